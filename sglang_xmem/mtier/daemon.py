"""`sglang-xmem mtierd`: a service that shares banks of memory among engines of this user, through X-Mem's interface.

Compiles the service on first use, then executes it. Clients need MTIER_LIB_PATH (the library, whose path is printed
once the service is reachable) and, with --socket, MTIER_SOCKET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psutil

from sglang_xmem import gpus, machine
from sglang_xmem.errors import ConfigError, SettingError, Unavailable
from sglang_xmem.mtier.build import DAEMON, LIBRARY, BuildError, built
from sglang_xmem.tiers.dax import bank_bytes

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}

#: Bytes left free on a GPU: for page tables, and for the service's context there (about 0.6 GB), created with the
#: bank's first allocation.
GPU_RESERVE_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--status", action="store_true", help="print banks and clients of a running service")
    parser.add_argument("--json", action="store_true", help="print --status as JSON, in bytes")
    parser.add_argument(
        "--bank",
        action="append",
        default=[],
        metavar="host:SIZE|gpu:ORDINAL[:SIZE]|dax:DEVICE[:SIZE]",
        help="a bank of shared host memory, such as host:4GB or host:512MiB; of a GPU's memory, such as gpu:1:40GB "
        "or gpu:1 (all free memory less 1 GiB); or of a devdax for the page bank, such as dax:/dev/dax9.0 or "
        "dax:/dev/dax9.0:256GiB (its first bytes); may be repeated; default: one bank of half of the host "
        "memory available to this process",
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="default: $MTIER_SOCKET, else mtierd.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/mtierd-UID, the "
        "first that is a private folder of this user",
    )
    parser.add_argument(
        "--quota",
        type=float,
        default=0,
        metavar="GB",
        help="limit per process, against errors (a process can start others); default: 0 (no limit)",
    )
    parser.add_argument(
        "--granularity", type=int, default=2, metavar="MiB", help="allocations are multiples of this; default: 2"
    )
    parser.add_argument("--flush", action="store_true", help="make the page bank of a running service forget all pages")
    parser.add_argument(
        "--share",
        type=int,
        default=100,
        metavar="PERCENT",
        help="maximum part of a host bank for pages of one model beyond its engines' requests; lower it if several "
        "models share a bank; default: 100",
    )
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="populate memory of the page bank only when an engine requests it; the default without --bank",
    )
    parser.add_argument(
        "--rest-after",
        type=float,
        default=5,
        metavar="SECONDS",
        help="how long a bank's GPU keeps its CUDA context after its last allocation is freed; default: 5",
    )
    parser.add_argument(
        "--metrics", type=int, metavar="PORT", help="serve http://127.0.0.1:PORT/metrics for Prometheus; 0: any port"
    )
    parser.add_argument(
        "--allow-reset",
        action="store_true",
        help="serve mTierResetAll, which clears the accounts of all clients while they still use the memory",
    )


def run(args: argparse.Namespace) -> int:
    """Execute the service in this process; returns only on an error.

    Raises:
        ConfigError: an argument is wrong.
    """
    if args.json and not args.status:
        raise ConfigError("--json needs --status. Give both, or leave it out.")
    where = ["--socket", args.socket] if args.socket else []
    arguments = [] if args.status or args.flush else service_arguments(args)
    try:
        directory = built(announce=lambda words: print(f"sglang-xmem: {words}", file=sys.stderr, flush=True))
    except BuildError as error:
        print(f"sglang-xmem: {error}", file=sys.stderr)
        return 1
    program = str(directory / DAEMON)
    if args.status:
        return _show_status([program, "--status", *where], as_json=args.json)
    if args.flush:
        return os.execv(program, [program, "--flush", *where])
    return os.execv(program, [program, *arguments, *where, "--library", str(directory / LIBRARY)])


def _show_status(command: Sequence[str], *, as_json: bool) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        print(done.stdout.rstrip() if as_json else status_text(json.loads(done.stdout)))
    return done.returncode


def status_text(status: Mapping[str, Any]) -> str:
    """Format a service's report: banks and the clients that hold memory, in GB (1e9 bytes)."""
    quota = f"{status['quota'] / 1e9:.2f} GB" if status["quota"] else "none"
    # What pages of a model that is not there may have, which is more than is free where pages of the past can go.
    opens = {each["bank"]: f"{each['bytes'] / 1e9:.2f}" for each in status.get("open", ())}
    banks: list[Sequence[str]] = [("bank", "memory", "GB", "used", "free", "for a new model", "allocations")]
    for bank in status["banks"]:
        memory = "host" if bank["kind"] == "host" else f"GPU {bank['gpu']} ({bank['pci']})"
        used = bank["total"] - bank["available"]
        sizes = (f"{nbytes / 1e9:.2f}" for nbytes in (bank["total"], used, bank["available"]))
        banks.append((str(bank["bank"]), memory, *sizes, opens.get(bank["bank"], "-"), str(bank["allocations"])))
    for device in status.get("devices", ()):
        used = device["total"] - device["available"]
        sizes = (f"{nbytes / 1e9:.2f}" for nbytes in (device["total"], used, device["available"]))
        banks.append((str(device["bank"]), device["name"], *sizes, opens.get(device["bank"], "-"), "0"))
    clients: list[Sequence[str]] = [("process", "GB", "allocations", "state")]
    for client in sorted(status["clients"], key=lambda client: -client["bytes"]):
        state = "connected" if client["connected"] else "away"
        name = str(client["pid"]) if client["pid"] else f"{client['process']} of another PID namespace"
        state = "ended, its memory is in use" if client["ended"] else state
        clients.append((name, f"{client['bytes'] / 1e9:.2f}", str(client["allocations"]), state))
    tables = [_table(banks), _table(clients) if len(clients) > 1 else "no client holds memory"]
    ahead = [_ahead_row(each) for each in status.get("ahead", ())]
    if ahead:
        tables.append(_table([("pages' memory ahead, bank", "GB", "present", "state"), *ahead]))
    spaces = status.get("spaces", ())
    if spaces:
        tables.append(_table([_SPACE_TITLES, *map(_space_row, spaces)]))
        tables.append(_table([_PAGES_TITLES, *map(_pages_row, spaces)]))
        sessions = [_session_row(space, session) for space in spaces for session in space["sessions"]]
        tables.append(_table([_SESSION_TITLES, *sessions]) if sessions else "no engine uses the page bank")
    return "\n\n".join([f"mtierd, process {status['pid']}, quota per process: {quota}", *tables])


#: Columns about the page bank. GB are of frames: all, what the model's engines are promised and what one more of them
#: may ask for, held by several engines, held by none, and empty.
_SPACE_TITLES = ("memory of", "GB", "promised", "for more engines", "shared", "cached", "empty")
_PAGES_TITLES = ("pages of", "pages", "published", "there already", "found", "evicted", "damaged")
_SESSION_TITLES = ("engine", "process", "promised GB", "held", "published pages", "state")


def _ahead_row(ahead: Mapping[str, Any]) -> Sequence[str]:
    state = "in progress" if not ahead["ended"] else "all of it" if not ahead["why"] else f"ended: {ahead['why']}"
    return (ahead["bank"], f"{ahead['bytes'] / 1e9:.2f}", f"{ahead['present'] / 1e9:.2f}", state)


def _space_row(space: Mapping[str, Any]) -> Sequence[str]:
    left = 0 if space["private"] else space["frames"] - space["promised"]
    counts = (space["frames"], space["promised"], left, space["shared"], space["cached"], space["free"])
    return (space["label"], *(f"{count * space['frame_bytes'] / 1e9:.2f}" for count in counts))


def _pages_row(space: Mapping[str, Any]) -> Sequence[str]:
    return (space["label"], *(str(space[key]) for key in ("pages", "published", "had", "found", "evicted", "damaged")))


def _session_row(space: Mapping[str, Any], session: Mapping[str, Any]) -> Sequence[str]:
    promised, held = (f"{session[key] * space['frame_bytes'] / 1e9:.2f}" for key in ("frames", "held"))
    state = "connected" if session["connected"] else "away"
    return (space["label"], str(session["pid"]), promised, held, str(session["published"]), state)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Format columns two spaces apart; numbers are right-aligned."""
    columns = []
    for title, *texts in zip(*rows, strict=True):
        width = max(map(len, (title, *texts)))
        numbers = all(re.fullmatch(r"[\d.]+", text) for text in texts)
        columns.append([text.rjust(width) if numbers else text.ljust(width) for text in (title, *texts)])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(lines)


def service_arguments(args: argparse.Namespace) -> list[str]:
    """Return the service's arguments, in bytes.

    Raises:
        ConfigError: an argument is wrong.
    """
    banks = [_parse_bank(text) for text in args.bank] or [_Bank("host", None, machine.host_available_bytes() // 2)]
    in_host = sum(bank.nbytes or 0 for bank in banks if bank.gpu is None and bank.device is None)
    most = int(psutil.virtual_memory().total)
    headroom = machine.cgroup_headroom_bytes()
    if in_host > min(most, most if headroom is None else headroom):
        there = f"this machine's {most / 1e9:.2f} GB"
        limit = there if headroom is None else f"the {headroom / 1e9:.2f} GB that this container has left"
        raise ConfigError(f"--bank: banks of {in_host / 1e9:.2f} GB do not fit into {limit} of memory. Give less.")
    if not 0 <= args.quota < 1e9:
        raise ConfigError(f"--quota is {args.quota:g}. Give GB per process, or 0 for no limit.")
    if args.metrics is not None and not 0 <= args.metrics <= 65535:
        raise ConfigError(f"--metrics is {args.metrics}. Give a port from 1 to 65535, or 0 for any.")
    if not 1 <= args.granularity <= 1024 or args.granularity & (args.granularity - 1):
        raise ConfigError(f"--granularity is {args.granularity}. Give a power of two from 1 to 1024 (MiB).")
    if not 0 <= args.rest_after <= 3600:
        raise ConfigError(f"--rest-after is {args.rest_after:g}. Give 0 to 3600 seconds.")
    if not 1 <= args.share <= 100:
        raise ConfigError(f"--share is {args.share}. Give percent of a bank, 1 to 100.")
    named = [bank.gpu for bank in banks if bank.gpu is not None]
    arguments: list[str] = []
    for bank in banks:
        if bank.device is not None:
            if sum(other.device == bank.device for other in banks) > 1:
                raise ConfigError(f"--bank names {bank.device} twice. Give one bank per device.")
            place, nbytes = f"dax:{bank.device}", _dax_bytes(bank, args.granularity << 20)
        elif bank.gpu is None:
            place, nbytes = "host", bank.nbytes or 0
        else:
            if named.count(bank.gpu) > 1:
                raise ConfigError(f"--bank names GPU {bank.gpu} twice. Give one bank per GPU.")
            place, nbytes = f"gpu:{bank.gpu}", _gpu_bytes(bank.text, bank.gpu, bank.nbytes)
        if nbytes < args.granularity << 20:
            raise ConfigError(
                f"--bank {bank.text} is smaller than the --granularity of {args.granularity} MiB. Give more."
            )
        arguments += ["--bank", f"{place}:{nbytes}"]
    arguments += ["--quota", str(int(args.quota * 1e9)), "--granularity", str(args.granularity << 20)]
    arguments += ["--share", str(args.share), "--rest-after", str(int(args.rest_after * 1e3))]
    if args.metrics is not None:
        arguments += ["--metrics", str(args.metrics)]
    if args.lazy or not args.bank:
        arguments.append("--lazy")
    return [*arguments, "--allow-reset"] if args.allow_reset else arguments


class _Bank(NamedTuple):
    """A --bank. `gpu` and `device`: None for host memory; `nbytes`: None for all free memory."""

    text: str
    gpu: int | None
    nbytes: int | None
    device: str | None = None


def _parse_bank(text: str) -> _Bank:
    dax = re.fullmatch(r"dax:(/[^:\"\\]{1,150})(?::(\d+(?:\.\d+)?)([A-Za-z]*))?", text)
    if dax is not None and (dax[2] is None or (dax[3] in _UNITS and float(dax[2]) > 0)):
        return _Bank(text, None, None if dax[2] is None else int(float(dax[2]) * _UNITS[dax[3]]), dax[1])
    match = re.fullmatch(r"(?:host:|gpu:(\d{1,4})(?:$|:))(?:(\d+(?:\.\d+)?)([A-Za-z]*))?", text)
    if match is not None:
        gpu = None if match[1] is None else int(match[1])
        if match[2] is None and gpu is not None and not text.endswith(":"):
            return _Bank(text, gpu, None)
        if match[2] is not None and match[3] in _UNITS and float(match[2]) > 0:
            return _Bank(text, gpu, int(float(match[2]) * _UNITS[match[3]]))
    raise ConfigError(
        f"--bank is {text!r}. Give host:SIZE, gpu:ORDINAL[:SIZE] or dax:DEVICE[:SIZE], such as host:4GB, gpu:1:512MiB "
        "or dax:/dev/dax9.0."
    )


def _dax_bytes(bank: _Bank, granule: int) -> int:
    """Return the bytes of a bank on a device, without claiming it."""
    assert bank.device is not None
    try:
        return bank_bytes(bank.device, bank.nbytes, granule)
    except SettingError as error:
        what = "device" if error.setting.endswith("device") else "size"
        fix = error.fix[0].upper() + error.fix[1:]
        raise ConfigError(f"--bank {bank.text}: its {what} {error.problem}. {fix}.") from None
    except Unavailable as error:
        raise ConfigError(f"--bank {bank.text}: {error.reason}. End that process, or give another device.") from None


def _gpu_bytes(text: str, gpu: int, wanted: int | None) -> int:
    """Return the bytes of a bank on a GPU: the requested size, or all free memory less the reserve.

    Others may use a named GPU too. Nothing here makes a CUDA context.
    """
    try:
        visible = gpus.visible_gpus()
        if gpu not in visible:
            raise ConfigError(
                f"--bank {text}: GPU {gpu} does not exist; this process sees {len(visible)}, counted from 0. Name one "
                "of these or change CUDA_VISIBLE_DEVICES."
            )
        free, _ = gpus.memory_bytes(gpu)
    except Unavailable as error:
        raise ConfigError(f"--bank {text}: {error}. Give host:SIZE for a bank of host memory.") from None
    most = free - GPU_RESERVE_BYTES
    nbytes = most if wanted is None else wanted
    if nbytes <= 0 or nbytes > most:
        raise ConfigError(
            f"--bank {text}: GPU {gpu} has {free / 1e9:.2f} GB free, of which {GPU_RESERVE_BYTES / 1e9:.2f} GB are "
            "reserved for the service's CUDA context. Give less, or free memory there."
        )
    return nbytes

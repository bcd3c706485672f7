"""`sglang-xmem mtierd`: a service that shares banks of memory among engines of this user, through X-Mem's interface.

Compiles the service on first use and becomes it. A client finds it by MTIER_LIB_PATH (the library, whose path is
printed at start) and MTIER_SOCKET (where --socket is not the default).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import NamedTuple

import psutil

from sglang_xmem import gpus
from sglang_xmem.errors import TierUnavailable
from sglang_xmem.mtier.build import DAEMON, LIBRARY, BuildError, built

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}

#: Left free on a GPU: for page tables, and for the service's context there, about 0.6 GB, which comes with the bank's
#: first allocation.
GPU_RESERVE_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--status", action="store_true", help="print banks and clients of a running service as JSON")
    parser.add_argument(
        "--bank",
        action="append",
        default=[],
        metavar="host:SIZE|gpu:ORDINAL[:SIZE]",
        help="a bank of shared host memory, such as host:4GB or host:512MiB, or of a GPU's memory, such as gpu:1:40GB "
        "or gpu:1 for all that is free there less 1 GiB; may be given several times; default: one of half of the host "
        "memory that is available",
    )
    parser.add_argument("--flush", action="store_true", help="make the page bank of a running service forget all pages")
    parser.add_argument("--socket", metavar="PATH", help="default: $MTIER_SOCKET, else mtierd.sock in $XDG_RUNTIME_DIR")
    parser.add_argument("--quota", type=float, default=0, metavar="GB", help="most that one process may have; 0: all")
    parser.add_argument(
        "--share",
        type=int,
        default=100,
        metavar="PERCENT",
        help="most of a host bank that pages of one model get where its engines ask for less; lower it where several "
        "models share a bank; default: 100",
    )
    parser.add_argument("--granularity", type=int, default=2, metavar="MiB", help="allocations are whole multiples")
    parser.add_argument(
        "--rest-after",
        type=float,
        default=5,
        metavar="SECONDS",
        help="how long a bank's GPU keeps its CUDA context when no memory is out; default: 5",
    )


def run(args: argparse.Namespace) -> int:
    """Does not return where the service starts: this process becomes it."""
    try:
        asked = ["--status"] * args.status + ["--flush"] * args.flush
        arguments = asked or service_arguments(args)
        if args.socket:
            arguments += ["--socket", args.socket]
        directory = built()
    except (ValueError, BuildError) as error:
        print(f"sglang_xmem: {error}", file=sys.stderr)
        return 1
    if not asked:
        print(f"MTIER_LIB_PATH={directory / LIBRARY}", flush=True)
    program = str(directory / DAEMON)
    return os.execv(program, [program, *arguments])


def service_arguments(args: argparse.Namespace) -> list[str]:
    """mtierd's own arguments, in bytes.

    Raises:
        ValueError: one sentence about an argument that is wrong.
    """
    memory = psutil.virtual_memory()
    banks = [_parse_bank(text) for text in args.bank] or [_Bank("host", None, int(memory.available) // 2)]
    in_host = sum(bank.nbytes or 0 for bank in banks if bank.gpu is None)
    if in_host > memory.total:
        raise ValueError(
            f"--bank: banks of {in_host / 1e9:.2f} GB do not fit into this machine's {memory.total / 1e9:.2f} GB of "
            "memory; give less."
        )
    if not 0 <= args.quota < 1e9:
        raise ValueError(f"--quota is {args.quota:g}; give GB a process, or 0 for no limit.")
    if not 1 <= args.granularity <= 1024 or args.granularity & (args.granularity - 1):
        raise ValueError(f"--granularity is {args.granularity}; give a power of two from 1 to 1024 (MiB).")
    if not 0 <= args.rest_after <= 3600:
        raise ValueError(f"--rest-after is {args.rest_after:g}; give 0 to 3600 seconds.")
    if not 1 <= args.share <= 100:
        raise ValueError(f"--share is {args.share}; give percent of a bank, 1 to 100.")
    named = [bank.gpu for bank in banks if bank.gpu is not None]
    arguments: list[str] = []
    for bank in banks:
        if bank.gpu is None:
            place, nbytes = "host", bank.nbytes or 0
        else:
            if named.count(bank.gpu) > 1:
                raise ValueError(f"--bank names GPU {bank.gpu} twice; give one bank a GPU.")
            place, nbytes = f"gpu:{bank.gpu}", _gpu_bytes(bank.text, bank.gpu, bank.nbytes)
        if nbytes < args.granularity << 20:
            raise ValueError(
                f"--bank {bank.text} is smaller than the --granularity of {args.granularity} MiB; give more."
            )
        arguments += ["--bank", f"{place}:{nbytes}"]
    arguments += ["--quota", str(int(args.quota * 1e9)), "--granularity", str(args.granularity << 20)]
    return [*arguments, "--share", str(args.share), "--rest-after", str(int(args.rest_after * 1e3))]


class _Bank(NamedTuple):
    """A --bank. `gpu`: None for host memory; `nbytes`: None for all that is free."""

    text: str
    gpu: int | None
    nbytes: int | None


def _parse_bank(text: str) -> _Bank:
    match = re.fullmatch(r"(?:host:|gpu:(\d{1,4})(?:$|:))(?:(\d+(?:\.\d+)?)([A-Za-z]*))?", text)
    if match is not None:
        gpu = None if match[1] is None else int(match[1])
        if match[2] is None and gpu is not None and not text.endswith(":"):
            return _Bank(text, gpu, None)
        if match[2] is not None and match[3] in _UNITS and float(match[2]) > 0:
            return _Bank(text, gpu, int(float(match[2]) * _UNITS[match[3]]))
    raise ValueError(
        f"--bank is {text!r}; give host:SIZE, gpu:ORDINAL or gpu:ORDINAL:SIZE, such as host:4GB or gpu:1:512MiB."
    )


def _gpu_bytes(text: str, gpu: int, wanted: int | None) -> int:
    """Bytes of a bank on a GPU: those that are wanted, at most and otherwise all that is free less the reserve.

    Others may use the GPU too: who names it knows. Nothing here makes a CUDA context.
    """
    try:
        visible = gpus.visible_gpus()
        if gpu not in visible:
            raise ValueError(
                f"--bank {text}: there is no GPU {gpu}; this process sees {len(visible)}, counted from 0, so name one "
                "of these or change CUDA_VISIBLE_DEVICES."
            )
        free, _ = gpus.memory_bytes(gpu)
    except TierUnavailable as error:
        raise ValueError(f"--bank {text}: {error}; give host:SIZE for a bank of host memory.") from None
    most = free - GPU_RESERVE_BYTES
    nbytes = most if wanted is None else wanted
    if nbytes <= 0 or nbytes > most:
        raise ValueError(
            f"--bank {text}: GPU {gpu} has {free / 1e9:.2f} GB free, of which {GPU_RESERVE_BYTES / 1e9:.2f} GB stay so "
            "for the service's CUDA context; give less, or free memory there."
        )
    return nbytes

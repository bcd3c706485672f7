"""`sglang-xmem mtierd`: a service that shares banks of memory among engines of this user, through X-Mem's interface.

Compiles the service on first use and becomes it. A client finds it by MTIER_LIB_PATH (the library, whose path is
printed at start) and MTIER_SOCKET (where --socket is not the default).
"""

from __future__ import annotations

import argparse
import os
import re
import sys

import psutil

from sglang_xmem.mtier.build import DAEMON, LIBRARY, BuildError, built

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--status", action="store_true", help="print banks and clients of a running service as JSON")
    parser.add_argument(
        "--bank",
        action="append",
        default=[],
        metavar="host:SIZE",
        help="a bank of shared host memory, such as host:4GB or host:512MiB; may be given several times; default: one "
        "of half of the memory that is available",
    )
    parser.add_argument("--socket", metavar="PATH", help="default: $MTIER_SOCKET, else mtierd.sock in $XDG_RUNTIME_DIR")
    parser.add_argument("--quota", type=float, default=0, metavar="GB", help="most that one process may have; 0: all")
    parser.add_argument("--granularity", type=int, default=2, metavar="MiB", help="allocations are whole multiples")


def run(args: argparse.Namespace) -> int:
    """Does not return where the service starts: this process becomes it."""
    try:
        arguments = ["--status"] if args.status else service_arguments(args)
        if args.socket:
            arguments += ["--socket", args.socket]
        directory = built()
    except (ValueError, BuildError) as error:
        print(f"sglang_xmem: {error}", file=sys.stderr)
        return 1
    if not args.status:
        print(f"MTIER_LIB_PATH={directory / LIBRARY}", flush=True)
    program = str(directory / DAEMON)
    return os.execv(program, [program, *arguments])


def service_arguments(args: argparse.Namespace) -> list[str]:
    """mtierd's own arguments, in bytes.

    Raises:
        ValueError: one sentence about an argument that is wrong.
    """
    memory = psutil.virtual_memory()
    banks = [_bank_bytes(text) for text in args.bank] or [int(memory.available) // 2]
    if sum(banks) > memory.total:
        raise ValueError(
            f"--bank: banks of {sum(banks) / 1e9:.2f} GB do not fit into this machine's {memory.total / 1e9:.2f} GB of "
            "memory; give less."
        )
    if not 0 <= args.quota < 1e9:
        raise ValueError(f"--quota is {args.quota:g}; give GB a process, or 0 for no limit.")
    if not 1 <= args.granularity <= 1024 or args.granularity & (args.granularity - 1):
        raise ValueError(f"--granularity is {args.granularity}; give a power of two from 1 to 1024 (MiB).")
    if min(banks) < args.granularity << 20:
        raise ValueError(f"--bank: a bank is smaller than the --granularity of {args.granularity} MiB; give more.")
    arguments = [word for size in banks for word in ("--bank", f"host:{size}")]
    return [*arguments, "--quota", str(int(args.quota * 1e9)), "--granularity", str(args.granularity << 20)]


def _bank_bytes(text: str) -> int:
    match = re.fullmatch(r"host:(\d+(?:\.\d+)?)([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"--bank is {text!r}; give host:SIZE, such as host:4GB or host:512MiB.")
    return int(float(match[1]) * _UNITS[match[2]])

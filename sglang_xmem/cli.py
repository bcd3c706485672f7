"""The command `sglang-xmem`."""

from __future__ import annotations

import argparse
import sys

from sglang_xmem.bench import copy, roundtrip, ttft
from sglang_xmem.mtier import daemon


def parser() -> argparse.ArgumentParser:
    """All commands; each sets `run`, a function of the parsed arguments that returns the exit status."""
    root = argparse.ArgumentParser(prog="sglang-xmem", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="measure").add_subparsers(dest="bench", required=True)
    for name, module, purpose in (
        ("copy", copy, "page copies against the link's contiguous copies"),
        ("roundtrip", roundtrip, "a whole pool through a tier and back, byte by byte"),
        ("ttft", ttft, "time to first token of hits, by backend and prompt length"),
    ):
        command = bench.add_parser(name, help=purpose, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    service = commands.add_parser("mtierd", help="share banks of memory among engines", description=daemon.__doc__)
    daemon.add_arguments(service)
    service.set_defaults(run=daemon.run)
    return root


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())

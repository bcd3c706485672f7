"""The command `sglang-xmem`."""

from __future__ import annotations

import argparse
import sys

from sglang_xmem import doctor
from sglang_xmem.bench import compare, multiturn, report, throughput, trace, ttft
from sglang_xmem.errors import ConfigError
from sglang_xmem.mtier import daemon


def parser() -> argparse.ArgumentParser:
    """All commands; each sets `run`, a function of the parsed arguments that returns the exit status."""
    root = argparse.ArgumentParser(prog="sglang-xmem", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="measure").add_subparsers(dest="bench", required=True)
    for name, module, purpose in (
        ("ttft", ttft, "time to first token of hits, by backend and prompt length"),
        ("throughput", throughput, "tokens/s by hit ratio and concurrency"),
        ("multiturn", multiturn, "agents with growing shared context, TTFT by turn"),
        ("trace", trace, "a recorded trace of requests, replayed"),
        ("report", report, "table, CSV and plots of results"),
        ("compare", compare, "what changed between two results"),
    ):
        command = bench.add_parser(name, help=purpose, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    service = commands.add_parser("mtierd", help="share banks of memory among engines", description=daemon.__doc__)
    daemon.add_arguments(service)
    service.set_defaults(run=daemon.run)
    examine = commands.add_parser(
        "doctor", help="what this machine has, and which tier it would get", description=doctor.__doc__
    )
    doctor.add_arguments(examine)
    examine.set_defaults(run=doctor.run)
    return root


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ConfigError as error:
        print(f"sglang-xmem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

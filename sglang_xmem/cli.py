"""The command `sglang-xmem`. Imports neither torch nor SGLang; a benchmark's module is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import sglang_xmem
from sglang_xmem.errors import ConfigError

#: Status of a command that was interrupted, as a shell reports SIGINT.
INTERRUPTED = 130

#: Commands by name: the module (with `add_arguments`, `run` and a docstring), and the help text.
COMMANDS = {
    "mtierd": ("sglang_xmem.mtier.daemon", "share banks of memory among engines"),
    "top": ("sglang_xmem.top", "show a server's tier live in the terminal"),
    "doctor": ("sglang_xmem.doctor", "show this machine's memory and links, and the tier that `auto` would use"),
}
BENCHMARKS = {
    "ttft": ("sglang_xmem.bench.ttft", "time to first token of hits, by backend and prompt length"),
    "throughput": ("sglang_xmem.bench.throughput", "tokens/s by hit ratio and concurrency"),
    "multiturn": ("sglang_xmem.bench.multiturn", "agents with growing shared context, TTFT by turn"),
    "trace": ("sglang_xmem.bench.trace", "a recorded trace of requests, replayed"),
    "copy": ("sglang_xmem.bench.copy", "verified page copies through each tier, GB/s"),
    "soak": ("sglang_xmem.bench.soak", "verified page copies through each tier, under load"),
    "report": ("sglang_xmem.bench.report", "tables and plots of results"),
    "compare": ("sglang_xmem.bench.compare", "differences between two results"),
}


class _Lazy(argparse.ArgumentParser):
    """A parser of one command that imports the command's module, with its help and arguments, on first use.

    It refuses unknown arguments itself: argparse would pass them to the root parser, which would print its own usage.
    """

    module: str | None = None

    def _load(self) -> None:
        name, self.module = self.module, None
        if name is not None:
            module: Any = importlib.import_module(name)
            self.description = module.__doc__
            module.add_arguments(self)
            self.set_defaults(run=module.run)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._load()
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def parser() -> argparse.ArgumentParser:
    """Build the parser; each command sets `run`, a function of the parsed arguments that returns the exit status."""
    root = argparse.ArgumentParser(prog="sglang-xmem", description="Commands of sglang_xmem.")
    root.add_argument("--version", action="version", version=f"sglang_xmem {sglang_xmem.__version__}")
    commands = root.add_subparsers(dest="command", required=True, parser_class=_Lazy)
    bench: Any = commands.add_parser("bench", help="run a benchmark", description="Benchmarks.")
    _add(bench.add_subparsers(dest="bench", required=True, parser_class=_Lazy).add_parser, BENCHMARKS)
    _add(commands.add_parser, COMMANDS)
    return root


def _add(add_parser: Callable[..., Any], commands: dict[str, tuple[str, str]]) -> None:
    for name, (module, purpose) in commands.items():
        add_parser(name, help=purpose, formatter_class=argparse.RawDescriptionHelpFormatter).module = module


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except ConfigError as error:
        print(f"sglang-xmem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout has closed it, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())

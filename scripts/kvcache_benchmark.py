#!/usr/bin/env python3
"""Time to first token and throughput of KV cache hits: kvcache_benchmark.py --ttft|--tput [--backend both|cpu|xmem].

Short names for `sglang-xmem bench ttft` and `bench throughput`, whose options it passes on. cpu is stock HiCache in
host DRAM, xmem the fastest tier that the machine has, both is one after the other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sglang_xmem import cli

BACKENDS = {"both": "stock,auto", "cpu": "stock", "xmem": "auto"}


def command(argv: list[str]) -> list[str]:
    """Arguments of `sglang-xmem` for those of this script."""
    parser = argparse.ArgumentParser(prog="kvcache_benchmark.py", description=__doc__, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ttft", action="store_const", dest="bench", const="ttft", help="time to first token")
    what.add_argument("--tput", action="store_const", dest="bench", const="throughput", help="throughput")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="both")
    own, rest = parser.parse_known_args(argv)
    return ["bench", own.bench, "--backends", BACKENDS[own.backend], *rest]


if __name__ == "__main__":
    sys.exit(cli.main(command(sys.argv[1:])))

"""Verified page copies through each tier, in GB/s, and as a share of a contiguous copy of as many bytes.

Random pages between random places on both sides, by the copier and the settings that an engine would have, without an
engine. Tiers that this machine does not have are skipped with the reason; a wrong byte fails the run. Without a GPU the
pools are in host memory, and rates say nothing.
"""

from __future__ import annotations

import argparse
import functools

from sglang_xmem.bench import moves, runs, stats
from sglang_xmem.bench.moves import CASES, Scene
from sglang_xmem.bench.runs import Results, Row
from sglang_xmem.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases = ",".join(CASES)
    parser.add_argument("--cases", default=None, help=f"comma-separated, of {cases}; default: all, with --quick kv")
    size = "bytes of a move in GB; default 4, with --quick 0.5, without a GPU 0.03"
    parser.add_argument("--gb", type=runs.at_least(0.001, float), default=None, help=size)
    repetitions = "samples of each; default 10, with --quick 5"
    parser.add_argument("--repetitions", type=runs.at_least(1), default=None, help=repetitions)
    moves.add_arguments(parser, "copy")


def run(args: argparse.Namespace) -> int:
    cases = args.cases.split(",") if args.cases else ["kv"] if args.quick else list(CASES)
    for name in cases:
        if name not in CASES:
            raise ConfigError(f"--cases {name}: choose from {', '.join(CASES)}.")
    repetitions = args.repetitions or (5 if args.quick else 10)
    gb = args.gb or (0.03 if not runs.has_gpu() else 0.5 if args.quick else 4.0)

    def measure(scene: Scene, name: str) -> list[Row]:
        found = []
        wrong = scene.wrong_pages(scene.pages)
        pages, _ = scene.some(scene.pages)
        nbytes = scene.pages * scene.case.page_bytes
        for direction, move in (("load", scene.load), ("store", scene.store)):
            rates = [nbytes / s / 1e9 for s in scene.seconds(functools.partial(move, pages), repetitions)]
            contiguous = scene.contiguous(nbytes, load=direction == "load")
            base = [nbytes / s / 1e9 for s in scene.seconds(contiguous, repetitions)]
            found.append(
                {
                    "case": name,
                    "direction": direction,
                    "pages": scene.pages,
                    "page_bytes": scene.case.page_bytes,
                    "gbps": round(stats.median(rates), 6),
                    "gbps_all": [round(rate, 6) for rate in rates],
                    "contiguous_gbps": round(stats.median(base), 6),
                    "verified": not wrong,
                    "wrong": wrong,
                    "copier": scene.copier,
                }
            )
        return found

    return moves.over_tiers(args, Results("copy", args), cases, int(gb * 1e9), measure)

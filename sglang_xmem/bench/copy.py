"""Verified page copies through each tier, in GB/s, and as a share of a contiguous copy of as many bytes.

Random pages between random places on both sides, by the copier and the settings that an engine would have, without an
engine. Tiers that this machine does not have are skipped with the reason; a wrong byte fails the run. Without a GPU the
pools are in host memory, and rates say nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from sglang_xmem.bench import moves, setup, stats
from sglang_xmem.bench.engine import Row
from sglang_xmem.bench.moves import CASES, Scene


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases = f"comma-separated, of {','.join(CASES)}; default: all, with --quick kv"
    parser.add_argument("--cases", type=setup.several(setup.one_of(list(CASES))), help=cases)
    size = "bytes of a move in GB; default 4, with --quick 0.5, without a GPU 0.03"
    parser.add_argument("--gb", type=setup.number(0.001, float), help=size)
    moves.add_arguments(parser, "copy")


def run(args: argparse.Namespace) -> int:
    gb = args.gb or (0.03 if not setup.has_gpu() else 0.5 if args.quick else 4.0)

    def measure(scene: Scene) -> list[Row]:
        found = []
        wrong = scene.wrong_pages(scene.pages)
        pages, _ = scene.some(scene.pages)
        nbytes = scene.pages * scene.case.page_bytes

        def rates(work: Callable[[], None]) -> list[float]:
            times = []
            for _ in range(1 + (5 if args.quick else 10)):
                scene.wait()
                begun = time.perf_counter()
                work()
                scene.wait()
                times.append(time.perf_counter() - begun)
            return [round(nbytes / seconds / 1e9, 6) for seconds in times[1:]]  # the first one warms up

        for direction, move in (("load", scene.load), ("store", scene.store)):
            moved = rates(lambda move=move: move(pages))  # type: ignore[misc]
            gbps, base = stats.median(moved), stats.median(rates(scene.contiguous(nbytes, load=direction == "load")))
            row = {"direction": direction, "pages": scene.pages, "page_bytes": scene.case.page_bytes, "wrong": wrong}
            row |= {"gbps": gbps, "gbps_all": moved, "contiguous_gbps": base, "share": round(gbps / base, 4)}
            found.append({**row, "copier": scene.copier})
        return found

    return moves.over_tiers("copy", args, args.cases or (["kv"] if args.quick else list(CASES)), int(gb * 1e9), measure)

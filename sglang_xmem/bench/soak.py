"""Many verified page copies through each tier, while the GPU multiplies matrices.

Moves of random sizes between random pages, each checked byte by byte: pages that should have moved and those that
should not. One wrong page fails the run. Tiers that this machine does not have are skipped with the reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from sglang_xmem.bench import moves, runs
from sglang_xmem.bench.moves import Scene
from sglang_xmem.bench.runs import Results, Row

#: Matrices of the load, n x n in bf16.
MATRIX = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = "in each tier, to and from it; default 100000, with --quick 1000, without a GPU 200"
    parser.add_argument("--page-copies", type=runs.at_least(1), default=None, help=count)
    moves.add_arguments(parser, "soak")


def run(args: argparse.Namespace) -> int:
    on_gpu = runs.has_gpu()
    wanted = args.page_copies or (200 if not on_gpu else 1000 if args.quick else 100_000)

    def measure(scene: Scene, name: str) -> list[Row]:
        done = wrong = 0
        start, multiply = time.monotonic(), _load(scene)
        while done < wanted:
            pages = int(torch.randint(1, scene.pages + 1, (1,), generator=scene.random))
            multiply()
            wrong += scene.wrong_pages(pages)
            done += 2 * pages
        seconds = round(time.monotonic() - start, 1)
        return [{"page_copies": done, "wrong": wrong, "seconds": seconds, "copier": scene.copier}]

    # 64 pages of 6.3 MB on a GPU; on a CPU a few.
    return moves.over_tiers(args, Results("soak", args), ["kv"], (400 if on_gpu else 32) * 10**6, measure)


def _load(scene: Scene) -> Callable[[], None]:
    """Enqueues some milliseconds of products on a stream of their own; nothing on a CPU."""
    if scene.device.type == "cpu":
        return lambda: None
    stream = torch.cuda.Stream(scene.device)
    matrix = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=scene.device)

    def multiply() -> None:
        with torch.cuda.stream(stream):
            for _ in range(20):
                torch.mm(matrix, matrix)

    return multiply

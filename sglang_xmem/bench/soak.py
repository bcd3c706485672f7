"""Many verified page copies through each tier, while the GPU multiplies matrices.

Moves of random sizes between random pages, each checked byte by byte on the device: pages that should have moved and
those that should not. One wrong page fails the run. Tiers that this machine does not have are skipped with the reason.

A billion copies in minutes: `--case small --page-copies 1000000000`, whose pages have 2 KiB.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sglang_xmem.bench import moves, setup
from sglang_xmem.bench.engine import Row
from sglang_xmem.bench.moves import CASES, Scene

#: Matrices of the load, n x n in bf16.
MATRIX = 4096
#: Bytes of the largest move on a CPU, and on a GPU by case.
ON_CPU, ON_GPU, SMALL_ON_GPU = 32 * 10**6, 400 * 10**6, 2 * 10**9
#: Checks that are enqueued before the first of them is waited for.
AHEAD = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = "in each tier, to and from it; default 100000, with --quick 1000, without a GPU 200"
    parser.add_argument("--page-copies", type=setup.number(1), help=count)
    parser.add_argument("--case", choices=list(CASES), default="kv", help="what a page is; default kv")
    limit = "seconds a tier may take; fewer copies than asked for fail the run; default 600"
    parser.add_argument("--time-limit", type=setup.number(1, float), default=600.0, help=limit)
    moves.add_arguments(parser, "soak")


def run(args: argparse.Namespace) -> int:
    on_gpu = setup.has_gpu()
    wanted = args.page_copies or (200 if not on_gpu else 1000 if args.quick else 100_000)

    def measure(scene: Scene) -> list[Row]:
        done, begun, due = 0, time.monotonic(), deque[torch.cuda.Event]()
        with _busy(scene.device):
            while done < wanted and time.monotonic() - begun < args.time_limit:
                pages = int(torch.randint(1, scene.pages + 1, (1,), generator=scene.random))
                scene.check(pages)
                done += 2 * pages
                if on_gpu:
                    due.append(torch.cuda.Event())
                    due[-1].record()
                    if len(due) > AHEAD:
                        due.popleft().synchronize()
            wrong = int(scene.wrong)
        seconds = round(time.monotonic() - begun, 1)
        row: Row = {"page_copies": done, "wrong": wrong, "page_bytes": scene.case.page_bytes, "seconds": seconds}
        row["copier"] = scene.copier
        return [row if done >= wanted else {**row, "too_few": f"{wanted} asked for in {args.time_limit:g} s"}]

    largest = ON_CPU if not on_gpu else SMALL_ON_GPU if args.case == "small" else ON_GPU
    return moves.over_tiers("soak", args, [args.case], largest, measure)


@contextmanager
def _busy(device: torch.device) -> Iterator[None]:
    """Keep a GPU's multiprocessors busy with products on a stream of their own; nothing on a CPU."""
    if device.type == "cpu":
        yield
        return
    stop = threading.Event()
    stream = torch.cuda.Stream(device)
    matrix = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device)
    torch.mm(matrix, matrix)
    torch.cuda.synchronize(device)

    def multiply() -> None:
        with torch.cuda.stream(stream):
            while not stop.is_set():
                for _ in range(20):
                    torch.mm(matrix, matrix)
                stream.synchronize()

    thread = threading.Thread(target=multiply, name="soak-load")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

#!/usr/bin/env python3
"""What sums of pages cost a GPU: a load of an 80K prompt from pinned memory, and the comparison behind it.

    python scripts/bench/sums.py --output docs/results/sums.jsonl

One row per level: milliseconds of the comparison by itself, of a load by itself and of both on one stream (medians),
and the calling thread's time to enqueue the comparison. `of_load` is what the comparison adds to that load. A faster
link's share is `sum_ms` against bytes / that link's rate.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sglang_xmem.copies import make_program
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.sums_cuda import CudaReport, CudaSummer, CudaSums
from sglang_xmem.sums import EVERY, Chosen, Group, SectionSums

GPU = torch.device("cuda:0")
#: Qwen3-8B's shape: 36 layers of K and V, 8 heads of 128 in bf16, pages of 64 tokens; 80K tokens.
LAYERS, UNIT_BYTES, PAGES, SLOTS = 36, 64 * 8 * 128 * 2, 1280, 64


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """Median of the GPU's time, in milliseconds."""
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _in_turn(*steps: Callable[[], object]) -> None:
    for step in steps:
        step()


def _lists(summer: CudaSummer, prepared: CudaSums, chosen: list[Chosen]) -> list[torch.Tensor]:
    found = summer.lists(prepared, chosen)
    return [torch.from_numpy(each).pin_memory().to(GPU, non_blocking=True) for each in found]


def _compare(summer: CudaSummer, prepared: CudaSums, pages: list[Pages], chosen: list[Chosen]) -> CudaReport:
    return summer.compare(prepared, pages, chosen, _lists(summer, prepared, chosen))


def main() -> None:
    """Append a row per level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each; default 15")
    parser.add_argument("--output", type=Path, default=Path("sums.jsonl"), help="JSON Lines file to append to")
    arguments = parser.parse_args()

    arrays = [torch.randint(0, 256, (PAGES + 1, UNIT_BYTES), dtype=torch.uint8, device=GPU) for _ in range(2 * LAYERS)]
    frame_bytes = 2 * LAYERS * UNIT_BYTES
    tier = torch.empty(PAGES * frame_bytes, dtype=torch.uint8, pin_memory=True)
    planes = [
        Plane(array.data_ptr(), UNIT_BYTES, PAGES + 1, number * UNIT_BYTES, UNIT_BYTES, SLOTS)
        for number, array in enumerate(arrays)
    ]
    steps = [Step(plane, 0, number // 2) for number, plane in enumerate(planes)]
    numbers = torch.randperm(PAGES)
    frames = (tier.data_ptr() + numbers * frame_bytes).to(GPU)
    pages = [Pages(frames, (torch.randperm(PAGES) + 1).to(GPU) * SLOTS)]
    copier, program, _ = make_program(
        "cuda", [Slab(tier.data_ptr(), PAGES, frame_bytes)], GPU, steps, LAYERS, link="pcie"
    )
    copier.store(program, pages)
    load = functools.partial(copier.load, program, pages, None)
    summer = CudaSummer(GPU)

    with arguments.output.open("a") as file:
        for level, every in EVERY.items():
            group = Group(SectionSums(planes, PAGES, every, pinned=True), tuple((plane, 0) for plane in planes))
            chosen = [Chosen.of(group.sums, numbers)]
            prepared = summer.prepare([group])
            summer.write(prepared, pages, chosen, _lists(summer, prepared, chosen))
            torch.cuda.synchronize()
            enqueue = []
            for _ in range(arguments.rounds):
                begun = time.perf_counter()
                report = _compare(summer, prepared, pages, chosen)
                enqueue.append(time.perf_counter() - begun)
                torch.cuda.synchronize()
                assert report.wrong()[0] == 0, report.wrong()

            compare = functools.partial(_compare, summer, prepared, pages, chosen)
            alone, loads = median_ms(compare, arguments.rounds), median_ms(load, arguments.rounds)
            with_sums = median_ms(functools.partial(_in_turn, load, compare), arguments.rounds)
            row = {
                "bench": "sums",
                "level": level,
                "gpu": torch.cuda.get_device_name(GPU),
                "bytes": PAGES * frame_bytes,
                "sum_ms": round(alone, 4),
                "load_ms": round(loads, 3),
                "load_and_sum_ms": round(with_sums, 3),
                "of_load": round(with_sums / loads - 1, 5),
                "enqueue_us": round(1e6 * statistics.median(enqueue), 1),
                "command": " ".join(["python", "scripts/bench/sums.py", *sys.argv[1:]]),
            }
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

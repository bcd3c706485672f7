"""Loads that two ranks share, in two processes with a GPU each: every byte of both pools, by whatever way it came.

SGLANG_XMEM_GPU_RESULTS names a folder that receives what is measured, as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_xmem.copies import siblings
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.geometry import Plane, Slab

pytestmark = pytest.mark.gpus(2)

#: MLA of DeepSeek-V2-Lite: 27 layers, 576 values of bf16 per token, pages of 64 tokens.
LAYERS, UNIT, PAGES = 27, 64 * 576 * 2, 1280


def _run(rank: int, port: int, folder: str, late_s: float) -> None:
    """One rank: loads alone, then shared, then shared with a sibling that is late; writes what it found."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    device = torch.device("cuda", rank)
    generator = torch.Generator().manual_seed(0)  # the same bytes on both ranks
    tier = torch.empty(PAGES, LAYERS * UNIT, dtype=torch.uint8, pin_memory=True)
    tier.view(torch.int64).random_(generator=generator)
    pool = torch.zeros(LAYERS, PAGES, UNIT, dtype=torch.uint8, device=device)
    planes = [Plane(pool[layer].data_ptr(), UNIT, PAGES, layer * UNIT, UNIT, 64) for layer in range(LAYERS)]
    steps = [Step(plane, 0, layer) for layer, plane in enumerate(planes)]
    order = torch.randperm(PAGES, generator=generator)
    frames = tier.data_ptr() + order * LAYERS * UNIT
    pages = [Pages(frames.to(device), (torch.arange(PAGES) * 64).to(device))]
    alone = CudaPageCopier([Slab(tier.data_ptr(), PAGES, LAYERS * UNIT)], device, link="pcie")

    def gather(mine: Any) -> list[Any]:
        found: list[Any] = [None, None]
        torch.distributed.all_gather_object(found, mine)
        return found

    shared = siblings.share_loads(alone, planes, gather, rank)
    found: dict[str, Any] = {"joined": shared is not alone}
    counters = alone.make_counters(LAYERS)
    assert counters is not None
    stream, reader = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def load(copier: Any, program: Any, delay_s: float = 0.0) -> dict[str, Any]:
        pool.fill_(0x5A)
        torch.cuda.synchronize()
        torch.distributed.barrier()
        time.sleep(delay_s)
        begun = time.perf_counter()
        wrong = torch.zeros(LAYERS, dtype=torch.int64, device=device)
        with torch.cuda.stream(stream):
            copier.load(program, pages, counters)
        enqueued = time.perf_counter()
        # A layer as soon as it is announced, by a sum that any wrong byte changes.
        with torch.cuda.stream(reader):
            for layer in range(LAYERS):
                counters.wait(layer)
                wrong[layer] = pool[layer].view(torch.int64).sum()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        right = [tier[order, n * UNIT : (n + 1) * UNIT] for n in range(LAYERS)]
        expected = torch.stack([layer.reshape(-1).view(torch.int64).sum() for layer in right])
        same = all(torch.equal(pool[n].cpu(), layer) for n, layer in enumerate(right))
        torch.distributed.barrier()
        return {
            "ms": 1e3 * seconds,
            "enqueue_us": 1e6 * (enqueued - begun),
            "in_time": bool(torch.equal(wrong.cpu(), expected)),
            "equal": same,
        }

    if found["joined"]:
        programs = alone.compile(steps, LAYERS), shared.compile(steps, LAYERS)
        for _ in range(3):
            found["alone"] = load(alone, programs[0])
            found["shared"] = load(shared, programs[1])
        found["missed"] = int(shared._missed.max())  # type: ignore[attr-defined]
        found["late"] = load(shared, programs[1], late_s * rank)
        found["missed_late"] = int(shared._missed.max())  # type: ignore[attr-defined]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_ranks_share_loads(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_run, (port, str(tmp_path), 0.5), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    if folder := os.environ.get("SGLANG_XMEM_GPU_RESULTS"):
        row = {"bench": "siblings", "gpu": torch.cuda.get_device_name(), "bytes": PAGES * LAYERS * UNIT, "ranks": ranks}
        Path(folder, "siblings.json").write_text(json.dumps(row))
    for rank in ranks:
        assert rank["joined"]
        for way in ("alone", "shared", "late"):
            assert rank[way]["equal"], way
            assert rank[way]["in_time"], way
        assert rank["missed"] == 0
    # The first rank did not wait half a second for the other one.
    assert ranks[0]["missed_late"] > 0

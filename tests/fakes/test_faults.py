"""The faulty copier and tier do what they say, and a canary notices each fault."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sglang_xmem.canary import Canary, Perch
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.errors import CopyError, Unavailable
from tests.fakes.faults import FaultyCopier, FaultyTier
from tests.unit.fakes import SlowFakeTier

FRAME_BYTES = 64


class Scene:
    """Eight frames, an array of eight units, and the parts of an arena that a canary uses."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.tier = torch.zeros((8, FRAME_BYTES), dtype=torch.uint8)
        self.array = torch.randint(0, 256, (8, FRAME_BYTES), dtype=torch.uint8)
        slab = Slab(self.tier.data_ptr(), 8, FRAME_BYTES)
        self.fault = ""
        self.copier = FaultyCopier(TorchPageCopier([slab], self.device), lambda: self.fault, seed=1)
        self.plane = Plane(self.array.data_ptr(), FRAME_BYTES, 8, 0, FRAME_BYTES, 1)
        self.program = self.copier.compile([Step(self.plane, 0, 0)], 1)
        self.pages = [Pages(self.tier.data_ptr() + FRAME_BYTES * torch.arange(1, 8), torch.arange(1, 8))]

    @contextmanager
    def kept_open(self) -> Iterator[bool]:
        yield True

    def compile(self, steps: Any, num_parts: int) -> Any:
        return self.copier.compile(steps, num_parts)

    def frames(self, wanted: Any) -> list[torch.Tensor]:
        return [self.tier.data_ptr() + FRAME_BYTES * pages for _, pages in wanted]

    def store(self, program: Any, pages: Any) -> None:
        self.copier.store(program, pages)

    def load(self, program: Any, pages: Any) -> None:
        self.copier.load(program, pages)


def differing(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one != other).sum())


def test_faults_of_stores() -> None:
    scene = Scene()
    scene.fault = "flip"
    scene.copier.store(scene.program, scene.pages)
    assert differing(scene.tier[1:], scene.array[1:]) == 1
    scene.fault = "stale"
    scene.array ^= 0xFF
    scene.copier.store(scene.program, scene.pages)
    assert len({int(row) for row in torch.nonzero((scene.tier != scene.array)[1:])[:, 0]}) == 1
    scene.fault = "refuse store"
    with pytest.raises(CopyError):
        scene.copier.store(scene.program, scene.pages)


def test_faults_of_loads() -> None:
    scene = Scene()
    scene.copier.store(scene.program, scene.pages)
    before = scene.array.clone()
    scene.array.zero_()
    scene.fault = "flip load"
    scene.copier.load(scene.program, scene.pages)
    assert differing(scene.array[1:], before[1:]) == 1
    assert torch.equal(scene.tier[1:], before[1:])
    scene.fault = "refuse load"
    scene.copier.store(scene.program, scene.pages)
    with pytest.raises(CopyError):
        scene.copier.load(scene.program, scene.pages)


@pytest.mark.parametrize("fault", ["", "refuse store", "refuse load", "flip", "stale", "flip load"])
def test_a_canary_notices(fault: str) -> None:
    scene = Scene()
    failed: list[str] = []
    came_back: list[bool] = []
    perch: Any = Perch("a pool", scene, "KV", 0, [scene.plane])  # type: ignore[arg-type]
    canary = Canary([perch], failed.append, lambda: came_back.append(True), lambda: False)
    canary.send()
    scene.fault = fault
    canary.send()
    scene.fault = ""
    canary.send()
    assert (len(failed), len(came_back)) == ((1, 2) if fault else (0, 3))
    assert torch.equal(scene.tier[1:], torch.zeros((7, FRAME_BYTES), dtype=torch.uint8))


def test_a_tier_that_loses_its_memory() -> None:
    inner = SlowFakeTier(SlowFakeTier.Settings(), 0, None)
    tier = FaultyTier(inner, allocations=1)
    region = tier.allocate(100)
    assert ctypes.c_uint8.from_address(region.extents[0].address) is not None
    with pytest.raises(Unavailable, match="the memory is gone"):
        tier.allocate(100)
    region.release()
    assert SlowFakeTier.live == []

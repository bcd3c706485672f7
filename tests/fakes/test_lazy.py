"""The lazy copier: correct bytes for readers that wait, poison for readers that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.torch import TorchPageCopier
from tests.contracts.copiers import CopierContract
from tests.fakes.lazy import POISON, LazyCopier, LazyCounters, finish_all

LAYERS, PAGES, UNIT = 3, 8, 16


class TestContract(CopierContract):
    """Without counters it is a copier like others."""

    seeds = range(20)
    reads_all_units = True

    def make(self, slabs: Sequence[Slab], device: torch.device) -> LazyCopier:
        return LazyCopier(TorchPageCopier(slabs, device))


class Rig:
    """Three layers in parts 0, 2 and 3 of 4, one plane each; pages 5 and 1 are loaded from frames 2 and 6."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        generator = torch.Generator().manual_seed(0)
        self.tier = torch.randint(0, 255, (PAGES, LAYERS, UNIT), dtype=torch.uint8, generator=generator)
        self.device = torch.zeros(LAYERS, PAGES, UNIT, dtype=torch.uint8)
        slab = Slab(self.tier.data_ptr(), PAGES, LAYERS * UNIT)
        self.copier = LazyCopier(TorchPageCopier([slab], torch.device("cpu")), self.reports.append)
        steps = [
            Step(Plane(self.device[layer].data_ptr(), UNIT, PAGES, layer * UNIT, UNIT, 4), 0, part)
            for layer, part in enumerate((0, 2, 3))
        ]
        self.program = self.copier.compile(steps, 4)
        self.counters = self.copier.make_counters(4)
        self.pages = Pages(slab.address + torch.tensor([2, 6]) * slab.frame_bytes, torch.tensor([5, 1]) * 4)

    def load(self, counters: LazyCounters | None = None) -> None:
        """Enqueue the load."""
        self.copier.load(self.program, [self.pages], counters)

    def state(self) -> list[str]:
        """Of each layer: right, poison or wrong."""
        found = []
        for layer in range(LAYERS):
            loaded = self.device[layer, [5, 1]]
            if torch.equal(loaded, self.tier[[2, 6], layer]):
                found.append("right")
            else:
                found.append("poison" if bool((loaded == POISON).all()) else "wrong")
        return found


@pytest.fixture
def make_rig() -> Iterator[Callable[[], Rig]]:
    """Make rigs whose unfinished loads end with the test, before their tensors do."""
    rigs: list[Rig] = []

    def make() -> Rig:
        rigs.append(Rig())
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.copier.forget()


@pytest.fixture
def rig(make_rig: Callable[[], Rig]) -> Rig:
    return make_rig()


def test_a_part_is_copied_when_it_is_waited_for(rig: Rig) -> None:
    rig.load(rig.counters)
    assert rig.state() == ["poison"] * 3
    rig.counters.wait(0)
    assert rig.state() == ["right", "poison", "poison"]
    # Part 1 has no steps: it is complete with the part before it.
    rig.counters.wait(1)
    assert rig.state() == ["right", "poison", "poison"]
    rig.counters.wait(2)
    assert rig.state() == ["right", "right", "poison"]
    assert rig.reports == []
    rig.counters.wait(3)
    assert rig.state() == ["right"] * 3
    assert rig.reports == ["lazy load: 3 of 3 parts at a wait"]
    # Other pages are what they were.
    rest = [page for page in range(PAGES) if page not in (5, 1)]
    assert not rig.device[:, rest].any()


def test_a_wait_copies_the_parts_before(rig: Rig) -> None:
    rig.load(rig.counters)
    rig.counters.wait(2)
    assert rig.state() == ["right", "right", "poison"]
    # What is there is not copied again.
    rig.device[0].zero_()
    rig.counters.wait(1)
    assert not rig.device[0].any()


@pytest.mark.parametrize("event", ["load", "finish_all"])
def test_the_rest_is_copied_when_something_else_is_enqueued_or_asked(event: str, rig: Rig) -> None:
    rig.load(rig.counters)
    rig.counters.wait(0)
    if event == "load":
        nothing = torch.empty(0, dtype=torch.int64)
        rig.copier.load(rig.program, [Pages(nothing, nothing)])
        assert rig.state() == ["right", "poison", "poison"]  # no pages, so nothing was enqueued
        rig.copier.load(rig.program, [Pages(rig.pages.frames[:1], torch.tensor([7 * 4]))])
    else:
        finish_all()
    assert rig.state() == ["right"] * 3
    assert rig.reports == ["lazy load: 1 of 3 parts at a wait"]


def test_a_load_without_counters_is_not_late(rig: Rig) -> None:
    rig.load()
    assert rig.state() == ["right"] * 3


def test_other_counters_do_not_copy(rig: Rig) -> None:
    rig.load(rig.counters)
    rig.copier.make_counters(4).wait(3)
    assert rig.state() == ["poison"] * 3


def test_vectors_that_change_too_early_are_noticed(make_rig: Callable[[], Rig]) -> None:
    for vector in ("frames", "slots"):
        rig = make_rig()
        rig.load(rig.counters)
        getattr(rig.pages, vector)[0] += 1
        with pytest.raises(AssertionError, match="changed before the load was complete"):
            rig.counters.wait(0)


def test_a_store_is_behind_the_load_before_it(rig: Rig) -> None:
    before = rig.tier.clone()
    rig.load(rig.counters)
    rig.copier.store(rig.program, [Pages(rig.pages.frames[:1], torch.tensor([0]))])
    assert torch.equal(rig.device[:, [5, 1]].transpose(0, 1), before[[2, 6]])
    assert not rig.tier[2].any()

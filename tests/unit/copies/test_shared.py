"""A move divided among several copiers: every page is moved once, in the right stream order, and counted once."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_xmem.copies import shared as shared_module
from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.shared import SharedCopier, deal
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.errors import CopyError
from tests.contracts.copiers import CopierContract, Limits, Scene

COUNTERS = 0xC0DE
RESTORED = -1


class Share(TorchPageCopier):
    """Copies when it is joined, as a GPU may; a part of the log of all."""

    def __init__(self, slabs: Sequence[Slab], device: torch.device, number: int, log: list[Any]) -> None:
        super().__init__(slabs, device)
        self.number, self.log = number, log
        self.started: list[Any] = []
        self.fails = False
        self.counts = True

    def can_count(self) -> bool:
        return self.counts

    def start(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: int = 0) -> int:
        if self.fails:
            raise CopyError("The driver refuses.")
        assert program.copier is self
        self.log.append(("start", self.number, [one.frames.numel() for one in pages], counters))
        self.started.append((program, pages, load))
        return 10**self.number

    def join(self, *, load: bool) -> None:
        self.log.append(("join", self.number))
        for program, pages, loads in self.started:
            assert loads == load
            super()._copy(program, pages, load=load, counters=None)
        self.started.clear()

    def make_counters(self, num_parts: int) -> Any:
        return f"counters of {self.number} for {num_parts}"

    def describe(self) -> str:
        return f"copier {self.number}"


class TestShared(CopierContract):
    limits = Limits(units=1 << 20, large=False)
    reads_all_units = True

    @pytest.fixture(autouse=True)
    def _small_shares(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared_module, "MIN_SHARE_BYTES", 4096)

    def make(self, slabs: Sequence[Slab], device: torch.device) -> SharedCopier:
        return SharedCopier(cast(Any, [Share(slabs, device, number, []) for number in range(3)]))


PAGES, UNIT = 100, 1 << 16


class Small:
    """Three copiers of 100 pages of 64 KiB, each half of two planes."""

    def __init__(self) -> None:
        self.memory = torch.zeros(2 * PAGES * UNIT, dtype=torch.uint8)
        tier = self.memory.data_ptr()
        device = tier + PAGES * UNIT
        self.log: list[Any] = []
        self.shares = [Share([Slab(tier, PAGES, UNIT)], torch.device("cpu"), number, self.log) for number in range(3)]
        self.copier = SharedCopier(cast(Any, self.shares))
        planes = [Plane(device + half * UNIT // 2, UNIT, PAGES, half * UNIT // 2, UNIT // 2, 1) for half in range(2)]
        self.program = self.copier.compile([Step(plane, 0, part) for part, plane in enumerate(planes)], 2)
        self.announced: list[int] = []
        self.counters: Any = SimpleNamespace(
            num_parts=2,
            address=COUNTERS,
            announce=self.announced.append,
            restore=lambda: self.announced.append(RESTORED),
        )

    def pages(self, count: int) -> list[Pages]:
        order = torch.randperm(PAGES)[:count]
        return [Pages(self.memory.data_ptr() + order * UNIT, order)]


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(1, 5))
def test_shares_are_as_equal_as_can_be(lengths: list[int], count: int) -> None:
    pages = [Pages(torch.arange(length), torch.arange(length) + 1000) for length in lengths]
    shares = deal(pages, count)
    assert [len(share) for share in shares] == [len(lengths)] * count
    for number, length in enumerate(lengths):
        parts = [share[number].frames for share in shares]
        assert torch.cat(parts).tolist() == list(range(length)), "each page once, in order"
        assert max(map(len, parts)) - min(map(len, parts)) <= 1, "links are as fast as each other"
        assert all(torch.equal(share[number].frames + 1000, share[number].slots) for share in shares)
    if lengths and set(lengths) == {1}:
        taken = [sum(len(one.frames) for one in share) for share in shares]
        assert max(taken) - min(taken) <= 1, "single pages do not all go to the same"


def test_others_start_before_the_ranks_own_and_all_before_any_is_joined() -> None:
    """What another GPU starts waits for the rank's stream, and the rank's stream for what is joined."""
    small = Small()
    small.copier.load(small.program, small.pages(PAGES))
    steps = [entry[:2] for entry in small.log]
    assert steps[:3] == [("start", 2), ("start", 1), ("start", 0)]
    assert sorted(steps[3:]) == [("join", 0), ("join", 1), ("join", 2)]


@pytest.mark.parametrize(("pages", "raised"), [(96, 111), (64, 11), (63, 1), (1, 1)])
def test_counters_are_raised_by_all_that_take_part(pages: int, raised: int) -> None:
    """A share has 2 MiB at least: 32 of these pages."""
    small = Small()
    small.copier.load(small.program, small.pages(pages), small.counters)
    assert small.announced == [raised]
    assert all(entry[3] == COUNTERS for entry in small.log if entry[0] == "start")
    small.copier.load(small.program, small.pages(0), small.counters)
    assert small.announced == [raised], "a load of nothing raises nothing"
    small.counters.num_parts = 3
    with pytest.raises(ValueError, match="3 counters for a load of 2 parts"):
        small.copier.load(small.program, small.pages(9), small.counters)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_share_that_fails_fails_the_move_and_the_others_are_joined(failing: int) -> None:
    small = Small()
    small.shares[failing].fails = True
    with pytest.raises(CopyError, match="refuses"):
        small.copier.load(small.program, small.pages(PAGES), small.counters)
    assert small.announced == [RESTORED], "neither this load nor a later one may look complete"
    started = {number for step, number, *_ in small.log if step == "start"}
    joined = {number for step, number, *_ in small.log if step == "join"}
    assert started == {number for number in range(3) if number > failing}
    assert joined >= started
    assert not any(share.started for share in small.shares)


def test_it_says_who_copies_and_has_a_relays_counters() -> None:
    copier = Small().copier
    assert isinstance(copier, PageCopier)
    assert copier.describe() == "copier 0, and as many bytes each by copier 1; copier 2"
    assert cast(Any, copier.make_counters(7)) == "counters of 2 for 7"


@pytest.mark.parametrize("without", [0, 1, 2])
def test_one_copier_that_cannot_count_is_enough_for_none(without: int) -> None:
    """A counter that it does not raise would be waited for without end."""
    small = Small()
    small.shares[without].counts = False
    assert small.copier.make_counters(7) is None


def test_scenes_are_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the contract above would be that of one copier."""
    monkeypatch.setattr(shared_module, "MIN_SHARE_BYTES", 4096)
    logs: list[Any] = []

    def make(slabs: Sequence[Slab], device: torch.device) -> SharedCopier:
        return SharedCopier(cast(Any, [Share(slabs, device, number, logs) for number in range(3)]))

    for seed in range(5):
        Scene(make, seed, TestShared.limits).run()
    assert {entry[1] for entry in logs if entry[0] == "start"} == {0, 1, 2}

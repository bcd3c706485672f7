"""A copy dealt to several copiers: every page is moved once, in the right order of streams, and told of in one sum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_xmem.copies import make_copier
from sglang_xmem.copies.base import PageCopier
from sglang_xmem.copies.shared import MIN_SHARE_PAGES, SharedCopier
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.copies.tuning import CudaTuning
from sglang_xmem.errors import CopyError

PLANES, TOKENS, PAGE, ROW = 4, 512, 2, 24
COUNTERS = 0xC0DE
RESTORED = -1


class Share(TorchPageCopier):
    """Copies when it is joined, as a GPU may; a part of the log of all."""

    def __init__(self, planes: tuple[list[torch.Tensor], list[torch.Tensor]], number: int, log: list[Any]) -> None:
        super().__init__(*planes, PAGE)
        self.number, self.log = number, log
        self.load_tuning = self.store_tuning = CudaTuning()
        self.started: list[Any] = []
        self.fails = False
        self.signals = True

    def can_signal(self) -> bool:
        return self.signals

    def start(
        self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool, counters: Any = (0, 0)
    ) -> int:
        if self.fails:
            raise CopyError("The driver refuses.")
        self.log.append(("start", self.number, tier_rows.numel(), counters))
        self.started.append((tier_rows, device_rows, planes, load))
        return 10**self.number

    def join(self, *, load: bool) -> None:
        self.log.append(("join", self.number))
        for tier_rows, device_rows, planes, loads in self.started:
            assert loads == load
            super()._copy(tier_rows, device_rows, planes, load=load)
        self.started.clear()

    def make_signals(self, num_parts: int) -> Any:
        return f"signals of {self.number} for {num_parts}"

    def describe(self) -> str:
        return f"copier {self.number}"


def planes_of(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (TOKENS, ROW), dtype=torch.uint8, generator=generator) for _ in range(PLANES)]


def shared(count: int) -> tuple[SharedCopier, list[Share], list[Any]]:
    planes, log = (planes_of(1), planes_of(2)), list[Any]()
    shares = [Share(planes, number, log) for number in range(count)]
    return SharedCopier(cast(Any, shares)), shares, log


def rows(pages: int, seed: int, stride: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randperm(TOKENS // PAGE, generator=generator)[:pages] * PAGE
    return found.repeat_interleave(stride)[::stride]


@given(
    count=st.integers(1, 5),
    pages=st.integers(0, TOKENS // PAGE),
    seed=st.integers(0, 100),
    stride=st.integers(1, 3),
    load=st.booleans(),
    first=st.integers(0, PLANES),
    last=st.integers(0, PLANES),
)
def test_it_moves_what_one_copier_moves(
    count: int, pages: int, seed: int, stride: int, load: bool, first: int, last: int
) -> None:
    copier, _, log = shared(count)
    tier, device = planes_of(1), planes_of(2)
    alone = TorchPageCopier(tier, device, PAGE)
    planes = range(min(first, last), max(first, last))
    arguments = (rows(pages, seed, stride), rows(pages, seed + 1, stride), planes)
    for one in (copier, alone):
        (one.load if load else one.store)(*arguments)
    for mine, others in ((copier.tier_planes, tier), (copier.device_planes, device)):
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    sizes = [entry[2] for entry in log if entry[0] == "start"]
    if pages and planes:
        assert sum(sizes) == pages
        assert max(sizes) - min(sizes) <= 1, "links are as fast as each other"
        assert len(sizes) == 1 or min(sizes) >= MIN_SHARE_PAGES
        assert len(sizes) == max(1, min(count, pages // MIN_SHARE_PAGES))
    else:
        assert log == []


def test_others_start_before_the_ranks_own_and_all_before_any_is_joined() -> None:
    """What another GPU starts waits for the rank's stream, and the rank's stream for what is joined."""
    copier, _, log = shared(3)
    copier.load(rows(60, 1), rows(60, 2), range(PLANES))
    steps = [entry[:2] for entry in log]
    assert steps[:3] == [("start", 2), ("start", 1), ("start", 0)]
    assert sorted(steps[3:]) == [("join", 0), ("join", 1), ("join", 2)]


def signals_of(parts: int, announced: list[int]) -> Any:
    def check_parts(planes: range) -> None:
        if len(planes) % parts:
            raise ValueError("no equal parts")

    def counters(planes: range) -> tuple[int, int]:
        return COUNTERS, len(planes) // parts

    def restore() -> None:
        announced.append(RESTORED)

    return SimpleNamespace(announce=announced.append, restore=restore, check_parts=check_parts, counters=counters)


@pytest.mark.parametrize(("pages", "raised"), [(100, 111), (2 * MIN_SHARE_PAGES, 11), (2 * MIN_SHARE_PAGES - 1, 1)])
def test_signals_are_raised_by_all_that_took_part(pages: int, raised: int) -> None:
    copier, _, log = shared(3)
    announced: list[int] = []
    signals = signals_of(2, announced)
    copier.load_signalling(rows(pages, 1), rows(pages, 2), range(PLANES), signals)
    assert announced == [raised]
    assert all(entry[3] == (COUNTERS, PLANES // 2) for entry in log if entry[0] == "start")
    copier.load_signalling(rows(0, 1), rows(0, 2), range(PLANES), signals)
    assert announced == [raised], "a load of nothing raises nothing"
    with pytest.raises(ValueError, match="no equal parts"):
        copier.load_signalling(rows(9, 1), rows(9, 2), range(PLANES - 1), signals)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_share_that_fails_fails_the_copy_and_the_others_are_joined(failing: int) -> None:
    copier, shares, log = shared(3)
    shares[failing].fails = True
    announced: list[int] = []
    with pytest.raises(CopyError, match="refuses"):
        copier.load_signalling(rows(90, 1), rows(90, 2), range(PLANES), signals_of(2, announced))
    assert announced == [RESTORED], "nobody may take this load for complete, or a later one for what this raised"
    started = {number for step, number, *_ in log if step == "start"}
    joined = {number for step, number, *_ in log if step == "join"}
    assert started == {number for number in range(3) if number > failing}
    assert joined >= started
    assert not any(share.started for share in shares)


def test_it_says_who_copies_and_has_a_relays_signals() -> None:
    copier, _, _ = shared(3)
    assert isinstance(copier, PageCopier)
    assert copier.describe() == "copier 0, and as many pages each by copier 1; copier 2"
    assert copier.make_signals(7) == "signals of 2 for 7"


@pytest.mark.parametrize("without", [0, 1, 2])
def test_one_copier_that_cannot_signal_is_enough_for_none(without: int) -> None:
    """A counter that it does not raise would be waited for without end."""
    copier, shares, _ = shared(3)
    shares[without].signals = False
    assert copier.make_signals(7) is None


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_only_the_cuda_kernel_relays(name: Any) -> None:
    with pytest.raises(CopyError, match=r"set copy\.kernel to cuda, or leave out dram\.relays\.$"):
        make_copier(name, planes_of(1), planes_of(2), PAGE, tier_locality="host", relays=(1,))

"""Pages of an engine in the page bank: the page table, weights that change, sums, and ranks with the same pages."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sglang_xmem.arena import SpaceSpec
from sglang_xmem.bank_space import TRAILER_BYTES, BankSpace
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.sums import SectionSums
from sglang_xmem.tiers.bank import BankRankPlan, BankSettings, BankTier
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB

FRAME = 64 << 10
KEYS = [bytes([number]) * 31 + b"\0" for number in range(8)]


@pytest.fixture(autouse=True)
def service(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTIER_SOCKET", str(start_daemon("--bank", f"host:{8 * MIB}").socket_path))


@pytest.fixture
def spaces() -> Iterator[list[BankSpace]]:
    """Those of two engines with the same model."""
    made = []
    for _ in range(2):
        tier = BankTier(BankSettings(), BankRankPlan(8 * MIB), None)
        tier.share_as([b"m" * 32], "model")
        made.append(BankSpace(SpaceSpec("KV", 32, FRAME), tier.allocate(32 * FRAME, FRAME)))
    yield made
    for space in made:
        space.region.release()


@pytest.mark.parametrize("frame", [256, 2048])
def test_small_frames_are_as_many_as_were_asked_for(frame: int) -> None:
    tier = BankTier(BankSettings(), BankRankPlan(8 * MIB), None)
    frames = 4 * MIB // frame
    space = BankSpace(SpaceSpec("KV", frames, frame), tier.allocate(frames * frame, frame))
    try:
        assert space.look_up(torch.arange(frames), claim=True).unique().numel() == frames
    finally:
        space.region.release()


def pages(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def content(space: BankSpace, page: int) -> Any:
    start = offset(space, page)
    return np.frombuffer(space.bank.slab.owner, np.uint8)[start : start + FRAME - TRAILER_BYTES]


def offset(space: BankSpace, page: int) -> int:
    """Of a page's frame in the slab, which each engine maps elsewhere."""
    return int(space.table[page]) - space.bank.slab.address


def store(space: BankSpace, *numbers: int) -> None:
    space.look_up(pages(*numbers), claim=True)
    for number in numbers:
        content(space, number)[:] = number


def test_a_page_that_another_engine_stored_is_adopted_without_a_copy(spaces: list[BankSpace]) -> None:
    first, second = spaces
    store(first, 1, 2, 3)
    assert first.publish(KEYS[1:4], pages(1, 2, 3)) == 3
    assert second.find(KEYS[1:]) == 3
    assert second.adopt(KEYS[1:6], pages(10, 11, 12, 13, 14)) == 3
    assert [int(content(second, page)[-1]) for page in (10, 11, 12)] == [1, 2, 3]
    content(first, 2)[:] = 77  # it is one memory
    assert int(content(second, 11)[0]) == 77
    second.look_up(pages(10, 12), claim=False)
    with pytest.raises(RuntimeError, match="without a frame"):
        second.look_up(pages(12, 13), claim=False)
    second.free(pages(10, 11, 12, 13))
    assert second.bank.held() == 0
    assert second.find(KEYS[1:]) == 3


def test_a_store_never_writes_to_what_others_may_read(spaces: list[BankSpace]) -> None:
    first, second = spaces
    store(first, 1)
    first.publish(KEYS[:1], pages(1))
    before = offset(first, 1)
    # Pools that ride on a page's number ask again for the frame that its anchor got.
    (own,) = second.look_up(pages(5), claim=True).tolist()
    assert second.look_up(pages(5, 6), claim=True).tolist()[0] == own
    store(first, 1)
    assert offset(first, 1) != before
    second.adopt(KEYS[:1], pages(7))
    assert offset(second, 7) == before


def test_weights_that_change_share_nothing_until_the_flush_and_then_other_pages(spaces: list[BankSpace]) -> None:
    first, second = spaces
    store(first, 1, 2)
    assert first.publish(KEYS[:1], pages(1)) == 1
    old = offset(first, 1)
    for space in spaces:
        space.weights_changed(b"new")
        assert space.find(KEYS) == 0
    assert first.publish(KEYS[1:2], pages(2)) == 0  # of the weights before
    assert first.adopt(KEYS[:1], pages(3)) == 0
    first.clear()
    second.clear()
    assert first.bank.held() == 0
    store(first, 1)
    assert first.find(KEYS[:1]) == 0
    assert first.publish(KEYS[:1], pages(1)) == 1
    assert second.find(KEYS[:1]) == 1
    second.weights_changed(b"")
    second.clear()
    store(second, 4)
    assert second.find(KEYS[:1]) == 1
    assert second.adopt(KEYS[:1], pages(5)) == 1
    assert offset(second, 5) == old


def test_a_canarys_page_keeps_its_frame_when_all_others_are_freed(spaces: list[BankSpace]) -> None:
    """Else its random bytes would go into a frame that is another engine's by then."""
    space, _ = spaces
    space.kept = 1
    store(space, 0, 1)
    frame = offset(space, 0)
    space.clear()
    assert (offset(space, 0), int(space.table[1])) == (frame, 0)
    assert space.bank.owned(space.table[:1].numpy()).all()


def test_sums_come_with_a_page_and_a_damaged_one_is_found_no_more(spaces: list[BankSpace]) -> None:
    first, second = spaces
    nbytes = FRAME - TRAILER_BYTES
    sums = [SectionSums([Plane(0, nbytes, 1, 0, nbytes, 1)], 32, 16, pinned=False) for _ in spaces]
    store(first, 1, 2, 3)
    for space, its in zip(spaces, sums, strict=True):
        space.carry(its)
    # Page 3 has no sum: what an earlier page left in the frame is not used.
    first._trailers[:] = 77  # type: ignore[index]
    for page in (1, 2):
        sums[0].every = 1
        sums[0].put(page, content(first, page), 0)
    sums[0].every = 16
    assert first.publish(KEYS[1:4], pages(1, 2, 3)) == 3
    content(first, 2)[1000] ^= 1
    assert second.adopt(KEYS[1:4], pages(20, 21, 22)) == 3
    found = pages(20, 21, 22)
    assert sums[1].have(found).tolist() == [True, True, False]
    sections = np.stack([content(second, page) for page in found.tolist()])
    assert sums[1].wrong(found, sections, 0).tolist() == [21]
    sums[1].forget(found)
    assert not sums[1].have(found).any()
    second.damaged(second.table[21:22].numpy())
    assert second.bank.reported(5)
    assert (second.find(KEYS[1:4]), first.find(KEYS[2:4]), first.find(KEYS[3:4])) == (1, 0, 1)
    # A page with the same key is another one.
    store(second, 5)
    assert second.publish(KEYS[2:3], pages(5)) == 1
    assert first.find(KEYS[1:4]) == 3


def test_a_page_that_another_rank_stored_first_gives_way_to_it(spaces: list[BankSpace]) -> None:
    first, second = spaces
    for space in spaces:
        store(space, 1, 2)
    first.publish(KEYS[1:3], pages(1, 2))
    before = offset(second, 1)
    second.publish(KEYS[1:3], pages(1, 2))
    assert offset(second, 1) == before  # one engine's page stays where it is
    copying = [True]
    second.gives_way = True
    second.copies_in_flight = lambda: lambda: not copying[0]
    second.publish(KEYS[1:3], pages(1, 2))
    assert [offset(second, page) for page in (1, 2)] == [offset(first, page) for page in (1, 2)]
    # A load may be reading the frame that it had.
    assert second.bank.held() == 4
    assert second.bank.owned(np.array([before + second.bank.slab.address])).all()
    copying[0] = False
    second.tidy()
    assert second.bank.held() == 2
    # Again, now that it is the bank's.
    second.publish(KEYS[1:3], pages(1, 2))
    assert second.bank.held() == 2
    second.free(pages(1, 2))
    assert (second.bank.held(), second.find(KEYS[1:3])) == (0, 2)


def test_a_store_waits_for_frames_that_gave_way(spaces: list[BankSpace]) -> None:
    """Both ranks hold all pages that they may, and the second one its own frames too, which copies may still know."""
    first, second = spaces
    every = torch.arange(first.spec.pages)
    keys = [number.to_bytes(32, "big") for number in range(len(every))]
    for space in spaces:
        space.gives_way = True
        space.look_up(every, claim=True)
    copying = [True]
    second.copies_in_flight = lambda: lambda: not copying
    for space in spaces:
        space.publish(keys, every)
    with contextlib.suppress(RuntimeError):
        while True:  # what others may have
            first.bank.claim(1)
    for space in spaces:
        space.free(every[:1])
    first.look_up(every[:1], claim=True)
    assert second.bank.held() == 2 * len(every) - 1
    threading.Timer(0.05, copying.clear).start()
    second.look_up(every[:1], claim=True)
    assert second.bank.held() == len(every)

"""What the page bank's storage class answers SGLang: how much of a prefix all spaces have together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from sglang_xmem.engines.sglang.bank_storage import BankStorage

KEYS = [bytes([number]).hex() * 32 for number in range(12)]


class FakeSpace:
    """A space of the bank that has some pages."""

    def __init__(self, there: set[int]) -> None:
        self.there = there
        self.adopted: list[tuple[int, int]] = []

    def look(self, keys: list[bytes]) -> Any:
        return np.array([key[0] in self.there for key in keys], np.bool_)

    def find(self, keys: list[bytes]) -> int:
        return int(np.cumprod(self.look(keys)).sum()) if keys else 0

    def adopt(self, keys: list[bytes], pages: torch.Tensor) -> int:
        count = self.find(keys)
        self.adopted += [(key[0], page) for key, page in zip(keys[:count], pages.tolist(), strict=False)]
        return count


def storage(**there: set[int]) -> BankStorage:
    made = BankStorage.__new__(BankStorage)
    made._spaces = {name: FakeSpace(pages) for name, pages in there.items()}  # type: ignore[misc]
    made.mem_pool_host = SimpleNamespace(page_size=16)
    made.registered_pools = {
        PoolName.SWA: SimpleNamespace(page_size=16),
        PoolName.MAMBA: SimpleNamespace(page_size=1),
    }
    return made


def trailing(name: PoolName, keys: list[str], **more: Any) -> PoolTransfer:
    return PoolTransfer(name=name, keys=keys, hit_policy=PoolHitPolicy.TRAILING_PAGES, **more)


ALL = set(range(12))


@pytest.mark.parametrize(
    ("kv", "window", "states", "hit", "prefixes"),
    [
        (ALL, ALL, {11}, 12, [12]),
        (ALL, ALL, {3, 8}, 9, [4, 9]),
        (ALL, {0, 5, 6, 7}, {7, 0}, 8, [1, 8]),
        (ALL, {6, 7}, {7}, 0, []),
        (ALL, ALL, set(), 0, []),
        (ALL, set(), ALL, 0, []),
        ({0, 1, 2, 3, 5}, ALL, {1, 5}, 2, [2]),
        (set(), ALL, ALL, 0, []),
    ],
)
def test_a_hit_needs_the_pages_of_all_spaces(
    kv: set[int], window: set[int], states: set[int], hit: int, prefixes: list[int]
) -> None:
    bank = storage(KV=kv, SWA=window, MAMBA=states)
    wanted = [trailing(PoolName.SWA, ["?"] * 3), trailing(PoolName.MAMBA, ["?"])]
    found = bank.batch_exists_v2(KEYS, wanted)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (hit, prefixes)


def test_pools_that_ride_on_a_space_have_what_it_has() -> None:
    bank = storage(KV=ALL, SWA={4, 5})
    indices = torch.arange(32, 80)
    window = trailing(PoolName.SWA, KEYS[4:7], host_indices=indices)
    rider = trailing(PoolName.DRAFT_SWA, KEYS[4:7], host_indices=indices, indices_from_pool=PoolName.SWA)
    indexer = PoolTransfer(name=PoolName.INDEXER, keys=KEYS[:2], indices_from_pool=PoolName.KV)
    got = bank.batch_get_v2([rider, indexer, window])
    assert got == {PoolName.SWA: [True, True, False], PoolName.DRAFT_SWA: [True, True, False], "indexer": [True, True]}
    space: Any = bank._spaces["SWA"]
    assert space.adopted == [(4, 2), (5, 3)]


def test_a_pool_with_numbers_that_the_bank_does_not_know_is_a_miss() -> None:
    """Such as a space whose memory is elsewhere: its pages would be whatever the device finds there."""
    made = storage(KV=ALL, SWA=ALL)
    state = trailing(PoolName.MAMBA, KEYS[3:4], host_indices=torch.tensor([5]))
    result = made.batch_exists_v2(KEYS, [trailing(PoolName.SWA, KEYS[:2]), state])
    assert (result.kv_hit_pages, result.extra_pool_hit_pages[PoolName.MAMBA]) == (0, 0)
    assert made.batch_get_v2([state]) == {PoolName.MAMBA: [False]}


def test_a_state_is_adopted_by_its_own_number() -> None:
    bank = storage(KV=ALL, MAMBA={7})
    assert bank.batch_get_v2([trailing(PoolName.MAMBA, [KEYS[7]], host_indices=torch.tensor([5]))]) == {
        PoolName.MAMBA: [True]
    }
    space: Any = bank._spaces["MAMBA"]
    assert space.adopted == [(7, 5)]

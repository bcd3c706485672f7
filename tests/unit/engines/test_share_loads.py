"""Which pools' loads are shared among ranks, and that nobody is asked where the user did not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_xmem.copies.geometry import Plane
from sglang_xmem.engines.sglang import pools


class MLATokenToKVPoolHost:
    dcp_size = 1


class SharedByDcp(MLATokenToKVPoolHost):
    dcp_size = 2


class MHATokenToKVPoolHost:
    pass


class FakeArena:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    def share_loads(self, planes: Any, gather: Any, me: int) -> None:
        self.asked.append((planes, gather, me))


def view(arena: FakeArena, pool: Any, address: int, layers: int = 2) -> Any:
    planes = {n: [Plane(address + n, 64, 9, 64 * n, 64, 16)] for n in range(layers)}
    return SimpleNamespace(arena=arena, pool=pool, layers=planes)


@pytest.mark.parametrize("asked", [False, True])
def test_pools_with_the_same_bytes_on_all_ranks(asked: bool) -> None:
    arena, other = FakeArena(), FakeArena()
    active: Any = SimpleNamespace(
        plan=SimpleNamespace(options=SimpleNamespace(copy=SimpleNamespace(share_loads=asked))),
        arenas=[arena, other],
        pools=[
            view(arena, MLATokenToKVPoolHost(), 100),
            view(arena, MHATokenToKVPoolHost(), 200),
            view(arena, SharedByDcp(), 300),
            view(arena, MLATokenToKVPoolHost(), 400, layers=0),
            view(other, MHATokenToKVPoolHost(), 500),
        ],
    )

    def gather(mine: Any) -> list[Any]:
        raise AssertionError("the arena asks")

    pools.share_loads(active, gather, 3)
    if not asked:
        assert arena.asked == other.asked == []
        return
    ((planes, given, me),) = arena.asked
    assert [plane.device_address for plane in planes] == [100, 101]
    assert given is gather
    assert me == 3
    # Every rank asks for every arena, or one would wait for the others.
    assert other.asked == [([], gather, 3)]

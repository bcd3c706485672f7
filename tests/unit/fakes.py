"""Tiers made of ordinary memory, whose free bytes and failures a test sets."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import msgspec

from sglang_xmem.errors import Unavailable
from sglang_xmem.tiers import Extent, MemoryTier, Ranks, Region, Traits


class FakeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    free_bytes: int = 1 << 30


class FakeTier(MemoryTier):
    """`missing`: why the machine lacks the tier; `lost`: why it has gone since; `fail_at`: which allocation fails."""

    name = "fake"
    nominal_gbps = 1000.0
    traits = Traits(cpu_addressable=False, counts_as_host_ram=False, link="nvlink")
    Settings = FakeSettings
    missing: ClassVar[str | None] = None
    lost: ClassVar[str | None] = None
    fail_at: ClassVar[int | None] = None
    live: ClassVar[list[int]] = []

    @classmethod
    def plan_ranks(cls, settings: Any, ranks: Ranks) -> tuple[Any, ...]:
        if cls.missing:
            raise Unavailable(cls.missing)
        return tuple(range(len(ranks.gpus)))

    def capacity_bytes(self) -> int:
        if self.lost:
            raise Unavailable(self.lost)
        return int(self.settings.free_bytes)

    def waste_bytes(self, granule: int) -> int:
        return 0

    def _allocate(self, nbytes: int, granule: int) -> Region:
        if len(self.live) == self.fail_at:
            raise Unavailable("the card is broken")
        memory = (ctypes.c_uint8 * nbytes)()
        address = ctypes.addressof(memory)
        self.live.append(address)

        def release(keep: Any = memory) -> None:
            self.live.remove(address)

        return Region([Extent(address, nbytes)], "a fake", release, granule=granule)


class SlowFakeTier(FakeTier):
    name = "slowfake"
    nominal_gbps = 1.0
    traits = Traits(cpu_addressable=True, counts_as_host_ram=True, link="pcie")
    live: ClassVar[list[int]] = []


class ShyFakeTier(FakeTier):
    """Is not tried by `auto`; memory of its own that the CPU addresses, as a devdax."""

    name = "shyfake"
    nominal_gbps = 2.0
    traits = Traits(cpu_addressable=True, counts_as_host_ram=False, link="cxl")
    live: ClassVar[list[int]] = []

    @classmethod
    def is_automatic(cls, settings: Any) -> bool:
        return False

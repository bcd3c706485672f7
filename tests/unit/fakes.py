"""Tiers made of ordinary memory, whose room and failures a test sets."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import msgspec

from sglang_xmem.errors import TierUnavailable
from sglang_xmem.tiers import Locality, MemoryTier, Ranks, Region


class FakeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    room_bytes: int = 1 << 30


class FakeTier(MemoryTier):
    name = "fake"
    nominal_gbps = 1000.0
    locality = Locality.DEVICE
    Settings = FakeSettings
    missing: ClassVar[str | None] = None
    taken: ClassVar[str | None] = None
    live: ClassVar[list[int]] = []

    @classmethod
    def seats(cls, settings: Any, ranks: Ranks) -> tuple[Any, ...]:
        if cls.missing:
            raise TierUnavailable(cls.missing)
        return tuple(range(len(ranks.gpus)))

    def capacity_bytes(self) -> int:
        if self.taken:
            raise TierUnavailable(self.taken)
        return int(self.settings.room_bytes)

    def allocate(self, nbytes: int, parts: int = 1) -> Region:
        memory = (ctypes.c_uint8 * nbytes)()
        address = ctypes.addressof(memory)
        self.live.append(address)

        def release(keep: Any = memory) -> None:
            self.live.remove(address)

        return Region(address, nbytes, "a fake", release)


class SlowFakeTier(FakeTier):
    name = "slowfake"
    nominal_gbps = 1.0
    locality = Locality.HOST
    live: ClassVar[list[int]] = []

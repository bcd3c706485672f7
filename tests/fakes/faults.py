"""A copier and a tier that fail on command, with a seed: decorators of ones that work, on the CPU."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.errors import CopyError, Unavailable
from sglang_xmem.tiers import MemoryTier, Region

#: What a copier can do wrong: refuse a store, or a load; take its time; never finish; after a store, have another byte
#: in the tier; leave a page in the tier as it was; and bring another byte to the device.
FAULTS = ("refuse store", "refuse load", "delay", "hang", "flip", "stale", "flip load")
DELAY_S = 0.2


class FaultyCopier(PageCopier):
    """Fails on command.

    Args:
        inner: copies at once, on the CPU.
        fault: asked at each copy; one of FAULTS, or "" for none.
        seed: of the choice among pages and bytes.
        report: called for each fault.
    """

    name = "faulty"

    def __init__(
        self,
        inner: PageCopier,
        fault: Callable[[], str],
        seed: int = 0,
        report: Callable[[str], None] = lambda what: None,
    ) -> None:
        super().__init__(inner.slabs, inner.device)
        self.inner = inner
        self._fault = fault
        self._random = random.Random(seed)
        self._report = report

    def compile(self, steps: Sequence[Step], num_parts: int) -> FaultyProgram:
        return FaultyProgram(self, steps, num_parts)

    def describe(self) -> str:
        return f"{self.inner.describe()}, with faults"

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, FaultyProgram)
        fault = self._fault()
        refused = fault == ("refuse load" if load else "refuse store")
        if refused or fault in ("delay", "hang") or fault == ("flip load" if load else "flip"):
            self._report(fault)
        if refused:
            raise CopyError("The driver refuses, as a test asked it to.")
        if fault == "delay":
            time.sleep(DELAY_S)
        while fault == "hang":
            time.sleep(60)
        if fault == "stale" and not load:
            self._report(fault)
            pages = [self._without_one(one) for one in pages]
        (self.inner.load if load else self.inner.store)(program.inner, pages)
        if fault == ("flip load" if load else "flip"):
            self._flip(program.steps, pages, load=load)

    def _without_one(self, pages: Pages) -> Pages:
        keep = list(range(pages.frames.numel()))
        if keep:
            del keep[self._random.randrange(len(keep))]
        return Pages(pages.frames[keep], pages.slots[keep])

    def _flip(self, steps: Sequence[Step], pages: Sequence[Pages], *, load: bool) -> None:
        """Change a byte of a page where the copy put it."""
        plane, vector, _ = self._random.choice([step for step in steps if pages[step.vector].frames.numel()])
        frames, slots = pages[vector]
        page = self._random.randrange(frames.numel())
        unit = plane.device_address + int(slots[page]) // plane.divisor * plane.device_stride
        address = unit if load else int(frames[page]) + plane.offset
        ctypes.c_uint8.from_address(address + self._random.randrange(plane.unit_bytes)).value ^= 0x40


class FaultyProgram(Program):
    """A program of the inner copier."""

    def __init__(self, copier: FaultyCopier, steps: Sequence[Step], num_parts: int) -> None:
        super().__init__(copier, steps, num_parts)
        self.inner = copier.inner.compile(steps, num_parts)


class FaultyTier(MemoryTier):
    """A tier that gives no memory, at first or from some allocation on.

    Args:
        inner: gives the memory.
        allocations: how many are made before all further ones are refused.
    """

    name = "faulty"
    nominal_gbps = 1.0

    def __init__(self, inner: MemoryTier, allocations: int) -> None:
        super().__init__(inner.settings, inner.rank_plan, inner.gpu)
        self.inner = inner
        self.traits = inner.traits
        self._left = allocations

    @classmethod
    def plan_ranks(cls, settings: Any, ranks: Any) -> tuple[Any, ...]:
        raise Unavailable("it decorates a tier that was planned")

    def capacity_bytes(self) -> int:
        return self.inner.capacity_bytes()

    def _allocate(self, nbytes: int, granule: int) -> Region:
        if self._left == 0:
            raise Unavailable("the memory is gone, as a test asked for")
        self._left -= 1
        return self.inner.allocate(nbytes, granule)

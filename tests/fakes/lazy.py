"""A copier for the CPU that is as late as the contract allows.

A GPU may execute a load's copies at any time before a wait for a part ends. A copier on the CPU has copied when `load`
returns, so a reader that waits for too early a part, or not at all, gives the same there as one that waits as it has
to. `LazyCopier` poisons all destinations when a load is enqueued, and copies a part when it is waited for.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.geometry import Plane

#: In every byte of a destination until it is copied: not a number, in all types of KV.
POISON = 0xFF

_copiers: weakref.WeakSet[LazyCopier] = weakref.WeakSet()


def finish_all() -> None:
    """Complete all loads, for a query whether they are complete, which a GPU may always confirm."""
    for copier in list(_copiers):
        copier.finish()


class LazyCounters(LayerCounters):
    """Counters that copy when they are waited for."""

    def __init__(self, num_parts: int, copier: LazyCopier) -> None:
        # Not the base's: that one takes memory of a GPU.
        self.num_parts = num_parts
        self._copier = copier

    def announce(self, raises: int) -> None:
        """Do nothing; there are no counters."""

    def restore(self) -> None:
        """Do nothing; there are no counters."""

    def wait(self, part: int) -> None:
        """Copy this part, and those before it: a counter rises when the copier has no more to do in any of them."""
        if not 0 <= part < self.num_parts:
            raise ValueError(f"part {part} of {self.num_parts}")
        self._copier.copy_until(self, part)


class LazyProgram(Program):
    """A program, whole and by parts.

    Attributes:
        whole: the inner copier's.
        parts: the inner copier's, of each part that has steps.
    """

    def __init__(self, copier: LazyCopier, steps: Sequence[Step], num_parts: int) -> None:
        super().__init__(copier, steps, num_parts)
        self.whole = copier.inner.compile(steps, num_parts)
        self.parts = {
            part: copier.inner.compile([step for step in steps if step.part == part], num_parts)
            for part in sorted({step.part for step in steps})
        }


class _Pending:
    """A load of which some parts are not copied yet."""

    def __init__(self, program: LazyProgram, pages: Sequence[Pages], counters: LayerCounters) -> None:
        self.program, self.pages, self.counters = program, list(pages), counters
        self.parts = list(program.parts)
        self.waited_for = 0
        self._as_enqueued = [(frames.clone(), slots.clone()) for frames, slots in pages]

    def copy(self, inner: PageCopier, part: int) -> None:
        """Copy one part, and check that the caller has kept the vectors as they were."""
        for number, ((frames, slots), as_enqueued) in enumerate(zip(self.pages, self._as_enqueued, strict=True)):
            if not (torch.equal(frames, as_enqueued[0]) and torch.equal(slots, as_enqueued[1])):
                raise AssertionError(f"vector {number} of a load was changed before the load was complete")
        inner.load(self.program.parts[part], self.pages)


class LazyCopier(PageCopier):
    """Delays the loads of another copier until they are waited for.

    A load is at most as late as the next load or store of this copier, as `finish`, and as `finish_all`. One without
    counters is not delayed, since its deadline is unknown. Stores are not either.

    Args:
        inner: copies at once, on the CPU.
        report: called at the end of each load with the number of parts that were copied because something waited for
            them.
    """

    name = "lazy"

    def __init__(self, inner: PageCopier, report: Callable[[str], None] | None = None) -> None:
        super().__init__(inner.slabs, inner.device)
        if self.device.type != "cpu":
            raise ValueError(f"the copier 'lazy' is for pools on the CPU, not on {self.device}")
        self.inner = inner
        self._report = report
        self._pending: _Pending | None = None
        _copiers.add(self)

    def compile(self, steps: Sequence[Step], num_parts: int) -> LazyProgram:
        return LazyProgram(self, steps, num_parts)

    def make_counters(self, num_parts: int) -> LazyCounters:
        return LazyCounters(num_parts, self)

    def describe(self) -> str:
        return f"{self.inner.describe()}, as late as it may be"

    def copy_until(self, counters: LayerCounters, part: int) -> None:
        """Copy all parts up to this one, if it is this counters' load that is not complete."""
        pending = self._pending
        if pending is None or pending.counters is not counters:
            return
        while pending.parts and pending.parts[0] <= part:
            pending.copy(self.inner, pending.parts[0])
            pending.waited_for += 1
            del pending.parts[0]
        if not pending.parts:
            self.finish()

    def finish(self) -> None:
        """Copy what is left of the load that is not complete."""
        pending = self._pending
        if pending is None:
            return
        for part in pending.parts:
            pending.copy(self.inner, part)
        self._pending = None
        if self._report is not None:
            self._report(f"lazy load: {pending.waited_for} of {len(pending.program.parts)} parts at a wait")

    def forget(self) -> None:
        """Drop what is left of the load. Call this before its memory goes: `finish_all` would write there."""
        self._pending = None

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, LazyProgram)
        self.finish()
        if not load:
            self.inner.store(program.whole, pages)
        elif counters is None:
            self.inner.load(program.whole, pages)
        else:
            for plane, vector, _ in program.steps:
                _poison(plane, pages[vector].slots)
            self._pending = _Pending(program, pages, counters)


def _poison(plane: Plane, slots: torch.Tensor) -> None:
    memory: Any = (ctypes.c_uint8 * plane.device_bytes).from_address(plane.device_address)
    units: np.ndarray[Any, Any] = np.ndarray(
        (plane.device_units, plane.unit_bytes),
        dtype=np.uint8,
        buffer=memoryview(memory),
        strides=(plane.device_stride, 1),
    )
    units[slots.numpy() // plane.divisor] = POISON

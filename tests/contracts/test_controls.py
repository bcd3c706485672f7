"""The contract's checks can fail: copiers that are wrong in one way each do not pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.torch import TorchPageCopier, TorchProgram, units_at
from tests.contracts.copiers import Limits, Scene


class _Wrong(TorchPageCopier):
    """A copier of which one thing is wrong."""

    def steps(self, steps: Sequence[Step]) -> Sequence[Step]:
        """What is compiled instead of `steps`."""
        return steps

    def pages(self, pages: Sequence[Pages]) -> Sequence[Pages]:
        """What is moved instead of `pages`."""
        return pages

    def compile(self, steps: Sequence[Step], num_parts: int) -> TorchProgram:
        return super().compile(self.steps(steps), num_parts)

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        super()._copy(program, self.pages(pages), load=load, counters=counters)


class SwapsTwoPages(_Wrong):
    def pages(self, pages: Sequence[Pages]) -> Sequence[Pages]:
        return [Pages(torch.cat([frames[:2].flip(0), frames[2:]]), slots) for frames, slots in pages]


class ForgetsTheLastPage(_Wrong):
    def pages(self, pages: Sequence[Pages]) -> Sequence[Pages]:
        return [Pages(frames[:-1], slots[:-1]) for frames, slots in pages]


class DropsAPlane(_Wrong):
    def steps(self, steps: Sequence[Step]) -> Sequence[Step]:
        return steps[1:]


class SwapsTwoPlanes(_Wrong):
    def steps(self, steps: Sequence[Step]) -> Sequence[Step]:
        if len(steps) < 2:
            return steps
        one, other = steps[0].plane, steps[1].plane
        same = min(one.unit_bytes, other.unit_bytes)
        swapped = one._replace(offset=other.offset, unit_bytes=same), other._replace(offset=one.offset, unit_bytes=same)
        return [step._replace(plane=plane) for step, plane in zip(steps, swapped, strict=False)] + list(steps[2:])


class CopiesAByteLess(_Wrong):
    def steps(self, steps: Sequence[Step]) -> Sequence[Step]:
        return [
            step._replace(plane=step.plane._replace(unit_bytes=max(1, step.plane.unit_bytes - 1))) for step in steps
        ]


class CopiesAByteMore(_Wrong):
    def compile(self, steps: Sequence[Step], num_parts: int) -> TorchProgram:
        program = super().compile(steps, num_parts)
        program.views = [
            (
                step,
                units_at(plane.device_address, plane.device_units, plane.device_stride, plane.unit_bytes + 1),
                [
                    units_at(slab.address + plane.offset, slab.frames, slab.frame_bytes, plane.unit_bytes + 1)
                    for slab in self.slabs
                ],
            )
            for step, plane in ((step, step.plane) for step in steps)
        ]
        return program


class TakesAnotherVector(_Wrong):
    def pages(self, pages: Sequence[Pages]) -> Sequence[Pages]:
        """Of the same length, so that nothing else notices."""
        taken = [
            next((other for other in pages if other is not one and len(other.slots) == len(one.slots)), one)
            for one in pages
        ]
        return [Pages(one.frames, other.slots) for one, other in zip(pages, taken, strict=True)]


class IgnoresTheDivisor(_Wrong):
    def steps(self, steps: Sequence[Step]) -> Sequence[Step]:
        return [step._replace(plane=step.plane._replace(divisor=1)) for step in steps]


class TakesTheFirstSlab(_Wrong):
    def pages(self, pages: Sequence[Pages]) -> Sequence[Pages]:
        slab = self.slabs[0]
        size = slab.frames * slab.frame_bytes
        return [Pages(slab.address + (frames - slab.address) % size, slots) for frames, slots in pages]


class DoesNothing(_Wrong):
    def steps(self, steps: Sequence[Step]) -> Sequence[Step]:
        return []


WRONG = [
    SwapsTwoPages,
    ForgetsTheLastPage,
    DropsAPlane,
    SwapsTwoPlanes,
    CopiesAByteLess,
    CopiesAByteMore,
    TakesAnotherVector,
    IgnoresTheDivisor,
    TakesTheFirstSlab,
    DoesNothing,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_copier_is_noticed(wrong: Callable[..., PageCopier]) -> None:
    limits = Limits(units=1 << 18, pages=12, large=False)
    noticed = 0
    for seed in range(30):
        Scene(TorchPageCopier, seed, limits).run()
        try:
            Scene(wrong, seed, limits).run()
        except (AssertionError, IndexError, ValueError):  # what it takes may not exist
            noticed += 1
    assert noticed > (2 if wrong is TakesAnotherVector else 10), "most scenes have what this copier does wrong"

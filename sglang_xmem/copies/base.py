"""The contract of a page copier: move pages between frames of a memory tier and the pools on the device.

Terms. A *plane* is an array on the device in which each page has one contiguous *unit*. A *frame* is the tier memory of
one page, all its planes. A *move* is one load or store of pages of any index spaces. *Load* moves tier -> device,
*store* device -> tier (SGLang calls the latter backup or write-back). A *part* of a load is what one layer waits for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.copies.geometry import MAX_VECTORS, Plane, Slab

if TYPE_CHECKING:
    from sglang_xmem.copies.counters import LayerCounters

#: Maximum parts of one load: a plane's record has 16 bits for its part.
MAX_PARTS: Final = 1 << 15


class Step(NamedTuple):
    """One plane's share of a move.

    Attributes:
        plane: the array to copy.
        vector: index into the move's Pages, for its frames and slots.
        part: number of its counter (SGLang's transfer layer); steps are sorted by it.
    """

    plane: Plane
    vector: int
    part: int


class Pages(NamedTuple):
    """One index space's pages in one load or store: page i is in frames[i] and in unit slots[i] // divisor.

    Attributes:
        frames: int64, shape (n,), contiguous: address of each frame for the copying GPU or CPU.
        slots: int64, shape (n,), any element stride: first slot (token) of each page on the device, below 2^40.

    Both are on the device of the pools; n may be 0; a destination must not occur twice. The caller keeps both alive
    until the stream has completed the move.
    """

    frames: torch.Tensor
    slots: torch.Tensor


class Program:
    """Steps compiled for one copier, for any number of moves.

    Args:
        copier: the only copier that can run this program.
        steps: sorted by part.
        num_parts: number of parts of a load, with or without steps.

    Raises:
        ValueError: a step is invalid; the message names it.
    """

    def __init__(self, copier: PageCopier, steps: Sequence[Step], num_parts: int) -> None:
        if not 0 <= num_parts <= MAX_PARTS:
            raise ValueError(f"a load has 0 to {MAX_PARTS} parts, not {num_parts}")
        before = 0
        for step in steps:
            step.plane.check(copier.slabs)
            if not 0 <= step.vector < MAX_VECTORS:
                raise ValueError(f"vector {step.vector} of {step} is not below {MAX_VECTORS}")
            if not before <= step.part < num_parts:
                raise ValueError(f"part {step.part} of {step} is not in order, or not below {num_parts}")
            before = step.part
        self.copier = copier
        self.steps = tuple(steps)
        self.num_parts = num_parts
        self.num_vectors = max((step.vector + 1 for step in steps), default=0)
        #: Bytes per page of each vector.
        self.page_bytes = [0] * self.num_vectors
        for step in steps:
            self.page_bytes[step.vector] += step.plane.unit_bytes


class PageCopier(ABC):
    """Copies pages between frames of `slabs` and arrays on `device`.

    Args:
        slabs: memory of the frames; fixed for the copier's lifetime.
        device: of the pools, and of the vectors of pages.

    Raises:
        ValueError: there is no slab, or a slab without frames.
    """

    name: ClassVar[str]

    def __init__(self, slabs: Sequence[Slab], device: torch.device) -> None:
        for slab in slabs:
            if slab.address <= 0 or slab.frames < 1 or slab.frame_bytes < 1:
                raise ValueError(f"a slab has an address and at least one frame of at least one byte, not {slab}")
        if not slabs:
            raise ValueError("a copier needs at least one slab of frames")
        self.slabs = tuple(slabs)
        # Includes the ordinal, as in tensors.
        self.device = torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device

    @abstractmethod
    def compile(self, steps: Sequence[Step], num_parts: int) -> Program:
        """Prepare moves of these planes; called once per set of pools, and may wait for the GPU.

        Args:
            steps: sorted by part, at most 2^16 of them.
            num_parts: of a load, with or without steps (SGLang's transfer_layer_id_max).

        Raises:
            ValueError: a step is invalid.
            CopyError: this copier cannot access a plane, or its kernel cannot be compiled.
        """

    def load(
        self,
        program: Program,
        pages: Sequence[Pages],
        counters: LayerCounters | None = None,
        addresses: Sequence[npt.NDArray[np.int64]] | None = None,
    ) -> None:
        """Enqueue tier -> device on the current stream; never waits, and its CPU time does not depend on the pages.

        Args:
            program: from this copier's `compile`.
            pages: the pages of each vector in the program's steps.
            counters: from `make_counters`: report when each part is in place. The previous load that used them is
                complete.
            addresses: `frames` of each of `pages`, on the CPU, for copiers that plan with them.

        Raises:
            CopyError: the driver refuses; the counters are unchanged.
        """
        if counters is not None and counters.num_parts != program.num_parts:
            raise ValueError(f"{counters.num_parts} counters for a load of {program.num_parts} parts")
        if self._any_pages(program, pages):
            self._copy(program, pages, load=True, counters=counters)

    def store(self, program: Program, pages: Sequence[Pages]) -> None:
        """Enqueue device -> tier on the current stream; see `load`."""
        if self._any_pages(program, pages):
            self._copy(program, pages, load=False, counters=None)

    def make_counters(self, num_parts: int) -> LayerCounters | None:
        """Make counters for `load`; None if this copier or this GPU does not support them. Waits for the GPU."""
        return None

    def describe(self) -> str:
        """Describe this copier and its settings, for one log line."""
        return self.name

    def _any_pages(self, program: Program, pages: Sequence[Pages]) -> bool:
        """Whether there is anything to copy; makes the checks that are cheap enough for every launch."""
        if program.copier is not self:
            raise ValueError("only the copier that compiled a program can run it")
        if not program.num_vectors <= len(pages) <= MAX_VECTORS:
            raise ValueError(f"{len(pages)} vectors of pages for a program with {program.num_vectors}")
        some = 0
        for frames, slots in pages:
            for vector in (frames, slots):
                if vector.dtype is not torch.int64 or vector.ndim != 1 or vector.device != self.device:
                    raise ValueError(
                        f"frames and slots must be vectors of int64 on {self.device}, not {vector.dtype} of shape "
                        f"{tuple(vector.shape)} on {vector.device}"
                    )
            count = frames.numel()
            if count != slots.numel():
                raise ValueError(f"{count} frames but {slots.numel()} slots")
            if count > 1 and frames.stride(0) != 1:
                raise ValueError("frames must be contiguous")
            some |= count
        return some != 0 and program.num_vectors > 0

    @abstractmethod
    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        """Enqueue one direction; arguments are checked, with at least one page and one step."""


def total_bytes(program: Program, pages: Sequence[Pages]) -> int:
    """Return the bytes of a move."""
    return sum(nbytes * vector.frames.numel() for nbytes, vector in zip(program.page_bytes, pages, strict=False))

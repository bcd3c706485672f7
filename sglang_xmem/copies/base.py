"""What every page copier does: move pages between frames of a memory tier and the pools on the device.

Words used here. A *plane* is an array on the device of which a page has one contiguous *unit*. A *frame* is the tier
memory of one page, all its planes. A *move* is one load or store of pages of any index spaces. *Load* moves tier ->
device, *store* device -> tier (SGLang calls the latter backup or write-back). A *part* of a load is what one layer
waits for.
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

#: Parts of one load at most: a plane's record has 16 bits for its part.
MAX_PARTS: Final = 1 << 15


class Step(NamedTuple):
    """One plane's share of a move.

    Attributes:
        plane: what is copied of each page.
        vector: which of the move's Pages gives its frames and slots.
        part: number of the counter (SGLang's transfer layer) that it belongs to; steps are sorted by it.
    """

    plane: Plane
    vector: int
    part: int


class Pages(NamedTuple):
    """One index space's pages of one load or store: page i is in frames[i] and in unit slots[i] // divisor.

    Attributes:
        frames: int64, shape (n,), contiguous: address of each frame as the copying GPU or CPU sees it.
        slots: int64, shape (n,), any element stride: first slot (token) of each page on the device, below 2^40.

    Both are on the device of the pools; n may be 0; a destination must not occur twice. The caller keeps both alive
    until the stream has passed the move.
    """

    frames: torch.Tensor
    slots: torch.Tensor


class Program:
    """Steps compiled for one copier, for any number of moves.

    Args:
        copier: whose program this is; no other runs it.
        steps: sorted by part.
        num_parts: parts that a load has, with steps or without.

    Raises:
        ValueError: steps that make no sense; the message says which.
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
        #: Bytes that a page of each vector moves.
        self.page_bytes = [0] * self.num_vectors
        for step in steps:
            self.page_bytes[step.vector] += step.plane.unit_bytes


class PageCopier(ABC):
    """Copies pages between frames of `slabs` and arrays on `device`.

    Args:
        slabs: where frames lie; fixed for the copier's whole life.
        device: of the pools, and of the vectors of pages.

    Raises:
        ValueError: no slab, or one without frames.
    """

    name: ClassVar[str]

    def __init__(self, slabs: Sequence[Slab], device: torch.device) -> None:
        for slab in slabs:
            if slab.address <= 0 or slab.frames < 1 or slab.frame_bytes < 1:
                raise ValueError(f"a slab has an address and at least one frame of at least one byte, not {slab}")
        if not slabs:
            raise ValueError("a copier needs at least one slab of frames")
        self.slabs = tuple(slabs)
        # With its number, as tensors have it.
        self.device = torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device

    @abstractmethod
    def compile(self, steps: Sequence[Step], num_parts: int) -> Program:
        """Prepare for moves of these planes; called once for a set of pools, and may wait for the GPU.

        Args:
            steps: sorted by part, at most 2^16 of them.
            num_parts: of a load, with steps or without (SGLang's transfer_layer_id_max).

        Raises:
            ValueError: steps that make no sense.
            CopyError: this copier cannot reach a plane, or its kernel cannot be made.
        """

    def load(
        self,
        program: Program,
        pages: Sequence[Pages],
        counters: LayerCounters | None = None,
        addresses: Sequence[npt.NDArray[np.int64]] | None = None,
    ) -> None:
        """Enqueue tier -> device on the current stream; never waits, and takes the same time for any number of pages.

        Args:
            program: from this copier's `compile`.
            pages: those of each vector that the program's steps name.
            counters: from `make_counters`: report when each part is in place. The previous load that used them is
                complete.
            addresses: `frames` of each of `pages`, on the CPU, for copiers that plan with them.

        Raises:
            CopyError: the driver refuses; the counters stand as if the load had not been asked for.
        """
        if counters is not None and counters.num_parts != program.num_parts:
            raise ValueError(f"{counters.num_parts} counters for a load of {program.num_parts} parts")
        if self._any_pages(program, pages):
            self._copy(program, pages, load=True, counters=counters)

    def store(self, program: Program, pages: Sequence[Pages]) -> None:
        """Enqueue device -> tier on the current stream; as `load`, the other way."""
        if self._any_pages(program, pages):
            self._copy(program, pages, load=False, counters=None)

    def make_counters(self, num_parts: int) -> LayerCounters | None:
        """Counters for `load`; None where this copier or this GPU has none. Waits for the GPU."""
        return None

    def describe(self) -> str:
        """What this copier is and how it is set, for one log line."""
        return self.name

    def _any_pages(self, program: Program, pages: Sequence[Pages]) -> bool:
        """Whether there is anything to do; the checks that a launch can afford."""
        if program.copier is not self:
            raise ValueError("a program is run by the copier that compiled it")
        if not program.num_vectors <= len(pages) <= MAX_VECTORS:
            raise ValueError(f"{len(pages)} vectors of pages for a program that has {program.num_vectors}")
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
                raise ValueError(f"{count} frames against {slots.numel()} slots")
            if count > 1 and frames.stride(0) != 1:
                raise ValueError("frames must be contiguous")
            some |= count
        return some != 0 and program.num_vectors > 0

    @abstractmethod
    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        """Enqueue one direction; arguments are checked, there is at least one page, and at least one step."""


def total_bytes(program: Program, pages: Sequence[Pages]) -> int:
    """Bytes that a move has."""
    return sum(nbytes * vector.frames.numel() for nbytes, vector in zip(program.page_bytes, pages, strict=False))

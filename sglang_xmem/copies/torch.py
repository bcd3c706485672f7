"""The page copy on CPU memory: the reference implementation, and the copier without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.geometry import Slab

#: Contiguous units, shape (units,): each element is a whole unit, as a NumPy void type.
Units = npt.NDArray[np.void]


class TorchPageCopier(PageCopier):
    """Copies synchronously on the calling thread; arguments as for PageCopier, all memory on the CPU.

    Raises:
        ValueError: also for a device that is not the CPU. Moves refuse frames that are not in a slab.
    """

    name = "torch"

    def __init__(self, slabs: Sequence[Slab], device: torch.device) -> None:
        super().__init__(slabs, device)
        if self.device.type != "cpu":
            raise ValueError(f"the copier 'torch' is for pools on the CPU, not on {self.device}")

    def compile(self, steps: Sequence[Step], num_parts: int) -> TorchProgram:
        return TorchProgram(self, steps, num_parts)

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, TorchProgram)
        if counters is not None:
            raise ValueError("the copier 'torch' has no counters: a load is in place when it returns")
        slots = [vector.slots.numpy() for vector in pages]
        found = [self._in_slabs(vector.frames.numpy()) for vector in pages]
        for step, device, tiers in program.views:
            units = slots[step.vector] // step.plane.divisor
            for number, which, frames in found[step.vector]:
                tier = tiers[number]
                if tier is None:
                    raise ValueError(f"frames of slab {self.slabs[number]} do not hold {step.plane}")
                if load:
                    device[units[which]] = tier[frames]
                else:
                    tier[frames] = device[units[which]]

    def _in_slabs(
        self, addresses: npt.NDArray[np.int64]
    ) -> list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Group frames by slab: yield its number, the indices of its pages, and their frames.

        Raises:
            ValueError: an address is not a frame's.
        """
        found, known = [], 0
        for number, slab in enumerate(self.slabs):
            end = slab.address + slab.frames * slab.frame_bytes
            (which,) = np.nonzero((addresses >= slab.address) & (addresses < end))
            frames, within = np.divmod(addresses[which] - slab.address, slab.frame_bytes)
            if within.any():
                raise ValueError(f"no frame of {slab} begins at {addresses[which][within != 0][0]:#x}")
            if len(which):
                found.append((number, which, frames))
            known += len(which)
        if known != len(addresses):
            raise ValueError(f"{len(addresses) - known} of {len(addresses)} frames are not in exactly one slab")
        return found


class TorchProgram(Program):
    """A program with a view of each plane, and of its units in each slab.

    Attributes:
        views: for each step, the device's units, and those of the frames of each slab; None if the unit does not fit
            into such a frame.
    """

    def __init__(self, copier: PageCopier, steps: Sequence[Step], num_parts: int) -> None:
        super().__init__(copier, steps, num_parts)
        self.views: list[tuple[Step, Units, list[Units | None]]] = []
        for step in steps:
            plane = step.plane
            device = units_at(plane.device_address, plane.device_units, plane.device_stride, plane.unit_bytes)
            tiers = [
                units_at(slab.address + plane.offset, slab.frames, slab.frame_bytes, plane.unit_bytes)
                if plane.offset + plane.unit_bytes <= slab.frame_bytes
                else None
                for slab in copier.slabs
            ]
            self.views.append((step, device, tiers))


def units_at(address: int, count: int, stride: int, unit_bytes: int) -> Units:
    """View `count` units of unit_bytes in this process's memory, `stride` bytes apart."""
    memory = (ctypes.c_uint8 * ((count - 1) * stride + unit_bytes)).from_address(address)
    return np.ndarray((count,), dtype=f"V{unit_bytes}", buffer=memoryview(memory), strides=(stride,))

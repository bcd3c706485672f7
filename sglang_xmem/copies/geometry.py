"""Geometry of copies: planes on the device, slabs of frames in the tier. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

#: Largest unit, in bytes.
MAX_UNIT_BYTES: Final = 64 << 20
#: Maximum vectors of pages in one move.
MAX_VECTORS: Final = 16
#: Slots (token numbers) are below this.
MAX_SLOT: Final = 1 << 40
#: A divisor times a slot stays within 64 bits.
MAX_DIVISOR: Final = 1 << 24


class Plane(NamedTuple):
    """One array on the device in which each page has one contiguous unit.

    Attributes:
        device_address: of unit 0.
        device_stride: bytes from one unit to the next, at least unit_bytes.
        device_units: number of units in the device array.
        offset: offset of this plane's unit in its frame, in bytes.
        unit_bytes: bytes of a unit, contiguous on both sides; 1 to MAX_UNIT_BYTES.
        divisor: the unit of a slot is number slot // divisor (the page size; 1 for Mamba states).
    """

    device_address: int
    device_stride: int
    device_units: int
    offset: int
    unit_bytes: int
    divisor: int

    @property
    def device_bytes(self) -> int:
        """Return the bytes from the first byte of unit 0 to the last byte of the last unit."""
        return (self.device_units - 1) * self.device_stride + self.unit_bytes

    def check(self, slabs: Iterable[Slab]) -> None:
        """Raise ValueError for numbers that no copier supports, or a unit that does not fit into any slab's frame."""
        room = max((slab.frame_bytes for slab in slabs), default=0)
        fine = {
            "unit_bytes": 1 <= self.unit_bytes <= MAX_UNIT_BYTES,
            "device_stride": self.device_stride >= self.unit_bytes,
            "device_units": self.device_units >= 1,
            "device_address": self.device_address > 0,
            "divisor": 1 <= self.divisor <= MAX_DIVISOR,
            "offset": self.offset >= 0 and self.offset + self.unit_bytes <= room,
        }
        for name, ok in fine.items():
            if not ok:
                raise ValueError(f"{name} is out of range in {self}, with frames of at most {room} bytes")


class Slab(NamedTuple):
    """Contiguous frames in one range of addresses: frame i is at address + i * frame_bytes."""

    address: int
    frames: int
    frame_bytes: int


def alignment_of(slabs: Iterable[Slab], planes: Iterable[Plane], most: int) -> int:
    """Return the largest divisor of `most` (bytes) that divides all addresses and sizes of a copy."""
    numbers = [most]
    for slab in slabs:
        numbers += [slab.address, slab.frame_bytes if slab.frames > 1 else 0]
    for plane in planes:
        stride = plane.device_stride if plane.device_units > 1 else 0
        numbers += [plane.device_address, stride, plane.offset, plane.unit_bytes]
    return math.gcd(*numbers)

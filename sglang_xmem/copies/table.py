"""The arguments of page_copy.cu: one record per plane, in a table that is written once, and a launch's parameters."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sglang_xmem.copies.geometry import MAX_VECTORS
from sglang_xmem.copies.tuning import CudaTuning

if TYPE_CHECKING:
    from sglang_xmem.copies.base import Step

#: `struct Plane` of page_copy.cu; the last word is not used.
_RECORD: Final = struct.Struct("<QQQQQIHHIIQ")
RECORD_BYTES: Final = _RECORD.size
#: Where a record has its plane's offset in the frame: a word of 8 bytes.
RECORD_OFFSET: Final = 16
#: Parameters before the vectors: table, planes, load, counters, parts (and a gap).
_HEAD: Final = struct.Struct("<QIIQII")
#: Where each parameter begins; the last one is `struct Vectors`, 32 bytes a vector.
PARAMETER_OFFSETS: Final = (0, 8, 12, 16, 24, 32)
_VECTOR_WORDS: Final = 4
PARAMETERS_BYTES: Final = _HEAD.size + 8 * _VECTOR_WORDS * MAX_VECTORS
_VECTORS: Final = [struct.Struct(f"<{_VECTOR_WORDS * count}q") for count in range(MAX_VECTORS + 1)]
#: Tiles of a plane at most: the kernel adds up those of 32 planes in 32 bits, and divides their pieces by multiplying.
_MAX_TILES: Final = 1 << 26


def magic(divisor: int) -> int:
    """What `divide` of page_copy.cu multiplies by: the upper 64 bits of n * magic are n // divisor; 0 for 1."""
    return 0 if divisor == 1 else -(-(1 << 64) // divisor)


def divider(divisor: int) -> tuple[int, int]:
    """Magic and shift of `Divider` of page_copy.cu: n * magic >> shift is n // divisor for 0 <= n < 2^31."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


def record(step: Step, tuning: CudaTuning, vector_bytes: int) -> bytes:
    """A plane's record, 64 bytes.

    Args:
        tuning: of the launches that read it.
        vector_bytes: of a thread's access, which divides all the plane's addresses and sizes; register variant.
    """
    plane = step.plane
    pieces, piece = tuning.pieces(plane.unit_bytes, vector_bytes)
    first, second = (piece, plane.unit_bytes) if tuning.variant == "bulk" else divider(pieces)
    return _RECORD.pack(
        plane.device_address,
        plane.device_stride,
        plane.offset,
        magic(plane.divisor),
        magic(pieces),
        pieces,
        step.vector,
        step.part,
        first,
        second,
        0,
    )


class Work:
    """How many tiles a move has, without a look at each plane.

    Args:
        steps: of a program.
        tuning, vector_bytes: as `record`'s.
    """

    def __init__(self, steps: Sequence[Step], tuning: CudaTuning, vector_bytes: int) -> None:
        self._tile_pieces = tuning.tile_pieces
        vectors = max((step.vector + 1 for step in steps), default=0)
        self._pieces, self._planes = [0] * vectors, [0] * vectors
        largest = [1] * vectors
        for step in steps:
            pieces, _ = tuning.pieces(step.plane.unit_bytes, vector_bytes)
            self._pieces[step.vector] += pieces
            self._planes[step.vector] += 1
            largest[step.vector] = max(largest[step.vector], pieces)
        self._most = [_MAX_TILES * self._tile_pieces // pieces for pieces in largest]

    def tiles(self, counts: Sequence[int]) -> int:
        """Tiles of a move at most; a plane whose last tile is not full is counted as if it had one more.

        Args:
            counts: pages of each vector.

        Raises:
            ValueError: more pages than the kernel can count.
        """
        tiles = 0
        for count, pieces, planes, most in zip(counts, self._pieces, self._planes, self._most, strict=False):
            if count > most:
                raise ValueError(f"{count} pages in one vector are more than the {most} that one launch can move")
            if count:
                tiles += count * pieces // self._tile_pieces + (planes if self._tile_pieces > 1 else 0)
        return tiles


class Parameters:
    """Buffer of a kernel's parameters, for launches by one thread at a time: the driver copies it during the call.

    Args:
        table: address of the planes' records.
        num_planes, num_parts: of the program.
        load: the direction.
    """

    def __init__(self, table: int, num_planes: int, num_parts: int, *, load: bool) -> None:
        self._fixed = (table, num_planes, int(load))
        self._num_parts = num_parts
        self._buffer = ctypes.create_string_buffer(PARAMETERS_BYTES)
        slots = [ctypes.addressof(self._buffer) + offset for offset in PARAMETER_OFFSETS]
        self._pointers = (ctypes.c_void_p * len(slots))(*slots)
        #: What cuLaunchKernel is given: address of the array of the parameters' addresses.
        self.address = ctypes.addressof(self._pointers)

    def pack(self, counters: int, vectors: Sequence[int]) -> None:
        """Write what changes from launch to launch.

        Args:
            counters: address of the first counter; 0 for none.
            vectors: for each vector four numbers: address of the frames, address of the slots, elements from one
                slot to the next, pages.
        """
        _HEAD.pack_into(self._buffer, 0, *self._fixed, counters, self._num_parts, 0)
        _VECTORS[len(vectors) // _VECTOR_WORDS].pack_into(self._buffer, _HEAD.size, *vectors)

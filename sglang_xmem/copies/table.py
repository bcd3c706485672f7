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
#: Position of the plane's offset in a record: an 8-byte word.
RECORD_OFFSET: Final = 16
#: Parameters before the vectors: table, planes, load, counters, parts (and a gap).
_HEAD: Final = struct.Struct("<QIIQII")
#: Start of each parameter; the last one is `struct Vectors`, 32 bytes per vector.
PARAMETER_OFFSETS: Final = (0, 8, 12, 16, 24, 32)
_VECTOR_WORDS: Final = 4
PARAMETERS_BYTES: Final = _HEAD.size + 8 * _VECTOR_WORDS * MAX_VECTORS
_VECTORS: Final = [struct.Struct(f"<{_VECTOR_WORDS * count}q") for count in range(MAX_VECTORS + 1)]
#: Maximum tiles of a plane: the kernel sums those of 32 planes in 32 bits, and divides their pieces by multiplication.
_MAX_TILES: Final = 1 << 26


def magic(divisor: int) -> int:
    """Return the factor of `divide` in page_copy.cu: n // divisor is the upper half of n * magic; 0 for divisor 1."""
    return 0 if divisor == 1 else -(-(1 << 64) // divisor)


def divider(divisor: int) -> tuple[int, int]:
    """Return magic and shift of `Divider` in page_copy.cu: n * magic >> shift is n // divisor for 0 <= n < 2^31."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


def record(step: Step, tuning: CudaTuning, vector_bytes: int) -> bytes:
    """Encode a plane's record, 64 bytes.

    Args:
        tuning: of the launches.
        vector_bytes: bytes of a thread's access, which divides all the plane's addresses and sizes; register variant.
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
    """Tile counts of a move, without a loop over planes.

    Args:
        steps: of a program.
        tuning, vector_bytes: see `record`.
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
        """Return an upper bound of a move's tiles: a plane with a partial last tile counts one more.

        Args:
            counts: number of pages per vector.

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


class ParameterBuffer:
    """A kernel's parameters, for launches by one thread at a time: the driver copies them during the call.

    Args:
        offsets: of each parameter.
        nbytes: of all.

    Attributes:
        buffer: what is written before a launch; zero at first.
        address: argument of cuLaunchKernel: address of the array of the parameters' addresses.
    """

    def __init__(self, offsets: Sequence[int], nbytes: int) -> None:
        self.buffer = ctypes.create_string_buffer(nbytes)
        places = [ctypes.addressof(self.buffer) + offset for offset in offsets]
        self._pointers = (ctypes.c_void_p * len(places))(*places)
        self.address = ctypes.addressof(self._pointers)


class Parameters(ParameterBuffer):
    """Parameters of page_copy.cu.

    Args:
        table: address of the planes' records.
        num_planes, num_parts: of the program.
        load: the direction.
    """

    def __init__(self, table: int, num_planes: int, num_parts: int, *, load: bool) -> None:
        super().__init__(PARAMETER_OFFSETS, PARAMETERS_BYTES)
        self._fixed = (table, num_planes, int(load))
        self._num_parts = num_parts

    def pack(self, counters: int, vectors: Sequence[int]) -> None:
        """Write the variable parameters.

        Args:
            counters: address of the first counter; 0 for none.
            vectors: four numbers per vector: address of the frames, address of the slots, stride of the slots in
                elements, pages.
        """
        _HEAD.pack_into(self.buffer, 0, *self._fixed, counters, self._num_parts, 0)
        _VECTORS[len(vectors) // _VECTOR_WORDS].pack_into(self.buffer, _HEAD.size, *vectors)

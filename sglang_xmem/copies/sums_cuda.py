"""Checksums of pages by a CUDA kernel, after the copies on the same stream."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.copies import nvrtc
from sglang_xmem.copies.base import Pages
from sglang_xmem.copies.geometry import MAX_VECTORS
from sglang_xmem.copies.table import ParameterBuffer, magic
from sglang_xmem.kernels import source
from sglang_xmem.sums import Chosen, Group, Report, Summer

SOURCE_FILE: Final = "page_sum.cu"
WARPS: Final = 16
#: Maximum reports in flight; a load's report is read before SGLang starts the third load after it.
_REPORTS: Final = 64
#: `struct Plane` of page_sum.cu.
_RECORD: Final = struct.Struct("<6Q")
#: Parameters before `struct Work`: planes, groups, store, scratch, report.
_HEAD: Final = struct.Struct("<QIIQQ")
_OFFSETS: Final = (0, 8, 12, 16, 24, 32)
_VECTOR: Final = struct.Struct("<Qq")
_GROUP: Final = struct.Struct("<QQQII")


def piece_bytes(groups: Sequence[Group]) -> int:
    """Return the kernel's read width: 8 bytes, or less if addresses and sizes are not multiples of that."""
    numbers = [8]
    for group in groups:
        for plane, _ in group.planes:
            numbers += [plane.device_address, plane.device_stride if plane.device_units > 1 else 0, plane.unit_bytes]
    return math.gcd(*numbers)


def records(groups: Sequence[Group]) -> bytes:
    """Encode the planes of all groups for the kernel."""
    return b"".join(
        _RECORD.pack(p.device_address, p.device_stride, p.offset, magic(p.divisor), p.unit_bytes, vector)
        for group in groups
        for p, vector in group.planes
    )


class Parameters(ParameterBuffer):
    """Parameter buffer of the kernel, for launches by one thread at a time."""

    def __init__(self, table: int, groups: Sequence[Group]) -> None:
        super().__init__(_OFFSETS, _HEAD.size + (_VECTOR.size + _GROUP.size) * MAX_VECTORS)
        self._table = table
        self._planes = [len(group.planes) for group in groups]

    def pack(
        self,
        pages: Sequence[Pages],
        rows: Sequence[torch.Tensor],
        entries: Sequence[torch.Tensor],
        *,
        scratch: int,
        report: int,
    ) -> int:
        """Write the variable parameters; return the number of warps with work.

        Args:
            rows, entries: of each group, in memory that the kernel reads.
            scratch: address of two zero words per page.
            report: address of two zero words on the device; 0 writes the sums instead of comparing them.
        """
        _HEAD.pack_into(self.buffer, 0, self._table, len(self._planes), int(not report), scratch, report)
        at = _HEAD.size
        for vector in pages:
            _VECTOR.pack_into(self.buffer, at, vector.slots.data_ptr(), vector.slots.stride(0))
            at += _VECTOR.size
        at = _HEAD.size + _VECTOR.size * MAX_VECTORS
        items = first = 0
        for planes, some, places in zip(self._planes, rows, entries, strict=True):
            count = some.numel()
            _GROUP.pack_into(self.buffer, at, some.data_ptr(), places.data_ptr(), count, first, planes)
            at += _GROUP.size
            first += planes
            items += count * planes
        return items


class CudaReport(Report):
    """Two words of pinned memory, copied from the kernel's report: the number of damaged pages, and one of them."""

    def __init__(self, words: torch.Tensor, chosen: Sequence[Chosen]) -> None:
        self.words = words
        self._chosen = chosen

    def wrong(self) -> tuple[int, str]:
        count, which = self.words.tolist()
        if not count:
            return 0, ""
        group, page = which >> 32, which & 0xFFFFFFFF
        return count, f"page {int(self._chosen[group].pages[page])} of pool {group}"


class CudaSummer(Summer):
    """Sums on the rank's own GPU.

    Args:
        device: of the pools.

    Raises:
        CopyError: the kernel cannot be compiled.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        properties: Any = torch.cuda.get_device_properties(device)
        self._capability = (properties.major, properties.minor)
        # One thread block per multiprocessor: memory bandwidth is the limit, so this disturbs the forward pass for the
        #     shortest time.
        self._ctas: int = properties.multi_processor_count
        # Allocating pinned memory later would stall the GPU.
        self._reports = list(torch.zeros((_REPORTS, 2), dtype=torch.int64, pin_memory=True))
        self._next = 0
        self._function(8)

    def _function(self, piece: int) -> Any:
        macros = {"PIECE_BYTES": piece, "THREADS": 32 * WARPS}
        image = nvrtc.build(source(SOURCE_FILE), SOURCE_FILE, macros, self._capability)
        return nvrtc.load(image, "page_sum", self._device)

    def prepare(self, groups: Sequence[Group]) -> CudaSums:
        return CudaSums(groups, self._function(piece_bytes(groups)), self._device)

    def lists(self, prepared: CudaSums, chosen: Sequence[Chosen]) -> list[npt.NDArray[np.int64]]:
        rows = [these.rows.numpy() for these in chosen]
        scratch = np.zeros(2 * sum(map(len, rows)) + 2, dtype=np.int64)  # two words per page, and the report
        return [*rows, *prepared.entries(chosen), scratch]

    def write(
        self, prepared: CudaSums, pages: Sequence[Pages], chosen: Sequence[Chosen], lists: Sequence[torch.Tensor]
    ) -> None:
        self._launch(prepared, pages, lists, 0)

    def compare(
        self, prepared: CudaSums, pages: Sequence[Pages], chosen: Sequence[Chosen], lists: Sequence[torch.Tensor]
    ) -> CudaReport:
        words = self._reports[self._next]
        self._next = (self._next + 1) % _REPORTS
        counted = lists[-1][-2:]
        self._launch(prepared, pages, lists, counted.data_ptr())
        words.copy_(counted, non_blocking=True)
        return CudaReport(words, chosen)

    def _launch(self, prepared: CudaSums, pages: Sequence[Pages], lists: Sequence[torch.Tensor], report: int) -> None:
        *found, scratch = lists
        rows, entries = found[: len(found) // 2], found[len(found) // 2 :]
        items = prepared.parameters.pack(pages, rows, entries, scratch=scratch.data_ptr(), report=report)
        grid = min(self._ctas, -(-items // WARPS))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        nvrtc.launch(prepared.function, grid, 32 * WARPS, 0, stream, prepared.parameters.address, self._device)


class CudaSums:
    """Groups with their table of planes on the GPU."""

    def __init__(self, groups: Sequence[Group], function: Any, device: torch.device) -> None:
        self.function = function
        self._tables = [group.sums.table.data_ptr() for group in groups]
        self._kept = groups  # with their tables
        self._planes = nvrtc.upload(bytearray(records(groups)), device)
        self.parameters = Parameters(self._planes.data_ptr(), groups)

    def entries(self, chosen: Sequence[Chosen]) -> list[npt.NDArray[np.int64]]:
        """Return the addresses of the chosen pages' sums, which are equal for GPU and CPU."""
        return [table + 8 * these.pages.numpy() for table, these in zip(self._tables, chosen, strict=True)]

"""Loads from host memory by the GPU's copy engines, which need no multiprocessor while the forward pass computes.

A persistent attention kernel has one block on every multiprocessor, and no block ends before all have started. Blocks
of a copy kernel that run for a whole load keep such a kernel from starting. A copy engine also uses more of the link.

Engines cannot look up slots, which are only on the GPU. So a load is divided into *chunks*: the bytes of one *piece*
(the planes of some consecutive parts and one vector) of some pages. A chunk is copied to a staging buffer by one 2D
copy per run of adjacent frames; then a short launch of the copy kernel moves its rows to their slots. Chunks use the
staging buffers round-robin, each with its own stream, so that the link does not wait for multiprocessors. Launches run
in the order of chunks; a part's counter is written after its last launch.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.copies import nvrtc
from sglang_xmem.copies.base import PageCopier, Pages, Program, Step, total_bytes
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.geometry import Slab, alignment_of
from sglang_xmem.copies.table import PARAMETER_OFFSETS, PARAMETERS_BYTES, RECORD_BYTES, RECORD_OFFSET, record
from sglang_xmem.copies.tuning import DEFAULT_TUNING, VECTOR_BYTES, CudaTuning
from sglang_xmem.errors import CopyError

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

#: Staging buffers: one is filled while the other one is emptied.
BUFFERS: Final = 2
#: Bytes of a load below which launch latency dominates, and the kernel is as fast.
MIN_LOAD_BYTES = 16 << 20
#: Minimum bytes of a chunk, to which parts are combined: 0.15 ms of a PCIe link, compared with some microseconds of
#:     calls.
MIN_CHUNK_BYTES = 8 << 20
#: Minimum average bytes of a row and of a copy; a copy engine is slow with shorter ones (docs/performance.md).
MIN_ROW_BYTES = 8 << 10
MIN_COPY_BYTES = 1 << 20
#: Maximum driver calls of a load, on the scheduler thread.
MOST_CALLS = 700
#: Maximum parts of a load: one call, of at most 256 operations, writes their counters.
MOST_PARTS = 250
#: Gaps of at most these bytes between two planes are copied too, instead of making two copies.
_GAP = 512
#: Maximum rows of a chunk, and bytes of a frame; limits of the driver.
_MOST_ROWS = 1 << 16
_MOST_FRAME_BYTES = (1 << 31) - 1
#: Number of refused loads in a row after which the kernel makes all loads.
_MOST_REFUSALS = 3
#: Tuning of the kernel after each chunk. More blocks end sooner, but disturb the forward pass more.
SCATTER: Final = DEFAULT_TUNING["load", "pcie"]

_UNIFIED: Final = 4  # CU_MEMORYTYPE_UNIFIED
_WRITE: Final = 2  # CU_STREAM_MEM_OP_WRITE_VALUE_32
#: 8-byte words of CUDA_MEMCPY2D, CUstreamBatchMemOpParams, and the copy kernel's parameters.
_COPY_WORDS, _OPERATION_WORDS, _PARAMETER_WORDS = 16, 6, PARAMETERS_BYTES // 8


class Gpu:
    """The driver calls of a load, with addresses instead of Python objects, on one stream per staging buffer.

    Args:
        device: a GPU.

    Raises:
        CopyError: there is no libcuda.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            library = ctypes.CDLL("libcuda.so.1")
            self._copy = library.cuMemcpy2DAsync_v2
            self._batch = library.cuStreamBatchMemOp_v2
            self._launch = library.cuLaunchKernel
            self._record, self._wait = library.cuEventRecord, library.cuStreamWaitEvent
        except (OSError, AttributeError) as error:
            raise CopyError(f"The driver lacks a call for copies by engines: {error}") from None
        word, pointer = ctypes.c_uint, ctypes.c_void_p
        self._copy.argtypes = [pointer, pointer]
        self._batch.argtypes = [pointer, word, pointer, word]
        self._launch.argtypes = [pointer, *[word] * 7, pointer, pointer, pointer]
        self._record.argtypes, self._wait.argtypes = [pointer, pointer], [pointer, pointer, word]
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(BUFFERS)]
        self._handles = [stream.cuda_stream for stream in self._streams]
        self._before = torch.cuda.Event()
        self._after = [torch.cuda.Event() for _ in range(BUFFERS)]
        #: Events after the last chunk of each stream. A recorded event has a handle.
        self._chunks = [torch.cuda.Event() for _ in range(BUFFERS)]
        for stream, event in zip(self._streams, self._chunks, strict=True):
            event.record(stream)
        self._events = [event.cuda_event for event in self._chunks]

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate memory, uint8 (nbytes,), that no enqueued work uses.

        Raises:
            CopyError: the GPU has too little free memory.
        """
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            raise CopyError(f"The GPU has no {nbytes >> 20} MiB free.") from None
        # Enqueued work may still use the memory's previous contents.
        torch.cuda.current_stream(self._device).synchronize()
        return memory

    def upload(self, content: bytearray) -> torch.Tensor:
        """Copy bytes to the GPU and wait, so that launches on any stream can use them."""
        return nvrtc.upload(content, self._device)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Order the block's work after the current stream's, and the current stream's later work after it."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            self._before.record(current)
            for stream in self._streams:
                stream.wait_event(self._before)
            try:
                yield
            finally:
                for stream, event in zip(self._streams, self._after, strict=True):
                    event.record(stream)
                    current.wait_event(event)

    def copy(self, descriptor: int, turn: int) -> None:
        """Enqueue the copy of rows that a CUDA_MEMCPY2D describes."""
        status = self._copy(descriptor, self._handles[turn])
        if status:
            raise CopyError(f"The driver refuses a copy of rows (CUDA error {status}).")

    def follow(self, turn: int) -> None:
        """Order a stream after the previous stream's last chunk, by `done`."""
        status = self._wait(self._handles[turn], self._events[turn - 1], 0)
        if status:
            raise CopyError(f"The driver refuses to order a load's copies (CUDA error {status}).")

    def done(self, turn: int) -> None:
        """Record that a chunk is enqueued completely."""
        status = self._record(self._events[turn], self._handles[turn])
        if status:
            raise CopyError(f"The driver refuses to order a load's copies (CUDA error {status}).")

    def write(self, operations: int, count: int, turn: int) -> None:
        """Enqueue `count` writes: CUstreamBatchMemOpParams."""
        status = self._batch(self._handles[turn], count, operations, 0)
        if status:
            raise CopyError(f"The driver refuses to write a counter (CUDA error {status}).")

    def launch(self, function: int, grid: int, tuning: CudaTuning, parameters: int, turn: int) -> None:
        """Enqueue a kernel; `parameters` is the address of its parameters' addresses."""
        status = self._launch(
            function, grid, 1, 1, 32 * tuning.warps, 1, 1, tuning.shared_bytes, self._handles[turn], parameters, None
        )
        if status:
            raise CopyError(f"The driver refuses to launch the copy kernel (CUDA error {status}).")


class Piece(NamedTuple):
    """Planes of one vector in some consecutive parts, and their places in a frame and in a staging row.

    Attributes:
        vector: of all planes.
        group: number of the group of parts.
        steps: as in the program; the planes' offsets are in a row.
        segments: offset in the frame, bytes, and offset in the row, of each range of bytes.
    """

    vector: int
    group: int
    steps: tuple[Step, ...]
    segments: tuple[tuple[int, int, int], ...]

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row."""
        return sum(nbytes for _, nbytes, _ in self.segments)


def pieces_of(steps: Sequence[Step], parts_in_group: int) -> tuple[list[Piece], list[int]]:
    """Combine steps by parts and vectors.

    Args:
        steps: sorted by part.
        parts_in_group: number of parts with steps that form one piece per vector.

    Returns: the pieces, sorted by group; and the first part of each group.
    """
    parts = sorted({step.part for step in steps})
    first_parts = parts[::parts_in_group]
    group_of = {part: number // parts_in_group for number, part in enumerate(parts)}
    by_piece: dict[tuple[int, int], list[Step]] = {}
    for step in steps:
        by_piece.setdefault((group_of[step.part], step.vector), []).append(step)
    pieces = []
    for (group, vector), mine in sorted(by_piece.items()):
        segments: list[tuple[int, int, int]] = []
        placed = []
        for step in sorted(mine, key=lambda step: step.plane.offset):
            offset, nbytes = step.plane.offset, step.plane.unit_bytes
            start, width, at = segments[-1] if segments else (0, 0, 0)
            if segments and offset <= start + width + _GAP:
                segments[-1] = (start, max(width, offset + nbytes - start), at)
            else:
                segments.append((offset, nbytes, at + width))
            start, _, at = segments[-1]
            placed.append(step._replace(plane=step.plane._replace(offset=at + offset - start)))
        pieces.append(Piece(vector, group, tuple(placed), tuple(segments)))
    return pieces, first_parts


class Layout:
    """The pieces of a program for loads of some size, as arrays with one element per piece, and their tables.

    Args:
        pieces, first_parts: from `pieces_of`.
        num_parts: of the program.
        buffer_bytes: of a staging buffer.
        tuning, alignment: of the scatter kernel.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        first_parts: Sequence[int],
        num_parts: int,
        buffer_bytes: int,
        tuning: CudaTuning,
        alignment: int,
    ) -> None:
        self.pieces = pieces
        self.num_groups = len(first_parts)
        self.vector = _ints(piece.vector for piece in pieces)
        self.group = _ints(piece.group for piece in pieces)
        self.planes = _ints(len(piece.steps) for piece in pieces)
        #: For each piece, its first record in the table.
        self.first = np.cumsum(self.planes) - self.planes
        self.row_bytes = _ints(piece.row_bytes for piece in pieces)
        self.most_rows = np.minimum(buffer_bytes // self.row_bytes, _MOST_ROWS)
        self.fits = bool((self.most_rows > 0).all())
        #: The kernel's tile counts per row.
        self.units = _ints(
            sum(tuning.pieces(step.plane.unit_bytes, alignment)[0] for step in piece.steps) for piece in pieces
        )
        self.segments = _ints(len(piece.segments) for piece in pieces)
        self.first_segment = np.cumsum(self.segments) - self.segments
        self.segment = np.array([segment for piece in pieces for segment in piece.segments], dtype=np.int64)
        #: Group of each part, or the group before it; -1 before the first.
        self.group_of_part = np.searchsorted(np.array(first_parts), np.arange(num_parts), side="right") - 1
        #: Addresses of each buffer's table and of each piece's row offsets, once uploaded.
        self.tables = np.zeros(BUFFERS, dtype=np.int64)
        self.rows = np.zeros(len(pieces), dtype=np.int64)

    def records(self, buffers: Sequence[int], tuning: CudaTuning, alignment: int) -> list[bytes]:
        """Make the table of each staging buffer, by its address: a plane is at its offset in a row of the buffer."""
        steps = [Step(step.plane, 0, 0) for piece in self.pieces for step in piece.steps]
        table = np.frombuffer(b"".join(record(step, tuning, alignment) for step in steps), dtype=np.uint64)
        first = np.zeros((len(steps), RECORD_BYTES // 8), dtype=np.uint64)
        first[:, RECORD_OFFSET // 8] = 1
        return [(table + np.uint64(buffer) * first.reshape(-1)).tobytes() for buffer in buffers]


def _ints(numbers: Any) -> Ints:
    return np.fromiter(numbers, dtype=np.int64)


class DmaProgram(Program):
    """A program for both ways.

    Attributes:
        by_kernel: the kernel's program.
        layouts: by the logarithm of the number of parts per group; empty if engines cannot load these planes.
    """

    def __init__(self, copier: DmaCopier, steps: Sequence[Step], num_parts: int) -> None:
        super().__init__(copier, steps, num_parts)
        self.by_kernel = copier.kernel.compile(steps, num_parts)
        self.parts = len({step.part for step in steps})
        self.layouts: list[Layout] = []
        self.function = 0
        if not 0 < num_parts <= MOST_PARTS or not steps:
            return
        alignment = alignment_of(copier.slabs, [step.plane for step in steps], VECTOR_BYTES)
        self.tuning, self.function = copier.kernel.scatter(SCATTER, alignment)
        for number in range(self.parts.bit_length()):
            pieces, first_parts = pieces_of(steps, 1 << number)
            layout = Layout(pieces, first_parts, num_parts, copier.buffer_bytes, self.tuning, alignment)
            if not layout.fits:
                break
            self.layouts.append(layout)
        self._upload(copier, alignment)

    def _upload(self, copier: DmaCopier, alignment: int) -> None:
        """Copy all tables to the GPU at once."""
        content, at = bytearray(), []
        widths: dict[int, int] = {}
        for layout in self.layouts:
            for turn, table in enumerate(layout.records(copier.buffers, self.tuning, alignment)):
                at.append((layout, turn, len(content)))
                content += table
            for width, rows in zip(layout.row_bytes.tolist(), layout.most_rows.tolist(), strict=True):
                if width not in widths:
                    widths[width] = len(content)
                    content += (np.arange(rows, dtype=np.int64) * width).tobytes()
        if not content:
            return
        self._tables = copier.gpu.upload(content)
        base = self._tables.data_ptr()
        for layout, turn, offset in at:
            layout.tables[turn] = base + offset
        for layout in self.layouts:
            layout.rows = _ints(base + widths[width] for width in layout.row_bytes.tolist())

    def layout_for(self, nbytes: int, buffer_bytes: int) -> Layout | None:
        """Return the layout for a load of `nbytes`; None if engines cannot load these planes."""
        if not self.layouts:
            return None
        wanted = min(MIN_CHUNK_BYTES, buffer_bytes) * self.parts // max(nbytes, 1)
        return self.layouts[min(max(wanted, 1).bit_length() - 1, len(self.layouts) - 1)]


class Plan(NamedTuple):
    """The calls of a load: copies, launch and operations of each chunk.

    Attributes:
        copies: one CUDA_MEMCPY2D each.
        copies_of: number of copies per chunk.
        parameters, pointers: of each chunk's launch, and their addresses.
        grids: blocks of each.
        operations: CUstreamBatchMemOpParams: the writes of counters.
        operations_of: number of operations before the first chunk (for first parts without pages), and after each
            chunk.
    """

    copies: Words
    copies_of: Ints
    parameters: Words
    pointers: Words
    grids: Ints
    operations: Words
    operations_of: Ints


class Frames:
    """Sorted slabs, to find runs of frames.

    Args:
        seam_bytes: memory is pinned in pieces of this size; a copy within one piece is always allowed.
    """

    def __init__(self, slabs: Sequence[Slab], seam_bytes: int) -> None:
        ordered = sorted(slabs)
        self._starts = np.array([slab.address for slab in ordered], dtype=np.int64)
        self._bytes = np.array([slab.frame_bytes for slab in ordered], dtype=np.int64)
        self._seam = seam_bytes
        self.largest = int(self._bytes.max())

    def runs(self, addresses: Ints) -> tuple[npt.NDArray[np.bool_], Ints]:
        """Report for each frame whether it starts a new run, and the distance of adjacent frames there, in bytes."""
        slab = np.searchsorted(self._starts, addresses, side="right") - 1
        pitch = self._bytes[slab]
        begins = np.ones(len(addresses), dtype=np.bool_)
        piece = (addresses - self._starts[slab]) // self._seam
        begins[1:] = (addresses[1:] - addresses[:-1] != pitch[1:]) | (slab[1:] != slab[:-1]) | (piece[1:] != piece[:-1])
        return begins, pitch


class DmaCopier(PageCopier):
    """A copier with large loads by copy engines, and all other moves by the kernel.

    Args:
        kernel: copier of the rank's own GPU; its slabs are pinned host memory.
        gpu: the GPU's calls.
        staging_bytes: total of all staging buffers.
        seam_bytes: see `Frames`.

    Raises:
        CopyError: the GPU has no memory for staging.
    """

    name = "cuda"

    def __init__(self, kernel: CudaPageCopier, gpu: Gpu, staging_bytes: int, seam_bytes: int) -> None:
        super().__init__(kernel.slabs, kernel.device)
        self.kernel, self.gpu = kernel, gpu
        self._frames = Frames(self.slabs, seam_bytes)
        if self._frames.largest > _MOST_FRAME_BYTES:
            raise CopyError("Frames are too large for copies of rows.")
        self.buffer_bytes = staging_bytes // BUFFERS // 4096 * 4096
        self._staging = gpu.allocate(BUFFERS * self.buffer_bytes)
        start = self._staging.data_ptr()
        self.buffers = [start + number * self.buffer_bytes for number in range(BUFFERS)]
        self._lock = threading.Lock()
        self._refusals = 0
        #: Number of loads by engines and by the kernel.
        self.loads = {"engines": 0, "kernel": 0}

    def compile(self, steps: Sequence[Step], num_parts: int) -> DmaProgram:
        return DmaProgram(self, steps, num_parts)

    def make_counters(self, num_parts: int) -> LayerCounters | None:
        return self.kernel.make_counters(num_parts)

    def describe(self) -> str:
        mib = BUFFERS * self.buffer_bytes >> 20
        loads = f"loads of {MIN_LOAD_BYTES >> 20} MiB and more by copy engines through {mib} MiB"
        if self._refusals >= _MOST_REFUSALS:
            loads = "copy engines refuse"
        return f"{self.kernel.describe()}, {loads} ({self.loads['engines']} of {sum(self.loads.values())} so far)"

    def load(
        self,
        program: Program,
        pages: Sequence[Pages],
        counters: LayerCounters | None = None,
        addresses: Sequence[Ints] | None = None,
    ) -> None:
        if addresses is None or not self._load_by_engines(program, pages, counters, addresses):
            super().load(program, pages, counters)

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, DmaProgram)
        if load:
            self.loads["kernel"] += 1
            self.kernel.load(program.by_kernel, pages, counters)
        else:
            self.kernel.store(program.by_kernel, pages)

    def _load_by_engines(
        self,
        program: Program,
        pages: Sequence[Pages],
        counters: LayerCounters | None,
        addresses: Sequence[Ints],
    ) -> bool:
        """Enqueue a load, unless the kernel is faster for it or the driver refuses."""
        nbytes = total_bytes(program, pages)
        if nbytes < MIN_LOAD_BYTES or self._refusals >= _MOST_REFUSALS:
            return False
        if counters is not None and counters.num_parts != program.num_parts:
            return False  # which is then refused
        if not self._any_pages(program, pages):
            return False
        assert isinstance(program, DmaProgram)
        layout = program.layout_for(nbytes, self.buffer_bytes)
        if layout is None:
            return False
        with self._lock:
            plan = self._plan(program, layout, pages, counters, addresses)
            if plan is None:
                return False
            try:
                with self.gpu.ordered():
                    self._enqueue(program, plan)
            except CopyError as error:
                self._refusals += 1
                logger.warning("sglang_xmem: the copy kernel makes a load instead of copy engines: %s", error)
                if counters is not None:
                    counters.restore()
                return False
            self._refusals = 0
            self.loads["engines"] += 1
            if counters is not None:
                counters.announce(1)
        return True

    def _enqueue(self, program: DmaProgram, plan: Plan) -> None:
        gpu, function, tuning = self.gpu, program.function, program.tuning
        copies, pointers, operations = (table.ctypes.data for table in (plan.copies, plan.pointers, plan.operations))
        before, *behind = plan.operations_of.tolist()
        if before:
            gpu.write(operations, before, 0)
            operations += 8 * _OPERATION_WORDS * before
        turn = 0
        for count, grid, written in zip(plan.copies_of.tolist(), plan.grids.tolist(), behind, strict=True):
            for _ in range(count):
                gpu.copy(copies, turn)
                copies += 8 * _COPY_WORDS
            gpu.follow(turn)
            gpu.launch(function, grid, tuning, pointers, turn)
            pointers += 8 * len(PARAMETER_OFFSETS)
            if written:
                gpu.write(operations, written, turn)
                operations += 8 * _OPERATION_WORDS * written
            gpu.done(turn)
            turn = (turn + 1) % BUFFERS

    def _plan(
        self,
        program: DmaProgram,
        layout: Layout,
        pages: Sequence[Pages],
        counters: LayerCounters | None,
        addresses: Sequence[Ints],
    ) -> Plan | None:
        """Plan all calls of a load; None if there are too many, or rows are too short."""
        # All vectors' frames, concatenated.
        counts = _ints(one.frames.numel() for one in pages)
        base = np.cumsum(counts) - counts
        frames = np.concatenate(addresses)
        begins, frame_pitch = self._frames.runs(frames)
        runs = np.flatnonzero(begins)

        # Chunks: equal shares of each piece's pages.
        in_piece = counts[layout.vector]
        chunks_of = -(-in_piece // layout.most_rows)
        rows = -(-in_piece // np.maximum(chunks_of, 1))
        piece = np.repeat(np.arange(len(in_piece)), chunks_of)
        chunks = len(piece)
        nth = np.arange(chunks) - (np.cumsum(chunks_of) - chunks_of)[piece]
        first_page = nth * rows[piece]
        height = np.minimum(rows[piece], in_piece[piece] - first_page)
        vector = layout.vector[piece]
        start = base[vector] + first_page
        turn = np.arange(chunks) % BUFFERS

        # Cuts: a chunk's pages in runs. Copies: a cut's segments.
        low, high = np.searchsorted(runs, start, side="right"), np.searchsorted(runs, start + height, side="left")
        cuts_of = 1 + high - low
        copies_of = cuts_of * layout.segments[piece]
        total = int(copies_of.sum())
        moved = int((height * layout.segments[piece]).sum())
        nbytes = total_bytes(program, pages)
        if total + 4 * chunks > MOST_CALLS or moved * MIN_ROW_BYTES > nbytes or total * MIN_COPY_BYTES > nbytes:
            return None
        chunk, number = _expand(cuts_of)
        cut = np.where(number == 0, start[chunk], runs[np.minimum(low[chunk] + number - 1, len(runs) - 1)])
        following = np.append(cut[1:], 0)
        last = np.append(chunk[1:] != chunk[:-1], True)
        cut_height = np.where(last, (start + height)[chunk], following) - cut
        of_cut, nth_segment = _expand(layout.segments[piece][chunk])
        cut, cut_height, chunk = cut[of_cut], cut_height[of_cut], chunk[of_cut]
        segment = layout.segment[layout.first_segment[piece[chunk]] + nth_segment]
        row_bytes = layout.row_bytes[piece]

        copies = np.zeros((total, _COPY_WORDS), dtype=np.uint64)
        copies[:, 2] = copies[:, 9] = _UNIFIED
        copies[:, 4] = frames[cut] + segment[:, 0]
        copies[:, 6] = frame_pitch[cut]
        buffers = np.array(self.buffers)
        copies[:, 11] = buffers[turn[chunk]] + (cut - start[chunk]) * row_bytes[chunk] + segment[:, 2]
        copies[:, 13] = row_bytes[chunk]
        copies[:, 14] = segment[:, 1]
        copies[:, 15] = cut_height

        parameters = np.zeros((chunks, _PARAMETER_WORDS), dtype=np.uint64)
        slots = _ints(one.slots.data_ptr() for one in pages)
        strides = _ints(one.slots.stride(0) for one in pages)
        parameters[:, 0] = layout.tables[turn] + RECORD_BYTES * layout.first[piece]
        parameters[:, 1] = layout.planes[piece] | 1 << 32  # and the direction, a load
        parameters[:, 4] = layout.rows[piece]
        parameters[:, 5] = slots[vector] + 8 * strides[vector] * first_page
        parameters[:, 6] = strides[vector]
        parameters[:, 7] = height
        pointers = parameters.ctypes.data + 8 * _PARAMETER_WORDS * np.arange(chunks)[:, None] + PARAMETER_OFFSETS
        tuning = program.tuning
        tiles = height * layout.units[piece] // tuning.tile_pieces + layout.planes[piece]
        grids = np.minimum(tuning.ctas, -(-tiles // tuning.warps))

        operations, operations_of = _operations(layout, chunks_of, counters)
        return Plan(copies, copies_of, parameters, pointers.astype(np.uint64), grids, operations, operations_of)


def _operations(layout: Layout, chunks_of: Ints, counters: LayerCounters | None) -> tuple[Words, Ints]:
    """Make the writes of a load's counters, and their number before the first chunk and after each chunk."""
    chunks = int(chunks_of.sum())
    if counters is None:
        return np.zeros((0, _OPERATION_WORDS), dtype=np.uint64), np.zeros(chunks + 1, dtype=np.int64)
    # A part is in place after the last chunk of its group, or of an earlier group.
    ends = np.cumsum(np.bincount(layout.group, weights=chunks_of, minlength=layout.num_groups)).astype(np.int64)
    behind = np.where(layout.group_of_part >= 0, ends[layout.group_of_part], 0)
    operations = np.zeros((len(behind), _OPERATION_WORDS), dtype=np.uint64)
    operations[:, 0] = _WRITE
    operations[:, 1] = counters.address + 4 * np.arange(len(behind))
    operations[:, 2] = counters.value_after(1)
    return operations, np.bincount(behind, minlength=chunks + 1)


def _expand(lengths: Ints) -> tuple[Ints, Ints]:
    """For each element of concatenated groups, return its group and its number in it."""
    group = np.repeat(np.arange(len(lengths)), lengths)
    return group, np.arange(len(group)) - (np.cumsum(lengths) - lengths)[group]

"""Loads from host memory by the copy engine, through a staging ring in the GPU's memory.

Multiprocessors get 93 % out of a PCIe link, the copy engine all of it (docs/performance.md, Copies). But it takes
addresses from the CPU, where only the tier's are known: SGLang has the GPU's page numbers on the GPU. So the copy
engine brings runs of neighbouring pages into a ring, and the page kernel, which reads the GPU's tables, takes them from
there to their places while the copy engine goes on.

A slot of the ring holds a chunk: some pages, K and V, of one layer. What a stream waits for has always been enqueued
before: the copy engine waits for the kernel of the chunk that had the slot before, the kernel for its chunk's copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.copies.base import PLANES_PER_LAYER, OnCpu, PageCopier
from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.engine import CopyEngine
from sglang_xmem.copies.signals import LoadSignals
from sglang_xmem.copies.tuning import STAGING_BYTES, STAGING_SHARE
from sglang_xmem.errors import CopyError

#: Of the ring: one is filled while the other is emptied, several times as fast.
SLOTS = 2
#: A layer has at least so many bytes, 16K tokens of Qwen3-30B-A3B in bf16. Below that the gain, 35 us of these, is
#: no more than the calling thread's time to enqueue a chunk, about 30 us.
MIN_LAYER_BYTES = 32 << 20
#: Neighbouring pages of a plane are on average at least so many bytes: each run is a piece that the thread enqueues.
MIN_RUN_BYTES = 1 << 20


Words = npt.NDArray[np.int64]


class Chunk(NamedTuple):
    """Pages of a load that are in a slot together.

    Attributes:
        pages: which, by their place in the load.
        offsets: bytes from a plane's first byte to each piece, one after the other: int64, shape (pieces,).
        places: bytes from the first of the slot's own to each piece's place.
        sizes: bytes of each piece.
    """

    pages: slice
    offsets: Words
    places: Words
    sizes: Words


def runs_of(rows: Words, page_size: int) -> Words:
    """Where runs of neighbours begin among pages, by their place: int64, shape (runs,), the first one 0.

    Args:
        rows: first row of each page, int64, shape (pages,), pages >= 1.
    """
    return np.concatenate(([0], np.flatnonzero(rows[1:] - rows[:-1] != page_size) + 1))


def chunks_of(
    rows: Words, runs: Words, page_size: int, row_bytes: int, slot_pages: int, seams: Sequence[int] = ()
) -> list[Chunk]:
    """Cut a load into chunks of about as many pages each, and runs of neighbours where chunks begin and at seams.

    Args:
        rows: as of `runs_of`, and what that gave.
        slot_pages: pages that a slot holds.
        seams: bytes from a plane's first byte to places that no piece may go across.
    """
    count = len(rows)
    cut = -(-count // -(-count // slot_pages))  # pages of a chunk
    page_bytes = page_size * row_bytes
    starts = np.union1d(runs, np.arange(0, count, cut))
    sizes = np.diff(starts, append=count) * page_bytes
    offsets, places = rows[starts] * row_bytes, starts % cut * page_bytes
    bounds = [*range(0, count, cut), count]
    for seam in seams:  # a handful, and most runs are not there
        across = np.flatnonzero((offsets < seam) & (seam < offsets + sizes))
        first = seam - offsets[across]
        starts = np.insert(starts, across + 1, starts[across])
        places = np.insert(places, across + 1, places[across] + first)
        rest = sizes[across] - first
        sizes[across] = first
        offsets, sizes = np.insert(offsets, across + 1, seam), np.insert(sizes, across + 1, rest)
    pieces = np.searchsorted(starts, bounds).tolist()
    return [
        Chunk(slice(*pages), offsets[slice(*mine)], places[slice(*mine)], sizes[slice(*mine)])
        for pages, mine in zip(pairwise(bounds), pairwise(pieces), strict=True)
    ]


class StagedCopier(PageCopier):
    """A page copier whose signalling loads of long runs go through the ring; all else is the direct copier's.

    Args:
        direct: copies without the ring.
        scatter: makes the copier from the ring to the device planes, of the planes that stand for the tier's.
        engine: copies from the tier into the ring.
        nbytes: of the ring.
        pinned: first bytes of the tier's ranges that were pinned one by one; no copy goes from one into the next.

    Raises:
        CopyError: a ring that cannot be had, or has no room for a page in each slot.
    """

    name = "staged"

    def __init__(
        self,
        direct: CudaPageCopier,
        scatter: Callable[[Sequence[torch.Tensor]], CudaPageCopier],
        engine: CopyEngine,
        nbytes: int,
        pinned: Sequence[int] = (),
    ) -> None:
        super().__init__(direct.tier_planes, direct.device_planes, direct.page_size)
        self._direct, self._engine = direct, engine
        self.load_tuning, self.store_tuning = direct.load_tuning, direct.store_tuning
        self.slot_pages = nbytes // (SLOTS * PLANES_PER_LAYER * self.page_bytes)
        if not self.slot_pages:
            raise CopyError(
                f"A staging ring of {nbytes} bytes has no room for pages of {self.page_bytes} bytes; raise "
                "copy.staging_mib, or set it to 0."
            )
        slot_rows = self.slot_pages * self.page_size
        shape = (PLANES_PER_LAYER, SLOTS * slot_rows, self.row_bytes)
        try:
            self._ring = torch.empty(shape, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            raise CopyError(
                f"{self._device} has no room left for a staging ring of {nbytes >> 20} MiB; lower copy.staging_mib or "
                "--mem-fraction-static."
            ) from None
        self.ring_bytes = self._ring.numel()
        # Every layer's chunks take turns in the same slots.
        self._scatter = scatter([self._ring[number % PLANES_PER_LAYER] for number in range(self.num_planes)])
        rows = torch.arange(0, SLOTS * slot_rows, self.page_size, device=self._device)
        self._slot_rows = rows.view(SLOTS, self.slot_pages).unbind()
        #: First byte of K's and of V's pages of each slot, shape (SLOTS, 2).
        self._slot_starts = np.array(
            [
                [plane.data_ptr() + slot * slot_rows * self.row_bytes for plane in self._ring.unbind()]
                for slot in range(SLOTS)
            ]
        )
        #: First byte of each plane in the tier.
        self._tier_starts = np.array([plane.data_ptr() for plane in self.tier_planes])
        size = self.tier_planes[0].numel()
        #: Of any plane: its pieces are cut there in all of them, which is simpler than by plane and costs a piece.
        self._seams = sorted({at - int(start) for at in pinned for start in self._tier_starts if 0 < at - start < size})
        self._stream = torch.cuda.Stream(self._device)
        self._begin = torch.cuda.Event()
        self._filled, self._emptied = ([torch.cuda.Event() for _ in range(SLOTS)] for _ in range(2))
        self._next_slot = 0
        #: How many loads went through the ring.
        self.staged_loads = 0
        self._lock = threading.Lock()

    def describe(self) -> str:
        return f"{self._direct.describe()}; long runs loaded by the copy engine through {self.ring_bytes >> 20} MiB"

    def make_signals(self, num_parts: int) -> LoadSignals | None:
        return self._direct.make_signals(num_parts)

    def _copy_signalling(
        self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, signals: LoadSignals, on_cpu: OnCpu
    ) -> None:
        chunks = self._worth_staging(on_cpu, planes, signals)
        if chunks is None:
            self._direct.load_signalling(tier_rows, device_rows, planes, signals)
            return
        with self._lock, torch.cuda.device(self._device):
            self._stream.query()  # this thread may have no CUDA context yet, and the engine asks for one
            try:
                signals.announce(self._load(chunks, device_rows, planes, signals))
            except BaseException:
                signals.restore()
                raise
            self.staged_loads += 1

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        (self._direct.load if load else self._direct.store)(tier_rows, device_rows, planes)

    def _worth_staging(self, rows: OnCpu, planes: range, signals: LoadSignals) -> list[Chunk] | None:
        """The chunks of a load that the ring makes faster; None of one that it does not."""
        if rows is None or planes.start % PLANES_PER_LAYER or len(planes) != PLANES_PER_LAYER * signals.num_parts:
            return None
        plane_bytes = rows.numel() * self.page_bytes
        if plane_bytes * PLANES_PER_LAYER < MIN_LAYER_BYTES:
            return None
        firsts = rows.numpy()
        runs = runs_of(firsts, self.page_size)
        if plane_bytes < len(runs) * MIN_RUN_BYTES:
            return None
        return chunks_of(firsts, runs, self.page_size, self.row_bytes, self.slot_pages, self._seams)

    def _load(self, chunks: Sequence[Chunk], device_rows: torch.Tensor, planes: range, signals: LoadSignals) -> int:
        """Enqueue all layers; returns by how much each layer's counter will rise.

        Raises:
            CopyError: the driver refuses; layers before that are enqueued, and raise their counters.
        """
        layers = self._tier_starts[planes.start : planes.stop].reshape(-1, PLANES_PER_LAYER)
        # What the engine is told and which rows the kernel is, for all layers and slots at once.
        arrays, todo = [], []
        for chunk in chunks:
            sources = layers[:, :, None] + chunk.offsets  # K's pieces of a layer, then V's
            targets = self._slot_starts[:, :, None] + chunk.places
            sizes = np.tile(chunk.sizes, PLANES_PER_LAYER)
            arrays.append((sources, targets, sizes))
            addresses = [array.__array_interface__["data"][0] for array in (sources, targets, sizes)]
            slot_rows = [rows[: chunk.pages.stop - chunk.pages.start] for rows in self._slot_rows]
            todo.append((*addresses, len(sizes), slot_rows, device_rows[chunk.pages]))
        load = torch.cuda.current_stream(self._device)
        handle, slot = self._stream.cuda_stream, self._next_slot
        self._begin.record(load)
        self._stream.wait_event(self._begin)  # as a kernel on that stream would, and so behind all loads before
        address, per_counter = signals.counters(planes)
        raises = 0
        for layer in range(len(layers)):
            raises = 0
            here = range(planes.start + PLANES_PER_LAYER * layer, planes.start + PLANES_PER_LAYER * (layer + 1))
            for from_, to, sizes_at, count, slot_rows, rows in todo:
                self._stream.wait_event(self._emptied[slot])
                self._engine.copy(to + 8 * count * slot, from_ + 8 * count * layer, sizes_at, count, handle)
                self._filled[slot].record(self._stream)
                load.wait_event(self._filled[slot])
                raises += self._scatter.start(
                    slot_rows[slot],
                    rows,
                    here,
                    load=True,
                    counters=(address + 4 * layer, per_counter),
                    stream=load.cuda_stream,
                )
                self._emptied[slot].record(load)
                slot = (slot + 1) % SLOTS
        self._next_slot = slot
        return raises


def staged(direct: PageCopier, nbytes: int | None = None, pinned: Sequence[int] = ()) -> StagedCopier:
    """`direct`, the CUDA kernel on the rank's own GPU, with a ring of `nbytes`, or of the usual size.

    Raises:
        CopyError: as StagedCopier, and where the driver has no batches of copies.
    """
    assert isinstance(direct, CudaPageCopier)
    if nbytes is None:
        memory: int = torch.cuda.get_device_properties(direct.device_planes[0].device).total_memory
        nbytes = min(STAGING_BYTES, memory // STAGING_SHARE)

    def scatter(planes: Sequence[torch.Tensor]) -> CudaPageCopier:
        return CudaPageCopier(planes, direct.device_planes, direct.page_size)

    return StagedCopier(direct, scatter, CopyEngine(), nbytes, pinned)

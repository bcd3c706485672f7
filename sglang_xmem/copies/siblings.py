"""Loads that ranks with the same bytes share: each brings a share of the pages over its own PCIe link and fetches the
others from its siblings' pools over NVLink.

Ranks of tensor parallelism hold the same KV of MLA in the same slots, and load the same pages at the same time. With n
of them on a host, a load from host memory takes 1/n of the time. kernels/page_fetch.cu says how ranks find out whether
they load the same, and why nobody waits for another without end.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch

from sglang_xmem.copies import ipc, nvrtc
from sglang_xmem.copies.base import PageCopier, Pages, Program, Step, total_bytes
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.cuda import CudaPageCopier, CudaProgram
from sglang_xmem.copies.geometry import MAX_VECTORS, Plane, Slab, alignment_of
from sglang_xmem.copies.ipc import Gather, Group
from sglang_xmem.copies.remote import CopyingGpu, ordinal
from sglang_xmem.copies.shared import MIN_SHARE_BYTES, deal
from sglang_xmem.copies.table import ParameterBuffer, magic
from sglang_xmem.copies.tuning import VECTOR_BYTES
from sglang_xmem.errors import CopyError
from sglang_xmem.kernels import source

logger = logging.getLogger(__name__)

SOURCE_FILE: Final = "page_fetch.cu"
MAX_RANKS: Final = 8
THREADS: Final = 512
#: Thread blocks per sibling whose share is fetched: 64 KiB in flight each, for the rate of one PCIe link over NVLink.
_CTAS_PER_SIBLING: Final = 2
#: A sibling that a load has waited for so long, in nanoseconds, is given up. Ranks enqueue a load within a millisecond
#: of each other, and a layer of 80K tokens takes about as long.
PATIENCE_NS: Final = 20_000_000
#: Loads one after the other in which a sibling was given up; then loads are not shared any more.
MOST_MISSES: Final = 4
#: Entries of a rank's ring. SGLang enqueues at most two loads ahead of a sibling that has not completed one.
RING: Final = 8
#: Parts of a load that is shared, at most.
MAX_SHARED_PARTS: Final = 1024
#: `struct Entry` of page_fetch.cu before its counters.
ENTRY_HEAD: Final = 40
#: `struct Plane` of page_fetch.cu.
_RECORD: Final = struct.Struct(f"<{6 + MAX_RANKS}Q")
#: `struct Siblings` of page_fetch.cu.
_SIBLINGS: Final = struct.Struct(f"<{2 * MAX_RANKS + 2}QII")
_VECTOR: Final = struct.Struct("<QQqQ")
_VECTORS_BYTES: Final = _VECTOR.size * MAX_VECTORS
#: Parameters of `page_announce` before `struct Vectors`: entry, parts (and a gap), number, kind, raises.
_ANNOUNCE_HEAD: Final = struct.Struct("<QI4xQQQ")
_ANNOUNCE_OFFSETS: Final = (0, 8, 16, 24, 32, 40)
#: Parameters of `page_fetch` before `struct Siblings` and `struct Vectors`: planes, their number, parts, counters.
_FETCH_HEAD: Final = struct.Struct("<QIIQ")
_FETCH_OFFSETS: Final = (0, 8, 12, 16, 24, 24 + _SIBLINGS.size)


def entry_bytes(num_parts: int) -> int:
    """Bytes of a ring's entry with so many counters."""
    return -(-(ENTRY_HEAD + 4 * num_parts) // 64) * 64


def ring_bytes(max_parts: int) -> int:
    """Bytes of a rank's ring, zero before the first load."""
    return RING * entry_bytes(max_parts)


class SiblingCopier(PageCopier):
    """Shares large loads with other ranks; everything else is the inner copier's.

    Args:
        inner: this rank's kernel, which the rank's own GPU runs.
        group: the ranks, whose shared memory is their rings of `ring_bytes(max_parts)`.
        max_parts: of a load that is shared.
        missed: int64 (MAX_RANKS,), pinned, zero: the kernel sets a rank's to the number of a load in which it gave that
            rank up.
        order: of the fetch, which runs on another stream of the rank's GPU.
    """

    name = "siblings"

    def __init__(
        self,
        inner: CudaPageCopier,
        group: Group,
        max_parts: int,
        missed: torch.Tensor,
        order: CopyingGpu,
    ) -> None:
        super().__init__(inner.slabs, inner.device)
        self.inner, self.group, self.max_parts = inner, group, max_parts
        self._missed = missed
        self._number = 0  # of the last shared load
        self._misses = 0  # one after the other
        self._seen_miss = 0
        self._lock = threading.Lock()  # loads are one thread's at a time
        self._order = order

    def compile(self, steps: Sequence[Step], num_parts: int) -> SiblingProgram:
        return SiblingProgram(self, steps, num_parts)

    def make_counters(self, num_parts: int) -> LayerCounters | None:
        return self.inner.make_counters(num_parts)

    def describe(self) -> str:
        shared = f"large loads shared by {self.group.size} ranks" if self.sharing else "loads not shared any more"
        return f"{self.inner.describe()}, {shared}"

    @property
    def sharing(self) -> bool:
        """False once other ranks were given up in MOST_MISSES loads, one after the other."""
        return self._misses < MOST_MISSES

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, SiblingProgram)
        if not load:
            self.inner.store(program.whole, pages)
            return
        with self._lock:
            least = self.group.size * MIN_SHARE_BYTES
            large = program.tables is not None and total_bytes(program, pages) >= least
            if counters is not None and large and self._may_share():
                self._share(program, pages, counters)
            else:
                self.inner.load(program.whole, pages, counters)

    def _share(self, program: SiblingProgram, pages: Sequence[Pages], counters: LayerCounters) -> None:
        """Announce the load, then enqueue this rank's share and the fetch of the others'."""
        assert program.tables is not None
        group = self.group
        # Ranks count alike. One that does not is given up by the others, and gives them up.
        self._number += 1
        offset = self._number % RING * entry_bytes(self.max_parts)
        entries = [ring + offset for ring in group.shared]
        own = deal(pages, group.size)[group.me]
        try:
            program.tables.announce(entries[group.me], self._number, self.inner.raises(program.whole, own), pages)
            stream = self._order.begin()
            try:
                # The copy first: the fetch's blocks wait for it.
                self.inner.start(program.whole, own, load=True, counters=entries[group.me] + ENTRY_HEAD)
                raises = program.tables.fetch(
                    counters.address, entries, self._missed.data_ptr(), self._number, pages, stream
                )
            finally:
                self._order.end()
        except CopyError:
            counters.restore()
            raise
        counters.announce(raises)

    def _may_share(self) -> bool:
        """Whether to share the next load, by what became of those before."""
        latest = int(self._missed.max())
        if latest > self._seen_miss:
            self._seen_miss = latest
            self._misses += 1
            if not self.sharing:
                logger.warning(
                    "sglang_xmem: loads are not shared with other ranks any more: these were late, or loaded something "
                    "else, in %d loads",
                    MOST_MISSES,
                )
        elif self._number > self._seen_miss + RING:
            self._misses = 0
        return self.sharing


def share_loads(copier: PageCopier, planes: Sequence[Plane], gather: Gather, me: int, unfit: str = "") -> PageCopier:
    """Share the loads of a copier with those of other ranks, if all of them can.

    All ranks call this at the same time. Waits for them, and for the GPU.

    Args:
        planes: of all pools that have the same bytes on all ranks; all ranks name theirs in the same order.
        gather: brings every rank's object to all.
        me: this rank's number.
        unfit: why this rank cannot; empty if it can, as far as its caller knows.

    Returns: `copier` where some rank cannot; a log line says why.
    """
    ring = missed = None
    if not unfit and not (isinstance(copier, CudaPageCopier) and copier.runner == copier.device):
        unfit = f"Its pages are copied by {copier.describe()}."
    elif not unfit:
        ring = torch.zeros(ring_bytes(MAX_SHARED_PARTS), dtype=torch.uint8, device=copier.device)
        missed = torch.zeros(MAX_RANKS, dtype=torch.int64, pin_memory=True)
        torch.cuda.current_stream(copier.device).synchronize()
    try:
        group = ipc.join(copier.device, planes, ring, gather, me, unfit)
        if not 2 <= group.size <= MAX_RANKS:
            raise CopyError(f"There are {group.size} ranks, and 2 to {MAX_RANKS} share loads.")
    except CopyError as error:
        logger.info("sglang_xmem: each rank loads all pages itself: %s", error)
        return copier
    assert isinstance(copier, CudaPageCopier)
    assert missed is not None
    order = CopyingGpu(ordinal(copier.device), copier.device)
    return SiblingCopier(copier, group, MAX_SHARED_PARTS, missed, order)


class SiblingProgram(Program):
    """The whole program for this rank alone, and the tables of the fetch.

    Attributes:
        whole: the inner copier's, which also runs this rank's share.
        tables: None where a plane is not among those that the ranks have shown each other.
    """

    def __init__(self, copier: SiblingCopier, steps: Sequence[Step], num_parts: int) -> None:
        super().__init__(copier, steps, num_parts)
        self.whole: CudaProgram = copier.inner.compile(steps, num_parts)
        group = copier.group
        known = all(step.plane in group.planes for step in steps) and num_parts <= copier.max_parts
        self.tables = Tables(copier.slabs, steps, num_parts, group, copier.device) if known and steps else None


class Tables:
    """Kernels of a program with everything that does not change from load to load.

    Args:
        slabs, steps, num_parts: of the program.
        group: the ranks.
        device: of the pools.
    """

    def __init__(
        self, slabs: Iterable[Slab], steps: Sequence[Step], num_parts: int, group: Group, device: torch.device
    ) -> None:
        self._device, self._num_parts, self._group = device, num_parts, group
        planes = [step.plane for step in steps]
        there = [plane._replace(device_address=a) for plane in planes for a in group.planes[plane]]
        self._vector_bytes = alignment_of(slabs, [*planes, *there], VECTOR_BYTES)
        self._kind = kind_of(steps, num_parts, group.size)
        self._num_planes = len(steps)
        self._grid = _CTAS_PER_SIBLING * group.size
        self._functions = self._load_kernels()
        self._table = self._upload(records(steps, group))
        self._announce = ParameterBuffer(_ANNOUNCE_OFFSETS, _ANNOUNCE_HEAD.size + _VECTORS_BYTES)
        self._fetch = ParameterBuffer(_FETCH_OFFSETS, _FETCH_HEAD.size + _SIBLINGS.size + _VECTORS_BYTES)

    def announce(self, entry: int, number: int, raises: int, pages: Sequence[Pages]) -> None:
        """Enqueue the announcement of a load on the current stream.

        Args:
            entry: address of this rank's entry of it.
            raises: by how much this rank's copy raises each counter.

        Raises:
            CopyError: the driver refuses.
        """
        head = _ANNOUNCE_HEAD.pack(entry, self._num_parts, number, self._kind, raises)
        self._announce.buffer.raw = head + pack_vectors(pages)
        self._launch("page_announce", 1, self._announce)

    def fetch(
        self, counters: int, entries: Sequence[int], missed: int, number: int, pages: Sequence[Pages], stream: int
    ) -> int:
        """Enqueue the fetch of the siblings' shares; returns by how much it raises each counter.

        Args:
            counters: address of the first counter of the load.
            entries: address of each rank's entry of it.
            missed: address of the words for ranks that are given up.
            stream: where, as an address.

        Raises:
            CopyError: the driver refuses.
        """
        head = _FETCH_HEAD.pack(self._table, self._num_planes, self._num_parts, counters)
        siblings = pack_siblings(entries, missed, number, PATIENCE_NS, self._group.me)
        self._fetch.buffer.raw = head + siblings + pack_vectors(pages)
        self._launch("page_fetch", self._grid, self._fetch, stream)
        return self._grid * (THREADS // 32)

    def _load_kernels(self) -> dict[str, Any]:
        properties: Any = torch.cuda.get_device_properties(self._device)
        macros = {"VEC_BYTES": self._vector_bytes, "THREADS": THREADS}
        image = nvrtc.build(source(SOURCE_FILE), SOURCE_FILE, macros, (properties.major, properties.minor))
        return {name: nvrtc.load(image, name, self._device) for name in ("page_announce", "page_fetch")}

    def _upload(self, content: bytes) -> int:
        self._kept = nvrtc.upload(bytearray(content), self._device)
        return self._kept.data_ptr()

    def _launch(self, name: str, grid: int, parameters: ParameterBuffer, stream: int | None = None) -> None:
        if stream is None:
            stream = torch.cuda.current_stream(self._device).cuda_stream
        nvrtc.launch(self._functions[name], grid, THREADS, 0, stream, parameters.address, self._device)


def kind_of(steps: Sequence[Step], num_parts: int, ranks: int) -> int:
    """A digest of what ranks have to have in common to share a load, but for addresses and slots; 63 bits."""
    what = [(*step.plane[1:], step.vector, step.part) for step in steps]
    return int.from_bytes(hashlib.sha256(repr((what, num_parts, ranks)).encode()).digest()[:8], "little") >> 1


def records(steps: Sequence[Step], group: Group) -> bytes:
    """Planes as page_fetch.cu reads them."""
    return b"".join(
        _RECORD.pack(
            step.plane.device_address,
            step.plane.device_stride,
            step.plane.offset,
            magic(step.plane.divisor),
            step.plane.unit_bytes,
            step.part << 32 | step.vector,
            *group.planes[step.plane],
            *[0] * (MAX_RANKS - group.size),
        )
        for step in steps
    )


def pack_vectors(pages: Sequence[Pages]) -> bytes:
    """`struct Vectors`."""
    packed = b"".join(_VECTOR.pack(f.data_ptr(), s.data_ptr(), s.stride(0), f.numel()) for f, s in pages)
    return packed.ljust(_VECTORS_BYTES, b"\0")


def pack_siblings(entries: Sequence[int], missed: int, number: int, patience_ns: int, me: int) -> bytes:
    """`struct Siblings`."""
    gap = [0] * (MAX_RANKS - len(entries))
    words = [missed + 8 * rank for rank in range(MAX_RANKS)]
    return _SIBLINGS.pack(*entries, *gap, *words, number, patience_ns, len(entries), me)

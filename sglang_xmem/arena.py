"""An arena: all pages of one rank in tier memory, as frames with a page table, and the copies to and from them.

An *index space* is an allocator of the engine (KV, SWA, Mamba states) with the pools that use its numbers. A page of a
space has one *frame*, which holds the adjacent units of all its planes. The *page table* of a space maps each page to
its frame's address, so a page may be anywhere in the tier: in another bank, or in a frame that another engine filled.

This module is independent of SGLang. Everything but the functions for storage runs on the scheduler thread: it never
waits for the GPU and never loops over tokens or pages.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.copies import make_program
from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.remote import ordinal
from sglang_xmem.errors import ConfigError, CopyError
from sglang_xmem.plan import Placement, describe_skipped
from sglang_xmem.sums import EVERY, CpuSummer, SectionSums, Summer

if TYPE_CHECKING:
    from sglang_xmem.config import CopySettings, Level
    from sglang_xmem.copies.counters import LayerCounters
    from sglang_xmem.copies.ipc import Gather
    from sglang_xmem.copies.policy import CopyPolicy
    from sglang_xmem.tiers import MemoryTier, Region

logger = logging.getLogger(__name__)

#: Alignment of frames and their sections, in bytes: a sector of GPU memory, and more than any copy needs.
ALIGNMENT = 256


def aligned(nbytes: int) -> int:
    """Round `nbytes` up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class SpaceSpec(NamedTuple):
    """An index space for an arena.

    Attributes:
        name: of the space, for messages.
        pages: number of pages of the engine's allocator.
        frame_bytes: bytes of a page's frame, a multiple of ALIGNMENT.
    """

    name: str
    pages: int
    frame_bytes: int


class Space:
    """One index space of an arena.

    Attributes:
        table: int64 (pages,), on the CPU: address of each page's frame, for the rank's GPU (or CPU).
    """

    def __init__(self, spec: SpaceSpec, region: Region) -> None:
        self.spec = spec
        self.region = region
        self.slabs = [
            Slab(extent.address, extent.nbytes // spec.frame_bytes, spec.frame_bytes)
            for extent in region.extents
            if extent.nbytes >= spec.frame_bytes
        ]
        self.table = self._first_table()
        self._addresses: npt.NDArray[np.int64] = self.table.numpy()
        #: Number of first pages that are never freed, for canaries.
        self.kept = 0

    def _first_table(self) -> torch.Tensor:
        return _round_robin(self.slabs, self.spec.pages)

    def look_up(self, pages: torch.Tensor, *, claim: bool) -> torch.Tensor:
        """Return the addresses of pages' frames: int64 (n,), on the CPU.

        Args:
            claim: pages without a frame get one; otherwise all must have one.
        """
        return torch.from_numpy(self._addresses.take(pages.numpy()))

    def free(self, pages: torch.Tensor) -> None:
        """Note that the engine has freed pages: int64 (n,), on the CPU, each once."""

    def clear(self) -> None:
        """Note that the engine has freed all pages except the kept ones."""

    def tidy(self) -> None:
        """Release unused memory; called every second."""

    def carry(self, sums: SectionSums) -> None:
        """Store this section's sums with the pages, for engines that find them."""


def _space(spec: SpaceSpec, region: Region) -> Space:
    if region.bank is None:
        return Space(spec, region)
    from sglang_xmem.bank_space import BankSpace

    return BankSpace(spec, region)


def _round_robin(slabs: Sequence[Slab], pages: int) -> torch.Tensor:
    """Return addresses of `pages` frames, round-robin over the slabs, so that a run of pages uses all slabs."""
    rounds = [
        torch.stack(
            (torch.arange(slab.frames), slab.address + slab.frame_bytes * torch.arange(slab.frames)),
        )
        for slab in slabs
    ]
    numbered = torch.cat(rounds, dim=1)
    order = torch.argsort(numbered[0], stable=True)
    table = numbered[1][order][:pages]
    assert table.numel() == pages, "the tier returned too few frames"
    return table.contiguous()


class Arena:
    """Frames of all index spaces of one rank.

    Args:
        placement: allocates the memory; all spaces are in one tier.
        spaces: index spaces to allocate.
        device: device of the engine's KV pools.
        copy: the user's settings of the page copier.
        integrity: which pages have sums.

    Attributes:
        summer: writes and compares sums; None if no page has one.

    Raises:
        ConfigError: no tier can hold the spaces.
        CopyError: the copier cannot run on this machine.
    """

    def __init__(
        self,
        placement: Placement,
        spaces: Sequence[SpaceSpec],
        *,
        device: torch.device,
        copy: CopySettings,
        integrity: Level = "off",
    ) -> None:
        self.device = device
        self._placement = placement
        self._copy = copy
        self.spaces: dict[str, Space] = {}
        #: Compiled loads and stores, by their maker's key.
        self.programs: dict[Any, Any] = {}
        self.copier: PageCopier | None = None
        #: Makes the counters of loads; stays the same when `share_loads` changes the copier.
        self.counting: PageCopier | None = None
        self.integrity = integrity
        self.summer: Summer | None = None
        self._regions: list[Region] = []
        self._slabs: list[Slab] = []
        self._views: list[tuple[int, torch.Tensor]] = []
        self._closed = False
        self._open_lock = threading.Lock()
        self._storage_lock = threading.Lock()  # storage threads may still run after the arena is closed
        self._storage_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.tier, self._policy = self._take(spaces)

    def extend(self, space: SpaceSpec) -> None:
        """Add an index space before the arena is used; `begin` must follow.

        Raises:
            ConfigError: the arena's tier cannot hold it.
        """
        tier, _ = self._take([space])
        if tier is not self.tier:
            raise ConfigError(
                f"tier {self.tier.name} cannot hold {space.name} with the other pools. Lower --hicache-size or "
                "--hicache-ratio."
            )
        self.programs.clear()

    def _take(self, spaces: Sequence[SpaceSpec]) -> tuple[MemoryTier, CopyPolicy]:
        """Allocate spaces, and log it."""
        placement = self._placement
        allocation = placement.allocate([(spec.pages * spec.frame_bytes, spec.frame_bytes) for spec in spaces])
        self._regions += allocation.regions
        for spec, region in zip(spaces, allocation.regions, strict=True):
            space = self.spaces[spec.name] = _space(spec, region)
            self._slabs += space.slabs
            self._views += [(slab.address, self._view(slab, allocation.tier)) for slab in space.slabs]
        if self.device.type == "cuda":
            self._warm_pinned_cache()
        logger.info(
            "sglang_xmem: tier=%s pool=%.2f GB (%s) in %s for %s%s",
            allocation.tier.name,
            sum(spec.pages * spec.frame_bytes for spec in spaces) / 1e9,
            ", ".join(f"{spec.name}: {spec.pages} pages of {spec.frame_bytes} B" for spec in spaces),
            "; ".join(sorted({region.summary for region in allocation.regions})),
            self.device,
            f"; skipped: {describe_skipped(placement.skipped)}" if placement.skipped else "",
        )
        return allocation.tier, allocation.policy

    @property
    def nbytes(self) -> int:
        """Return the total bytes of all frames."""
        return sum(space.spec.pages * space.spec.frame_bytes for space in self.spaces.values())

    @property
    def gpus(self) -> tuple[int, ...]:
        """Return CUDA ordinals of the rank's GPU and of all GPUs whose memory or links pages use; empty on a CPU."""
        if self.device.type == "cpu":
            return ()
        others = (gpu for region in self._regions for gpu in (*region.gpus, *region.reachable_from))
        return tuple(dict.fromkeys((ordinal(self.device), *others)))

    def begin(self, steps: Sequence[Step]) -> None:
        """Make the copier. All planes are needed to check that the GPU that executes copies can access the pools.

        Args:
            steps: all planes of all pools.

        Raises:
            CopyError: the copier cannot run on this machine, or cannot access the pools.
        """
        copy = self._copy
        self.copier, _, refused = make_program(
            copy.kernel,
            self._slabs,
            self.device,
            steps,
            1,
            link=self.tier.traits.link,
            load=copy.load,
            store=copy.store,
            policy=self._policy,
            staging_bytes=self._staging_bytes(),
        )
        if refused is not None:
            logger.info("sglang_xmem: %s executes the copies itself: %s", self.device, refused)
        self.counting = self.copier
        logger.info("sglang_xmem: pages are copied by %s", self.copier.describe())
        self.summer = self._make_summer()

    def share_loads(self, planes: Sequence[Plane], gather: Gather, me: int) -> None:
        """Share large loads with ranks that hold the same bytes, where all of them can.

        All these ranks call this at the same time; it waits for them.

        Args:
            planes: those whose bytes are the same on all ranks, in the same order on each.
            gather: brings every rank's object to all.
            me: this rank's number.
        """
        from sglang_xmem.copies import siblings

        assert self.copier is not None, "begin() comes first"
        traits = self.tier.traits
        unfit = "" if traits.cpu_addressable else f"Tier {self.tier.name} is not host memory."
        self.copier = siblings.share_loads(self.copier, planes, gather, me, unfit)
        self.programs.clear()
        logger.info("sglang_xmem: pages are copied by %s", self.copier.describe())

    def _staging_bytes(self) -> int:
        """Return the staging bytes of copy engines on the GPU; they copy only from host memory."""
        traits = self.tier.traits
        engines = traits.cpu_addressable and traits.link in ("pcie", "cxl") and self.device.type == "cuda"
        return self._copy.staging_mib << 20 if engines else 0

    def _make_summer(self) -> Summer | None:
        if self.integrity == "off":
            return None
        if self.device.type == "cpu":
            return CpuSummer()
        from sglang_xmem.copies.sums_cuda import CudaSummer

        try:
            return CudaSummer(self.device)
        except CopyError as error:
            if self.integrity == "full":
                raise
            logger.warning("sglang_xmem: pages are not compared with what was stored: %s", error)
            return None

    def sums_of(self, space: str, planes: Sequence[Plane]) -> SectionSums | None:
        """Make the sums of a new section of a space's frames; None if no page has one."""
        if self.integrity == "off":
            return None
        pinned = self.device.type == "cuda"
        sums = SectionSums(planes, self.spaces[space].spec.pages, EVERY[self.integrity], pinned=pinned)
        self.spaces[space].carry(sums)
        return sums

    def compile(self, steps: Sequence[Step], num_parts: int) -> Program:
        """Prepare a load or store of `steps`, once per set of pools, since it may wait for the GPU."""
        assert self.copier is not None, "begin() comes first"
        return self.copier.compile(steps, num_parts)

    def make_counters(self, num_parts: int) -> LayerCounters | None:
        """Make counters for one load at a time; None if only events can signal completion of layers."""
        assert self.counting is not None, "begin() comes first"
        return self.counting.make_counters(num_parts)

    def frames(self, wanted: Sequence[tuple[str, torch.Tensor]], *, claim: bool = True) -> list[torch.Tensor]:
        """Look up frames, and copy their addresses to the device, in one copy on the current stream.

        Args:
            wanted: (space, pages) of each vector; pages: int64 (n,), on the CPU.
            claim: pages without a frame get one, for a store; otherwise all must have one.

        Returns: int64 (n,) each, on the device.
        """
        return self.upload(self.look_up(wanted, claim=claim))

    def look_up(self, wanted: Sequence[tuple[str, torch.Tensor]], *, claim: bool) -> list[npt.NDArray[np.int64]]:
        """Look up addresses of frames, on the CPU; arguments as for `frames`."""
        return [self.spaces[space].look_up(pages, claim=claim).numpy() for space, pages in wanted]

    def upload(self, found: Sequence[npt.NDArray[np.int64]]) -> list[torch.Tensor]:
        """Copy vectors to the device in one copy on the current stream."""
        if self.device.type == "cpu":
            return [torch.from_numpy(each) for each in found]
        # A copy from pageable memory would wait for the stream. torch keeps a pinned block until its copies are done.
        lengths = [len(each) for each in found]
        pinned = torch.empty(sum(lengths), dtype=torch.int64, pin_memory=True)
        np.concatenate(found, out=pinned.numpy())
        return list(pinned.to(self.device, non_blocking=True).split(lengths))

    def load(
        self,
        program: Program,
        pages: Sequence[Pages],
        counters: LayerCounters | None = None,
        addresses: Sequence[npt.NDArray[np.int64]] | None = None,
    ) -> None:
        """Enqueue tier -> device on the current stream.

        Args: see `PageCopier.load`.

        Raises:
            CopyError: the driver refuses; counters are unchanged.
        """
        assert self.copier is not None
        self.copier.load(program, pages, counters, addresses)

    def store(self, program: Program, pages: Sequence[Pages]) -> None:
        """Enqueue device -> tier on the current stream; see `load`."""
        assert self.copier is not None
        self.copier.store(program, pages)

    def copy_plainly(self, steps: Sequence[Step], pages: Sequence[Pages], *, load: bool) -> None:
        """Copy by torch operations on the current stream, after the copier has refused.

        Slow: several operations per plane and slab, and a wait for the GPU if there is more than one slab.
        """
        slabs = [slab for space in self.spaces.values() for slab in space.slabs]
        rows = [bytes_at(s.address, s.frames * s.frame_bytes, self.device).view(s.frames, s.frame_bytes) for s in slabs]
        for step in steps:
            plane, (frames, slots) = step.plane, pages[step.vector]
            array = bytes_at(
                plane.device_address, (plane.device_units - 1) * plane.device_stride + plane.unit_bytes, self.device
            ).as_strided((plane.device_units, plane.unit_bytes), (plane.device_stride, 1))
            units = slots // plane.divisor
            for slab, frame_rows in zip(slabs, rows, strict=True):
                if slab.frame_bytes < plane.offset + plane.unit_bytes:
                    continue  # belongs to another space with smaller frames
                part = frame_rows[:, plane.offset : plane.offset + plane.unit_bytes]
                numbers = (frames - slab.address).div(slab.frame_bytes, rounding_mode="floor")
                here = (numbers >= 0) & (numbers < slab.frames)
                chosen = (numbers, units) if len(slabs) == 1 else (numbers[here], units[here])
                if load:
                    array[chosen[1]] = part[chosen[0]]
                else:
                    part[chosen[0]] = array[chosen[1]]

    def address(self, space: str, page: int) -> int:
        """Return the address of a page's frame."""
        return int(self.spaces[space].table[page])

    @property
    def cpu_addressable(self) -> bool:
        """Whether the CPU can read and write frames at their addresses."""
        return self.tier.traits.cpu_addressable

    def host_buffers(self, space: str) -> list[torch.Tensor]:
        """Return a space's slabs as flat uint8 CPU tensors, for backends that register memory.

        Empty if the CPU does not address the memory.
        """
        slabs = {slab.address for slab in self.spaces[space].slabs}
        return [view for address, view in self._views if address in slabs] if self.cpu_addressable else []

    def read(self, space: str, page: int, offset: int, nbytes: int) -> torch.Tensor:
        """Copy bytes of a page's frame to the CPU: uint8 (nbytes,); waits for the copy.

        For storage threads, not the scheduler thread.

        Raises:
            RuntimeError: the arena is closed.
        """
        with self._storage_lock:
            part = self._part(space, page, offset, nbytes)
            if part.device.type == "cpu":
                return part.clone()
            with torch.cuda.stream(self._storage_stream):
                return part.cpu()

    def sections(self, space: str, pages: torch.Tensor, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Copy parts of frames that the CPU addresses: shape (n, nbytes)."""
        starts = self.spaces[space].table[pages] + offset
        found = np.empty((len(pages), nbytes), dtype=np.uint8)
        for begin, view in self._views:
            (here,) = torch.nonzero((starts >= begin) & (starts < begin + view.numel()), as_tuple=True)
            if len(here):
                windows = np.lib.stride_tricks.sliding_window_view(view.numpy(), nbytes)
                found[here.numpy()] = windows[(starts[here] - begin).numpy()]
        return found

    def write(self, space: str, page: int, offset: int, data: torch.Tensor) -> None:
        """Write bytes to a page's frame; complete on return.

        For storage threads, not the scheduler thread.

        Args:
            data: uint8 (nbytes,), on the CPU.

        Raises:
            RuntimeError: the arena is closed.
        """
        with self._storage_lock:
            part = self._part(space, page, offset, data.numel())
            if part.device.type == "cpu":
                part.copy_(data)
                return
            assert self._storage_stream is not None
            with torch.cuda.stream(self._storage_stream):
                part.copy_(data, non_blocking=True)
                self._storage_stream.synchronize()

    @contextmanager
    def kept_open(self) -> Iterator[bool]:
        """Keep the memory allocated until the block ends; yields whether it is. Not for the scheduler thread."""
        with self._open_lock:
            yield not self._closed

    def close(self) -> None:
        """Release the memory; idempotent. Waits for the device, for storage threads and for all `keep` blocks."""
        with self._open_lock, self._storage_lock:
            if self._closed:
                return
            self._closed = True
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._views = []
            self.copier = None
            for region in self._regions:
                region.release()

    def _part(self, space: str, page: int, offset: int, nbytes: int) -> torch.Tensor:
        if self._closed:
            raise RuntimeError("the arena is closed")
        at = self.address(space, page) + offset
        for start, view in self._views:
            if start <= at and at + nbytes <= start + view.numel():
                return view[at - start : at - start + nbytes]
        raise RuntimeError(f"page {page} of {space} is not in a slab")

    def _view(self, slab: Slab, tier: MemoryTier) -> torch.Tensor:
        """Return a slab's bytes as a uint8 tensor; valid until the arena is closed."""
        device = torch.device("cpu") if tier.traits.cpu_addressable else self.device
        return bytes_at(slab.address, slab.frames * slab.frame_bytes, device)

    def _warm_pinned_cache(self) -> None:
        """Fill torch's pinned cache with a block of every size that `frames` needs.

        The cache uses powers of two. Allocating pinned memory later would stall the GPU.
        """
        most = 2 * 8 * sum(space.spec.pages for space in self.spaces.values())
        if self.integrity == "full":
            most *= 4  # bytes that sums add per frame
        nbytes = 1 << 12
        while nbytes < most:
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            nbytes *= 2


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """View memory at an address as a uint8 tensor (nbytes,) labelled `device`; valid while the memory is mapped.

    Memory of another GPU gets the label of the rank's GPU, which can address it and runs the operations. Other ways to
    wrap a pointer query the owner from the driver, and would run torch's kernels on the other GPU.
    """
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))

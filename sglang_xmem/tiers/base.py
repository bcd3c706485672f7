"""The contract of a memory tier: allocate bytes at addresses that the GPU reads and writes, capacity, traits, release.

A tier is one module of this package with one `MemoryTier` subclass; `sglang_xmem.tiers` finds it by its file.
Importing a tier's module must not import torch, CUDA or an SDK: the flags' choices come from all of them.

A tier states facts. `sglang_xmem.copies.policy` decides from them and from the settings which GPU copies.
"""

from __future__ import annotations

import logging
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import msgspec

from sglang_xmem.errors import LOWER_SIZE, Unavailable

if TYPE_CHECKING:
    from sglang_xmem.bank import BankSession

logger = logging.getLogger(__name__)

#: More than any machine has; larger values overflow C integers.
MOST_BYTES = 1 << 56

Link = Literal["nvlink", "pcie", "cxl", "none"]


class Traits(msgspec.Struct, frozen=True):
    """Properties of a tier's memory, which decide how it may be accessed and what limits it.

    Attributes:
        cpu_addressable: the CPU reads and writes the bytes at their addresses.
        counts_as_host_ram: it is part of host RAM, so the engine's host budget limits it.
        link: the link between it and the rank's GPU; selects the copy's tuning.
        persistent: the bytes outlive the process.
        shared: other processes see the same bytes.
    """

    cpu_addressable: bool
    counts_as_host_ram: bool
    link: Link
    persistent: bool = False
    shared: bool = False


class Ranks(msgspec.Struct, frozen=True):
    """The ranks that one launcher starts on this machine, of tensor, pipeline and data parallelism.

    Attributes:
        gpus: CUDA ordinal of each rank's GPU in the order of local ranks; None: a rank without a GPU. A GPU may occur
            twice.
    """

    gpus: tuple[int | None, ...]

    @property
    def uses_gpu(self) -> bool:
        return any(gpu is not None for gpu in self.gpus)


class Extent(NamedTuple):
    """One range of addresses."""

    address: int
    nbytes: int


class Health(NamedTuple):
    """Whether a tier can serve, and the reason if not."""

    ok: bool
    reason: str | None = None


class Region:
    """One allocation of a tier. `release` is idempotent, never raises, and frees only this allocation.

    Attributes:
        extents: ranges of addresses that the rank's GPU (or the CPU, on a machine without one) reads and writes.
            Granules start at each range's first byte; a partial granule at its end is not used.
        granule: bytes that must not be split over two extents.
        summary: location of the bytes, for the log line.
        gpus: CUDA ordinals of the GPUs that own the memory; empty for host memory.
        reachable_from: CUDA ordinals of other GPUs that can access all extents.
        owner: for each extent, an object with the buffer protocol over its bytes; a view through it keeps host memory
            mapped, even past `release`. None if the CPU does not address the memory, or if `release` always unmaps it.
        bank: allocates the region's granules one by one, and knows which hold pages of other processes. None: all
            granules belong to this allocation.
    """

    def __init__(
        self,
        extents: Sequence[Extent],
        summary: str,
        release: Callable[[], None],
        *,
        granule: int = 1,
        gpus: tuple[int, ...] = (),
        reachable_from: tuple[int, ...] = (),
        owner: tuple[Any, ...] | None = None,
        bank: BankSession | None = None,
    ) -> None:
        assert owner is None or len(owner) == len(extents)
        self.extents = tuple(extents)
        self.granule = granule
        self.summary = summary
        self.gpus = gpus
        self.reachable_from = reachable_from
        self.owner = owner
        self.bank = bank
        self._release: Callable[[], None] | None = release

    @property
    def nbytes(self) -> int:
        """Total bytes of all whole granules."""
        return sum(extent.nbytes // self.granule for extent in self.extents) * self.granule

    def release(self) -> None:
        release, self._release = self._release, None
        self.owner = None
        if release is not None:
            try:
                release()
            except Exception:  # the caller cannot handle it
                logger.exception("sglang_xmem: releasing %s failed", self.summary)


class MemoryTier(ABC):
    """A rank's share of one kind of memory.

    Args:
        settings: this tier's section of the configuration, an instance of `Settings`.
        rank_plan: this rank's plan from `plan_ranks`; picklable, of the tier's own type.
        gpu: CUDA ordinal of the rank's GPU, None without one.
    """

    name: ClassVar[str]
    #: Order in which `auto` tries tiers, fastest first: nominal GB/s (1e9 bytes) of one direction.
    nominal_gbps: ClassVar[float]
    #: The class attribute is for a rank with a GPU; an instance overrides it if it depends on the machine.
    traits: Traits
    #: msgspec.Struct with forbid_unknown_fields: the tier's keys in the configuration.
    Settings: ClassVar[type[msgspec.Struct]]

    def __init__(self, settings: Any, rank_plan: Any, gpu: int | None) -> None:
        self.settings = settings
        self.rank_plan = rank_plan
        self.gpu = gpu

    @classmethod
    def is_automatic(cls, settings: Any) -> bool:
        """Whether `auto` tries the tier with these settings."""
        return True

    @classmethod
    @abstractmethod
    def plan_ranks(cls, settings: Any, ranks: Ranks) -> tuple[Any, ...]:
        """Plan this tier for all ranks of a launcher, one plan per rank. Allocates nothing.

        Runs in the launcher, which must not create a CUDA context.

        Raises:
            Unavailable: this machine lacks the tier, or all of it is in use.
            SettingError: a setting is impossible; raised even if another tier could serve.
        """

    @abstractmethod
    def capacity_bytes(self) -> int:
        """Return the bytes that `allocate` could give this rank now, with arbitrarily small granules.

        Raises:
            Unavailable: another process has claimed the planned memory since.
        """

    def waste_bytes(self, granule: int) -> int:
        """Return the maximum of bytes that an allocation with this `granule` leaves unused."""
        return mmap.PAGESIZE

    def expect(self, nbytes: int) -> None:  # noqa: B027  most tiers have one location
        """Announce the total bytes of the next allocations, so that they can be contiguous.

        Raises:
            Unavailable: see `capacity_bytes`.
        """

    def share_as(self, identities: Sequence[bytes], label: str) -> None:  # noqa: B027  most tiers share nothing
        """Announce the contents of the next allocations, for a tier that shares memory between equal contents.

        Args:
            identities: one per next allocation, 32 bytes; equal if the pages are equal.
            label: for reports.
        """

    def allocate(self, nbytes: int, granule: int = 1) -> Region:
        """Allocate `nbytes`. The contents are undefined.

        Args:
            granule: bytes that must be contiguous, such as a frame's; `nbytes` is rounded up to whole granules. A tier
                with several locations returns an extent in each.

        Raises:
            Unavailable: too little is free; a partial allocation is released.
        """
        if not 1 <= nbytes <= MOST_BYTES or not 1 <= granule <= MOST_BYTES:
            size = f"{nbytes} bytes in pieces of {granule}"
            raise Unavailable(f"a pool of {size} is not supported", *([LOWER_SIZE] if nbytes > 0 else []))
        return self._allocate(-(-nbytes // granule) * granule, granule)

    @abstractmethod
    def _allocate(self, nbytes: int, granule: int) -> Region:
        """As `allocate`, with `nbytes` a positive multiple of `granule`."""

    def health(self) -> Health:
        """Report whether the tier can serve; cheap, does not block."""
        return Health(True)

"""What a memory tier is: bytes in, addresses that the GPU can read and write, free capacity, traits, release.

A tier is one module of this package with one `MemoryTier` subclass; `sglang_xmem.tiers` finds it by its file.
Importing a tier's module must not import torch, CUDA or an SDK: the flags' choices come from all of them.

A tier says facts. Who copies follows from them and from the settings in one place, `sglang_xmem.copies.policy`.
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

#: More than any machine has; arithmetic beyond it leaves what C takes.
MOST_BYTES = 1 << 56

Link = Literal["nvlink", "pcie", "cxl", "none"]


class Traits(msgspec.Struct, frozen=True):
    """What a tier's memory is, which decides what may touch it and what limits it.

    Attributes:
        cpu_addressable: the CPU reads and writes the bytes at their addresses.
        counts_as_host_ram: it takes of the host's RAM, so the engine's budget of that limits it.
        link: what a copy between it and the rank's GPU goes over; chooses the copy's tuning.
        persistent: the bytes outlive the process.
        shared: other processes see the same bytes.
    """

    cpu_addressable: bool
    counts_as_host_ram: bool
    link: Link
    persistent: bool = False
    shared: bool = False


class Ranks(msgspec.Struct, frozen=True):
    """The ranks that one launcher starts on this machine: of tensor, pipeline and data parallelism alike.

    Attributes:
        gpus: CUDA ordinal of each rank's GPU in the order of local ranks; None a rank without a GPU. Any list: a GPU
            may occur twice.
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
    """Whether a tier can go on serving, and why not."""

    ok: bool
    reason: str | None = None


class Region:
    """One allocation of a tier. `release` is idempotent, never raises, and frees only this allocation.

    Attributes:
        extents: ranges of addresses that the rank's GPU (or the CPU, on a machine without one) reads and writes. Each
            holds whole granules from its first byte on; a rest below a granule at its end is not used.
        granule: bytes that may not be split over two extents.
        summary: where the bytes are, for the log line.
        gpus: CUDA ordinals of the GPUs whose memory it is; empty for host memory.
        reachable_from: CUDA ordinals of other GPUs than the rank's that have access to all extents too.
        owner: for each extent an object with the buffer protocol over its bytes: whoever views host memory through it
            keeps it mapped, past `release` if need be. None where nothing could: memory that the CPU does not address,
            or that goes with `release`.
        bank: hands the region's granules out one by one, and knows which of them hold pages of other processes. None:
            all of them are this allocation's alone.
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
        """Bytes of all whole granules."""
        return sum(extent.nbytes // self.granule for extent in self.extents) * self.granule

    def release(self) -> None:
        release, self._release = self._release, None
        self.owner = None
        if release is not None:
            try:
                release()
            except Exception:  # whoever gives memory back can do nothing about it
                logger.exception("sglang_xmem: giving back %s failed", self.summary)


class MemoryTier(ABC):
    """A rank's share of one kind of memory.

    Args:
        settings: this tier's part of the configuration, an instance of `Settings`.
        rank_plan: what `plan_ranks` planned for this rank; a picklable value of the tier's own.
        gpu: CUDA ordinal of the rank's GPU, None without one.
    """

    name: ClassVar[str]
    #: Order in which `auto` tries tiers, fastest first: nominal GB/s (1e9 bytes) of one direction.
    nominal_gbps: ClassVar[float]
    #: Of the class, for a rank with a GPU; of an instance where it follows from the machine.
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
        """Plan this tier for all ranks of a launcher: one plan a rank. Allocates nothing.

        Runs in the launcher, where no CUDA context may be made.

        Raises:
            Unavailable: this machine does not have the tier, or all of it is in use.
            SettingError: `settings` ask for something impossible; also where another tier would do.
        """

    @abstractmethod
    def capacity_bytes(self) -> int:
        """Bytes that `allocate` could give this rank now, in granules as small as need be.

        Raises:
            Unavailable: another process has used the planned memory since.
        """

    def waste_bytes(self, granule: int) -> int:
        """Bytes of the capacity that an allocation in pieces of `granule` may leave unused, at most."""
        return mmap.PAGESIZE

    def expect(self, nbytes: int) -> None:  # noqa: B027  most tiers have one place alone
        """Hear that the next allocations will be of so many bytes together; they are to lie side by side if they can.

        Raises:
            Unavailable: as `capacity_bytes`.
        """

    def share_as(self, identities: Sequence[bytes], label: str) -> None:  # noqa: B027  most tiers share nothing
        """Hear what the next allocations are to hold; for a tier whose memory is shared by those that hold the same.

        Args:
            identities: of each of the next allocations, 32 bytes, equal for pages that are equal.
            label: for people.
        """

    def allocate(self, nbytes: int, granule: int = 1) -> Region:
        """Allocate `nbytes`. The contents are undefined.

        Args:
            granule: bytes that have to lie in one range of addresses, such as a frame's; `nbytes` is rounded up to
                whole ones. A tier whose memory is in several places gives an extent in each.

        Raises:
            Unavailable: it does not have them; nothing of a partial allocation stays behind.
        """
        if not 1 <= nbytes <= MOST_BYTES or not 1 <= granule <= MOST_BYTES:
            size = f"{nbytes} bytes in pieces of {granule}"
            raise Unavailable(f"a pool of {size} is not a possible size", *([LOWER_SIZE] if nbytes > 0 else []))
        return self._allocate(-(-nbytes // granule) * granule, granule)

    @abstractmethod
    def _allocate(self, nbytes: int, granule: int) -> Region:
        """`allocate`, of a positive multiple of `granule`."""

    def health(self) -> Health:
        """Whether the tier can go on serving; cheap, and waits for nothing."""
        return Health(True)

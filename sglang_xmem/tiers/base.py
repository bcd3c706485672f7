"""What a memory tier is: bytes in, an address that the GPU can read and write, capacity, locality, release.

A tier is one module of this package with one `MemoryTier` subclass; `sglang_xmem.tiers` finds it by its file.
Importing a tier's module must not import torch, CUDA or an SDK: the flags' choices come from all of them.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec


class Locality(enum.Enum):
    """Where a tier's bytes live, which decides what may touch them."""

    HOST = "host"  #: host memory: the CPU reads and writes it, host-RAM limits apply
    DEVICE = "device"  #: memory that only GPUs address: host code goes through staging


class Ranks(msgspec.Struct, frozen=True):
    """The ranks that one launcher starts on this machine.

    Attributes:
        gpus: CUDA ordinal of each rank's GPU in the order of local ranks; None a rank without a GPU.
    """

    gpus: tuple[int | None, ...]

    @property
    def uses_gpu(self) -> bool:
        return any(gpu is not None for gpu in self.gpus)


class Region:
    """One allocation of a tier. `release` is idempotent, never raises, and frees only this allocation.

    Attributes:
        address: first byte; the rank's GPU (or the CPU, on a machine without one) reads and writes there.
        nbytes: usable bytes, of all parts.
        summary: where the bytes are, for the log line.
        owner: for host memory in one range, an object with the buffer protocol over the bytes: whoever views the memory
            through it keeps it mapped, past `release` if need be. None for memory that the CPU does not address.
        parts: where the region lies apart, the address of each of the equal parts that it was asked for in; None where
            all bytes are one range.
        copying_gpu: CUDA ordinal of another GPU than the rank's that is to run the copies, and reaches all addresses;
            None: the rank's own.
        copying_required: the user asked for that; else the rank's own GPU runs them where the other one cannot.
        relays: CUDA ordinals of GPUs that each move a share of every copy through a link of their own.
        pinned: for host memory, the first byte of each range that was pinned by itself: a copy by the driver may not
            go from one into the next.
    """

    def __init__(
        self,
        address: int,
        nbytes: int,
        summary: str,
        release: Callable[[], None],
        owner: Any = None,
        parts: tuple[int, ...] | None = None,
        copying_gpu: int | None = None,
        copying_required: bool = False,
        relays: tuple[int, ...] = (),
        pinned: tuple[int, ...] = (),
    ) -> None:
        self.relays = relays
        self.pinned = pinned
        self.copying_gpu = copying_gpu
        self.copying_required = copying_required
        self.owner = owner
        self.address = address
        self.nbytes = nbytes
        self.summary = summary
        self.parts = parts
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        self.owner = None
        if release is not None:
            release()


class MemoryTier(ABC):
    """A rank's share of one kind of memory.

    Args:
        settings: this tier's part of --hicache-xmem-config, an instance of `Settings`.
        seat: what `seats` planned for this rank; a picklable value of the tier's own.
        gpu: CUDA ordinal of the rank's GPU, None without one.
    """

    name: ClassVar[str]
    #: Order in which `auto` tries tiers, fastest first: nominal GB/s (1e9 bytes) of one direction.
    nominal_gbps: ClassVar[float]
    #: Of the class, or of an instance where it follows from the machine.
    locality: Locality
    #: msgspec.Struct with forbid_unknown_fields: the tier's keys in --hicache-xmem-config.
    Settings: ClassVar[type[msgspec.Struct]]

    def __init__(self, settings: Any, seat: Any, gpu: int | None) -> None:
        self.settings = settings
        self.seat = seat
        self.gpu = gpu

    @classmethod
    @abstractmethod
    def seats(cls, settings: Any, ranks: Ranks) -> tuple[Any, ...]:
        """Plan this tier for all ranks of a launcher: one seat a rank. Allocates nothing.

        Runs in the launcher, where no CUDA context may be made.

        Raises:
            TierUnavailable: this machine does not have the tier, or all of it is in use.
            ConfigError: `settings` ask for something impossible; also where another tier would do.
        """

    @abstractmethod
    def capacity_bytes(self) -> int:
        """Bytes that `allocate` could give this rank now, in parts as small as need be.

        Raises:
            TierUnavailable: what was planned has been taken since.
        """

    @abstractmethod
    def allocate(self, nbytes: int, parts: int = 1) -> Region:
        """Allocate `nbytes` (> 0). The contents are undefined.

        Args:
            parts: equal parts, each of which has to be one range of addresses; a divisor of `nbytes`. A tier whose
                memory is in several places may spread them over these, and deals them out in turn.

        Raises:
            TierUnavailable: it cannot be had; nothing of a partial allocation stays behind.
        """

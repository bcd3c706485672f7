"""How the CUDA kernel runs: its settings, the measured choice for each tier and direction. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

BULK_CAPABILITY = (9, 0)
VECTOR_BYTES = 16  # widest access of a thread, and what a bulk copy's addresses and size must be multiples of
MAX_SHARED_BYTES = 227 * 1024

#: `copier`: on the GPU that runs the copies, which is not the one that computes.
Locality = Literal["host", "device", "copier"]
Direction = Literal["load", "store"]


@dataclass(frozen=True)
class CudaTuning:
    """How one direction's kernel runs.

    Attributes:
        variant: `register`: threads load and store 16 bytes at a time. `bulk`: asynchronous bulk copies (TMA) through
            shared memory; where the GPU or the addresses do not allow it, the register variant runs instead.
        ctas: thread blocks at most; small copies take fewer.
        threads: of a block; register variant. Multiple of 32.
        unroll: loads in flight a thread; register variant. More than 16 do not fit 512 threads' registers.
        streaming: evict-first in L2 too; register variant.
        rings: warps of a block, each with its own ring of stages; bulk variant.
        stages: buffers of a ring; bulk variant.
        stage_bytes: size of each, a multiple of 128; bulk variant.
        pending_stores: stages of a ring that may be on their way out while the others are on their way in.

    Raises:
        ValueError: settings out of range.
    """

    variant: Literal["register", "bulk"] = "register"
    ctas: int = 32
    threads: int = 512
    unroll: int = 8
    streaming: bool = False
    rings: int = 1
    stages: int = 8
    stage_bytes: int = 16384
    pending_stores: int = 2

    def __post_init__(self) -> None:
        ok = {
            "variant": self.variant in ("register", "bulk"),
            "ctas": self.ctas >= 1,
            "threads": self.threads % 32 == 0 and 32 <= self.threads <= 1024,
            "unroll": 1 <= self.unroll <= 64,
            "rings": 1 <= self.rings <= 32,
            "stages": self.stages >= 1,
            "stage_bytes": self.stage_bytes % 128 == 0 and self.stage_bytes >= 128,
            # Against each other only where both are used: a change of one is tried on defaults of both variants.
            "pending_stores": self.pending_stores >= 0
            and (self.variant != "bulk" or self.pending_stores < self.stages),
        }
        for name, fine in ok.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range in {self}")
        if self.dynamic_shared_bytes and self.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(f"{self.shared_bytes} bytes of shared memory are more than a block can have in {self}")

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of the bulk variant, with 8 bytes of barrier a stage."""
        return self.rings * self.stages * (self.stage_bytes + 8)

    @property
    def dynamic_shared_bytes(self) -> int:
        """What a launch asks for; the barriers are static."""
        return self.rings * self.stages * self.stage_bytes if self.variant == "bulk" else 0

    @property
    def warps(self) -> int:
        """Warps of a block, each of which takes tiles on its own."""
        return self.rings if self.variant == "bulk" else self.threads // 32

    def macros(self, vector_bytes: int) -> dict[str, int]:
        """Preprocessor definitions for page_copy.cu; vector_bytes is the width of a thread's access."""
        if self.variant == "bulk":
            return {
                "PAGE_COPY_BULK": 1,
                "RINGS": self.rings,
                "STAGES": self.stages,
                "STAGE_BYTES": self.stage_bytes,
                "PENDING_STORES": self.pending_stores,
            }
        return {
            "PAGE_COPY_BULK": 0,
            "THREADS": self.threads,
            "UNROLL": self.unroll,
            "STREAMING": int(self.streaming),
            "VEC_BYTES": vector_bytes,
        }

    def tiles_per_plane(self, num_pages: int, page_bytes: int, vector_bytes: int) -> int:
        """Units of work that the kernel makes of one plane, as page_copy.cu does: each goes to one warp."""
        if self.variant == "register":
            return -(-num_pages * page_bytes // (32 * self.unroll * vector_bytes))
        if page_bytes <= self.stage_bytes:
            return -(-num_pages // (self.stage_bytes // page_bytes))
        return num_pages * -(-page_bytes // self.stage_bytes)

    def __str__(self) -> str:
        if self.variant == "bulk":
            return f"bulk, {self.ctas} CTAs x {self.rings} rings x {self.stages} x {self.stage_bytes} B"
        return f"register, {self.ctas} CTAs x {self.threads} threads x {self.unroll}"


#: A load or a store in eight thread blocks, each with little of a multiprocessor: 128 KiB of shared memory, so that one
#: block of attention (64 KiB) or of a MoE product (68 KiB) still fits beside it, and few registers.
_FRUGAL: Final = CudaTuning(variant="bulk", ctas=8, rings=8, stages=4, stage_bytes=4096, pending_stores=1)

#: By (direction, locality of the tier); docs/performance.md has the measurements behind them. More blocks would fill
#: the link, but a load runs beside the forward pass, and attention kernels plan one wave over all multiprocessors:
#: blocks that take places from that wave double attention's time.
DEFAULT_TUNING: Final[Mapping[tuple[Direction, Locality], CudaTuning]] = {
    ("load", "device"): _FRUGAL,
    ("store", "device"): _FRUGAL,
    ("load", "host"): _FRUGAL,
    ("store", "host"): _FRUGAL,
    # Nobody else computes on a GPU that runs copies for another one.
    ("load", "copier"): CudaTuning(ctas=132, threads=256, unroll=16),
    ("store", "copier"): CudaTuning(ctas=132, threads=512, unroll=8),
}

#: Of the ring that loads from host memory go through (copies/staged.py). Each of its two slots then has 64K tokens of a
#: layer of Qwen3-30B-A3B in bf16 (2 KiB a token). On a small GPU a 512th of its memory, for SGLang has planned with all
#: that it found free.
STAGING_BYTES: Final = 256 << 20
STAGING_SHARE: Final = 512

#: Pages below this many bytes are a bulk copy each, and a multiprocessor issues too few of them: at 1 KiB (page size 1)
#: eight blocks reach 46 % of an NVLink that sixteen of the register variant fill (docs/results/copy_sweep.jsonl). Host
#: links are slow enough.
SMALL_PAGE_BYTES: Final = 2048
SMALL_PAGE_TUNING: Final[Mapping[tuple[Direction, Locality], CudaTuning]] = {
    ("load", "device"): CudaTuning(ctas=16, threads=512, unroll=16),
    ("store", "device"): CudaTuning(ctas=16, threads=512, unroll=16),
}


def copies_from(tier: Locality, runs_on: int | None) -> Locality:
    """The row of the tables for a tier in such memory, whose copies another GPU runs or not.

    A relay of host memory copies over a link as slow as the rank's own, so a few blocks do there too.
    """
    return tier if runs_on is None or tier == "host" else "copier"


def defaults_of(direction: Direction) -> list[CudaTuning]:
    """All that `default_tuning` may choose for a direction."""
    tables = (DEFAULT_TUNING, SMALL_PAGE_TUNING)
    return [tuning for table in tables for (of, _), tuning in table.items() if of == direction]


def default_tuning(direction: Direction, locality: Locality, page_bytes: int) -> CudaTuning:
    """The measured choice for pages of so many bytes."""
    small = SMALL_PAGE_TUNING.get((direction, locality)) if page_bytes < SMALL_PAGE_BYTES else None
    return small or DEFAULT_TUNING[direction, locality]


def fit_tuning(tuning: CudaTuning, *, capability: tuple[int, int], max_shared_bytes: int, alignment: int) -> CudaTuning:
    """`tuning` as it can run: the bulk variant becomes the register variant where it cannot.

    Args:
        capability: compute capability of the GPU.
        max_shared_bytes: shared memory that a block of this GPU may have.
        alignment: bytes that every address and size is a multiple of.
    """
    possible = capability >= BULK_CAPABILITY and tuning.shared_bytes <= max_shared_bytes
    if tuning.variant == "bulk" and not (possible and alignment % VECTOR_BYTES == 0):
        return dataclasses.replace(tuning, variant="register")
    return tuning

"""Settings of the CUDA kernel, and the measured choice per link and direction. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

BULK_CAPABILITY = (9, 0)
VECTOR_BYTES = 16  # widest access of a thread, and alignment of a bulk copy's addresses and size
MAX_SHARED_BYTES = 227 * 1024

#: Link of a tier, from its traits.
Link = Literal["nvlink", "pcie", "cxl", "none"]
#: Rows of the tables: the link over which the rank's GPU or a relay copies, or another GPU instead of the rank's.
Path = Literal["nvlink", "pcie", "runner"]
Direction = Literal["load", "store"]


@dataclass(frozen=True)
class CudaTuning:
    """Settings of one direction's kernel.

    Attributes:
        variant: `register`: threads load and store 16 bytes at a time. `bulk`: asynchronous bulk copies (TMA) through
            shared memory; if the GPU or the addresses do not allow it, the register variant runs instead.
        ctas: maximum thread blocks; small copies use fewer.
        threads: threads per block, a multiple of 32; register variant.
        unroll: loads in flight per thread; register variant. More than 16 exceed the registers of 512 threads.
        streaming: evict-first in L2 too; register variant.
        rings: warps per block, each with its own ring of stages; bulk variant.
        stages: buffers per ring, at most 32; bulk variant.
        stage_bytes: size of each, a multiple of 128; bulk variant.
        pending_stores: stages of a ring that may have a store in flight while the others have a load in flight.

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
            "stages": 1 <= self.stages <= 32,
            "stage_bytes": self.stage_bytes % 128 == 0 and self.stage_bytes >= 128,
            # Checked against each other only if both are used: an override is validated on the defaults of both
            #     variants.
            "pending_stores": self.pending_stores >= 0
            and (self.variant != "bulk" or self.pending_stores < self.stages),
        }
        for name, fine in ok.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range in {self}")
        if self.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(f"{self.shared_bytes} bytes of shared memory exceed the limit per block in {self}")

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a launch: the stages, with an 8-byte barrier each."""
        return self.rings * self.stages * (self.stage_bytes + 8) if self.variant == "bulk" else 0

    @property
    def warps(self) -> int:
        """Return the warps per block, which process tiles independently."""
        return self.rings if self.variant == "bulk" else self.threads // 32

    def macros(self, vector_bytes: int) -> dict[str, int]:
        """Return the preprocessor definitions for page_copy.cu; vector_bytes is the width of a thread's access."""
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

    @property
    def tile_pieces(self) -> int:
        """Return the pieces of a tile, a warp's unit of work."""
        return 1 if self.variant == "bulk" else 32 * self.unroll

    def pieces(self, unit_bytes: int, vector_bytes: int) -> tuple[int, int]:
        """Return how page_copy.cu divides a unit: number of pieces, and bytes of one; the last one may be shorter.

        A piece is a thread's access of vector_bytes in the register variant, and a bulk copy in the bulk variant.
        Chunks of a unit larger than a stage are equal up to 128 bytes.
        """
        if self.variant == "register":
            return unit_bytes // vector_bytes, vector_bytes
        fewest = -(-unit_bytes // self.stage_bytes)
        piece = unit_bytes if fewest == 1 else -(-unit_bytes // fewest // 128) * 128
        return -(-unit_bytes // piece), piece

    def __str__(self) -> str:
        if self.variant == "bulk":
            return f"bulk, {self.ctas} CTAs x {self.rings} rings x {self.stages} x {self.stage_bytes} B"
        return f"register, {self.ctas} CTAs x {self.threads} threads x {self.unroll}"


#: A load or a store with eight thread blocks that use little of a multiprocessor: 128 KiB of shared memory, so that one
#: block of attention (64 KiB) or of a MoE product (68 KiB) still fits next to it, and few registers.
_FRUGAL: Final = CudaTuning(variant="bulk", ctas=8, rings=8, stages=4, stage_bytes=4096, pending_stores=1)

#: By direction and path; the measurements are in docs/performance.md. More blocks would saturate the link, but a load
#: runs concurrently with the forward pass, and attention kernels plan one wave over all multiprocessors: blocks that
#: displace part of that wave double attention's time.
DEFAULT_TUNING: Final[Mapping[tuple[Direction, Path], CudaTuning]] = {
    ("load", "nvlink"): _FRUGAL,
    ("store", "nvlink"): _FRUGAL,
    ("load", "pcie"): _FRUGAL,
    ("store", "pcie"): _FRUGAL,
    # A GPU that executes copies for another one is otherwise idle.
    ("load", "runner"): CudaTuning(ctas=132, threads=256, unroll=16),
    ("store", "runner"): CudaTuning(ctas=132, threads=512, unroll=8),
}

#: Units below these bytes are too short for bulk copies: a multiprocessor has only as many in flight as stages, and at
#: 1 KiB (page size 1) eight blocks reach 46 % of an NVLink that sixteen blocks of the register variant saturate
#: (docs/results/copy_sweep.jsonl). A host link needs less in flight.
SMALL_UNIT_BYTES: Final[Mapping[Path, int]] = {"nvlink": 2048, "pcie": 1024}
SMALL_UNIT_TUNING: Final[Mapping[tuple[Direction, Path], CudaTuning]] = {
    ("load", "nvlink"): CudaTuning(ctas=16, threads=512, unroll=16),
    ("store", "nvlink"): CudaTuning(ctas=16, threads=512, unroll=16),
    ("load", "pcie"): CudaTuning(ctas=8, threads=512, unroll=16),
    ("store", "pcie"): CudaTuning(ctas=8, threads=512, unroll=16),
}


def path_of(link: Link, runs_on: int | None) -> Path:
    """Return the tables' row for a link, and for copies by another GPU or the rank's.

    A relay of host memory uses a link as slow as the rank's own, so a few blocks suffice. CXL memory uses the same PCIe
    link; memory without a link counts as NVLink.
    """
    if link in ("pcie", "cxl"):
        return "pcie"
    return "nvlink" if runs_on is None else "runner"


def defaults_of(direction: Direction) -> list[CudaTuning]:
    """Return all choices of `default_tuning` for a direction."""
    tables = (DEFAULT_TUNING, SMALL_UNIT_TUNING)
    return [tuning for table in tables for (of, _), tuning in table.items() if of == direction]


def default_tuning(
    direction: Direction, path: Path, spaces: Iterable[Sequence[int]], alignment: int = VECTOR_BYTES
) -> CudaTuning:
    """Return the measured choice.

    Args:
        spaces: for each index space, the bytes of each unit of its pages. If small units are most of a page's bytes in
            some space, as with page size 1, they decide.
        alignment: common alignment of all addresses and sizes, in bytes. Below that of bulk copies, the register
            variant runs with narrower accesses; it then needs as many in flight as for small units.
    """
    limit = SMALL_UNIT_BYTES.get(path, 0)
    if limit and alignment % VECTOR_BYTES:
        return SMALL_UNIT_TUNING[direction, path]
    for units in spaces:
        if 2 * sum(nbytes for nbytes in units if nbytes < limit) > sum(units):
            return SMALL_UNIT_TUNING[direction, path]
    return DEFAULT_TUNING[direction, path]


def fit_tuning(tuning: CudaTuning, *, capability: tuple[int, int], max_shared_bytes: int, alignment: int) -> CudaTuning:
    """Adapt `tuning` to a GPU: the register variant replaces an unsupported bulk variant.

    Args:
        capability: compute capability of the GPU.
        max_shared_bytes: maximum shared memory per block of this GPU.
        alignment: common alignment of all addresses and sizes, in bytes.
    """
    possible = capability >= BULK_CAPABILITY and tuning.shared_bytes <= max_shared_bytes
    if tuning.variant == "bulk" and not (possible and alignment % VECTOR_BYTES == 0):
        return dataclasses.replace(tuning, variant="register")
    return tuning

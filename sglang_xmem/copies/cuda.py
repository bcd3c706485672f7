"""The page copy by the hand-written CUDA kernel: a few thread blocks that move all pages beside the forward pass."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from sglang_xmem.copies import nvrtc
from sglang_xmem.copies.base import PageCopier
from sglang_xmem.errors import CopyError
from sglang_xmem.kernels import source

_SOURCE_FILE = "page_copy.cu"
_MIN_CAPABILITY = (8, 0)
_BULK_CAPABILITY = (9, 0)
_VECTOR_BYTES = 16  # widest access of a thread, and what a bulk copy's addresses and size must be multiples of
_MAX_SHARED_BYTES = 227 * 1024
_MAX_PAGE_BYTES = 2**30  # the kernel counts a page's vectors in 31 bits

Locality = Literal["host", "device"]


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
            "pending_stores": 0 <= self.pending_stores < self.stages,
        }
        for name, fine in ok.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range in {self}")
        if self.shared_bytes > _MAX_SHARED_BYTES:
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


#: By (direction, locality of the tier). Reads across a link need more bytes in flight than writes, which are posted;
#: PCIe is full with a few blocks.
DEFAULT_TUNING: Final[Mapping[tuple[Literal["load", "store"], Locality], CudaTuning]] = {
    ("load", "device"): CudaTuning(ctas=32, unroll=16),
    ("store", "device"): CudaTuning(ctas=32, unroll=8),
    ("load", "host"): CudaTuning(ctas=16, unroll=8),
    ("store", "host"): CudaTuning(ctas=16, unroll=8),
}


def fit_tuning(tuning: CudaTuning, *, capability: tuple[int, int], max_shared_bytes: int, alignment: int) -> CudaTuning:
    """`tuning` as it can run: the bulk variant becomes the register variant where it cannot.

    Args:
        capability: compute capability of the GPU.
        max_shared_bytes: shared memory that a block of this GPU may have.
        alignment: bytes that every address and size is a multiple of.
    """
    possible = capability >= _BULK_CAPABILITY and tuning.shared_bytes <= max_shared_bytes
    if tuning.variant == "bulk" and not (possible and alignment % _VECTOR_BYTES == 0):
        return dataclasses.replace(tuning, variant="register")
    return tuning


class CudaPageCopier(PageCopier):
    """Arguments as PageCopier's; tier planes may lie anywhere the GPU can address, device planes on the GPU. And:

    Args:
        tier_locality: where the tier's bytes live, which picks the default tuning.
        load_ctas, store_ctas: thread blocks of a launch at most; 0 leaves it to the tuning.
        load_tuning, store_tuning: settings of each direction; None takes the default.

    Raises:
        ValueError: also for device planes that are not CUDA tensors, and a page too large.
        CopyError: a GPU older than sm_80, no NVRTC or cuda-bindings, or a kernel that does not load.
    """

    name = "cuda"

    def __init__(
        self,
        tier_planes: Sequence[torch.Tensor],
        device_planes: Sequence[torch.Tensor],
        page_size: int,
        *,
        tier_locality: Locality = "device",
        load_ctas: int = 0,
        store_ctas: int = 0,
        load_tuning: CudaTuning | None = None,
        store_tuning: CudaTuning | None = None,
    ) -> None:
        super().__init__(tier_planes, device_planes, page_size)
        if self._device.type != "cuda":
            raise ValueError(f"the copier 'cuda' is for device planes on a CUDA GPU, not on {self._device}")
        if self.page_bytes > _MAX_PAGE_BYTES:
            raise ValueError(f"a page of {self.page_bytes} bytes is larger than {_MAX_PAGE_BYTES}")
        properties: Any = torch.cuda.get_device_properties(self._device)
        capability = (properties.major, properties.minor)
        if capability < _MIN_CAPABILITY:
            raise CopyError(
                f"the copier 'cuda' needs a GPU of compute capability 8.0, and {self._device} has "
                f"{capability[0]}.{capability[1]}; set copy.kernel to 'triton'."
            )
        tier = [plane.data_ptr() for plane in tier_planes]
        device = [plane.data_ptr() for plane in device_planes]
        self._tier_table = torch.tensor(tier, dtype=torch.int64, device=self._device)
        self._device_table = torch.tensor(device, dtype=torch.int64, device=self._device)
        # Launches may come on any stream; the tables must be there by then.
        torch.cuda.current_stream(self._device).synchronize()

        alignment = math.gcd(_VECTOR_BYTES, self.row_bytes, *tier, *device)

        def fitted(chosen: CudaTuning | None, direction: Literal["load", "store"], ctas: int) -> CudaTuning:
            tuning = chosen or DEFAULT_TUNING[direction, tier_locality]
            return fit_tuning(
                dataclasses.replace(tuning, ctas=ctas) if ctas else tuning,
                capability=capability,
                max_shared_bytes=properties.shared_memory_per_block_optin,
                alignment=alignment,
            )

        #: What runs, which is the asked-for tuning unless that cannot run here.
        self.load_tuning = fitted(load_tuning, "load", load_ctas)
        self.store_tuning = fitted(store_tuning, "store", store_ctas)
        tables = (self._tier_table.data_ptr(), self._device_table.data_ptr())
        self._load = _Launcher(self, self.load_tuning, capability, alignment, tables)
        self._store = _Launcher(self, self.store_tuning, capability, alignment, tables[::-1])

    def describe(self) -> str:
        return f"{self.name} (load: {self.load_tuning}; store: {self.store_tuning})"

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        if load:
            self._load(tier_rows, device_rows, planes)
        else:
            self._store(device_rows, tier_rows, planes)


class _Launcher:
    """One direction's kernel with everything that does not change from launch to launch.

    Args:
        copier: whose pages are copied.
        tuning: one that fits the GPU.
        capability: of the GPU.
        alignment: bytes, 1 to 16, that every address is a multiple of.
        tables: addresses of the device arrays of the source's and the destination's plane addresses.
    """

    #: Kernel arguments in slots of 8 bytes; `int num_planes` reads the low half of its slot.
    _ARGUMENTS = struct.Struct("<QQqQqQqqqq")

    def __init__(
        self,
        copier: PageCopier,
        tuning: CudaTuning,
        capability: tuple[int, int],
        alignment: int,
        tables: tuple[int, int],
    ) -> None:
        from cuda.bindings import driver

        image = nvrtc.build(source(_SOURCE_FILE), _SOURCE_FILE, tuning.macros(alignment), capability)
        device = copier.device_planes[0].device
        self._function = nvrtc.load(image, "page_copy", device, tuning.dynamic_shared_bytes)
        self._driver: Any = driver
        self._launch: Any = driver.cuLaunchKernel
        self._device = device
        self._tuning = tuning
        self._alignment = alignment
        self._row_bytes, self._page_bytes = copier.row_bytes, copier.page_bytes
        self._src_table, self._dst_table = tables
        self._threads, self._shared_bytes = 32 * tuning.warps, tuning.dynamic_shared_bytes
        # The driver copies the arguments during the call, so one buffer serves all launches, one thread at a time.
        self._lock = threading.Lock()
        self._buffer = ctypes.create_string_buffer(self._ARGUMENTS.size)
        slots = range(ctypes.addressof(self._buffer), ctypes.addressof(self._buffer) + self._ARGUMENTS.size, 8)
        self._pointers = (ctypes.c_void_p * len(slots))(*slots)
        self._parameters = ctypes.addressof(self._pointers)

    def __call__(self, src_rows: torch.Tensor, dst_rows: torch.Tensor, planes: range) -> None:
        """Enqueue on the current stream of the copier's device.

        Raises:
            CopyError: the driver refuses the launch.
        """
        num_planes = len(planes)
        num_pages = src_rows.numel()
        tuning = self._tuning
        tiles = num_planes * tuning.tiles_per_plane(num_pages, self._page_bytes, self._alignment)
        grid = min(tuning.ctas, -(-tiles // tuning.warps))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with self._lock:
            self._ARGUMENTS.pack_into(
                self._buffer,
                0,
                self._src_table + 8 * planes.start,
                self._dst_table + 8 * planes.start,
                num_planes,
                src_rows.data_ptr(),
                src_rows.stride(0),
                dst_rows.data_ptr(),
                dst_rows.stride(0),
                num_pages,
                self._row_bytes,
                self._page_bytes,
            )
            size = (grid, 1, 1, self._threads, 1, 1, self._shared_bytes, stream, self._parameters, 0)
            status = self._launch(self._function, *size)[0]
            if status.value:
                # This thread may have no CUDA context yet, or another GPU's. Finding out only now keeps that question
                # out of every other launch. torch.cuda.device alone would not create a context.
                with torch.cuda.device(self._device):
                    torch.cuda.current_stream(self._device).query()
                    status = self._launch(self._function, *size)[0]
        if status.value:
            raise CopyError(f"The driver refuses to launch the copy kernel: {status.name}.")

"""The page copy by the hand-written CUDA kernel: a few thread blocks that move all pages beside the forward pass."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from sglang_xmem.copies import nvrtc
from sglang_xmem.copies.base import OnCpu, PageCopier
from sglang_xmem.copies.remote import CopyingGpu, give_access
from sglang_xmem.copies.signals import NOBODY, Counters, LoadSignals
from sglang_xmem.copies.signals import supported as signals_supported
from sglang_xmem.copies.tuning import (
    VECTOR_BYTES,
    CudaTuning,
    Direction,
    Locality,
    copies_from,
    default_tuning,
    fit_tuning,
)
from sglang_xmem.errors import CopyError
from sglang_xmem.kernels import source

_SOURCE_FILE = "page_copy.cu"
_MIN_CAPABILITY = (8, 0)
_MAX_PAGE_BYTES = 2**30  # the kernel counts a page's vectors in 31 bits


class CudaPageCopier(PageCopier):
    """Arguments as PageCopier's; tier planes may lie anywhere the GPU can address, device planes on the GPU. And:

    Args:
        tier_locality: where the tier's bytes live, which picks the default tuning.
        load, store: settings of each direction, whole or as changes to the measured ones (fields of CudaTuning).
        runs_on: CUDA ordinal of another GPU that runs the copies; all tier planes are within its reach.

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
        load: CudaTuning | Mapping[str, Any] = MappingProxyType({}),
        store: CudaTuning | Mapping[str, Any] = MappingProxyType({}),
        runs_on: int | None = None,
    ) -> None:
        super().__init__(tier_planes, device_planes, page_size)
        if self._device.type != "cuda":
            raise ValueError(f"the copier 'cuda' is for device planes on a CUDA GPU, not on {self._device}")
        if self.page_bytes > _MAX_PAGE_BYTES:
            raise ValueError(f"a page of {self.page_bytes} bytes is larger than {_MAX_PAGE_BYTES}")
        runner = self._device if runs_on is None else torch.device("cuda", runs_on)
        properties: Any = torch.cuda.get_device_properties(runner)
        capability = (properties.major, properties.minor)
        if capability < _MIN_CAPABILITY:
            raise CopyError(
                f"the copier 'cuda' needs a GPU of compute capability 8.0, and {runner} has "
                f"{capability[0]}.{capability[1]}; set copy.kernel to 'triton'."
            )
        there = [plane.data_ptr() for plane in tier_planes]
        here = [plane.data_ptr() for plane in device_planes]
        self._tier_table = torch.tensor(there, dtype=torch.int64, device=self._device)
        self._device_table = torch.tensor(here, dtype=torch.int64, device=self._device)
        # Launches may come on any stream; the tables must be there by then.
        torch.cuda.current_stream(self._device).synchronize()
        if runs_on is not None:
            give_access(runs_on, self._device, (self._tier_table, *device_planes))
        self._runs_on = runs_on

        alignment = math.gcd(VECTOR_BYTES, self.row_bytes, *there, *here)
        locality = copies_from(tier_locality, runs_on)

        def fitted(given: CudaTuning | Mapping[str, Any], direction: Direction) -> CudaTuning:
            if not isinstance(given, CudaTuning):
                given = dataclasses.replace(default_tuning(direction, locality, self.page_bytes), **given)
            return fit_tuning(
                given,
                capability=capability,
                max_shared_bytes=properties.shared_memory_per_block_optin,
                alignment=alignment,
            )

        #: What runs, which is what was asked for unless that cannot run here.
        self.load_tuning, self.store_tuning = fitted(load, "load"), fitted(store, "store")
        tables = (self._tier_table.data_ptr(), self._device_table.data_ptr())
        self._load = _Launcher(self, self.load_tuning, capability, alignment, tables, runs_on)
        self._store = _Launcher(self, self.store_tuning, capability, alignment, tables[::-1], runs_on)

    def describe(self) -> str:
        where = "" if self._runs_on is None else f" on GPU {self._runs_on}"
        return f"{self.name}{where} (load: {self.load_tuning}; store: {self.store_tuning})"

    def can_signal(self) -> bool:
        """Whether this copier's loads can raise counters on the rank's GPU, and streams there wait for them."""
        return signals_supported(self._device, self._runs_on)

    def make_signals(self, num_parts: int) -> LoadSignals | None:
        if not self.can_signal():
            return None
        return LoadSignals(num_parts, self._device, remote=self._runs_on is not None)

    def start(
        self,
        tier_rows: torch.Tensor,
        device_rows: torch.Tensor,
        planes: range,
        *,
        load: bool,
        counters: Counters = NOBODY,
        stream: int | None = None,
    ) -> int:
        """Enqueue a copy behind what is on the current stream, which does not wait for it before `join`.

        For whoever calls from one thread at a time, has several under way at once, and announces them to the signals
        whose counters a load raises. `join` has to follow, also where this raises, but for the rank's own copies.

        Args:
            stream: handle of the current stream, from a caller that knows it; asking for it takes 3 us.

        Returns: by how much it will raise each counter.
        """
        if load:
            return self._load.start(tier_rows, device_rows, planes, counters, stream)
        return self._store.start(device_rows, tier_rows, planes, stream=stream)

    def join(self, *, load: bool) -> None:
        """Let the current stream go on behind what `start` enqueued."""
        (self._load if load else self._store).join()

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        if load:
            self._load(tier_rows, device_rows, planes)
        else:
            self._store(device_rows, tier_rows, planes)

    def _copy_signalling(
        self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, signals: LoadSignals, on_cpu: OnCpu
    ) -> None:
        self._load(tier_rows, device_rows, planes, signals)


class _Launcher:
    """One direction's kernel with everything that does not change from launch to launch.

    Args:
        copier: whose pages are copied.
        tuning: one that fits the GPU.
        capability: of the GPU.
        alignment: bytes, 1 to 16, that every address is a multiple of.
        tables: addresses of the device arrays of the source's and the destination's plane addresses.
        runs_on: another GPU than the copier's that runs the kernel.
    """

    #: Kernel arguments in slots of 8 bytes: which planes, then those of a call (which pages, and whom to tell). `int
    #: num_planes` reads the low half of its slot.
    _PART = struct.Struct("<QQq")
    _CALL = struct.Struct("<QqQqqqqQq")

    def __init__(
        self,
        copier: PageCopier,
        tuning: CudaTuning,
        capability: tuple[int, int],
        alignment: int,
        tables: tuple[int, int],
        runs_on: int | None = None,
    ) -> None:
        from cuda.bindings import driver

        image = nvrtc.build(source(_SOURCE_FILE), _SOURCE_FILE, tuning.macros(alignment), capability)
        device = copier.device_planes[0].device
        self._remote = None if runs_on is None else CopyingGpu(runs_on, device)
        self._runner = device if self._remote is None else self._remote.device
        self._function = nvrtc.load(image, "page_copy", self._runner, tuning.dynamic_shared_bytes)
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
        self._call = ctypes.create_string_buffer(self._CALL.size)
        #: Parameters of each range of planes that has been launched; the buffers stay alive beside their address.
        self._parts: dict[range, tuple[int, Any, Any]] = {}

    def _part(self, planes: range) -> int:
        """Address of the kernel parameters for a range of planes: pointers to its own slots and to the call's."""
        known = self._parts.get(planes)
        if known is None:
            part = ctypes.create_string_buffer(self._PART.size)
            self._PART.pack_into(
                part, 0, self._src_table + 8 * planes.start, self._dst_table + 8 * planes.start, len(planes)
            )
            slots = [ctypes.addressof(buffer) + at for buffer in (part, self._call) for at in range(0, len(buffer), 8)]
            pointers = (ctypes.c_void_p * len(slots))(*slots)
            known = self._parts[planes] = (ctypes.addressof(pointers), pointers, part)
        return known[0]

    def __call__(
        self,
        src_rows: torch.Tensor,
        dst_rows: torch.Tensor,
        planes: range,
        signals: LoadSignals | None = None,
    ) -> None:
        """Enqueue a launch on the current stream of the copier's device.

        Raises:
            CopyError: the driver refuses it; nothing is enqueued.
        """
        with self._lock:
            try:
                raises = self.start(src_rows, dst_rows, planes, signals.counters(planes) if signals else NOBODY)
            finally:
                self.join()
            if signals:
                signals.announce(raises)

    def join(self) -> None:
        """Let the rank's current stream go on behind the last launch."""
        if self._remote is not None:
            self._remote.end()

    def start(
        self,
        src_rows: torch.Tensor,
        dst_rows: torch.Tensor,
        planes: range,
        counters: Counters = NOBODY,
        stream: int | None = None,
    ) -> int:
        """`__call__` for one thread at a time, without `join` and without announcing the load.

        Returns: by how much the launch will raise each counter.
        """
        num_pages = src_rows.numel()
        tuning = self._tuning
        tiles_per_plane = tuning.tiles_per_plane(num_pages, self._page_bytes, self._alignment)
        launch, function, threads, shared = self._launch, self._function, self._threads, self._shared_bytes
        self._CALL.pack_into(
            self._call,
            0,
            src_rows.data_ptr(),
            src_rows.stride(0),
            dst_rows.data_ptr(),
            dst_rows.stride(0),
            num_pages,
            self._row_bytes,
            self._page_bytes,
            *counters,
        )
        grid = min(tuning.ctas, -(-len(planes) * tiles_per_plane // tuning.warps))
        parameters = self._part(planes)
        if self._remote is None:
            if stream is None:
                stream = torch.cuda.current_stream(self._device).cuda_stream
            status = launch(function, grid, 1, 1, threads, 1, 1, shared, stream, parameters, 0)[0]
        else:
            stream = self._remote.begin()
        if self._remote is not None or status.value:
            # This thread may have no CUDA context yet, or another GPU's. Finding out only now keeps that
            # question out of every other launch. torch.cuda.device alone would not create a context.
            with torch.cuda.device(self._runner):
                torch.cuda.current_stream(self._runner).query()
                status = launch(function, grid, 1, 1, threads, 1, 1, shared, stream, parameters, 0)[0]
        if status.value:
            raise CopyError(f"The driver refuses to launch the copy kernel: {status.name}.")
        return grid * tuning.warps

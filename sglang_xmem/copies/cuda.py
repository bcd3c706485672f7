"""The page copy by the hand-written CUDA kernel: a few thread blocks that move all pages during the forward pass."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from sglang_xmem.copies import nvrtc
from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.counters import supported as counters_supported
from sglang_xmem.copies.geometry import Slab, alignment_of
from sglang_xmem.copies.remote import CopyingGpu, check_access, give_access
from sglang_xmem.copies.table import Parameters, Work, record
from sglang_xmem.copies.tuning import (
    VECTOR_BYTES,
    CudaTuning,
    Direction,
    Link,
    default_tuning,
    fit_tuning,
    path_of,
)
from sglang_xmem.errors import CopyError
from sglang_xmem.kernels import source

_SOURCE_FILE = "page_copy.cu"
_MIN_CAPABILITY = (8, 0)


class CudaPageCopier(PageCopier):
    """Arguments as for PageCopier; slabs may be anywhere that the copying GPU can address, `device` is a GPU. And:

    Args:
        link: link to the tier, which selects the default tuning.
        load, store: settings of each direction: a CudaTuning, or overrides of the measured one (its fields).
        runs_on: CUDA ordinal of another GPU that executes the copies, and can access all slabs.

    Raises:
        ValueError: also for a device that is not a CUDA GPU.
        CopyError: a GPU older than sm_80, no NVRTC or cuda-bindings, or a GPU that cannot access the rank's memory.
    """

    name = "cuda"

    def __init__(
        self,
        slabs: Sequence[Slab],
        device: torch.device,
        *,
        link: Link = "nvlink",
        load: CudaTuning | Mapping[str, Any] = MappingProxyType({}),
        store: CudaTuning | Mapping[str, Any] = MappingProxyType({}),
        runs_on: int | None = None,
    ) -> None:
        super().__init__(slabs, device)
        if self.device.type != "cuda":
            raise ValueError(f"the copier 'cuda' is for pools on a CUDA GPU, not on {self.device}")
        self.runner = self.device if runs_on is None else torch.device("cuda", runs_on)
        properties: Any = torch.cuda.get_device_properties(self.runner)
        self._capability = (properties.major, properties.minor)
        if self._capability < _MIN_CAPABILITY:
            raise CopyError(
                f"the copier 'cuda' needs a GPU of compute capability 8.0, but {self.runner} has "
                f"{properties.major}.{properties.minor}; set copy.kernel to 'triton'."
            )
        self._shared_bytes: int = properties.shared_memory_per_block_optin
        self._runs_on = runs_on
        if runs_on is not None:
            # Vectors come from torch's allocator too.
            give_access(runs_on, self.device)
            check_access(runs_on, self.device, [torch.zeros(1, device=self.device).data_ptr()])
        self._path = path_of(link, runs_on)
        self._given: dict[Direction, CudaTuning | Mapping[str, Any]] = {"load": load, "store": store}
        self._order = {
            direction: None if runs_on is None else CopyingGpu(runs_on, self.device) for direction in self._given
        }
        # One thread at a time launches a direction: launches share events and a program's parameters.
        self._locks = {direction: threading.Lock() for direction in self._given}
        #: The tuning of each direction in the last compiled program, for `describe`.
        self.tunings = {direction: self._tuning(direction, [], VECTOR_BYTES) for direction in self._given}

    def compile(self, steps: Sequence[Step], num_parts: int) -> CudaProgram:
        program = CudaProgram(self, steps, num_parts)
        if self._runs_on is not None:
            check_access(self._runs_on, self.device, {step.plane.device_address for step in steps})
        return program

    def describe(self) -> str:
        where = "" if self._runs_on is None else f" on GPU {self._runs_on}"
        return f"{self.name}{where} (load: {self.tunings['load']}; store: {self.tunings['store']})"

    def can_count(self) -> bool:
        """Whether this copier's loads can raise counters on the rank's GPU, and streams there wait for them."""
        return counters_supported(self.device, self._runs_on)

    def make_counters(self, num_parts: int) -> LayerCounters | None:
        if not self.can_count():
            return None
        return LayerCounters(num_parts, self.device, remote=self._runs_on is not None)

    def start(self, program: CudaProgram, pages: Sequence[Pages], *, load: bool, counters: int = 0) -> int:
        """Enqueue a move after the current stream's work; the stream does not wait for it before `join`.

        For callers that use one thread at a time and announce the load to the counters. `join` must follow, even after
        an exception.

        Args:
            counters: address of the first counter, 0 for none.

        Returns: the launch's increment of each counter; 0 without a launch, if there are no pages.
        """
        direction: Direction = "load" if load else "store"
        return program.kernels[direction].start(pages, counters, self._order[direction])

    def raises(self, program: CudaProgram, pages: Sequence[Pages]) -> int:
        """Say by how much a load's launch will raise each counter; see `start`."""
        return program.kernels["load"].warps(pages)

    def join(self, *, load: bool) -> None:
        """Make the current stream wait for the move of `start`."""
        order = self._order["load" if load else "store"]
        if order is not None:
            order.end()

    def make_kernel(self, program: CudaProgram, direction: Direction) -> Kernel:
        """Prepare the kernel of one direction of a program."""
        planes = [step.plane for step in program.steps]
        alignment = alignment_of(self.slabs, planes, VECTOR_BYTES)
        spaces: list[list[int]] = [[] for _ in range(program.num_vectors)]
        for step in program.steps:
            spaces[step.vector].append(step.plane.unit_bytes)
        tuning = self.tunings[direction] = self._tuning(direction, spaces, alignment)
        return Kernel(program, tuning, alignment, self._capability, self.runner, load=direction == "load")

    def scatter(self, tuning: CudaTuning, alignment: int) -> tuple[CudaTuning, int]:
        """Load the kernel for separate tables; return its tuning, as far as it is supported, and its address.

        Args:
            alignment: common alignment of all addresses and sizes, 1 to 16 bytes.
        """
        tuning = fit_tuning(
            tuning, capability=self._capability, max_shared_bytes=self._shared_bytes, alignment=alignment
        )
        image = _image(tuning, alignment, self._capability)
        return tuning, int(nvrtc.load(image, "page_copy", self.runner, tuning.shared_bytes))

    def _tuning(self, direction: Direction, spaces: Sequence[Sequence[int]], alignment: int) -> CudaTuning:
        """Return the requested tuning, adapted to this GPU if necessary."""
        tuning = self._given[direction]
        if not isinstance(tuning, CudaTuning):
            tuning = dataclasses.replace(default_tuning(direction, self._path, spaces, alignment), **tuning)
        return fit_tuning(tuning, capability=self._capability, max_shared_bytes=self._shared_bytes, alignment=alignment)

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, CudaProgram)
        with self._locks["load" if load else "store"]:
            try:
                raises = self.start(program, pages, load=load, counters=0 if counters is None else counters.address)
            finally:
                self.join(load=load)
            if counters is not None:
                counters.announce(raises)


class CudaProgram(Program):
    """A program with a kernel, a table of planes and a parameter buffer per direction."""

    def __init__(self, copier: CudaPageCopier, steps: Sequence[Step], num_parts: int) -> None:
        super().__init__(copier, steps, num_parts)
        self.kernels = {direction: copier.make_kernel(self, direction) for direction in copier.tunings}


@functools.cache
def _image(tuning: CudaTuning, alignment: int, capability: tuple[int, int]) -> bytes:
    """Cache the kernel's image, so that compiling another program on the scheduler thread reads no file."""
    return nvrtc.build(source(_SOURCE_FILE), _SOURCE_FILE, tuning.macros(alignment), capability)


class Kernel:
    """One direction's kernel with everything that is constant across launches.

    Args:
        program: source of the steps.
        tuning: one that fits the GPU.
        alignment: common alignment of all addresses and sizes, 1 to 16 bytes.
        capability: of the GPU.
        runner: the GPU.
        load: the direction.
    """

    def __init__(
        self,
        program: Program,
        tuning: CudaTuning,
        alignment: int,
        capability: tuple[int, int],
        runner: torch.device,
        *,
        load: bool,
    ) -> None:
        self._function = nvrtc.load(_image(tuning, alignment, capability), "page_copy", runner, tuning.shared_bytes)
        self._device, self._runner = program.copier.device, runner
        self.tuning = tuning
        self._threads = 32 * tuning.warps
        self._work = Work(program.steps, tuning, alignment)
        records = bytearray().join(record(step, tuning, alignment) for step in program.steps) or bytearray(64)
        # On the GPU that reads it; otherwise each tile's record would be a read over the link.
        self._table = nvrtc.upload(records, runner)
        self._parameters = Parameters(self._table.data_ptr(), len(program.steps), program.num_parts, load=load)

    def warps(self, pages: Sequence[Pages]) -> int:
        """Count the warps that a launch for these pages has."""
        tiles = self._work.tiles([vector.frames.numel() for vector in pages])
        return min(self.tuning.ctas, -(-tiles // self.tuning.warps)) * self.tuning.warps

    def start(self, pages: Sequence[Pages], counters: int, order: CopyingGpu | None) -> int:
        """Enqueue a launch: see CudaPageCopier.start.

        Args:
            order: stream order, if another GPU than the rank's runs the kernel.

        Raises:
            CopyError: the driver refuses it; nothing is enqueued.
        """
        tuning, warps = self.tuning, self.warps(pages)
        grid = warps // tuning.warps
        if order is not None:
            stream = order.begin()
        if grid == 0:
            return 0
        numbers: list[int] = []
        for frames, slots in pages:
            numbers += (frames.data_ptr(), slots.data_ptr(), slots.stride(0), frames.numel())
        self._parameters.pack(counters, numbers)
        threads, shared, parameters = self._threads, tuning.shared_bytes, self._parameters.address
        if order is None:
            stream = torch.cuda.current_stream(self._device).cuda_stream
            nvrtc.launch(self._function, grid, threads, shared, stream, parameters, self._runner)
        else:
            with torch.cuda.device(self._runner):
                nvrtc.launch(self._function, grid, threads, shared, stream, parameters, self._runner)
        return warps

"""A copier whose kernel is page_copy.cu, run on the CPU: its arithmetic and its order of copies, without a GPU.

What stands for the GPU is `machine.h`. The tables and parameters are the ones that the CUDA copier makes.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.geometry import Slab, alignment_of
from sglang_xmem.copies.table import Parameters, Work, record
from sglang_xmem.copies.tuning import VECTOR_BYTES, CudaTuning, fit_tuning
from sglang_xmem.kernels import source

_HERE = Path(__file__).parent
_RAISED = ctypes.CFUNCTYPE(None, ctypes.c_uint64)
_ARGUMENTS: list[Any] = [ctypes.c_uint32] * 3 + [ctypes.c_void_p, ctypes.c_uint64, _RAISED, ctypes.c_void_p]
_ARGUMENTS += [ctypes.c_uint32] * 2
_BUILDS = tempfile.TemporaryDirectory(prefix="page_copy_")
_LIBRARIES: dict[str, Any] = {}


def library(text: str, macros: Mapping[str, int], name: str = "page_copy") -> Any:
    """A kernel's source compiled by g++ for some macros; a function of _ARGUMENTS (see emulate.cpp)."""
    macros = {"PAGE_COPY_BULK": 0, "VEC_BYTES": 8, **macros}
    options = [f"-DKERNEL_NAME={name}", *(f"-D{key}={value}" for key, value in macros.items())]
    key = hashlib.sha256(repr((text, options)).encode()).hexdigest()[:16]
    if key not in _LIBRARIES:
        kernel, built = Path(_BUILDS.name) / f"{key}.cu", Path(_BUILDS.name) / f"{key}.so"
        kernel.write_text(text)
        names = [f'-DPAGE_COPY_MACHINE="{_HERE / "machine.h"}"', f'-DKERNEL="{kernel}"']
        options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", *options, *names, "-o", str(built)]
        subprocess.run(["g++", *options, str(_HERE / "emulate.cpp")], check=True)
        function = ctypes.CDLL(str(built)).emulate
        function.restype = ctypes.c_char_p
        function.argtypes = _ARGUMENTS
        _LIBRARIES[key] = function
    return _LIBRARIES[key]


class EmulatedCopier(PageCopier):
    """Arguments as PageCopier's, all memory on the CPU, and:

    Args:
        tuning: of both directions.
        text: of the kernel, to try a wrong one.
    """

    name = "emulated"

    def __init__(
        self,
        slabs: Sequence[Slab],
        device: torch.device,
        tuning: CudaTuning,
        text: str | None = None,
    ) -> None:
        super().__init__(slabs, device)
        self.tuning, self._text = tuning, text or source("page_copy.cu")
        self.launches = 0
        #: Called with a counter's address at each raise.
        self.on_raise: Callable[[int], None] = lambda address: None

    def describe(self) -> str:
        return f"{self.name} ({self.tuning})"

    def compile(self, steps: Sequence[Step], num_parts: int) -> EmulatedProgram:
        return EmulatedProgram(self, steps, num_parts)

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, EmulatedProgram)
        assert counters is None
        self.start(program, pages, load=load, counters=0)

    def start(self, program: EmulatedProgram, pages: Sequence[Pages], *, load: bool, counters: int) -> int:
        """Run a move; as CudaPageCopier.start."""
        tuning = program.tuning
        grid = min(tuning.ctas, -(-program.work.tiles([one.frames.numel() for one in pages]) // tuning.warps))
        if grid == 0:
            return 0
        numbers: list[int] = []
        tier = [(slab.address, slab.frames * slab.frame_bytes) for slab in self.slabs]
        device = [(step.plane.device_address, step.plane.device_bytes) for step in program.steps]
        ranges = [*(device if load else tier), *(tier if load else device), program.table]
        for frames, slots in pages:
            numbers += (frames.data_ptr(), slots.data_ptr(), slots.stride(0), frames.numel())
            ranges += [(frames.data_ptr(), 8 * frames.numel()), (slots.data_ptr(), 8 * slots.stride(0) * slots.numel())]
        parameters = program.parameters[load]
        parameters.pack(counters, numbers)
        self.launches += 1
        flat = [number for place in ranges for number in place]
        wrong = program.run(
            grid,
            32 * tuning.warps,
            tuning.shared_bytes,
            parameters.address,
            self.launches,
            _RAISED(self.on_raise),
            (ctypes.c_uint64 * len(flat))(*flat),
            len(device if load else tier),
            len(ranges),
        )
        assert wrong is None, wrong.decode()
        return grid * tuning.warps


class EmulatedProgram(Program):
    """A program with the tables that the CUDA copier would make."""

    def __init__(self, copier: EmulatedCopier, steps: Sequence[Step], num_parts: int) -> None:
        super().__init__(copier, steps, num_parts)
        alignment = alignment_of(copier.slabs, [step.plane for step in steps], VECTOR_BYTES)
        self.tuning = fit_tuning(copier.tuning, capability=(9, 0), max_shared_bytes=1 << 20, alignment=alignment)
        self.work = Work(steps, self.tuning, alignment)
        self._table = ctypes.create_string_buffer(b"".join(record(one, self.tuning, alignment) for one in steps), None)
        self.table = (ctypes.addressof(self._table), 64 * len(steps))
        self.parameters = {
            load: Parameters(ctypes.addressof(self._table), len(steps), num_parts, load=load) for load in (True, False)
        }
        self.run = library(copier._text, self.tuning.macros(alignment))

"""Loads by copy engines with page_copy.cu itself behind each chunk: its tables and parameters, without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from sglang_xmem.copies.dma import BUFFERS, DmaCopier
from sglang_xmem.copies.geometry import Slab
from sglang_xmem.copies.table import PARAMETER_OFFSETS, PARAMETERS_BYTES
from sglang_xmem.copies.tuning import CudaTuning, fit_tuning
from sglang_xmem.kernels import source
from tests.contracts.copiers import CopierContract, Limits
from tests.emulation.emulated import _RAISED, library
from tests.unit.copies.test_dma import Gpu, Kernel, small  # noqa: F401  (small is a fixture)


class Kernels(Kernel):
    """Gives the tuning that a GPU would run."""

    def scatter(self, tuning: CudaTuning, alignment: int) -> tuple[CudaTuning, int]:
        return fit_tuning(tuning, capability=(9, 0), max_shared_bytes=1 << 20, alignment=alignment), alignment


class EmulatedGpu(Gpu):
    """Runs the kernel's source.

    Attributes:
        launches: that were run, and `variants` of the kernel in them.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.launches = 0
        self.variants: set[str] = set()

    def launch(self, function: int, grid: int, tuning: CudaTuning, parameters: int, turn: int) -> None:
        places = (ctypes.c_uint64 * len(PARAMETER_OFFSETS)).from_address(parameters)
        assert [place - places[0] for place in places] == list(PARAMETER_OFFSETS)
        self._call("launch", turn, (function, grid, tuning, ctypes.string_at(places[0], PARAMETERS_BYTES)))

    def _do_launch(self, what: Any) -> None:
        alignment, grid, tuning, content = what
        buffer = ctypes.create_string_buffer(content, PARAMETERS_BYTES)
        places = (ctypes.c_uint64 * len(PARAMETER_OFFSETS))(
            *(ctypes.addressof(buffer) + at for at in PARAMETER_OFFSETS)
        )
        # Everything may be written: which bytes were is what the contract looks at.
        everything = (ctypes.c_uint64 * 2)(0, 1 << 62)
        self.launches += 1
        self.variants.add(tuning.variant)
        wrong = library(source("page_copy.cu"), tuning.macros(alignment))(
            grid, 32 * tuning.warps, tuning.shared_bytes, ctypes.addressof(places), self.launches,
            _RAISED(lambda address: pytest.fail("the kernel behind a chunk has no counters")), everything, 1, 1,
        )  # fmt: skip
        assert wrong is None, wrong.decode()


@pytest.mark.usefixtures("small")
class TestEmulatedDma(CopierContract):
    seeds = range(6)
    limits = Limits(units=1 << 17, pages=12, large=False)
    reads_all_units = True
    made = 0
    gpu = EmulatedGpu()

    def make(self, slabs: Sequence[Slab], device: torch.device) -> DmaCopier:
        type(self).made += 1
        type(self).gpu = EmulatedGpu(self.made)
        buffer = (1 << 12, 1 << 16)[self.made % 2]
        return DmaCopier(cast(Any, Kernels(slabs, device)), cast(Any, self.gpu), BUFFERS * buffer, 1 << 62)

    def test_both_variants_run(self) -> None:
        """Bulk copies take addresses that are multiples of 16; other scenes are for the register variant."""
        variants = set()
        for seed in range(20, 26):
            self.scene(seed).run()
            variants |= self.gpu.variants
        assert variants == {"bulk", "register"}

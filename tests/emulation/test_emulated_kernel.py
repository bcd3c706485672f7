"""page_copy.cu on the CPU: the copiers' contract with every variant, counters, and wrong kernels that are noticed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import pytest
import torch
from copiers import CopierContract, Limits
from emulated import EmulatedCopier

from sglang_xmem.copies.geometry import Slab
from sglang_xmem.copies.tuning import CudaTuning

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")

TUNINGS = {
    "register": CudaTuning(ctas=3, threads=64, unroll=8),
    "register_odd": CudaTuning(ctas=2, threads=96, unroll=3),
    "bulk": CudaTuning(variant="bulk", ctas=2, rings=2, stages=4, stage_bytes=4096, pending_stores=1),
    "bulk_waits": CudaTuning(variant="bulk", ctas=1, rings=2, stages=2, stage_bytes=512, pending_stores=0),
    "bulk_far_ahead": CudaTuning(variant="bulk", ctas=2, rings=1, stages=32, stage_bytes=256, pending_stores=0),
}


class _Emulated(CopierContract):
    tuning = ""
    seeds = range(12)
    limits = Limits(units=1 << 18, pages=12, large=False)

    def make(self, slabs: Sequence[Slab], device: torch.device) -> EmulatedCopier:
        return EmulatedCopier(slabs, device, TUNINGS[self.tuning])


class TestRegister(_Emulated):
    tuning = "register"


class TestRegisterOdd(_Emulated):
    tuning = "register_odd"


class TestBulk(_Emulated):
    tuning = "bulk"


class TestBulkWaits(_Emulated):
    tuning = "bulk_waits"


class TestBulkFarAhead(_Emulated):
    tuning = "bulk_far_ahead"

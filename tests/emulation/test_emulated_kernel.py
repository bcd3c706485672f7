"""page_copy.cu on the CPU: the copiers' contract with every variant, counters, and wrong kernels that are noticed."""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sglang_xmem.copies.geometry import Slab
from sglang_xmem.copies.table import divider, magic
from sglang_xmem.copies.tuning import CudaTuning
from sglang_xmem.kernels import source
from tests.contracts.copiers import CopierContract, Limits, Scene
from tests.emulation.emulated import EmulatedCopier, EmulatedProgram

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


class Load:
    """A load with counters, and what is in place whenever one is raised."""

    def __init__(self, tuning: CudaTuning, seed: int, text: str | None = None) -> None:
        def make(slabs: Sequence[Slab], device: torch.device) -> EmulatedCopier:
            return EmulatedCopier(slabs, device, tuning, text)

        self.scene = scene = Scene(make, seed, _Emulated.limits)
        copier, program = scene.copier, scene.program
        assert isinstance(copier, EmulatedCopier)
        assert isinstance(program, EmulatedProgram)
        self.counters = (ctypes.c_uint32 * (scene.num_parts + 1))()  # and one that must not be raised
        self.early: list[int] = []
        given, plain = scene.pages()
        scene.expect(plain, load=True)
        tiles = program.work.tiles([len(one.slots) for one in given])
        self.warps = -(-tiles // program.tuning.warps)
        self.warps = min(program.tuning.ctas, self.warps) * program.tuning.warps
        begin = scene.device_memory.data_ptr()
        found = scene.device_memory.numpy()

        def raised(address: int) -> None:
            part = (address - ctypes.addressof(self.counters)) // 4
            self.counters[part] += 1
            if self.counters[part] < self.warps:
                return
            for plane, vector, of in scene.steps:
                for unit in plain[vector][1] if of <= part else ():
                    at = plane.device_address + unit * plane.device_stride - begin
                    place = slice(at, at + plane.unit_bytes)
                    if not np.array_equal(found[place], scene.expected_device[place]):
                        self.early.append(part)
                        return

        copier.on_raise = raised
        raises = copier.start(program, given, load=True, counters=ctypes.addressof(self.counters))
        assert raises == self.warps
        scene.check("a load with counters")


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_warp_raises_every_counter_and_none_too_soon(tuning: str) -> None:
    """Also of parts without planes, without pages, and of warps without a tile."""
    for seed in range(100, 115):
        load = Load(TUNINGS[tuning], seed)
        assert list(load.counters) == [load.warps] * load.scene.num_parts + [0]
        assert load.early == []


#: Faults of a kernel: text, its replacement, and a tuning that shows the fault.
WRONG = {
    "fills a stage whose store is in flight": ("            bulk_wait_read();\n", "", "bulk_waits"),
    "reports bulk copies that have not arrived": (
        "            bulk_wait_all();\n            progress.raise(part_of(what), lane);",
        "            progress.raise(part_of(what), lane);",
        "bulk",
    ),
    "reports the current tile": ("part > raised", "part + 1 > raised", "register"),
    "raises counters without a fence": ("        if (lane == 0) fence_writes();\n", "", "register"),
    "fences one lane's writes alone": (
        "        __syncwarp();\n        if (lane == 0) fence_writes();\n",
        "        if (lane == 0) fence_writes();\n        __syncwarp();\n",
        "register",
    ),
    "does not report at the end": ("    progress.raise(num_parts, lane);\n}", "}", "register"),
    "ends before its copies": ("    bulk_wait_all();\n    progress.raise(num_parts, lane);", "", "bulk"),
    "reads past a vector's end": ("min((u64)page + lane, pages.count - 1)", "(u64)page + lane", "register"),
    "takes a plane's tiles for the next one's": ("end <= tile", "end < tile", "register"),
    "takes a plane's tiles for the next one's, by lanes": ("<= tile) at += step", "< tile) at += step", "bulk"),
    "never advances to more planes": ("block + 32 >= num_planes", "true", "bulk"),
    "takes the block before": ("            to = to_next;\n", "            if (!stored) to = to_next;\n", "bulk_waits"),
    "ignores the stride of slots": ("8 * mine * pages.slots_stride", "8 * mine", "register"),
    "rounds a unit's last chunk up": ("min(chunk, unit_bytes - begin)", "chunk", "bulk"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_noticed(wrong: str) -> None:
    right, instead, tuning = WRONG[wrong]
    text = source("page_copy.cu")
    assert right in text
    for seed in range(100, 125):
        try:
            load = Load(TUNINGS[tuning], seed, text.replace(right, instead))
            assert list(load.counters) == [load.warps] * load.scene.num_parts + [0]
            assert load.early == []
        except AssertionError:
            return
    pytest.fail("no scene noticed")


def test_magic_numbers_divide() -> None:
    divisors = [1, 2, 3, 7, 48, 64, 65535, 65536, 65537, (1 << 24) - 1, 1 << 24]
    for divisor, quotient in itertools.product(divisors, (0, 1, 2, 12345)):
        for n in (quotient * divisor, quotient * divisor + divisor - 1):
            multiplier = magic(divisor)
            assert (n * multiplier >> 64 if multiplier else n) == quotient
            small, shift = divider(divisor)
            assert small < 1 << 32
            assert n >= 1 << 31 or n * small >> shift == quotient
        far = ((1 << 40) - 1) // divisor
        for n, expected in ((far * divisor, far), (far * divisor - 1, far - 1)):
            assert (n * multiplier >> 64 if multiplier else n) == expected

"""page_sum.cu on the CPU: its sums are those of sums.py, for every alignment, and it finds pages that changed."""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sglang_xmem.copies.base import Pages
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.copies.sums_cuda import SOURCE_FILE, WARPS, CudaReport, Parameters, piece_bytes, records
from sglang_xmem.kernels import source
from sglang_xmem.sums import Chosen, CpuSummer, Group, SectionSums
from tests.emulation.emulated import _RAISED, library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")


class Scene:
    """Some pools of random geometry with random bytes, and pages of them."""

    def __init__(self, seed: int, alignment: int, every: int = 1, text: str | None = None) -> None:
        self.rng = rng = random.Random(seed)
        self.text = text or source(SOURCE_FILE)
        noise = torch.Generator().manual_seed(seed)
        self.memory, self.pages, self.groups, self.chosen = [], [], [], []
        vector = 0
        for _ in range(rng.randint(1, 4)):
            units, count = rng.randint(3, 9), rng.randint(0, 3)
            numbers = torch.tensor(rng.sample(range(40), count), dtype=torch.int64)
            planes: list[tuple[Plane, int]] = []
            for _ in range(rng.choice([1, 1, 2])):  # vectors of the same pages, as a packed draft has
                divisor = rng.choice([1, 16])
                slots = torch.tensor(rng.sample(range(units), count), dtype=torch.int64) * divisor
                spread = torch.full((count, 3), -1, dtype=torch.int64)
                spread[:, 0] = slots
                self.pages.append(Pages(torch.zeros(count, dtype=torch.int64), spread[:, 0]))
                for _ in range(rng.randint(1, 3)):
                    nbytes = alignment * rng.choice([1, 3, 33, 257])
                    stride = nbytes + alignment * rng.choice([0, 2])
                    array = torch.randint(0, 256, (units * stride + 16,), dtype=torch.uint8, generator=noise)
                    begin = -array.data_ptr() % 16 + (alignment if alignment < 8 else 0)
                    self.memory.append(array)
                    offset = sum(plane.unit_bytes for plane, _ in planes)
                    planes.append(
                        (Plane(array.data_ptr() + begin % 16, stride, units, offset, nbytes, divisor), vector)
                    )
                vector += 1
            sums = SectionSums([plane for plane, _ in planes], 40, every, pinned=False)
            self.groups.append(Group(sums, tuple(planes)))
            self.chosen.append(Chosen.of(sums, numbers))

    def launch(self, report: torch.Tensor | None) -> None:
        """Run the kernel; raises AssertionError for what it may not do."""
        planes = ctypes.create_string_buffer(records(self.groups), None)
        parameters = Parameters(ctypes.addressof(planes), self.groups)
        tables = [group.sums.table for group in self.groups]
        rows = [these.rows.contiguous() for these in self.chosen]
        entries = [table.data_ptr() + 8 * these.pages for table, these in zip(tables, self.chosen, strict=True)]
        scratch = torch.zeros(2 * sum(map(len, rows)), dtype=torch.int64)
        address = 0 if report is None else report.data_ptr()
        items = parameters.pack(self.pages, rows, entries, scratch=scratch.data_ptr(), report=address)
        written = [scratch, *(tables if report is None else [report])]
        read = [*tables, *self.memory, *rows, *entries, *(one.slots for one in self.pages)]
        ranges = [number for one in (*written, *read) for number in extent(one)]
        ranges += [ctypes.addressof(planes), len(planes)]
        if items:
            wrong = self._kernel()(
                self.rng.choice([1, 3]), 32 * WARPS, 0, parameters.address, self.rng.randrange(1 << 30),
                _RAISED(lambda address: None), (ctypes.c_uint64 * len(ranges))(*ranges), len(written), len(ranges) // 2,
            )  # fmt: skip
            assert wrong is None, wrong.decode()

    def _kernel(self) -> Any:
        macros = {"PIECE_BYTES": piece_bytes(self.groups), "THREADS": 32 * WARPS}
        return library(self.text, macros, "page_sum")

    def expected(self) -> list[list[int]]:
        """The tables that the CPU makes."""
        tables = [group.sums.table.clone() for group in self.groups]
        cpu = CpuSummer()
        cpu.write(cpu.prepare(self.groups), self.pages, self.chosen)
        made = [group.sums.table.tolist() for group in self.groups]
        for group, table in zip(self.groups, tables, strict=True):
            group.sums.table.copy_(table)
        return made

    def compare(self) -> tuple[int, str]:
        """What the kernel reports."""
        words = torch.zeros(2, dtype=torch.int64)
        self.launch(words)
        return CudaReport(words, self.chosen).wrong()


def extent(tensor: torch.Tensor) -> Sequence[int]:
    """Address and bytes of all elements."""
    stride = max(tensor.stride(), default=1) if tensor.dim() else 1
    return tensor.data_ptr(), max(0, (tensor.numel() - 1) * stride + 1) * tensor.element_size()


@pytest.mark.parametrize("alignment", [1, 4, 8])
def test_sums_are_those_of_the_cpu(alignment: int) -> None:
    for seed in range(8):
        scene = Scene(seed, alignment, every=1 + seed % 3)
        expected = scene.expected()
        scene.launch(None)
        assert [group.sums.table.tolist() for group in scene.groups] == expected
        assert scene.compare() == (0, "")


def changed_pages_found(text: str | None = None) -> bool:
    """Whether one changed byte anywhere in a chosen page is found, and reported by pool and page."""
    for seed in range(20):
        scene = Scene(seed, random.Random(seed).choice([1, 8]), text=text)
        scene.launch(None)
        for number, (group, these) in enumerate(zip(scene.groups, scene.chosen, strict=True)):
            for row, page in zip(these.rows.tolist(), these.pages.tolist(), strict=True):
                plane, vector = scene.rng.choice(group.planes)
                unit = int(scene.pages[vector].slots[row]) // plane.divisor
                at = plane.device_address + unit * plane.device_stride + scene.rng.randrange(plane.unit_bytes)
                byte = ctypes.c_uint8.from_address(at)
                byte.value ^= 1 << scene.rng.randrange(8)
                if scene.compare() != (1, f"page {page} of pool {number}"):
                    return False
                scene.groups[number].sums.forget(torch.tensor([page]))
    return True


def test_a_changed_byte_is_found() -> None:
    assert changed_pages_found()


def test_a_page_without_a_sum_is_not_compared() -> None:
    scene = Scene(3, 8)
    assert any(len(these.rows) for these in scene.chosen)
    assert scene.compare() == (0, "")


@pytest.mark.parametrize(
    ("right", "instead"),
    [
        pytest.param("lane == 0 && whole < bytes", "false", id="forgets a unit's last bytes"),
        pytest.param("+ 1 < group.planes", "+ 2 < group.planes", id="finishes a page early"),
        pytest.param("known != entry", "known > entry", id="compares badly"),
        pytest.param("pages += work.groups[number].count;", "", id="lets groups meet"),
        pytest.param("row * vector.slots_stride", "row", id="ignores the stride of slots"),
    ],
)
def test_a_wrong_kernel_is_noticed(right: str, instead: str) -> None:
    text = source(SOURCE_FILE)
    assert right in text
    text = text.replace(right, instead)
    try:
        for seed in range(20):
            scene = Scene(seed, 1, text=text)
            expected = scene.expected()
            scene.launch(None)
            assert [group.sums.table.tolist() for group in scene.groups] == expected
        assert changed_pages_found(text)
    except AssertionError:
        return
    pytest.fail("no scene noticed")

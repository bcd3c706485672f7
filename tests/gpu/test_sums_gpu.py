"""page_sum.cu on a GPU: its sums are those of sums.py, and one changed byte is found."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sglang_xmem.arena import bytes_at
from sglang_xmem.copies.base import Pages
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.copies.sums_cuda import CudaSummer
from sglang_xmem.sums import Chosen, CpuSummer, Group, SectionSums

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cache_of_kernels")]

GPU = torch.device("cuda:0")
PAGES = 64


def lists(summer: CudaSummer, prepared: Any, chosen: Sequence[Chosen]) -> list[torch.Tensor]:
    return [torch.from_numpy(each).to(GPU) for each in summer.lists(prepared, chosen)]


class Scene:
    """Pools of random geometry on the GPU, the same bytes on the CPU, and pages of them."""

    def __init__(self, seed: int, alignment: int, every: int) -> None:
        rng = random.Random(seed)
        noise = torch.Generator(GPU).manual_seed(seed)
        self.memory: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.groups: list[Group] = []
        self.twins: list[Group] = []
        self.pages: list[Pages] = []
        self.twin_pages: list[Pages] = []
        self.chosen: list[Chosen] = []
        for vector in range(rng.randint(1, 4)):
            units, divisor = rng.randint(20, 90), rng.choice([1, 16])
            count = rng.randint(1, 19)
            numbers = torch.tensor(rng.sample(range(PAGES), count), dtype=torch.int64)
            slots = torch.tensor(rng.sample(range(units), count), dtype=torch.int64) * divisor
            planes, twins, offset = [], [], 0
            for _ in range(rng.randint(1, 5)):
                nbytes = alignment * rng.choice([1, 3, 33, 257, 4096])
                stride = nbytes + alignment * rng.choice([0, 2])
                shape = (units * stride + 16,)
                device = torch.randint(0, 256, shape, dtype=torch.uint8, device=GPU, generator=noise)
                host = device.cpu()
                self.memory.append((device, host))
                planes.append((Plane(device.data_ptr(), stride, units, offset, nbytes, divisor), vector))
                twins.append((Plane(host.data_ptr(), stride, units, offset, nbytes, divisor), vector))
                offset += nbytes
            for found, made, pinned in ((planes, self.groups, True), (twins, self.twins, False)):
                made.append(
                    Group(SectionSums([plane for plane, _ in found], PAGES, every, pinned=pinned), tuple(found))
                )
            frames = torch.zeros(count, dtype=torch.int64)
            self.pages.append(Pages(frames.to(GPU), slots.to(GPU)))
            self.twin_pages.append(Pages(frames, slots))
            self.chosen.append(Chosen.of(self.groups[-1].sums, numbers))


@pytest.mark.parametrize("alignment", [1, 2, 4, 8])
def test_sums_are_those_of_the_cpu_and_a_changed_byte_is_found(alignment: int) -> None:
    summer, cpu = CudaSummer(GPU), CpuSummer()
    for seed in range(12):
        scene = Scene(seed, alignment, every=1 + seed % 3)
        prepared = summer.prepare(scene.groups)
        summer.write(prepared, scene.pages, scene.chosen, lists(summer, prepared, scene.chosen))
        cpu.write(cpu.prepare(scene.twins), scene.twin_pages, scene.chosen)
        torch.cuda.synchronize()
        for group, twin in zip(scene.groups, scene.twins, strict=True):
            assert torch.equal(group.sums.table, twin.sums.table)
        report = summer.compare(prepared, scene.pages, scene.chosen, lists(summer, prepared, scene.chosen))
        torch.cuda.synchronize()
        assert report.wrong() == (0, "")

        number = next((n for n, these in enumerate(scene.chosen) if len(these.rows)), None)
        if number is None:
            continue
        plane, vector = scene.groups[number].planes[-1]
        row = int(scene.chosen[number].rows[-1])
        unit = int(scene.twin_pages[vector].slots[row]) // plane.divisor
        bytes_at(plane.device_address + unit * plane.device_stride, plane.unit_bytes, GPU)[-1] ^= 0x10
        report = summer.compare(prepared, scene.pages, scene.chosen, lists(summer, prepared, scene.chosen))
        torch.cuda.synchronize()
        assert report.wrong() == (1, f"page {int(scene.chosen[number].pages[-1])} of pool {number}")

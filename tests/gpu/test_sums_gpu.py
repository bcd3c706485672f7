"""Sums by the CUDA kernel are those of the CPU, behind copies on the same stream, and find pages that changed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sglang_xmem.copies.base import Pages
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.copies.sums_cuda import CudaSummer
from sglang_xmem.sums import Chosen, CpuSummer, Group, SectionSums

pytestmark = pytest.mark.gpu

UNITS = 24


class Pool:
    """Planes of several sizes, on the GPU and as a copy on the CPU."""

    def __init__(self, sizes: Sequence[int], every: int) -> None:
        self.arrays = [torch.randint(0, 256, (UNITS, size), dtype=torch.uint8, device="cuda") for size in sizes]
        self.copies = [array.cpu() for array in self.arrays]
        self.gpu, self.cpu = (
            self._group(arrays, every, pinned) for arrays, pinned in ((self.arrays, True), (self.copies, False))
        )

    def _group(self, arrays: Sequence[torch.Tensor], every: int, pinned: bool) -> Group:
        planes, offset = [], 0
        for array in arrays:
            planes.append(Plane(array.data_ptr(), array.shape[1], UNITS, offset, array.shape[1], 1))
            offset += array.shape[1]
        return Group(SectionSums(planes, 64, every, pinned=pinned), tuple((plane, 0) for plane in planes))


def upload(found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [one.cuda() for one in found]


@pytest.mark.parametrize("sizes", [(4096, 4096, 65536), (1, 7, 129), (12, 4), (1 << 20,)])
def test_sums_are_those_of_the_cpu(sizes: Sequence[int]) -> None:
    pool = Pool(sizes, every=2)
    numbers, slots = torch.randperm(64)[:UNITS], torch.randperm(UNITS)
    chosen = [Chosen.of(pool.gpu.sums, numbers)]
    on_gpu, on_cpu = (
        [Pages(torch.zeros(UNITS, dtype=torch.int64, device=device), slots.to(device))] for device in ("cuda", "cpu")
    )
    summer = CudaSummer(torch.device("cuda", torch.cuda.current_device()), upload)
    prepared = summer.prepare([pool.gpu])
    summer.write(prepared, on_gpu, chosen)
    CpuSummer().write([pool.cpu], on_cpu, chosen)
    torch.cuda.synchronize()
    assert torch.equal(pool.gpu.sums.table, pool.cpu.sums.table)
    report = summer.compare(prepared, on_gpu, chosen)
    torch.cuda.synchronize()
    assert report.wrong() == (0, "")
    row = int(chosen[0].rows[0])
    pool.arrays[-1][slots[row], sizes[-1] - 1] ^= 1
    report = summer.compare(prepared, on_gpu, chosen)
    torch.cuda.synchronize()
    assert report.wrong() == (1, f"page {int(chosen[0].pages[0])} of pool 0")

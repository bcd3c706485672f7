"""Sums of pages: what changes them, and what a table knows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sglang_xmem.copies.base import Pages
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.sums import Chosen, CpuSummer, Group, SectionSums, keyed_sum, unit_sums

Bytes = npt.NDArray[np.uint8]


def sum_of(data: Bytes, offset: int = 0) -> int:
    return int(unit_sums(data.reshape(1, -1), offset)[0])


@pytest.mark.parametrize("nbytes", [1, 7, 8, 9, 64, 1000])
def test_every_byte_and_every_place_counts(nbytes: int) -> None:
    data = np.zeros(nbytes, dtype=np.uint8)
    sums = {sum_of(data), sum_of(data, 8)}
    for at in range(nbytes):
        for bit in (0, 7):
            changed = data.copy()
            changed[at] ^= 1 << bit
            sums.add(sum_of(changed))
    assert len(sums) == 2 + 2 * nbytes


def test_order_of_words_counts() -> None:
    """Also of words that differ in their highest bit alone, which multiplying does not spread."""
    words = np.array([0, 1 << 63, 5, 6], dtype=np.uint64)
    swapped = words[[1, 0, 2, 3]]
    assert sum_of(words.view(np.uint8)) != sum_of(swapped.view(np.uint8))
    assert sum_of(words.view(np.uint8)) != sum_of(words[[0, 1, 3, 2]].view(np.uint8))


def test_a_key_belongs_to_the_sum() -> None:
    data = np.arange(100, dtype=np.uint8)
    assert keyed_sum(data, "a") == keyed_sum(data.copy(), "a")
    assert len({keyed_sum(data, "a"), keyed_sum(data, "b"), keyed_sum(data[::-1].copy(), "a")}) == 3


class Pool:
    """Two planes of 8 units, and a pool's sums of 40 pages."""

    def __init__(self, every: int) -> None:
        self.arrays = [torch.randint(0, 256, (8, nbytes), dtype=torch.uint8) for nbytes in (24, 10)]
        planes = [
            Plane(array.data_ptr(), array.shape[1], 8, offset, array.shape[1], 1)
            for array, offset in zip(self.arrays, (0, 24), strict=True)
        ]
        self.sums = SectionSums(planes, 40, every, pinned=False)
        self.group = Group(self.sums, tuple((plane, 0) for plane in planes))

    def wrong(self, numbers: list[int], slots: list[int], *, store: bool = False) -> tuple[int, str]:
        pages = [Pages(torch.zeros(len(slots), dtype=torch.int64), torch.tensor(slots))]
        chosen = [Chosen.of(self.sums, torch.tensor(numbers))]
        summer = CpuSummer()
        if store:
            summer.write([self.group], pages, chosen)
        return summer.compare([self.group], pages, chosen).wrong()


def test_pages_are_told_by_their_numbers() -> None:
    pool = Pool(every=1)
    assert pool.wrong([30, 10, 20], [1, 2, 3], store=True) == (0, "")
    assert pool.wrong([20, 30], [3, 1]) == (0, "")
    assert pool.wrong([20, 30], [1, 3]) == (2, "pages 20, 30 of pool 0")
    pool.arrays[1][2, 9] ^= 1
    assert pool.wrong([30, 10, 20], [1, 2, 3]) == (1, "pages 10 of pool 0")
    pool.sums.forget(torch.tensor([10]))
    assert pool.wrong([30, 10, 20], [1, 2, 3]) == (0, "")


def test_a_sample_takes_some_pages() -> None:
    pool = Pool(every=4)
    pool.wrong([4, 5, 8], [0, 1, 2], store=True)
    assert torch.nonzero(pool.sums.table).flatten().tolist() == [4, 8]
    for array in pool.arrays:
        array ^= 1
    assert pool.wrong([4, 5, 8], [0, 1, 2]) == (2, "pages 4, 8 of pool 0")


def test_sections_have_the_sums_of_their_units() -> None:
    pool = Pool(every=1)
    pool.wrong([7], [5], store=True)
    section = torch.cat([array[5] for array in pool.arrays]).numpy()
    assert pool.sums.wrong(torch.tensor([7]), section.reshape(1, -1), 0).tolist() == []
    pool.sums.put(9, section, 0)
    assert pool.sums.table[9] == pool.sums.table[7]
    section[33] ^= 1
    assert pool.sums.wrong(torch.tensor([7]), section.reshape(1, -1), 0).tolist() == [7]

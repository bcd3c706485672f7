"""Checksums of pages: computed on the device by a store, kept with the page table, and compared after a load.

A sum has 64 bits and depends on the order of a page's bytes: each 8-byte word is mixed with its offset in the frame by
invertible steps, so one changed word always changes the sum. `kernels/page_sum.cu` computes the same.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.config import Level
from sglang_xmem.copies.base import Pages
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.copies.torch import units_at

#: One page in EVERY[level] has a sum, by its number. An H100 sums an 80K prompt of 12 GB in 4.3 ms
#: (docs/results/sums.jsonl), so a 16th takes 0.3 ms: 0.1 % of its load from host memory, 0.7 % of a peer's hit (44 ms).
EVERY: Final[Mapping[Level, int]] = {"sample": 16, "full": 1}

#: Key of `Session.counts`: pages whose bytes do not match their sums.
FAILURES: Final = "integrity:mismatch"

#: Odd, so that multiplication is invertible: for a word's offset, and for the two rounds (Murmur's finalizer).
PLACE: Final = 0x9E3779B97F4A7C15
FIRST: Final = 0xFF51AFD7ED558CCD
SECOND: Final = 0xC4CEB9FE1A85EC53

Sums = npt.NDArray[np.uint64]


def unit_sums(units: npt.NDArray[np.uint8], offset: int) -> Sums:
    """Compute what a plane's units add to the sums of their pages.

    Args:
        units: shape (n, unit_bytes).
        offset: offset of the units in their frames, in bytes.

    Returns: shape (n,); a page's sum is that of its planes, modulo 2^64.
    """
    rest = -units.shape[1] % 8
    if rest:
        units = np.pad(units, ((0, 0), (0, rest)))
    words: Sums = np.ascontiguousarray(units).view(np.uint64)
    places = np.arange(words.shape[1], dtype=np.uint64) * np.uint64(8) + np.uint64(offset + 1)
    mixed = words ^ (places * np.uint64(PLACE))
    for factor in (FIRST, SECOND):
        mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(32)
    total: Sums = mixed.sum(axis=1, dtype=np.uint64)
    return total


def keyed_sum(data: npt.NDArray[np.uint8], key: str) -> bytes:
    """Compute the sum of a page and its storage key, 8 bytes: other bytes or another key give another sum."""
    of_key = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return (int(unit_sums(data.reshape(1, -1), 0)[0]) ^ of_key).to_bytes(8, "little")


class SectionSums:
    """Sums of one pool's part of all frames of a space.

    Args:
        planes: of the pool.
        pages: of the space.
        every: one page in `every` has a sum, by its number.
        pinned: a GPU writes the table.

    Attributes:
        table: int64 (pages,), on the CPU; 0: unknown.
    """

    def __init__(self, planes: Sequence[Plane], pages: int, every: int, *, pinned: bool) -> None:
        self.planes = tuple(planes)
        self.every = every
        self.table = torch.zeros(pages, dtype=torch.int64, pin_memory=pinned)
        #: Pages that were adopted with a sum: they are compared whatever their number.
        self._given = torch.zeros(pages, dtype=torch.bool)

    def have(self, pages: torch.Tensor) -> torch.Tensor:
        """Select the pages to sum and compare, by their numbers on the CPU."""
        numbers: npt.NDArray[np.int64] = pages.numpy()
        # Uses numpy, as all computations for a move: torch divides long vectors among threads, for which the scheduler
        # thread would wait, and its operations are several times slower with cold CPU caches.
        rest = numbers & self.every - 1 if self.every & self.every - 1 == 0 else numbers % self.every
        return torch.from_numpy((rest == 0) | self._given.numpy()[numbers])

    def forget(self, pages: torch.Tensor) -> None:
        """Clear the sums of pages that get other contents."""
        self.table[pages] = 0
        self._given[pages] = False

    def take(self, pages: torch.Tensor, entries: torch.Tensor) -> None:
        """Set the sums of pages that another engine stored: table entries, 0 for a page without a sum."""
        self.table[pages] = entries
        self._given[pages] = entries != 0

    def put(self, page: int, section: npt.NDArray[np.uint8], offset: int) -> None:
        """Sum a page that did not come from the device.

        Args:
            section: the pool's bytes of the page.
            offset: offset of the section in the frame.
        """
        if page % self.every == 0:
            self.table[page] = int(self._sums(section.reshape(1, -1), offset)[0])

    def wrong(self, pages: torch.Tensor, sections: npt.NDArray[np.uint8], offset: int) -> torch.Tensor:
        """Return those of `pages` that do not match their sums.

        Args:
            sections: the pool's bytes of each page, shape (n, bytes).
            offset: offset of the sections in their frames.
        """
        known = self.table[pages]
        return pages[(known != 0) & (known != torch.from_numpy(self._sums(sections, offset)))]

    def _sums(self, sections: npt.NDArray[np.uint8], offset: int) -> npt.NDArray[np.int64]:
        total = np.zeros(len(sections), dtype=np.uint64)
        for plane in self.planes:
            begin = plane.offset - offset
            total += unit_sums(sections[:, begin : begin + plane.unit_bytes], plane.offset)
        return as_entries(total)


def as_entries(sums: Sums) -> npt.NDArray[np.int64]:
    """Convert sums to table entries, where 0 means unknown."""
    return np.where(sums == 0, np.uint64(1), sums).astype(np.uint64).view(np.int64)


class Group(NamedTuple):
    """One pool's share of a move: its planes, each with the vector of its slots; all vectors have equal pages."""

    sums: SectionSums
    planes: tuple[tuple[Plane, int], ...]


class Chosen(NamedTuple):
    """The pages of a group with sums.

    Attributes:
        rows: int64 (k,), on the CPU: indices into the move's vectors.
        pages: int64 (k,), on the CPU: page numbers.
    """

    rows: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def of(cls, sums: SectionSums, pages: torch.Tensor) -> Chosen:
        """Select the pages with sums of a vector of page numbers on the CPU."""
        rows = np.flatnonzero(sums.have(pages).numpy())
        return cls(torch.from_numpy(rows), torch.from_numpy(pages.numpy()[rows]))


class Report(ABC):
    """The result of a completed comparison."""

    @abstractmethod
    def wrong(self) -> tuple[int, str]:
        """Return the number of damaged pages and their names; of many, one name."""


class Summer(ABC):
    """Writes and compares the sums of units on the device, after the copies on the current stream."""

    @abstractmethod
    def prepare(self, groups: Sequence[Group]) -> Any:
        """Prepare for moves of these groups; once per set of pools, since it may wait for the GPU."""

    @abstractmethod
    def lists(self, prepared: Any, chosen: Sequence[Chosen]) -> list[npt.NDArray[np.int64]]:
        """Make the index lists that `write` and `compare` need on the device, to be copied with the move's frames."""

    @abstractmethod
    def write(
        self, prepared: Any, pages: Sequence[Pages], chosen: Sequence[Chosen], lists: Sequence[torch.Tensor]
    ) -> None:
        """Enqueue: sum the chosen pages of each group on the device, into the groups' tables.

        Args:
            lists: the result of `lists` for these pages, on the device; used once.
        """

    @abstractmethod
    def compare(
        self, prepared: Any, pages: Sequence[Pages], chosen: Sequence[Chosen], lists: Sequence[torch.Tensor]
    ) -> Report:
        """Enqueue: sum as in `write`, and compare with the tables."""


class CpuReport(Report):
    """Damaged pages, by group."""

    def __init__(self, pages: Sequence[torch.Tensor]) -> None:
        self._pages = pages

    def wrong(self) -> tuple[int, str]:
        which = "; ".join(
            f"pages {', '.join(map(str, pages.tolist()))} of pool {number}"
            for number, pages in enumerate(self._pages)
            if len(pages)
        )
        return sum(map(len, self._pages)), which


class CpuSummer(Summer):
    """Computes sums on the calling thread; all memory is on the CPU."""

    def prepare(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups)

    def lists(self, prepared: list[Group], chosen: Sequence[Chosen]) -> list[npt.NDArray[np.int64]]:
        return []

    def write(
        self,
        prepared: list[Group],
        pages: Sequence[Pages],
        chosen: Sequence[Chosen],
        lists: Sequence[torch.Tensor] = (),
    ) -> None:
        for group, these in zip(prepared, chosen, strict=True):
            group.sums.table[these.pages] = self._entries(group, pages, these)

    def compare(
        self,
        prepared: list[Group],
        pages: Sequence[Pages],
        chosen: Sequence[Chosen],
        lists: Sequence[torch.Tensor] = (),
    ) -> CpuReport:
        wrong = []
        for group, these in zip(prepared, chosen, strict=True):
            known = group.sums.table[these.pages]
            wrong.append(these.pages[(known != 0) & (known != self._entries(group, pages, these))])
        return CpuReport(wrong)

    def _entries(self, group: Group, pages: Sequence[Pages], chosen: Chosen) -> torch.Tensor:
        total = np.zeros(len(chosen.rows), dtype=np.uint64)
        for plane, vector in group.planes:
            units = units_at(plane.device_address, plane.device_units, plane.device_stride, plane.unit_bytes)
            found = units[(pages[vector].slots[chosen.rows] // plane.divisor).numpy()]
            total += unit_sums(found.view(np.uint8).reshape(len(found), plane.unit_bytes), plane.offset)
        return torch.from_numpy(as_entries(total))

"""Checksums of the pages that SGLang's loads and stores move: written after a store, compared after a load.

A load's comparison is enqueued after its copies, so its result arrives after SGLang has planned the forward pass.
`recovery.py` reads it before that pass's results are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem import session
from sglang_xmem.engines.sglang import sharing
from sglang_xmem.engines.sglang.geometry import pages_of
from sglang_xmem.errors import CopyError
from sglang_xmem.sums import FAILURES, Chosen, Group, Report

if TYPE_CHECKING:
    from sglang_xmem.copies.base import Pages, Step
    from sglang_xmem.engines.sglang.pools import AdoptedPool

logger = logging.getLogger(__name__)


class Vectors(NamedTuple):
    """A move's pages.

    Attributes:
        pages: of each vector.
        addresses: frames of each, on the CPU.
        chosen: the pages of each of the move's groups that have sums.
        lists: the summer's index lists for the device; empty if no page has a sum.
    """

    pages: list[Pages]
    addresses: list[npt.NDArray[np.int64]]
    chosen: list[Chosen]
    lists: list[torch.Tensor]


class Checked(NamedTuple):
    """The groups of a compiled move, ready to be summed.

    Attributes:
        pools: of each group.
        vectors: of each group; all vectors of a group have the same pages.
    """

    pools: tuple[AdoptedPool, ...]
    vectors: tuple[tuple[int, ...], ...]
    prepared: Any

    @classmethod
    def of(cls, arena: Any, views: Sequence[AdoptedPool], steps: Sequence[Step]) -> Checked | None:
        """Select the pools with all planes in a move; None if there are none, or no page has a sum.

        Args:
            views: the pool of each vector.
        """
        if arena.summer is None:
            return None
        groups: dict[int, tuple[AdoptedPool, Group]] = {}
        for view in dict.fromkeys(views):
            planes = tuple((step.plane, step.vector) for step in steps if views[step.vector] is view)
            if view.sums is not None and sorted(plane for plane, _ in planes) == sorted(view.sums.planes):
                groups[view.number] = view, Group(view.sums, planes)
        if not groups:
            return None
        pools, made = zip(*groups.values(), strict=True)
        vectors = tuple(tuple(dict.fromkeys(vector for _, vector in group.planes)) for group in made)
        return cls(pools, vectors, arena.summer.prepare(made))

    def chosen(self, numbers: Sequence[torch.Tensor]) -> list[Chosen]:
        """Select each group's pages with sums; none if the group's vectors have different pages.

        Args:
            numbers: page numbers of each vector in its index space, on the CPU. Several vectors may share one tensor.
        """
        found = []
        for view, mine in zip(self.pools, self.vectors, strict=True):
            pages = numbers[mine[0]]
            if any(numbers[vector] is not pages for vector in mine):
                pages = pages[:0]
            assert view.sums is not None
            found.append(Chosen.of(view.sums, pages))
        return found


class Check:
    """A load's comparison.

    Args:
        pools: of the compared groups.
        frames: of each of them, the addresses of its pages' frames, on the CPU.
        report: the result, once the load is done.
        wait: returns when the load is done.
    """

    def __init__(
        self,
        pools: Sequence[AdoptedPool],
        frames: Sequence[npt.NDArray[np.int64]],
        report: Report,
        wait: Callable[[], None],
    ) -> None:
        self._pools = pools
        self._frames = frames
        self._report = report
        self._wait = wait

    def settle(self) -> str:
        """Wait for the comparison; count and return the mismatches as a clause, empty if there are none.

        After a mismatch, no page of the load is found in a page bank any more: not all pages were compared.
        """
        self._wait()
        count, which = self._report.wrong()
        if not count:
            return ""
        session.current().counts[FAILURES] += count
        for view, frames in zip(self._pools, self._frames, strict=True):
            sharing.report_damaged(view, frames)
        names = ", ".join(type(view.pool).__name__ for view in self._pools)
        return f"{count} pages of {names} came back from the tier with wrong bytes ({which})"


def write(arena: Any, checked: Checked | None, vectors: Vectors) -> None:
    """Sum the pages that a store has read, on the store's stream."""
    if checked is not None and any(len(these.rows) for these in vectors.chosen):
        try:
            arena.summer.write(checked.prepared, vectors.pages, vectors.chosen, vectors.lists)
        except CopyError as error:  # these pages then have no sums
            _skipped(error)


def compare(arena: Any, checked: Checked | None, vectors: Vectors, wait: Callable[[], None]) -> Check | None:
    """Compare the pages of a load, on the load's stream. None if no page of it has a sum."""
    if checked is None:
        return None
    pages = sum(len(these.rows) for these in vectors.chosen)
    if not pages:
        return None
    try:
        report = arena.summer.compare(checked.prepared, vectors.pages, vectors.chosen, vectors.lists)
    except CopyError as error:
        _skipped(error)
        return None
    session.current().counts["integrity:checked"] += pages
    frames = [vectors.addresses[mine[0]] for mine in checked.vectors]
    return Check(checked.pools, frames, report, wait)


def _skipped(error: CopyError) -> None:
    session.current().counts["integrity:skipped"] += 1
    logger.warning("sglang_xmem: pages are moved without their sums: %s", error)


def damaged(view: AdoptedPool, host_indices: torch.Tensor) -> torch.Tensor:
    """Count the pages in the tier with wrong sums, if the CPU executes the copies; otherwise 0.

    They are not found in a page bank any more.

    Args:
        host_indices: SGLang's indices into the pool.
    """
    arena = view.arena
    if view.sums is None or arena.device.type != "cpu" or not arena.cpu_addressable:
        return host_indices[:0]
    pages = Chosen.of(view.sums, pages_of(host_indices.cpu(), view.slots)).pages
    section = view.section
    found = arena.sections(section.space, pages, section.offset, section.nbytes)
    wrong = view.sums.wrong(pages, found, section.offset)
    sharing.report_damaged(view, arena.spaces[section.space].table[wrong].numpy())
    return wrong

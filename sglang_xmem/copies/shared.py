"""One copy divided among several GPUs, each with its own link to the tier's memory.

Each GPU reaches host memory through its own PCIe link. The rank's own GPU moves one share of the pages; each relay,
which is another GPU, moves one share through its own link and forwards it over NVLink, which is many times faster.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_xmem.copies.base import PageCopier, Pages, Program, Step, total_bytes
from sglang_xmem.copies.counters import LayerCounters

if TYPE_CHECKING:
    from sglang_xmem.copies.cuda import CudaPageCopier

#: Minimum bytes of a share: 40 us of a PCIe link. Handing a share to another GPU and waiting for it takes 10 to 16 us.
MIN_SHARE_BYTES = 2 << 20


class SharedCopier(PageCopier):
    """Copies by several copiers of the same slabs in parallel.

    Args:
        copiers: the rank's own first, then one or more relays'. They have no other users.
    """

    name = "shared"

    def __init__(self, copiers: Sequence[CudaPageCopier]) -> None:
        super().__init__(copiers[0].slabs, copiers[0].device)
        self._copiers = tuple(copiers)
        self._lock = threading.Lock()  # one thread at a time launches a copier

    def compile(self, steps: Sequence[Step], num_parts: int) -> SharedProgram:
        return SharedProgram(self, self._copiers, steps, num_parts)

    def describe(self) -> str:
        own, *relays = (copier.describe() for copier in self._copiers)
        return f"{own}, and as many bytes each by {'; '.join(relays)}"

    def make_counters(self, num_parts: int) -> LayerCounters | None:
        if not all(copier.can_count() for copier in self._copiers):
            return None
        return self._copiers[-1].make_counters(num_parts)  # as for a relay: another GPU raises the counters

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, SharedProgram)
        shares = deal(pages, max(1, min(len(self._copiers), total_bytes(program, pages) // MIN_SHARE_BYTES)))
        address = 0 if counters is None else counters.address
        raises, complete = 0, False
        started: list[CudaPageCopier] = []
        with self._lock:
            try:
                # The rank's own last: another GPU's launch waits for all earlier work on the rank's stream.
                for number in reversed(range(len(shares))):
                    started.append(self._copiers[number])
                    raises += self._copiers[number].start(
                        program.programs[number], shares[number], load=load, counters=address
                    )
                complete = True
            finally:
                for copier in started:
                    copier.join(load=load)
                if counters is not None and complete:
                    counters.announce(raises)
                elif counters is not None:
                    counters.restore()


class SharedProgram(Program):
    """A program per copier."""

    def __init__(
        self, copier: PageCopier, copiers: Sequence[CudaPageCopier], steps: Sequence[Step], num_parts: int
    ) -> None:
        super().__init__(copier, steps, num_parts)
        self.programs = [one.compile(steps, num_parts) for one in copiers]


def deal(pages: Sequence[Pages], count: int) -> list[list[Pages]]:
    """Divide a move into `count` shares with equal parts of each vector.

    Remainders go to a different share for each vector, so that single pages of several spaces are spread.
    """
    shares: list[list[Pages]] = [[] for _ in range(count)]
    for number, (frames, slots) in enumerate(pages):
        length = frames.numel()
        ends = [(length * share + number % count) // count for share in range(count + 1)]
        for share, begin, end in zip(shares, ends, ends[1:], strict=False):
            share.append(Pages(frames[begin:end], slots[begin:end]))
    return shares

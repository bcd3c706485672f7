"""One copy dealt to several GPUs, each of which has a link of its own to the tier's memory.

Host memory is reached over PCIe, and each GPU has a link. The rank's own GPU moves one share of the pages; each relay,
which is another GPU, moves one through its own link and passes it over NVLink, which is many times as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sglang_xmem.copies.base import OnCpu, PageCopier
from sglang_xmem.copies.signals import NOBODY, LoadSignals

if TYPE_CHECKING:
    from sglang_xmem.copies.cuda import CudaPageCopier

#: Pages that a share has at least; fewer take no longer over one link than handing them to another GPU does.
MIN_SHARE_PAGES = 4


class SharedCopier(PageCopier):
    """Copies by several copiers of the same planes at once.

    Args:
        copiers: the rank's own first, then a relay's or more. Nobody else uses any of them.
    """

    name = "shared"

    def __init__(self, copiers: Sequence[CudaPageCopier]) -> None:
        first = copiers[0]
        super().__init__(first.tier_planes, first.device_planes, first.page_size)
        self._copiers = tuple(copiers)
        #: How each share's kernel runs.
        self.load_tuning, self.store_tuning = first.load_tuning, first.store_tuning
        self._lock = threading.Lock()  # a copier's launches are one thread's at a time

    def describe(self) -> str:
        own, *relays = (copier.describe() for copier in self._copiers)
        return f"{own}, and as many pages each by {'; '.join(relays)}"

    def make_signals(self, num_parts: int) -> LoadSignals | None:
        if not all(copier.can_signal() for copier in self._copiers):
            return None
        return self._copiers[-1].make_signals(num_parts)  # as a relay has them: another GPU raises the counters

    def _copy_signalling(
        self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, signals: LoadSignals, on_cpu: OnCpu
    ) -> None:
        self._deal(tier_rows, device_rows, planes, load=True, signals=signals)

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        self._deal(tier_rows, device_rows, planes, load=load, signals=None)

    def _deal(
        self,
        tier_rows: torch.Tensor,
        device_rows: torch.Tensor,
        planes: range,
        *,
        load: bool,
        signals: LoadSignals | None,
    ) -> None:
        pages = tier_rows.numel()
        count = max(1, min(len(self._copiers), pages // MIN_SHARE_PAGES))
        ends = [pages * number // count for number in range(count + 1)]
        counters = NOBODY if signals is None else signals.counters(planes)
        raises, complete = 0, False
        started: list[CudaPageCopier] = []
        with self._lock:
            try:
                # The rank's own last: what another GPU starts waits for all that is on the rank's stream by then.
                for number in reversed(range(count)):
                    share = slice(ends[number], ends[number + 1])
                    started.append(self._copiers[number])
                    raises += self._copiers[number].start(
                        tier_rows[share], device_rows[share], planes, load=load, counters=counters
                    )
                complete = True
            finally:
                for copier in started:
                    copier.join(load=load)
                if signals is not None and complete:
                    signals.announce(raises)
                elif signals is not None:
                    signals.restore()

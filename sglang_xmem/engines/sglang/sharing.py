"""The page bank's spaces of a rank: pages that SGLang frees, that are found damaged, and weights that change."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sglang_xmem import session
from sglang_xmem.bank_space import BankSpace
from sglang_xmem.engines.sglang.geometry import pages_of
from sglang_xmem.engines.sglang.identity import Unidentified, weights_digest

if TYPE_CHECKING:
    from sglang_xmem.engines.sglang.pools import AdoptedPool


def bank_spaces() -> list[BankSpace]:
    """Return this rank's spaces in the page bank."""
    arenas = session.current().arenas
    return [space for arena in arenas for space in arena.spaces.values() if isinstance(space, BankSpace)]


def report_damaged(view: AdoptedPool, addresses: npt.NDArray[np.int64]) -> None:
    """Remove a pool's pages with these frames from the page bank; does nothing for other tiers."""
    space = view.arena.spaces[view.section.space]
    if isinstance(space, BankSpace):
        space.damaged(addresses)


def finish_reports(timeout_s: float = 2.0) -> None:
    """Wait until damaged pages are reported to the page bank, before a rank ends."""
    for space in bank_spaces():
        space.bank.reported(timeout_s)


def attach(view: AdoptedPool) -> None:
    """Report the pages that a pool with a bank space frees."""
    space = view.arena.spaces[view.section.space]
    if not isinstance(space, BankSpace):
        return
    pool, slots, free, clear = view.pool, view.slots, view.pool.free, view.pool.clear

    def free_pages(indices: Any) -> int:
        numbers = indices.cpu()
        freed = int(free(numbers))
        space.free(pages_of(numbers, slots))
        return freed

    def clear_pages() -> None:
        clear()
        space.clear()

    pool.free, pool.clear = free_pages, clear_pages


def weights_from_disk(original: Any, self: Any, recv_req: Any) -> Any:
    """Share with engines of the new weights, from the following flush on (hook)."""
    known = session.current().facts
    try:
        weights, load_format = weights_digest(recv_req.model_path), str(recv_req.load_format)
    except (Unidentified, OSError):
        return weights_from_elsewhere(original, self, recv_req)
    # Dummy weights do not depend on the files.
    same = known is not None and (known["weights"], known["load_format"]) == (weights, load_format)
    same = same and load_format != "dummy"
    _change(b"" if same else f"{weights} {load_format}".encode())
    answer = None
    try:
        answer = original(self, recv_req)
    finally:
        # A failure leaves other or partial weights; files may have changed during it too.
        if not getattr(answer, "success", False) or not _still(recv_req.model_path, weights):
            _change(os.urandom(32))
    return answer


def _still(model: str, digest: str) -> bool:
    try:
        return weights_digest(model) == digest
    except (Unidentified, OSError):
        return False


def weights_from_elsewhere(original: Any, self: Any, recv_req: Any) -> Any:
    """Share with no other engine: nothing identifies these weights (hook)."""
    _change(os.urandom(32))
    return original(self, recv_req)


def _change(name: bytes) -> None:
    for space in bank_spaces():
        space.weights_changed(name)

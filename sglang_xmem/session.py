"""Everything of this package that a scheduler process holds. The session is the only global."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_xmem.arena import Arena
    from sglang_xmem.plan import Placement, Plan


class Session:
    """One rank of an engine with the tier on.

    Attributes:
        plan: what the launcher found.
        placement: gives memory to this rank's arenas.
        arenas: of this rank, in the order they were made.
        notes: what to log as soon as logging is set up.
        counts: events by name, such as "loads" or "fallback_loads"; plain integers, since the hot path bumps them.
    """

    def __init__(self, plan: Plan, placement: Placement) -> None:
        self.plan = plan
        self.placement = placement
        self.arenas: list[Arena] = []
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        #: Host RAM that this rank may claim, as it was when SGLang began to size an automatic pool.
        self.sized_against: int | None = None

    def tier_names(self) -> list[str]:
        """Tiers of the arenas, for the launcher and for logs."""
        return [arena.tier.name for arena in self.arenas]

    def describe(self) -> dict[str, Any]:
        """Facts of this rank for status pages."""
        return {
            "tiers": self.tier_names(),
            "bytes": [arena.nbytes for arena in self.arenas],
            "counts": dict(self.counts),
        }


_session: Session | None = None


def start(session: Session | None) -> None:
    """Make `session` this process's; None ends it."""
    global _session
    _session = session


def current() -> Session:
    """This process's session.

    Raises:
        RuntimeError: there is none.
    """
    if _session is None:
        raise RuntimeError("no session of sglang_xmem is active in this process")
    return _session


def active() -> bool:
    """Whether this process has a session."""
    return _session is not None

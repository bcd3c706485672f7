"""Everything of this package that a scheduler process holds. The session is the only global."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sglang_xmem.watch import Watch

if TYPE_CHECKING:
    from sglang_xmem.arena import Arena
    from sglang_xmem.metrics import Exporter
    from sglang_xmem.plan import Placement, Plan


class Session:
    """One rank of an engine with the tier on.

    Attributes:
        plan: what the launcher found.
        placement: gives memory to this rank's arenas.
        arenas: of this rank, in the order they were made.
        pools: the engine's pools that live in them, as its adapter knows them.
        notes: what to log as soon as logging is set up.
        counts: events by name, such as "loads" or "fallback_loads"; plain integers, since the hot path bumps them.
    """

    def __init__(self, plan: Plan, placement: Placement, deadline_s: float = 30.0) -> None:
        self.plan = plan
        self.placement = placement
        self.arenas: list[Arena] = []
        self.pools: list[Any] = []
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        #: Looks up what pages depend on, for tiers that share them; its value is None where that cannot be said.
        self.look_up_facts: Callable[[], dict[str, Any] | None] = lambda: None
        #: What it said before the weights were loaded; None: pages are shared with nobody.
        self.facts: dict[str, Any] | None = None
        #: The model's name, for people.
        self.label = ""
        #: False once a copy was refused and had to be made another way.
        self.healthy = True
        self.watch = Watch(deadline_s, self._where, self._export)
        self._exporter: Exporter | None = None

    def serve(self, labels: Mapping[str, str] | None) -> None:
        """Begin to watch copies, and to export metrics with `labels` unless None."""
        if labels is not None:
            from sglang_xmem.metrics import Exporter

            self._exporter = Exporter(self, labels)
        self.watch.start()

    def _export(self) -> None:
        if self._exporter is not None:
            self._exporter.export()

    def _where(self) -> str:
        return f"of tier {', '.join(self.tier_names())}"

    def tier_names(self) -> list[str]:
        """Tiers of the arenas, for the launcher and for logs."""
        return [arena.tier.name for arena in self.arenas]

    def describe(self) -> dict[str, Any]:
        """Facts of this rank for status pages."""
        return {
            "tiers": self.tier_names(),
            "healthy": self.healthy,
            "copiers": [arena.copier.describe() for arena in self.arenas if arena.copier is not None],
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

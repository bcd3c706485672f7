"""All state of this package in a scheduler process. The session is the only global."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_xmem import gpu_events
from sglang_xmem.plan import describe_skipped
from sglang_xmem.watch import InFlight, Watch

if TYPE_CHECKING:
    from sglang_xmem.arena import Arena
    from sglang_xmem.canary import Canary, Perch
    from sglang_xmem.gpu_events import GpuEvents
    from sglang_xmem.metrics import Exporter
    from sglang_xmem.plan import Placement, Plan


logger = logging.getLogger(__name__)


class Session:
    """One rank of an engine with the tier on.

    Attributes:
        plan: the launcher's plan.
        placement: allocates memory for this rank's arenas.
        arenas: this rank's arenas, in order of creation.
        pools: the engine's pools in them, as its adapter's type.
        notes: messages to log once logging is set up.
        counts: events by name, such as "pages:load" or "failures:refused" (metrics.py); plain integers, since the hot
            path increments them.
        used_fraction: function of (arena, space name): the fraction of the space that holds KV cache, by the engine's
            allocator.
    """

    def __init__(self, plan: Plan, placement: Placement, deadline_s: float = 30.0) -> None:
        self.plan = plan
        self.placement = placement
        self.arenas: list[Arena] = []
        self.pools: list[Any] = []
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        #: Returns what pages depend on, for tiers that share them; None if that is unknown.
        self.look_up_facts: Callable[[], dict[str, Any] | None] = lambda: None
        #: Its value before the weights were loaded; None: pages are not shared.
        self.facts: dict[str, Any] | None = None
        #: The model's name, for reports.
        self.label = ""
        #: Why the tier is set aside (nothing is stored in it or loaded from it). Empty while it serves.
        self.trouble = ""
        self._for_good = False
        #: Comparisons of loads without a batch, until they are settled.
        self.checks: list[Any] = []
        self.canary: Canary | None = None
        self.gpu_events: GpuEvents | None = None
        self.used_fraction: Callable[[Arena, str], float] = lambda arena, space: 0.0
        self.watch = Watch(deadline_s, self._where, self._each_second, finished=self._observe)
        self._exporter: Exporter | None = None

    def serve(self, labels: Mapping[str, str] | None, perches: Sequence[Perch] = ()) -> None:
        """Start to watch copies and GPUs, send canaries, and export metrics with `labels` unless None."""
        if perches:
            from sglang_xmem.canary import Canary

            try:
                self.canary = Canary(perches, self._canary_failed, self.take_again, self._may_be_well)
                self.canary.start()
            except RuntimeError as error:  # no scratch memory, or the copying GPU cannot access it
                logger.warning("sglang_xmem: no canary pages, so a tier that fails stays set aside: %s", error)
        if labels is not None:
            from sglang_xmem.metrics import Exporter

            self._exporter = Exporter(self, labels)
        self.gpu_events = gpu_events.watch([gpu for arena in self.arenas for gpu in arena.gpus], self._gpu_failed)
        self.watch.start()

    def set_aside(self, why: str, *, for_good: bool = False) -> None:
        """Stop using the tier, until `take_again`.

        Args:
            for_good: until the server is restarted.
        """
        if self._for_good:
            return
        if not self.trouble or for_good:
            logger.warning(
                "sglang_xmem: tier %s is set aside%s: %s",
                ", ".join(self.tier_names()),
                " until the server is restarted" if for_good else "",
                why,
            )
        self.trouble, self._for_good = why, for_good

    def take_again(self) -> None:
        """Use the tier again, after a canary came back."""
        if self._for_good:
            return
        if self.trouble:
            logger.warning("sglang_xmem: tier %s is used again", ", ".join(self.tier_names()))
        self.trouble = ""

    def _may_be_well(self) -> bool:
        return not self.healthy and not self._for_good

    def _gpu_failed(self, why: str, *, for_good: bool) -> None:
        self.counts["failures:gpu"] += 1
        if for_good and self.canary is not None:
            self.canary.stop()
        self.set_aside(why, for_good=for_good)

    def _canary_failed(self, why: str) -> None:
        self.counts["failures:canary"] += 1
        self.set_aside(why)

    @property
    def healthy(self) -> bool:
        """False from a failure of the tier until a canary comes back."""
        return not self.trouble

    def _each_second(self) -> None:
        if self.canary is not None:
            self.canary.check_time()
        for arena in self.arenas:
            for space in arena.spaces.values():
                space.tidy()
        if self._exporter is not None:
            self._exporter.export()

    def _observe(self, copy: InFlight) -> None:
        if self._exporter is not None:
            self._exporter.observe(copy)

    def capacity_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's pages, by tier."""
        return self._by_tier(lambda arena: arena.nbytes)

    def used_bytes(self) -> dict[str, int]:
        """Return the bytes of pages that hold KV cache, by tier."""
        return self._by_tier(
            lambda arena: sum(
                round(self.used_fraction(arena, name) * space.spec.pages) * space.spec.frame_bytes
                for name, space in arena.spaces.items()
            )
        )

    def pinned_bytes(self) -> dict[str, int]:
        """Return the bytes of pages that copies in flight hold, by tier; all copies of a rank use its first tier."""
        return dict.fromkeys(self.tier_names()[:1], self.watch.in_flight_bytes())

    def _by_tier(self, nbytes: Callable[[Arena], int]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for arena in self.arenas:
            found[arena.tier.name] += nbytes(arena)
        return dict(found)

    def _where(self) -> str:
        return f"of tier {', '.join(self.tier_names())}"

    def tier_names(self) -> list[str]:
        """Return the tiers of the arenas, for the launcher and for logs."""
        return [arena.tier.name for arena in self.arenas]

    def _configuration(self) -> dict[str, Any]:
        """Return the user's settings that apply to this rank's tiers, including defaults."""
        options = self.plan.options
        settings = {name: options.tiers[name] for name in self.tier_names()}
        found: dict[str, Any] = msgspec.to_builtins({"tier": options.tier, "copy": options.copy, **settings})
        return found

    def describe(self) -> dict[str, Any]:
        """Return facts of this rank for status pages."""
        return {
            "tiers": self.tier_names(),
            "healthy": self.healthy,
            "trouble": self.trouble,
            "integrity": self.plan.options.integrity,
            "copiers": [arena.copier.describe() for arena in self.arenas if arena.copier is not None],
            "capacity_bytes": self.capacity_bytes(),
            "used_bytes": self.used_bytes(),
            "pinned_bytes": self.pinned_bytes(),
            "configuration": self._configuration(),
            "skipped": describe_skipped(self.plan.skipped),
            "counts": dict(self.counts),
        }


_session: Session | None = None


def start(session: Session | None) -> None:
    """Set this process's session; None ends it."""
    global _session
    _session = session


def current() -> Session:
    """Return this process's session.

    Raises:
        RuntimeError: there is none.
    """
    if _session is None:
        raise RuntimeError("no session of sglang_xmem is active in this process")
    return _session


def active() -> bool:
    """Whether this process has a session."""
    return _session is not None

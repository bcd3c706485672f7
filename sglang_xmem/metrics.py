"""Prometheus metrics of a rank, through SGLang's own endpoint.

The hot path increments plain integers of the session (`Session.counts`), with keys "FAMILY" or "FAMILY:LABEL". The
watch thread exports them once per second, and observes each completed copy. A new label, such as another failure
reason, needs no change here. Imports prometheus_client on first use: SGLang sets its multiprocess folder first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sglang_xmem.session import Session
    from sglang_xmem.watch import InFlight

PREFIX = "sglang:xmem_"


class Gauge(NamedTuple):
    """A gauge."""

    name: str
    help: str


class Family(NamedTuple):
    """Counters that differ in one label.

    Attributes:
        key: key of `Session.counts`, before the colon.
        name: name of the counter, without the prefix.
        label: name of the label.
        known: label values that are exported as 0 from the start, so that rates include the first event.
        scale: factor for a count.
    """

    key: str
    name: str
    help: str
    label: str
    known: tuple[str, ...]
    scale: float = 1.0


class Histogram(NamedTuple):
    """A histogram over completed copies; label `direction`."""

    name: str
    help: str
    buckets: tuple[float, ...]


CAPACITY = Gauge("tier_capacity_bytes", "Bytes of this rank's pages in the tier.")
USED = Gauge("tier_used_bytes", "Bytes of pages in the tier that hold KV cache.")
PINNED = Gauge("tier_pinned_bytes", "Bytes of pages that loads and stores in flight protect from eviction.")
HEALTHY = Gauge("tier_healthy", "1 while the tier serves, 0 while it is set aside after a failure.")
INFO = Gauge("tier_info", "1; its label copier names what executes the copies.")
GAUGES = (CAPACITY, USED, PINNED, HEALTHY, INFO)

SECONDS = Histogram(
    "copy_seconds",
    "Seconds of a load or store, from its first byte to its last.",
    (50e-6, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
BYTES = Histogram("copy_bytes", "Bytes of a load or store.", tuple(float(4**n << 16) for n in range(9)))
HISTOGRAMS = (SECONDS, BYTES)

DIRECTIONS = ("load", "store")
LOOKUPS = Family(
    "lookups",
    "lookup_pages_total",
    "Pages of prompts, by the place of the hit.",
    "result",
    ("device", "tier", "storage", "miss"),
)
FAMILIES = (
    LOOKUPS,
    Family("pages", "copy_pages_total", "Pages copied, all pools.", "direction", DIRECTIONS),
    Family(
        "enqueue_ns", "copy_enqueue_seconds_total", "Scheduler thread's time in copies.", "direction", DIRECTIONS, 1e-9
    ),
    Family("failures", "failures_total", "Failures of the tier, by reason.", "reason", ("refused", "canary", "gpu")),
    Family("fallbacks", "fallbacks_total", "Copies made by a slower path.", "kind", ("plain", "layers")),
    Family(
        "set_aside",
        "set_aside_total",
        "Loads and stores not made while the tier is set aside.",
        "direction",
        DIRECTIONS,
    ),
    Family(
        "integrity",
        "integrity_checks_total",
        "Pages whose bytes were compared with what was stored, by result.",
        "result",
        ("checked", "mismatch", "skipped"),
    ),
    Family(
        "storage",
        "storage_pages_total",
        "Pages that storage backends moved, or failed to move.",
        "operation",
        ("read", "write", "read_failed", "write_failed"),
    ),
    Family(
        "bank",
        "bank_pages_total",
        "Pages of the page bank: adopted, published, already present, not published, or damaged.",
        "result",
        ("adopted", "published", "duplicate", "private", "damaged"),
    ),
    Family("bank_questions", "bank_questions_total", "Requests to the page bank.", "result", ("unanswered",)),
    Family(
        "bank_sessions",
        "bank_sessions_total",
        "Spaces of the page bank after a lost connection: rejoined, or lost with the service's memory.",
        "result",
        ("rejoined", "lost"),
    ),
)


def series() -> Iterator[str]:
    """Return the names of all series in Prometheus."""
    for gauge in GAUGES:
        yield PREFIX + gauge.name
    for family in FAMILIES:
        yield PREFIX + family.name
    for histogram in HISTOGRAMS:
        for suffix in ("bucket", "sum", "count"):
            yield f"{PREFIX}{histogram.name}_{suffix}"


class Exporter:
    """Exports a session's numbers to prometheus_client; only for the watch thread.

    Args:
        labels: labels of every series; the label tier is added.
        registry: for tests; default: prometheus_client's own.
    """

    def __init__(self, session: Session, labels: Mapping[str, str], registry: Any = None) -> None:
        import prometheus_client as client

        self._session = session
        self._labels = {**labels, "tier": "+".join(dict.fromkeys(session.tier_names()))}
        names = sorted(self._labels)
        of = {} if registry is None else {"registry": registry}

        def gauge(kind: Gauge, *more: str) -> Any:
            return client.Gauge(PREFIX + kind.name, kind.help, [*names, *more], multiprocess_mode="mostrecent", **of)

        self._gauges = {kind.name: gauge(kind) for kind in GAUGES if kind is not INFO}
        self._families = {
            family.key: (family, client.Counter(PREFIX + family.name, family.help, [*names, family.label], **of))
            for family in FAMILIES
        }
        histograms = [
            client.Histogram(PREFIX + kind.name, kind.help, [*names, "direction"], buckets=kind.buckets, **of)
            for kind in HISTOGRAMS
        ]
        self._copies = {
            direction: [histogram.labels(**self._labels, direction=direction) for histogram in histograms]
            for direction in DIRECTIONS
        }
        #: For each key of the session's counts: its counter, its factor, and the exported value.
        self._counters: dict[str, tuple[Any, float, int]] = {}
        for family in FAMILIES:
            for value in family.known:
                self._add(f"{family.key}:{value}", 0)
        info = gauge(INFO, "copier")
        for arena in session.arenas:
            if arena.copier is not None:
                info.labels(**{**self._labels, "tier": arena.tier.name}, copier=arena.copier.describe()).set(1)

    def export(self) -> None:
        """Set the gauges, and add the counts since the last call."""
        session = self._session
        for gauge, by_tier in (
            (CAPACITY, session.capacity_bytes()),
            (USED, session.used_bytes()),
            (PINNED, session.pinned_bytes()),
        ):
            for tier, nbytes in by_tier.items():
                self._gauges[gauge.name].labels(**{**self._labels, "tier": tier}).set(nbytes)
        self._gauges[HEALTHY.name].labels(**self._labels).set(float(session.healthy))
        for key, value in list(session.counts.items()):
            self._add(key, value)

    def observe(self, copy: InFlight) -> None:
        """Observe a completed copy."""
        seconds, nbytes = self._copies[copy.what]
        seconds.observe(copy.seconds())
        nbytes.observe(copy.nbytes)

    def _add(self, key: str, value: int) -> None:
        if key not in self._counters:
            name, _, label = key.partition(":")
            if name not in self._families:
                return
            family, counter = self._families[name]
            self._counters[key] = (counter.labels(**self._labels, **{family.label: label}), family.scale, 0)
        counter, scale, exported = self._counters[key]
        counter.inc((value - exported) * scale)
        self._counters[key] = (counter, scale, value)

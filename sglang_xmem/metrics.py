"""Prometheus metrics of a rank, through SGLang's own endpoint.

The hot path bumps plain integers of the session (`Session.counts`); the watch thread exports them once per second.
Imports prometheus_client on use: SGLang sets its multiprocess folder first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sglang_xmem.session import Session


class Metric(NamedTuple):
    """A series.

    Attributes:
        name: without the prefix.
        kind: "counter" or "gauge".
        key: of `Session.counts`, for counters.
        scale: what a count is multiplied by.
    """

    name: str
    kind: str
    help: str
    key: str = ""
    scale: float = 1.0


PREFIX = "sglang:xmem_"
METRICS = (
    Metric("tier_capacity_bytes", "gauge", "Bytes of this rank's pool in the tier."),
    Metric("tier_healthy", "gauge", "1 while the tier's copies work, 0 when they had to be made another way."),
    Metric("loads_total", "counter", "Loads from the tier.", "loads"),
    Metric("stores_total", "counter", "Stores to the tier.", "stores"),
    Metric("load_pages_total", "counter", "Pages loaded from the tier, all pools.", "load_pages"),
    Metric("store_pages_total", "counter", "Pages stored in the tier, all pools.", "store_pages"),
    Metric("load_bytes_total", "counter", "Bytes loaded from the tier.", "load_bytes"),
    Metric("store_bytes_total", "counter", "Bytes stored in the tier.", "store_bytes"),
    Metric("load_enqueue_seconds_total", "counter", "Scheduler thread's time in loads.", "load_ns", 1e-9),
    Metric("store_enqueue_seconds_total", "counter", "Scheduler thread's time in stores.", "store_ns", 1e-9),
    Metric("fallback_loads_total", "counter", "Loads made launch by launch, layer by layer.", "loads_by_layers"),
    Metric("copy_refusals_total", "counter", "Copies that the copier refused.", "refusals"),
    Metric("bank_adopted_pages_total", "counter", "Pages found in the page bank, used as they lie.", "bank_adopted"),
    Metric("bank_published_pages_total", "counter", "Pages that others can find in the bank.", "bank_published"),
    Metric("bank_duplicate_pages_total", "counter", "Pages that the bank had already.", "bank_had"),
    Metric("bank_private_pages_total", "counter", "Pages that could not be published.", "bank_stale"),
    Metric("bank_unanswered_total", "counter", "Questions that the bank did not answer.", "bank_unanswered"),
    Metric("storage_reads_total", "counter", "Pages read by storage backends.", "storage_reads"),
    Metric("storage_writes_total", "counter", "Pages written by storage backends.", "storage_writes"),
)


class Exporter:
    """Brings a session's numbers to prometheus_client.

    Args:
        labels: of every series, besides the tier.
    """

    def __init__(self, session: Session, labels: Mapping[str, str]) -> None:
        import prometheus_client

        self._session = session
        self._labels = {**labels, "tier": ",".join(session.tier_names())}
        names = sorted(self._labels)
        self._series: dict[str, Any] = {}
        self._exported: dict[str, float] = {}
        for metric in METRICS:
            if metric.kind == "counter":
                made: Any = prometheus_client.Counter(PREFIX + metric.name, metric.help, names)
            else:
                made = prometheus_client.Gauge(PREFIX + metric.name, metric.help, names, multiprocess_mode="mostrecent")
            self._series[metric.name] = made.labels(**self._labels)

    def export(self) -> None:
        """Add what was counted since the last call."""
        session = self._session
        self._series["tier_capacity_bytes"].set(sum(arena.nbytes for arena in session.arenas))
        self._series["tier_healthy"].set(float(session.healthy))
        for metric in METRICS:
            if metric.kind == "counter":
                value = session.counts[metric.key] * metric.scale
                self._series[metric.name].inc(max(0.0, value - self._exported.get(metric.name, 0.0)))
                self._exported[metric.name] = value

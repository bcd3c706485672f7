"""Metrics of a rank: what is counted is exported, once, under documented names; copies are timed when they end."""

from __future__ import annotations

import re
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import metrics
from sglang_xmem.watch import InFlight, Watch

client = pytest.importorskip("prometheus_client")

SOURCES = Path(metrics.__file__).parent
LABELS = {"model_name": "m", "tp_rank": "0", "pp_rank": "0", "dp_rank": "0"}


class FakeSession:
    def __init__(self) -> None:
        copier = types.SimpleNamespace(describe=lambda: "torch")
        self.arenas = [types.SimpleNamespace(tier=types.SimpleNamespace(name="dram"), copier=copier)]
        self.counts: Counter[str] = Counter()
        self.healthy = True
        self.used = 256

    def tier_names(self) -> list[str]:
        return ["dram"]

    def capacity_bytes(self) -> dict[str, int]:
        return {"dram": 1024}

    def used_bytes(self) -> dict[str, int]:
        return {"dram": self.used}

    def pinned_bytes(self) -> dict[str, int]:
        return {"dram": 128}


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def registry() -> Any:
    return client.CollectorRegistry()


@pytest.fixture
def exporter(session: FakeSession, registry: Any) -> metrics.Exporter:
    made: Any = session
    return metrics.Exporter(made, LABELS, registry)


def value(registry: Any, name: str, **labels: str) -> float | None:
    found: float | None = registry.get_sample_value(f"sglang:xmem_{name}", {**LABELS, "tier": "dram", **labels})
    return found


def test_gauges_follow_the_session(session: FakeSession, registry: Any, exporter: metrics.Exporter) -> None:
    exporter.export()
    names = ("tier_capacity_bytes", "tier_used_bytes", "tier_pinned_bytes", "tier_healthy")
    assert [value(registry, name) for name in names] == [1024, 256, 128, 1]
    session.used, session.healthy = 512, False
    exporter.export()
    assert [value(registry, name) for name in names] == [1024, 512, 128, 0]
    assert value(registry, "tier_info", copier="torch") == 1


def test_counts_are_added_once(session: FakeSession, registry: Any, exporter: metrics.Exporter) -> None:
    session.counts.update({"pages:load": 5, "enqueue_ns:load": 2_000_000_000})
    exporter.export()
    exporter.export()
    session.counts["pages:load"] += 2
    exporter.export()
    assert value(registry, "copy_pages_total", direction="load") == 7
    assert value(registry, "copy_enqueue_seconds_total", direction="load") == 2
    assert value(registry, "copy_pages_total", direction="store") == 0


def test_the_first_failure_and_new_reasons_show(
    session: FakeSession, registry: Any, exporter: metrics.Exporter
) -> None:
    # A counter that appears with its first event has no rate; so known reasons are there from the start.
    assert value(registry, "failures_total", reason="refused") == 0
    assert value(registry, "integrity_checks_total", result="mismatch") == 0
    session.counts.update({"failures:refused": 1, "failures:moonlight": 3})
    exporter.export()
    assert value(registry, "failures_total", reason="refused") == 1
    assert value(registry, "failures_total", reason="moonlight") == 3


def test_copies_are_distributed_by_time_and_size(registry: Any, exporter: metrics.Exporter) -> None:
    copy = InFlight("load")
    copy.nbytes, copy.elapsed_s = 3 << 20, lambda: 70e-6
    exporter.observe(copy)
    assert value(registry, "copy_seconds_bucket", direction="load", le="5e-05") == 0
    assert value(registry, "copy_seconds_bucket", direction="load", le="0.0001") == 1
    assert value(registry, "copy_bytes_sum", direction="load") == 3 << 20
    assert value(registry, "copy_bytes_count", direction="store") == 0


def test_all_series_have_their_documented_names(registry: Any, exporter: metrics.Exporter) -> None:
    exporter.export()
    found = {sample.name for family in registry.collect() for sample in family.samples}
    assert {name for name in found if not name.endswith("_created")} == set(metrics.series())


def test_every_count_of_the_sources_is_exported() -> None:
    text = "\n".join(path.read_text() for path in SOURCES.rglob("*.py"))
    keys = set(re.findall(r"counts\[f?\"(\w+):", text))
    assert {"failures", "pages", "storage"} <= keys
    # Bytes and numbers of copies are those of the histograms.
    assert keys - {"bytes", "copies"} <= {family.key for family in metrics.FAMILIES}


@pytest.mark.parametrize("deadline_s", [0.0, 30.0])
def test_a_copy_is_reported_when_it_has_ended(deadline_s: float) -> None:
    ended = False
    finished: list[InFlight] = []
    watch = Watch(deadline_s, lambda: "", finished=finished.append)
    with watch.over("load") as flight:
        flight.nbytes = 10
        flight.done = lambda: ended
    watch.look()
    assert not finished
    assert watch.in_flight_bytes() == 10
    ended = True
    watch.look()
    watch.look()
    assert [(copy.what, copy.nbytes) for copy in finished] == [("load", 10)]
    assert watch.in_flight_bytes() == 0


def test_a_device_without_clocks_is_timed_by_its_enqueue(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.25])
    monkeypatch.setattr("sglang_xmem.watch.time.monotonic", lambda: next(clock))
    watch = Watch(0, lambda: "")
    with watch.over("store") as flight:
        flight.done = lambda: True
    assert flight.seconds() == 0.25

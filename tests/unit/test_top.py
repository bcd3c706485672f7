"""`sglang-xmem top` over what the exporter exports, served as SGLang serves it."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import cli, metrics, scrape
from sglang_xmem.errors import ConfigError
from sglang_xmem.watch import InFlight
from tests.unit.test_metrics import LABELS, FakeSession

client = pytest.importorskip("prometheus_client")


class Server:
    """A server whose /metrics are `text`; None: it has none."""

    def __init__(self) -> None:
        self.text: str | None = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = outer.text is not None and self.path == "/metrics"
                self.send_response(200 if found else 404)
                self.end_headers()
                if outer.text is not None:
                    self.wfile.write(outer.text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()


class Exported:
    """Metrics of two ranks, and of SGLang."""

    def __init__(self) -> None:
        self.registries = [client.CollectorRegistry() for _ in range(2)]
        self.sessions = [FakeSession() for _ in self.registries]
        made: list[Any] = list(self.sessions)
        self.exporters = [
            metrics.Exporter(session, {**LABELS, "tp_rank": str(number)}, registry)
            for number, (session, registry) in enumerate(zip(made, self.registries, strict=True))
        ]
        self.sglang = client.CollectorRegistry()
        self.prompts = client.Counter("sglang:prompt_tokens_total", "", ["model_name"], registry=self.sglang)
        self.cached = client.Counter("sglang:cached_tokens_total", "", ["cache_source"], registry=self.sglang)

    def copy(self, rank: int, what: str, nbytes: int, seconds: float) -> None:
        flight = InFlight(what)
        flight.nbytes, flight.elapsed_s = nbytes, lambda: seconds
        self.exporters[rank].observe(flight)

    def text(self) -> str:
        for exporter in self.exporters:
            exporter.export()
        return "".join(client.generate_latest(each).decode() for each in (*self.registries, self.sglang))


@pytest.fixture
def exported() -> Exported:
    made = Exported()
    made.prompts.labels(model_name="m").inc(1000)
    made.cached.labels(cache_source="device").inc(100)
    made.cached.labels(cache_source="host").inc(600)
    made.cached.labels(cache_source="total").inc(700)
    made.copy(0, "load", 3_000_000, 0.0015)
    made.copy(1, "load", 1_000_000, 0.0005)
    looked_up = {"lookups:device": 1, "lookups:tier": 6, "lookups:miss": 13}
    for session in made.sessions:  # the ranks of one engine look up the same pages
        session.counts.update(looked_up)
    made.sessions[1].counts.update({"pages:load": 7, "failures:refused": 2})
    made.sessions[1].healthy = False
    return made


def test_numbers_are_those_of_the_exporter(exported: Exported) -> None:
    found = scrape.numbers(scrape.parse(exported.text()), "u")
    assert found["tokens"] == {"device": 100, "tier": 600, "storage": 0, "computed": 300}
    assert [rank["rank"]["tp_rank"] for rank in found["ranks"]] == [0, 1]
    assert [rank["healthy"] for rank in found["ranks"]] == [True, False]
    one = found["ranks"][1]
    assert (one["tier"], one["copier"], one["capacity_bytes"], one["used_bytes"]) == ("dram", "torch", 1024, 256)
    assert one["failures"] == {"refused": 2, "canary": 0, "gpu": 0}
    assert one["copies"]["load"]["pages"] == 7
    assert scrape.lookups(found) == {"device": 1, "tier": 6, "storage": 0, "miss": 13}
    both = scrape.total(found["ranks"], "load")
    assert (both["count"], both["bytes"], both["seconds"]) == (2, 4_000_000, pytest.approx(0.002))


def test_an_interval_is_a_difference_but_for_levels(exported: Exported) -> None:
    before = scrape.numbers(scrape.parse(exported.text()), "u")
    exported.copy(0, "load", 500, 0.1)
    exported.sessions[0].used = 1000
    exported.sessions[0].counts["failures:new"] = 1
    exported.cached.labels(cache_source="host").inc(50)
    exported.prompts.labels(model_name="m").inc(50)
    now = scrape.numbers(scrape.parse(exported.text()), "u")
    change = scrape.since(now, before)
    assert change["tokens"] == {"device": 0, "tier": 50, "storage": 0, "computed": 0}
    assert change["ranks"][0]["copies"]["load"]["bytes"] == 500
    assert change["ranks"][0]["used_bytes"] == 1000
    assert change["ranks"][0]["failures"] == {"refused": 0, "canary": 0, "gpu": 0, "new": 1}
    assert change["ranks"][1]["copies"]["load"]["count"] == 0
    assert change["ranks"][1]["rank"]["tp_rank"] == 1


@pytest.mark.parametrize(("q", "seconds"), [(0.5, 0.0015), (0.95, 0.01), (0.25, 0.001)])
def test_quantiles_lie_within_their_bucket(q: float, seconds: float) -> None:
    buckets = {"0.001": 1, "0.002": 3, "+Inf": 4, "0.01": 3}
    assert scrape.quantile(buckets, q) == pytest.approx(seconds)


def test_no_copies_have_no_quantile() -> None:
    assert scrape.quantile({}, 0.5) is None
    assert scrape.quantile({"0.1": 0, "+Inf": 0}, 0.5) is None


def test_lines_that_are_no_samples_are_left_out() -> None:
    text = '# HELP a b\n\na{x="1",y="b\\"}"} 2\nnonsense\nb NaN\n'
    assert [(s.name, dict(s.labels)) for s in scrape.parse(text)] == [("a", {"x": "1", "y": 'b\\"}'}), ("b", {})]


@pytest.mark.parametrize("text", [None, "sglang:prompt_tokens_total 5.0\n"])
def test_a_server_without_metrics_is_one_sentence(
    server: Server, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    server.text = text
    assert cli.main(["top", "--once", "--url", server.url]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("--enable-metrics" if text is None else "--hicache-use-xmem") in said


def test_nothing_answers_is_one_sentence() -> None:
    for url in ("http://127.0.0.1:1", "nonsense", "http://127.0.0.1:99999", "http://:::"):
        with pytest.raises(ConfigError, match=r"No server responds at .* Start SGLang"):
            scrape.fetch(url)


def test_one_screen(server: Server, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.text = exported.text()
    picture = tmp_path / "top.svg"
    assert cli.main(["top", "--once", "--interval", "0.01", "--url", server.url, "--svg", str(picture)]) == 0
    said = capsys.readouterr().out
    for words in ("UNHEALTHY: rank 0.0.1", "60%", "65%", "2.00", "failed: refused", "tier dram (torch)"):
        assert words in said
    assert "UNHEALTHY" in picture.read_text()


@pytest.mark.parametrize("options", [["--json"], []])
def test_live_until_the_server_goes(server: Server, exported: Exported, options: list[str]) -> None:
    server.text = exported.text()
    command = [sys.executable, "-m", "sglang_xmem.cli", "top", "--url", server.url, "--interval", "0.05", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if options:
            looks = [json.loads(process.stdout.readline()) for _ in range(2)]
            assert looks[1]["time"] > looks[0]["time"]
            assert looks[1]["interval"]["tokens"]["tier"] == 0
        else:
            assert any("How full is the tier?" in line for line in iter(process.stdout.readline, ""))
        server.text = None
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "--enable-metrics" in said


@pytest.mark.parametrize("arguments", [["--interval", "0"], ["--interval", "nan"], ["--svg", "x", "--json", "--once"]])
def test_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["top", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert arguments[0] in capsys.readouterr().err

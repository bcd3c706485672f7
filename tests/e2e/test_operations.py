"""One server, started as docs/operations.md says: its metrics, its information, and every command of that page."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sglang_xmem import metrics, scrape
from tests import REPOSITORY
from tests.e2e.harness import BASE_OPTIONS, EVICT_AND_ASK_AGAIN, Answer, Server, ServerClient, run_steps

pytestmark = pytest.mark.cpu_engine

DOCUMENT = REPOSITORY / "docs" / "operations.md"
DEFAULT_URL = "http://127.0.0.1:30000"


def commands() -> list[str]:
    """Every command of the page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


class Served(NamedTuple):
    server: Server
    answers: dict[str, Answer]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    (start,) = (command for command in commands() if command.startswith("python -m sglang.launch_server"))
    command = [sys.executable, *shlex.split(start.replace("MODEL", str(tiny_model)))[1:]]
    given = {"enable_hierarchical_cache"}
    options = {name: value for name, value in BASE_OPTIONS.items() if name not in given}
    with Server(command, options, tmp_path_factory.mktemp("served") / "log") as server:
        server.wait_ready(180)
        yield Served(server, run_steps(ServerClient(server), EVICT_AND_ASK_AGAIN))


@pytest.fixture(scope="module")
def scraped(served: Served) -> list[scrape.Sample]:
    """Metrics, once those of the last copies are there; they follow within a second."""
    return scrape.parse(_settled(served.url))


def _settled(url: str) -> str:
    import time

    before = ""
    while True:
        text = "\n".join(line for line in scrape.fetch(url).splitlines() if metrics.PREFIX in line)
        if text == before:
            return scrape.fetch(url)
        before = text
        time.sleep(1.5)


def test_every_metric_is_exported(served: Served, scraped: list[scrape.Sample]) -> None:
    assert {sample.name for sample in scraped if sample.name.startswith(metrics.PREFIX)} == set(metrics.series())


def test_numbers_are_those_of_the_requests(served: Served, scraped: list[scrape.Sample]) -> None:
    found = scrape.numbers(scraped, served.url)
    (rank,) = found["ranks"]
    page_size = BASE_OPTIONS["page_size"]
    assert (rank["tier"], rank["copier"], rank["healthy"]) == ("dram", "torch", True)
    hit = served.answers["tier_hit"].cached["host"]
    assert hit > 0
    assert found["tokens"]["tier"] == hit + served.answers["changed"].cached.get("host", 0)
    pages = scrape.lookups(found)
    assert {name: count * page_size for name, count in pages.items() if name != "miss"} == {
        name: found["tokens"][name] for name in ("device", "tier", "storage")
    }
    # Of each prompt the last page is not whole.
    assert sum(pages.values()) * page_size < sum(found["tokens"].values()) < (sum(pages.values()) + 20) * page_size
    load, store = rank["copies"]["load"], rank["copies"]["store"]
    assert load["pages"] == hit // page_size
    assert load["bytes"] / load["pages"] == store["bytes"] / store["pages"]
    for copy in (load, store):
        assert copy["count"] == copy["buckets"]["+Inf"] > 0
        assert 0 < copy["seconds"] < 60
    # write_through: what was stored is there until the tier is full; one page is the canary's.
    page_bytes = load["bytes"] // load["pages"]
    assert rank["capacity_bytes"] % page_bytes == 0
    assert page_bytes * (store["pages"] + 1) >= rank["used_bytes"] > load["bytes"]
    assert rank["pinned_bytes"] == 0
    assert sum(rank["failures"].values()) == sum(rank["fallbacks"].values()) == 0


def test_server_information(served: Served, scraped: list[scrape.Sample]) -> None:
    status, body = served.server.request("GET", "/get_server_info")
    assert status == 200
    information: dict[str, Any] = json.loads(body)
    assert information["hicache_xmem_tier"] == "dram"
    state = information["internal_states"][0]["sglang_xmem"]
    assert state["tiers"] == ["dram"]
    assert state["healthy"] is True
    assert state["configuration"]["dram"]["numa_required"] is False
    (rank,) = scrape.numbers(scraped, served.url)["ranks"]
    assert state["used_bytes"] == {"dram": rank["used_bytes"]}
    assert state["capacity_bytes"] == {"dram": rank["capacity_bytes"]}
    assert state["counts"]["copies:load"] == rank["copies"]["load"]["count"]


def test_documented_commands_run(served: Served) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    others = [command for command in commands() if not command.startswith("python -m sglang.launch_server")]
    assert len(others) >= 3
    for command in others:
        assert DEFAULT_URL in command
        done = subprocess.run(
            shlex.split(command.replace(DEFAULT_URL, served.url)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PATH": path},
        )
        assert done.returncode == 0, done.stderr
        assert "dram" in done.stdout

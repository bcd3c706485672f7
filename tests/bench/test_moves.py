"""`bench copy` and `bench soak` on the CPU, with pages of some hundred bytes: what they verify, and how they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import cli
from sglang_xmem.bench import moves
from sglang_xmem.bench.moves import Case, Scene
from sglang_xmem.bench.report import read_rows

#: Three pages in the largest move, so that others stay where they are.
PAGES = 3
QUICK = {"soak": ["--page-copies", "40"], "copy": ["--quick"]}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(layers=2, units=(64, 128), divisor=4)
    monkeypatch.setitem(moves.CASES, "kv", case)
    monkeypatch.setattr(moves.setup, "has_gpu", lambda: False)
    original = Scene.__init__

    def init(self: Any, tier: str, config: Any, gpu: Any, case: Case, pages: int, seed: int) -> None:
        original(self, tier, config, gpu, case, PAGES, seed)

    monkeypatch.setattr(Scene, "__init__", init)


def bench(tmp_path: Path, name: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    output = tmp_path / "rows.jsonl"
    status = cli.main(["bench", name, "--output", str(output), *arguments])
    return status, read_rows(output)


@pytest.mark.parametrize("name", ["soak", "copy"])
def test_all_pages_are_right(tmp_path: Path, name: str) -> None:
    status, rows = bench(tmp_path, name, "--tiers", "dram", *QUICK[name])
    assert status == 0
    assert {row["wrong"] for row in rows} == {0}
    assert {row["tier"] for row in rows} == {"dram"}
    if name == "soak":
        assert 40 <= rows[0]["page_copies"] < 40 + 2 * PAGES
    else:
        assert [row["direction"] for row in rows] == ["load", "store"]
        assert all(row["gbps"] > 0 for row in rows)


@pytest.mark.parametrize("where", ["moved", "bystander"])
@pytest.mark.parametrize("name", ["soak", "copy"])
def test_a_wrong_byte_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
    """Negative control: a byte of a page that moved, or of one that no move named."""
    load = Scene.load

    def spoilt(self: Scene, pages: Any) -> None:
        load(self, pages)
        units = (pages.slots // self.case.divisor).tolist()
        victim = units[0] if where == "moved" else next(u for u in range(2 * PAGES) if u not in units)
        self.pools[-1][victim, 0] ^= 1

    monkeypatch.setattr(Scene, "load", spoilt)
    status, rows = bench(tmp_path, name, "--tiers", "dram", *QUICK[name])
    assert status == 1
    assert rows[0]["wrong"] > 0


@pytest.mark.parametrize("named", [["--tiers", "peer,dram"], []])
def test_tiers_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], named: list[str]) -> None:
    """They fail the run only if they were named."""
    status, rows = bench(tmp_path, "soak", *named, "--page-copies", "4")
    assert status == len(named[:1])
    by_tier = {row["tier"]: row for row in rows}
    assert "needs GPUs" in by_tier["peer"]["skipped"]
    assert by_tier["dram"]["wrong"] == 0
    assert "peer: skipped: " in capsys.readouterr().out


def test_fewer_copies_than_were_asked_for_fail_the_run(tmp_path: Path) -> None:
    arguments = ["--tiers", "dram", "--page-copies", str(10**9), "--time-limit", "1"]
    status, rows = bench(tmp_path, "soak", *arguments)
    assert status == 1
    assert 0 < rows[0]["page_copies"] < 10**9
    assert rows[0]["wrong"] == 0
    assert "1000000000 asked for in 1 s" in rows[0]["too_few"]

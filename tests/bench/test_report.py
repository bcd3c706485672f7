"""Reports, plots and comparisons: what they show, of which rows, and what they say of rows that they cannot read."""

from __future__ import annotations

import json
import random
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import cli
from sglang_xmem.bench import compare, plots, report, stats
from sglang_xmem.errors import ConfigError
from tests import REPOSITORY

COMMITTED = REPOSITORY / "docs" / "results" / "ttft.jsonl"


def a_row(bench: str, backend: str, ms: list[float], **more: Any) -> dict[str, Any]:
    common = {"bench": bench, "run": "r", "backend": backend, "shape": "tiny", "ttft_ms": stats.summary(ms)}
    return {**common, "all_ms": ms, "samples": len(ms), "samples_unproven": 0, **more}


def ttft_row(backend: str, tokens: int, ms: list[float], **more: Any) -> dict[str, Any]:
    more = {"page_size": 16, "outputs_equal": True, **more}
    return a_row("ttft", backend, ms, prompt_tokens=tokens, hits={"device": 0, "host": tokens}, **more)


def throughput_row(backend: str, ratio: float, concurrency: int, rates: list[float]) -> dict[str, Any]:
    found = {"tokens_per_s": stats.median(rates), "min": min(rates), "max": max(rates), "tokens_per_s_all": rates}
    what = {"hit_ratio": ratio, "concurrency": concurrency, "measured_hit_ratio": ratio, "prompt_tokens": 512}
    return a_row("throughput", backend, [1.0, 2.0], **found, **what)


HITS = {"device": 0.31, "host": 0.16, "total": 0.47}
REPLAY: Any = {"trace": "x.jsonl", "speed": "60", "e2e_ms": stats.summary([1e3, 98765.4]), "tokens_per_s": 123456.7}
ROWS = {
    "ttft": [
        ttft_row(backend, tokens, [ms * tokens / 1024 for ms in (9.0, 10.0, 11.0)], floor_ms=1.0, over_floor=1.0)
        for backend in ("hbm", "dram", "recompute")
        for tokens in (1024, 10240)
    ],
    "throughput": [
        throughput_row(backend, ratio, concurrency, [1e3 * (1 + ratio), 1.1e3 * (1 + ratio)])
        for backend, ratios in (("stock", (0.0, 0.5, 1.0)), ("dram", (0.0, 0.5, 1.0)), ("recompute", (0.0,)))
        for ratio in ratios
        for concurrency in (1, 4)
    ],
    "multiturn": [
        a_row("multiturn", name, [5.0, 6.0, 20.0], turn=turn, agents=3, hit_ratio=HITS, prompt_tokens=400, seconds=s)
        for name in ("stock", "dram")
        for turn, s in ((0, None), (1, None), (2, None), (None, 12.5))
    ],
    "trace": [
        a_row("trace", name, [123.4, 12345.6, 98765.4], hit_ratio=HITS, ideal_hit_ratio=0.473, seconds=1234.5, **REPLAY)
        for name in ("hbm", "stock", "dram", "peer")
    ],
}


def shown(capsys: pytest.CaptureFixture[str], *rows: dict[str, Any]) -> str:
    report.print_table(rows)
    return capsys.readouterr().out


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("bench", ["ttft", "throughput", "multiturn"])
def test_plots(bench: str, tmp_path: Path) -> None:
    rows = [report.flat({**row, "machine": "CPU"}) for row in ROWS[bench]]
    png, svg = tmp_path / f"{bench}.png", tmp_path / f"{bench}.svg"
    plots.write(rows, png)
    assert is_png(png)
    plots.write(rows, svg)
    text = "".join(ElementTree.parse(svg).getroot().itertext())
    for words in ("dram", "CPU engine: says nothing about speed", " samples"):
        assert words in text
    if bench != "ttft":
        assert "dram: ~1.00x stock" in text, "the headline"
    before = svg.read_bytes()
    plots.write(rows, svg)
    assert svg.read_bytes() == before
    plots.write([{**row, "machine": "2 x NVIDIA H200"} for row in rows], svg)
    assert "2 x NVIDIA H200" in svg.read_text()


def is_png(path: Path) -> bool:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and width > 500 and height > 300


def test_plots_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ttft = [report.flat(row) for row in ROWS["ttft"]]
    for rows, name, words in (
        (ttft, "x.txt", "Give one that ends in .png"),
        ([{"bench": "trace"}], "x.png", "no plot"),
        ([report.flat(ttft_row("dram", 256, []))], "x.png", "nothing to plot"),
        (ttft, "missing/x.png", "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=words):
            plots.write(rows, tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plots.write(ttft, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [*ROWS["multiturn"], {**ROWS["multiturn"][-1], "backend": "peer", "seconds": 6.25}],
            "2.00x as fast as stock.",
        ),
        ([ttft_row("hbm", 256, [558.0, 674.4, 790.0]), ttft_row("dram", 256, [318.0, 663.8, 1009.0])], "~0.98x"),
        ([ttft_row("hbm", 256, [10.0, 11.0]), ttft_row("dram", 256, [20.0, 22.0])], " 2.00x"),
        ([ttft_row("dram", 1024, [1.0, 2.0], outputs_tell_prompts_apart=False)], "say nothing of the KV"),
        ([ttft_row("dram", 1024, [1.0, 2.0], outputs_equal=False)], "DIFFER"),
    ],
)
def test_tables_say(capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], words: str) -> None:
    assert words in shown(capsys, *rows)


@pytest.mark.parametrize("name", [*sorted(ROWS), "committed"])
def test_tables_fit_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for rows in [ROWS[name]] if name in ROWS else [report.load(COMMITTED.with_name(f"{kind}.jsonl")) for kind in ROWS]:
        lines = shown(capsys, *rows).splitlines()
        tables = [line.rstrip() for line in lines if "  " in line or line.startswith("──")]
        assert len(tables) > 2
        assert max(map(len, tables)) <= 80


def test_committed_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, plot = "20261121-045631-c604b6", tmp_path / "x.png"
    assert cli.main(["bench", "report", str(COMMITTED), "--run", run, "--plot", str(plot)]) == 0
    assert is_png(plot)
    assert "3.96x" in capsys.readouterr().out  # 80K: stock 170.8 ms, peer 43.2 ms
    assert cli.main(["bench", "report", str(COMMITTED), "--run", run, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    assert {"ttft_ms.p50", "hits.host"} <= set(rows[0])


@pytest.mark.parametrize("name", ["ttft", "throughput", "multiturn", "trace", "soak", "roundtrip"])
def test_runs_of_a_committed_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = COMMITTED.with_name(f"{name}.jsonl")
    assert cli.main(["bench", "report", str(path), "--list"]) == 0
    out, err = capsys.readouterr()
    assert err == "", "no row is left out"
    runs = dict.fromkeys(str(row["run"]) for row in report.read_rows(path))
    assert all(run in out for run in runs)
    for run in runs:
        assert cli.main(["bench", "report", str(path), "--run", run]) == 0
    capsys.readouterr()
    assert cli.main(["bench", "report", str(path)]) == 0
    assert (f"The last of {len(runs)} runs" in capsys.readouterr().out) == (len(runs) > 1)
    assert cli.main(["bench", "report", str(path), "--run", "nothing"]) == 2
    assert next(iter(runs)) in capsys.readouterr().err, "it names those that there are"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rubbish", "Line 1 of"),
        ("[1]", "Line 1 of"),
        ('{"backend": "sglang", "mean_ttft_ms": 12.3}', "no rows of sglang-xmem bench: line 1 has no text for bench"),
        ('{"bench": "ttft"}', "line 1 has no text for run"),
        ('{"bench": "ttft", "run": "x"}', "line 1 has no text for backend"),
        ("", "x.jsonl has no rows of sglang-xmem bench. Name another file."),
    ],
)
def test_files_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    for command in (["report", str(path)], ["compare", str(path), str(path)]):
        assert cli.main(["bench", *command]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def changed(bench: str, **values: Any) -> dict[str, Any]:
    return {**ROWS[bench][0], **values}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (changed("ttft", backend=["dram"]), "no text for backend"),
        (changed("ttft", prompt_tokens="80K"), "no number for prompt_tokens"),
        (changed("ttft", ttft_ms="fast"), "no number for ttft_ms.p50"),
        (changed("ttft", all_ms=[1.0, None]), "no list of numbers for all_ms"),
        (changed("ttft", shape={"a": 1, "b": []}, turn="x"), "no number for turn"),
        (changed("throughput", concurrency=[4]), "no value for concurrency"),
        (changed("trace", ttft_ms={"p50": 1.0, "p50_interval": 1.0}), "no list of numbers for ttft_ms.p50_interval"),
        ({"bench": "copy", "run": "r", "tier": None, "skipped": "no GPU"}, "no text for tier"),
    ],
)
def test_rows_that_cannot_be_shown_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], words: str
) -> None:
    """With one line that counts them; a file without any other row is refused with the same words."""
    good = written(tmp_path / "good.jsonl", ROWS["ttft"])
    path = written(tmp_path / "x.jsonl", [*ROWS["ttft"], row])
    total = len(ROWS["ttft"]) + 1
    for command in (["report", path], ["report", path, "--list"], ["compare", good, path]):
        assert cli.main(["bench", *command]) == 0
        assert f"x.jsonl: 1 of {total} rows are left out; line {total} has {words}." in capsys.readouterr().err
    alone = written(tmp_path / "alone.jsonl", [row])
    for command in (["report", alone], ["compare", alone, good]):
        assert cli.main(["bench", *command]) == 2
        assert f"has no rows of sglang-xmem bench: line 1 has {words}" in capsys.readouterr().err


ODD: list[Any] = [None, True, "x", [], [1], ["a"], {}, {"p50": "x"}, -1, 0, float("nan"), 1e308, 10**400, {"a": {}}]


@pytest.mark.parametrize("seed", range(30))
def test_no_value_ends_in_a_traceback(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows with values of any type: shown, left out or refused."""
    choice = random.Random(seed).choice
    for bench, rows in ROWS.items():
        odd = json.loads(json.dumps(rows))
        for row in (choice(odd) for _ in range(3)):
            key = choice([*row, "machine", "skipped", "too_few", "complete", "hit_ratio"])
            inner = row[key] if isinstance(row.get(key), dict) and row[key] and choice([True, False]) else row
            inner[key if inner is row else choice(list(inner))] = choice(ODD)
        good, path = written(tmp_path / "good.jsonl", rows), written(tmp_path / "x.jsonl", odd)
        plot = ["--plot", str(tmp_path / "x.svg")] if seed % 10 == 0 and bench != "trace" else []
        for command in (["report", path, *plot], ["report", path, "--list"], ["compare", good, path]):
            assert cli.main(["bench", *command]) in (0, 2)
    capsys.readouterr()


def test_rows_with_less_than_all_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bench, rows in ROWS.items():
        kind = report.KINDS[bench]
        keys = ["bench", "run", *kind.what.split(), kind.metric.partition(".")[0]]
        least = written(tmp_path / "least.jsonl", [{key: row[key] for key in keys} for row in rows])
        plot = [] if bench == "trace" else ["--plot", str(tmp_path / "x.png")]
        for command in (["report", least, "--list"], ["compare", least, least]):
            assert cli.main(["bench", *command]) == 0
        status = cli.main(["bench", "report", least, *plot])
        assert (status, "nothing to plot" in capsys.readouterr().err) in ((0, False), (2, True))


def test_unfinished_last_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for before, first in (
        ('{"a": 1}\n{"b": ', [{"a": 1}]),
        ('{"a": 1}\n{"b": 2}', [{"a": 1}, {"b": 2}]),
        ('{"a": ', []),
    ):
        path.write_text(before)
        if first:
            assert report.read_rows(path) == first
        report.append_rows(path, [{"c": 3}])
        assert report.read_rows(path) == [*first, {"c": 3}]
    path.write_text('{"b": \n{"a": 1}\n')
    with pytest.raises(ConfigError, match="Line 1"):
        report.read_rows(path)


def verdict_of(a: dict[str, Any], b: dict[str, Any]) -> str:
    return compare.judged(report.flat(a), report.flat(b))[0]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([100.0, 101.0, 102.0], [50.0, 51.0, 52.0], compare.FASTER),
        ([50.0, 51.0, 52.0], [100.0, 101.0, 102.0], compare.SLOWER),
        ([50.0, 51.0, 52.0], [51.0, 52.0, 53.0], compare.NOISE),
        ([50.0, 60.0, 90.0], [91.0, 92.0, 93.0], compare.NOISE),  # apart, and less than A's own spread
        ([50.0], [100.0, 101.0], compare.UNKNOWN),
    ],
)
def test_verdicts(a: list[float], b: list[float], verdict: str) -> None:
    assert verdict_of(ttft_row("dram", 256, a), ttft_row("dram", 256, b)) == verdict


def test_a_higher_rate_is_faster() -> None:
    a, b = throughput_row("dram", 1.0, 4, [10.0, 11.0]), throughput_row("dram", 1.0, 4, [20.0, 21.0])
    assert (verdict_of(a, b), verdict_of(b, a)) == (compare.FASTER, compare.SLOWER)
    what = {"bench": "copy", "tier": "dram", "case": "c", "direction": "load"}
    a, b = ({**what, "gbps": rate, "gbps_all": [rate - 1, rate + 1]} for rate in (300.0, 350.0))
    assert (verdict_of(a, b), verdict_of(a, a)) == (compare.FASTER, compare.NOISE)


def test_what_b_did_not_measure_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A tier without a proven hit is no faster for that."""
    files = [
        written(tmp_path / f"{name}.jsonl", [ttft_row("stock", 256, [9.0, 9.1]), ttft_row("dram", 256, ms)])
        for name, ms in (("a", [50.0, 51.0, 52.0]), ("b", []))
    ]
    assert cli.main(["bench", "compare", *files]) == 0
    assert compare.MISSING in capsys.readouterr().out
    assert cli.main(["bench", "compare", *files, "--fail-on-slower"]) == 1
    assert cli.main(["bench", "compare", *reversed(files), "--fail-on-slower"]) == 0


def test_engines_are_put_together() -> None:
    (row,) = report.merged(report.flat(ttft_row("dram", 256, [ms])) for ms in (1.0, 3.0))
    assert (row["ttft_ms.p50"], row["samples"], row["all_ms"]) == (2.0, 2, [1.0, 3.0])


def test_compare_committed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [f"{COMMITTED}#{run}" for run in ("20261121-012344-ae284a", "20261121-020639-070796")]
    assert cli.main(["bench", "compare", *runs]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("peer 81920"))
    assert "faster" in line
    assert cli.main(["bench", "compare", runs[1], runs[1]]) == 0
    out = capsys.readouterr().out
    assert "faster" not in out
    assert "slower" not in out
    assert cli.main(["bench", "compare", *reversed(runs), "--fail-on-slower"]) == 1
    assert cli.main(["bench", "compare", runs[0], f"{COMMITTED}#nothing"]) == 2
    assert cli.main(["bench", "compare", runs[0], str(COMMITTED.with_name("throughput.jsonl"))]) == 2

"""Tables, CSV, plots and comparisons."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import cli
from sglang_xmem.bench import compare, report, stats
from sglang_xmem.errors import ConfigError
from tests import REPOSITORY

COMMITTED = REPOSITORY / "docs" / "results" / "ttft.jsonl"


def ttft_row(backend: str, tokens: int, ms: list[float], run: str = "r", **more: Any) -> dict[str, Any]:
    return {
        "bench": "ttft",
        "run": run,
        "backend": backend,
        "engine": backend,
        "prompt_tokens": tokens,
        "ttft_ms": stats.summary(ms),
        "hits": {"device": 0, "host": tokens},
        "outputs_equal": True,
        "samples": len(ms),
        "samples_unproven": 0,
        "all_ms": ms,
        "shape": "tiny",
        "page_size": 16,
        **more,
    }


def throughput_row(backend: str, ratio: float, concurrency: int, rates: list[float]) -> dict[str, Any]:
    return {
        "bench": "throughput",
        "run": "r",
        "backend": backend,
        "engine": backend,
        "hit_ratio": ratio,
        "concurrency": concurrency,
        "tokens_per_s": stats.median(rates),
        "min": min(rates),
        "max": max(rates),
        "tokens_per_s_all": rates,
        "measured_hit_ratio": ratio,
        "ttft_ms": stats.summary([1.0, 2.0]),
        "samples": 4,
        "samples_unproven": 0,
        "prompt_tokens": 512,
        "shape": "tiny",
    }


def multiturn_row(backend: str, turn: int | None, ms: list[float]) -> dict[str, Any]:
    return {
        "bench": "multiturn",
        "run": "r",
        "backend": backend,
        "engine": backend,
        "turn": turn,
        "agents": 3,
        "prompt_tokens": 400,
        "ttft_ms": stats.summary(ms),
        "hit_ratio": {"device": 0.1, "host": 0.5, "total": 0.6},
        "samples": len(ms),
        "samples_unproven": 0,
        "all_ms": ms,
        "shape": "tiny",
        **({"seconds": 12.5} if turn is None else {}),
    }


def trace_row(backend: str, ms: list[float]) -> dict[str, Any]:
    times = stats.summary(ms)
    return {
        "bench": "trace",
        "run": "r",
        "backend": backend,
        "trace": "conversation_trace.jsonl",
        "speed": "60",
        "shape": "tiny",
        "ttft_ms": times,
        "e2e_ms": times,
        "hit_ratio": {"device": 0.31, "host": 0.16, "total": 0.47},
        "ideal_hit_ratio": 0.473,
        "samples": 242,
        "samples_unproven": 0,
        "tokens_per_s": 123456.7,
        "seconds": 1234.5,
    }


ROWS = {
    "ttft": [
        ttft_row(backend, tokens, [ms * tokens / 1024 for ms in (9.0, 10.0, 11.0)])
        for backend in ("hbm", "dram", "recompute")
        for tokens in (1024, 10240)
    ],
    "throughput": [
        throughput_row(backend, ratio, concurrency, [1e3 * (1 + ratio), 1.1e3 * (1 + ratio)])
        for backend, ratios in (("stock", (0.0, 0.5, 1.0)), ("dram", (0.0, 0.5, 1.0)), ("recompute", (0.0,)))
        for ratio in ratios
        for concurrency in (1, 4)
    ],
    "multiturn": [multiturn_row("dram", turn, [5.0, 6.0, 20.0]) for turn in (0, 1, 2, None)],
}


def is_png(path: Path) -> bool:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and width > 500 and height > 300


@pytest.mark.parametrize("bench", sorted(ROWS))
def test_plots(bench: str, tmp_path: Path) -> None:
    rows = [{**row, "machine": "CPU"} for row in ROWS[bench]]
    png, svg = tmp_path / f"{bench}.png", tmp_path / f"{bench}.svg"
    report.write_plot(rows, png)
    assert is_png(png)
    report.write_plot(rows, svg)
    text = "".join(ElementTree.parse(svg).getroot().itertext())
    assert "dram" in text
    assert "CPU engine: says nothing about speed" in text
    assert "samples" in text
    if bench == "throughput":
        assert "dram: ~1.00x stock" in text, "the headline"
    before = svg.read_bytes()
    report.write_plot(rows, svg)
    assert svg.read_bytes() == before
    report.write_plot([{**row, "machine": "2 x NVIDIA H200"} for row in rows], svg)
    assert "2 x NVIDIA H200" in svg.read_text()


def test_plots_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for rows, name, words in (
        (ROWS["ttft"], "x.txt", "Give one that ends in .png"),
        ([{"bench": "trace"}], "x.png", "no plot"),
        (ROWS["ttft"], "missing/x.png", "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=words):
            report.write_plot(rows, tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        report.write_plot(ROWS["ttft"], tmp_path / "x.png")


def test_table_says_where_a_tier_does_not_help(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ttft_row("recompute", 256, [10.0, 11.0]), ttft_row("dram", 256, [10.5, 12.0])]
    rows += [ttft_row("recompute", 1024, [100.0, 110.0]), ttft_row("dram", 1024, [10.5, 12.0])]
    report.print_table(rows)
    out = capsys.readouterr().out
    assert "dram at 256 tokens: no gain" in out
    assert "dram at 1K tokens: no gain" not in out


def test_a_trace_that_a_tier_does_not_change_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [trace_row(name, ms) for name, ms in (("stock", [9.0, 11.0]), ("dram", [9.0, 12.0]), ("peer", [2.0, 4.0]))]
    report.print_table(rows)
    out = capsys.readouterr().out
    assert "dram: TTFT does not differ from stock's" in out
    assert "peer: TTFT" not in out


def test_factors_over_hbm_say_where_spreads_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table([ttft_row("hbm", 256, [558.0, 674.4, 790.0]), ttft_row("dram", 256, [318.0, 663.8, 1009.0])])
    assert "~0.98x" in capsys.readouterr().out
    report.print_table([ttft_row("hbm", 256, [10.0, 11.0]), ttft_row("dram", 256, [20.0, 22.0])])
    assert " 2.00x" in capsys.readouterr().out


def widest(columns: int, *arguments: str) -> tuple[int, str]:
    """The longest line of a table in a terminal of so many columns, and all of it."""
    command = shlex.join([sys.executable, "-m", "sglang_xmem.cli", "bench", "report", *arguments])
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["script", "-qec", f"stty cols {columns}; {command}", "/dev/null"],
        capture_output=True, text=True, env=environment, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("──"))
    table = [line.rstrip() for line in lines[:rule] + lines[rule + 1 :] if "  " in line or line.startswith("──")]
    return max(map(len, [*table, lines[rule].rstrip()])), "\n".join(lines)


@pytest.mark.skipif(shutil.which("script") is None, reason="needs the command script")
@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["ttft", "throughput", "multiturn", "trace"])
def test_tables_fit_a_terminal(name: str, columns: int, tmp_path: Path) -> None:
    width, text = widest(columns, str(COMMITTED.with_name(f"{name}.jsonl")))
    assert width <= columns
    assert "…" not in text
    long = [trace_row(backend, [123.4, 12345.6, 98765.4]) for backend in ("hbm", "stock", "dram", "peer")]
    rows = [{**row, "floor_ms": 1.0, "over_floor": 1.0, "machine": "8 x H200"} for row in ROWS.get(name, long)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    width, text = widest(columns, str(tmp_path / "x.jsonl"))
    assert width <= columns
    assert "…" not in text


def test_committed_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, plot = "20261121-045631-c604b6", tmp_path / "x.png"
    assert cli.main(["bench", "report", str(COMMITTED), "--run", run, "--plot", str(plot)]) == 0
    assert is_png(plot)
    assert "3.96x" in capsys.readouterr().out  # 80K: stock 170.8 ms, peer 43.2 ms
    assert cli.main(["bench", "report", str(COMMITTED), "--run", run, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    assert {"ttft_ms.p50", "hits.host"} <= set(rows[0])


@pytest.mark.parametrize("name", ["ttft", "throughput", "multiturn", "trace"])
def test_runs_of_a_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = COMMITTED.with_name(f"{name}.jsonl")
    assert cli.main(["bench", "report", str(path), "--list"]) == 0
    out = capsys.readouterr().out
    runs = dict.fromkeys(str(row["run"]) for row in report.read_rows(path))
    assert all(run in out for run in runs)
    assert cli.main(["bench", "report", str(path)]) == 0
    assert (f"The last of {len(runs)} runs" in capsys.readouterr().out) == (len(runs) > 1)
    assert cli.main(["bench", "report", str(path), "--run", "nothing"]) == 2
    assert next(iter(runs)) in capsys.readouterr().err, "it names those that there are"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rubbish", "Line 1 of"),
        ("[1]", "Line 1 of"),
        ('{"backend": "sglang", "mean_ttft_ms": 12.3}', "a row without bench, run"),
        ('{"bench": "ttft"}', "a row of bench ttft without run"),
        ('{"bench": "ttft", "run": "x"}', "a row of bench ttft without backend, prompt_tokens"),
        ("", "has no rows"),
    ],
)
def test_files_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert cli.main(["bench", "report", str(path)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_unfinished_last_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    assert report.read_rows(path) == [{"a": 1}]
    report.append_rows(path, [{"c": 3}])
    assert report.read_rows(path) == [{"a": 1}, {"c": 3}]
    path.write_text('{"a": 1}\n{"b": 2}')  # all there but its end
    report.append_rows(path, [{"c": 3}])
    assert report.read_rows(path) == [{"a": 1}, {"b": 2}, {"c": 3}]
    path.write_text('{"a": ')
    report.append_rows(path, [{"c": 3}])
    assert report.read_rows(path) == [{"c": 3}]
    path.write_text('{"b": \n{"a": 1}\n')
    with pytest.raises(ConfigError, match="Line 1"):
        report.read_rows(path)


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
    (change,) = compare.compare([ttft_row("dram", 256, a)], [ttft_row("dram", 256, b, run="s")])
    assert change.verdict == verdict
    assert change.change == pytest.approx(stats.median(b) / stats.median(a) - 1)


def test_more_tokens_per_second_is_faster() -> None:
    a, b = throughput_row("dram", 1.0, 4, [10.0, 11.0]), throughput_row("dram", 1.0, 4, [20.0, 21.0])
    assert compare.compare([a], [b])[0].verdict == compare.FASTER
    assert compare.compare([b], [a])[0].verdict == compare.SLOWER


def test_what_b_did_not_measure_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A tier without a proven hit is no faster for that."""
    for name, ms in (("a", [50.0, 51.0, 52.0]), ("b", [])):
        rows = [ttft_row("stock", 256, [9.0, 9.1]), ttft_row("dram", 256, ms)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    assert cli.main(["bench", "compare", *files]) == 0
    assert compare.MISSING in capsys.readouterr().out
    assert cli.main(["bench", "compare", *files, "--fail-on-slower"]) == 1
    assert cli.main(["bench", "compare", *reversed(files), "--fail-on-slower"]) == 0


def test_engines_put_together_have_rates_of_all() -> None:
    more: dict[str, Any] = {"kv_bytes": 8_000_000, "floor_ms": 1.0}
    passes = [ttft_row("dram", 256, [ms], gbps=8 / ms, over_floor=ms, **more) for ms in (1.0, 3.0)]
    (row,) = report.merged(passes)
    assert row["ttft_ms"]["p50"] == 2.0
    assert (row["gbps"], row["over_floor"]) == (4.0, 2.0)


def test_compare_committed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["20261121-012344-ae284a", "20261121-020639-070796"]
    assert cli.main(["bench", "compare", *runs, "--results", str(COMMITTED.parent)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("peer 81920"))
    assert "faster" in line
    assert cli.main(["bench", "compare", f"{COMMITTED}#{runs[1]}", runs[1], "--results", str(COMMITTED.parent)]) == 0
    out = capsys.readouterr().out
    assert "faster" not in out
    assert "slower" not in out
    assert cli.main(["bench", "compare", *reversed(runs), "--results", str(COMMITTED.parent), "--fail-on-slower"]) == 1
    with_timelines = ["20261121-123832-9e24d5", "20261121-124542-4dc62c"]
    assert cli.main(["bench", "compare", *with_timelines, "--results", str(COMMITTED.parent)]) == 0
    assert cli.main(["bench", "compare", runs[0], "nothing", "--results", str(COMMITTED.parent)]) == 2


@pytest.mark.parametrize(("gbps", "words"), [(0.00412, "0.00412"), (0.5, "0.5"), (391.44, "391"), (None, "-")])
def test_slow_copies_have_a_rate_too(gbps: float | None, words: str) -> None:
    """Those of a host without a GPU were 0.0 GB/s."""
    assert report._rate(gbps) == words


def test_copies_compare_by_rate() -> None:
    a = {"bench": "copy", "tier": "dram", "case": "c", "direction": "load", "gbps": 300.0, "gbps_all": [299.0, 301.0]}
    assert compare.compare([a], [{**a, "gbps": 300.5, "gbps_all": [299.0, 302.0]}])[0].verdict == compare.NOISE
    assert compare.compare([a], [{**a, "gbps": 350.0, "gbps_all": [349.0, 351.0]}])[0].verdict == compare.FASTER


def test_outputs_that_are_all_alike_are_not_called_equal(capsys: pytest.CaptureFixture[str]) -> None:
    for differ, words in (
        (None, "each hit's are those"),
        (True, "each hit's are those"),
        (False, "say nothing of the KV"),
    ):
        report.print_table([ttft_row("dram", 1024, [1.0, 2.0], outputs_tell_prompts_apart=differ)])
        assert words in capsys.readouterr().out

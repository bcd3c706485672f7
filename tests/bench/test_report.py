"""Tables, CSV, plots and comparisons."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shlex
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import cli
from sglang_xmem.bench import compare, report, stats
from sglang_xmem.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "results" / "ttft.jsonl"


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
        "tokens_per_s": stats.percentile(rates, 50),
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
def test_files(bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ROWS[bench]
    report.print_table(rows)
    assert "dram" in capsys.readouterr().out
    table, png, svg = report.write_files(rows, tmp_path / f"{bench}.jsonl")
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert float(lines[0]["ttft_ms.p50"]) == rows[0]["ttft_ms"]["p50"]
    assert is_png(png)
    text = "".join(ElementTree.parse(svg).getroot().itertext())
    assert "dram" in text
    if bench != "multiturn":
        assert "computed again" in text
    before = svg.read_bytes()
    report.write_files(rows, tmp_path / f"{bench}.jsonl")
    assert svg.read_bytes() == before


def test_no_plots_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.write_files(ROWS["ttft"], tmp_path / "x.jsonl") == [tmp_path / "x.csv"]
    assert "pip install matplotlib" in capsys.readouterr().err


def test_table_says_where_a_tier_does_not_help(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ttft_row("recompute", 256, [10.0, 11.0]), ttft_row("dram", 256, [10.5, 12.0])]
    rows += [ttft_row("recompute", 1024, [100.0, 110.0]), ttft_row("dram", 1024, [10.5, 12.0])]
    report.print_table(rows)
    out = capsys.readouterr().out
    assert "dram at 256 tokens: no gain" in out
    assert "dram at 1K tokens: no gain" not in out


def test_committed_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = "20261121-045631-c604b6"
    assert cli.main(["bench", "report", str(COMMITTED), "--run", run, "--output", str(tmp_path / "x")]) == 0
    assert is_png(tmp_path / "x.png")
    out = capsys.readouterr().out
    assert "3.96x" in out  # 80K: stock 170.8 ms, peer 43.2 ms


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
    with pytest.raises(ConfigError, match="line 1"):
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
    assert change.change == pytest.approx(stats.percentile(b, 50) / stats.percentile(a, 50) - 1)


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


def test_passes_put_together_have_rates_of_all() -> None:
    more: dict[str, Any] = {"kv_bytes": 8_000_000, "link_gbps": 10.0}
    passes = [
        ttft_row("dram", 256, [ms], gbps=0.008 / ms * 1e3, link_share=1.0, transfer_hidden=0.9, **more)
        for ms in (1.0, 3.0)
    ]
    (row,) = report.merged(passes)
    assert row["ttft_ms"]["p50"] == 2.0
    assert (row["gbps"], row["link_share"]) == (4.0, 0.4)
    assert "transfer_hidden" not in row


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


def test_copies_compare_by_rate() -> None:
    a = {"bench": "copy", "path": "p", "case": "c", "kernel": "k", "gbps": 300.0, "times_ms": [10.0, 10.1]}
    assert compare.compare([a], [{**a, "gbps": 301.0}])[0].verdict == compare.NOISE
    assert compare.compare([a], [{**a, "gbps": 350.0, "times_ms": [8.5, 8.6]}])[0].verdict == compare.FASTER


def documented_commands() -> list[str]:
    """Every benchmark command in the documentation's code blocks."""
    commands = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            commands += [line for line in lines if re.match(r"sglang-xmem |python3? scripts/kvcache_benchmark", line)]
    return commands


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "sglang-xmem":
        arguments = words[1:]
    else:
        sys.path.insert(0, str(ROOT / "scripts"))
        arguments = importlib.import_module("kvcache_benchmark").command(words[2:])
    assert cli.parser().parse_args(arguments).run


def test_names_of_the_predecessors() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    command = importlib.import_module("kvcache_benchmark").command
    assert command(["--ttft", "--backend", "both"]) == ["bench", "ttft", "--backends", "stock,auto"]
    assert command(["--tput", "--backend", "cpu"]) == ["bench", "throughput", "--backends", "stock"]
    assert command(["--ttft", "--backend", "xmem", "--quick"]) == ["bench", "ttft", "--backends", "auto", "--quick"]
    assert json.dumps(command(["--tput"]))


def test_outputs_that_are_all_alike_are_not_called_equal() -> None:
    row = {
        "bench": "ttft",
        "run": "1",
        "backend": "peer",
        "prompt_tokens": 1024,
        "ttft_ms": {"p50": 1.0, "min": 1.0, "max": 1.0, "p50_interval": [1.0, 1.0]},
        "hits": {"device": 0, "host": 960},
        "outputs_equal": True,
        "samples": 1,
        "samples_unproven": 0,
    }
    for tells, word in ((None, "equal"), (True, "equal"), (False, "alike")):
        _, header, (line,), notes = report._ttft_table([{**row, "outputs_tell_prompts_apart": tells}])
        assert line[header.index("outputs")] == word
        assert any(note.startswith("alike:") for note in notes) == (tells is False)

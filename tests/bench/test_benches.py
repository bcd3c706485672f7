"""The engine benchmarks over the fake worker: rows, proofs, refusals, crashes, interrupts and resuming."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_worker import FAKE_WORKER, Bench, FakeEngine

from sglang_xmem import cli
from sglang_xmem.bench import engine, runs, sizing, ttft
from sglang_xmem.bench.sizing import KVShape
from sglang_xmem.errors import ConfigError


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Run `sglang-xmem bench ...` with the fake worker: exit status and all rows of its output file."""
    monkeypatch.setattr(engine, "WORKER", (sys.executable, str(FAKE_WORKER)))
    monkeypatch.setattr(runs, "has_gpu", lambda: False)
    monkeypatch.setattr(runs.gpus, "visible_gpus", lambda: range(0))
    monkeypatch.setenv("PYTHONPATH", str(Path(engine.__file__).resolve().parents[2]))

    def run(*arguments: str, how: dict[str, Any] | None = None) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setenv("FAKE_ENGINE", json.dumps(how or {}))
        output = tmp_path / "rows.jsonl"
        status = cli.main(["bench", *arguments, "--shape", "tiny", "--output", str(output)])
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return status, rows

    return run


TTFT = ("ttft", "--sizes", "64,128", "--rounds", "2", "--quick")


def test_ttft_rows(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, rows = bench(*TTFT, "--backends", "hbm,stock,dram,recompute", "--link-gbps", "dram=10")
    assert status == 0
    assert {(row["engine"], row["backend"]) for row in rows} == {
        (engine, backend) for engine in ("stock", "dram") for backend in ("hbm", "recompute", engine)
    }
    for row in rows:
        assert {"bench", "run", "backend", "prompt_tokens", "ttft_ms", "hits", "outputs_equal"} <= set(row)
        assert row["complete"]
        assert row["outputs_equal_across"]
        assert row["outputs_tell_prompts_apart"]
        assert row["samples_unproven"] == 0
        whole = row["prompt_tokens"] - 16
        expected = {"hbm": {"device": whole, "host": 0}, "recompute": {"device": 0, "host": 0}}
        assert row["hits"] == expected.get(row["backend"], {"device": 0, "host": whole})
        if row["backend"] == "dram":
            # Tiny: 2 (K and V) x 4 layers x 2 heads x 64 x 2 bytes = 2048 a token.
            assert row["kv_bytes"] == whole * 2048
            assert row["gbps"] == pytest.approx(row["kv_bytes"] / row["ttft_ms"]["p50"] / 1e6, abs=1e-3)
            assert 0 <= row["transfer_hidden"] <= 1
    out = capsys.readouterr().out
    assert "TTFT of a hit" in out
    about = json.loads((tmp_path / "rows.runs.jsonl").read_text())
    assert about["run"] == rows[0]["run"]
    assert {"commit", "command", "versions", "settings"} <= set(about)
    for suffix in ("csv", "png", "svg"):
        assert (tmp_path / f"rows.{suffix}").stat().st_size > 100


@pytest.mark.parametrize("tier", [True, False])
def test_hits_come_after_other_prompts(tier: bool) -> None:
    """Those of HBM too, which leave the prompt its place: warm caches of the CPU are nobody's advantage."""
    workload = ttft.Workload([64, 128], 1, 16, 4, seed=0, quick=True, on_gpu=False)
    assert workload.device_tokens >= max(workload.sizes) + sum(map(len, workload.others)) + 4 * workload.page
    assert sum(map(len, workload.fillers)) >= workload.device_tokens, "a flood takes the prompt's place"
    names = {id(prompt): size for size, prompt in workload.prompts.items()}
    asked: list[Any] = []

    class Engine:
        def ask(self, prompt: Any, count: int = 1) -> Any:
            asked.append(names.get(id(prompt), "warm up"))
            return SimpleNamespace(device=0, host=0, output=[0] * count, ttft_ms=1.0)

        def flood(self, prompts: Any) -> None:
            asked.append({len(workload.fillers): "flood", len(workload.others): "others"}[len(prompts)])

        def settle(self, seconds: float) -> None: ...

    measurement = SimpleNamespace(add=lambda **sample: None, step=lambda doing: None)
    ttft.measure(Engine(), workload, measurement, tier)  # type: ignore[arg-type]
    before_rounds = ["warm up"] * 4 + [64, 64, 128, 128, "flood"]
    a_round = [["flood", size, size, "others", size] if tier else [size, "others", size] for size in (64, 128)]
    assert asked == [*before_rounds, *a_round[0], *a_round[1]]


def test_ttft_floor_alone_needs_no_hicache(bench: Bench) -> None:
    status, rows = bench(*TTFT, "--backends", "hbm,recompute", "--no-plots")
    assert status == 0
    assert {row["backend"] for row in rows} == {"hbm", "recompute"}
    assert {row["engine"] for row in rows} == {"hbm"}


def test_ttft_passes_alternate(bench: Bench) -> None:
    _, rows = bench(*TTFT, "--backends", "stock,dram", "--passes", "2", "--no-plots")
    order = list(dict.fromkeys((row["engine"], row["pass"]) for row in rows))
    assert order == [("stock", 0), ("dram", 0), ("dram", 1), ("stock", 1)]


def test_ttft_auto_says_its_tier(bench: Bench) -> None:
    _, rows = bench(*TTFT, "--backends", "auto", "--no-plots")
    assert {row["backend"] for row in rows if row["engine"] == "auto"} == {"hbm", "recompute", "dram"}


def test_unproven_hits_fail(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = bench(*TTFT, "--backends", "dram", "--no-plots", how={"no_host": True})
    assert status == 1
    tier = [row for row in rows if row["backend"] == "dram"]
    assert [(row["samples"], row["samples_unproven"]) for row in tier] == [(0, 2), (0, 2)]
    assert all(row["ttft_ms"]["p50"] is None for row in tier)
    assert "has proof of its hit" in capsys.readouterr().err


def test_wrong_outputs_fail(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = bench(*TTFT, "--backends", "dram", "--no-plots", how={"wrong_output": True})
    assert status == 1
    assert "outputs differ" in capsys.readouterr().err


def test_crash_leaves_what_is_done_and_resume_does_the_rest(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (*TTFT, "--backends", "stock,dram", "--no-plots")
    starts = {"starts": str(tmp_path / "starts")}
    status, rows = bench(*arguments, how={"crash_after": 12, "crash_in": ["dram"], "log": starts})
    assert status == 1
    assert {row["engine"] for row in rows if row["complete"]} == {"stock"}
    assert {row["engine"] for row in rows if not row["complete"]} == {"dram"}
    err = capsys.readouterr().err
    assert "ended with status 9" in err
    assert "the fake engine gives up" in err
    status, rows = bench(*arguments, "--resume", how={"log": starts})
    assert status == 0
    assert len({row["run"] for row in rows}) == 1
    assert {row["engine"] for row in rows if row["complete"]} == {"stock", "dram"}
    assert (tmp_path / "starts").read_text().split() == ["stock", "dram", "dram"]
    # The failed engine's rows stay in the file and out of the table.
    table = capsys.readouterr().out
    assert sum(line.split()[:2] == ["dram", "64"] for line in table.splitlines()) == 1
    status, more = bench(*arguments, "--resume", "--seed", "1")
    assert len({row["run"] for row in more}) == 2  # other parameters: a run of its own


def test_timeout(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = bench(*TTFT, "--backends", "dram", "--no-plots", "--timeout", "2", how={"seconds": 1.0})
    assert status == 1
    assert "longer than --timeout 2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "arguments"),
    [
        (signal.SIGINT, ["ttft", "--sizes", "64,128", "--rounds", "50"]),
        (signal.SIGTERM, ["multiturn", "--turns", "50", "--think", "0.2"]),
    ],
)
def test_interrupt_writes_what_is_done(tmp_path: Path, sent: signal.Signals, arguments: list[str]) -> None:
    output = tmp_path / "rows.jsonl"
    code = (
        f"import sys; from sglang_xmem.bench import engine; engine.WORKER = (sys.executable, {str(FAKE_WORKER)!r})\n"
        f"from sglang_xmem import cli; sys.exit(cli.main(['bench', *{arguments!r}, '--shape', 'tiny',"
        f" '--backends', 'dram', '--quick', '--no-plots', '--output', {str(output)!r}]))"
    )
    root = str(Path(cli.__file__).resolve().parents[1])
    asks = tmp_path / "asks"
    how = json.dumps({"seconds": 0.02, "log": {"asks": str(asks)}})
    environment = {**os.environ, "FAKE_ENGINE": how, "PYTHONPATH": root}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    # Far enough for a sample of each kind, and not for a finished run, however slow the machine is at importing.
    deadline = time.monotonic() + 120
    while not (asks.exists() and len(asks.read_text().splitlines()) >= 60):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline, "it did not get going"
        time.sleep(0.1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows
    assert not any(row["complete"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ttft", "--backends", "dram", "--sizes", "80K"), "longer than the model's context of 16384"),
        (("ttft", "--backends", "dram,peer"), "peer cannot be used with --hicache-size 1: peer: it needs GPUs"),
        (("ttft", "--backends", "nvme"), "choose from hbm, "),
        (("ttft", "--backends", ""), "empty"),
        (("ttft", "--backends", "dram+two"), "give its configuration as --variant two=JSON (now: none)"),
        (("ttft", "--backends", "stock+two", "--variant", "two={}"), "stock has no tier to configure"),
        (("ttft", "--backends", "dram", "--variant", "two"), "is not NAME=JSON"),
        (("ttft", "--backends", "dram", "--variant", 'two={"dram": {"thread": 1}}'), "unknown key 'thread'"),
        (("ttft", "--sizes", "none"), "not a number of tokens"),
        (("ttft", "--sizes", "999999999999K"), "not a number of tokens"),
        (("ttft", "--backends", "dram", "--sizes", "16,64"), "--sizes 16 has no hit"),
        (("ttft", "--engine-args", "[]"), "not a JSON object"),
        (("ttft", "--engine-args", '{"hicache_use_xmem": false}'), "names hicache_use_xmem, which the benchmark sets"),
        (("ttft", "--engine-args", '{"page_size": 32}'), "names page_size, which the benchmark sets itself"),
        (("ttft", "--backends", "stock", "--xmem-config", "{nope"), "is not JSON"),
        (("ttft", "--backends", "dram", "--xmem-config", "@/nowhere.json"), "cannot be read"),
        (("ttft", "--link-gbps", "dram=fast"), "not a list of rates"),
        (("ttft", "--link-gbps", "/nowhere"), "not a readable copy"),
        (("ttft", "--timeline", "timeline.jsonl"), "this machine has none"),
        (("ttft", "--sizes", "64", "--timeline-size", "128"), "none of --sizes"),
        (("throughput", "--hit-ratios", "0,101"), "not percentages"),
        (("throughput", "--size", "8K", "--concurrency", "400", "--hicache-size", "1"), "use --hicache-size"),
        (("multiturn", "--device-tokens", "64"), "does not fit into a KV pool"),
        (("multiturn", "--url", "nowhere"), "is not an address"),
        (("multiturn", "--url", "http://127.0.0.1:9"), "no server answers"),
        (("trace", "/nowhere.jsonl"), "cannot be read"),
        (("trace", "/nowhere.jsonl", "--speed", "-1"), "not a speed"),
    ],
)
def test_refused_before_it_runs(
    bench: Bench, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    status, rows = bench(*arguments)
    assert status == 2
    assert rows == []
    err = capsys.readouterr().err.strip()
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert err.endswith(".")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("ttft", "--rounds", "-1"), "--rounds"),
        (("ttft", "--passes", "0"), "--passes"),
        (("ttft", "--page-size", "0"), "--page-size"),
        (("ttft", "--tp-size", "0"), "--tp-size"),
        (("ttft", "--output-tokens", "-5"), "--output-tokens"),
        (("ttft", "--max-unproven", "nan"), "--max-unproven"),
        (("ttft", "--timeout", "inf"), "--timeout"),
        (("throughput", "--requests", "-1"), "--requests"),
        (("multiturn", "--agents", "0"), "--agents"),
        (("multiturn", "--think", "-1"), "--think"),
        (("trace", "x.jsonl", "--concurrency", "0"), "--concurrency"),
        (("trace", "x.jsonl", "--limit", "many"), "--limit"),
        (("roundtrip", "--gb", "nan"), "--gb"),
        (("copy", "--gpu", "-3"), "--gpu"),
    ],
)
def test_impossible_numbers_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], option: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: '{arguments[-1]}' is not a number" in last


def test_an_output_that_cannot_be_written_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "rows.jsonl"
    assert cli.main(["bench", *TTFT, "--backends", "dram", "--shape", "tiny", "--output", str(output)]) == 2
    err = capsys.readouterr().err.strip()
    assert f"--output {output} cannot be written" in err
    assert len(err.splitlines()) == 1


def test_resuming_makes_no_failure_good(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*TTFT, "--backends", "dram", "--no-plots")
    assert bench(*arguments, how={"wrong_output": True})[0] == 1
    capsys.readouterr()
    status, rows = bench(*arguments, "--resume")
    assert status == 1
    assert len({row["run"] for row in rows}) == 1
    assert "outputs differ" in capsys.readouterr().err


@pytest.mark.parametrize("size", [32, 48])
def test_a_hit_of_few_pages_has_to_be_one(bench: Bench, size: int) -> None:
    few = ("ttft", "--sizes", str(size), "--rounds", "1", "--quick", "--backends", "dram", "--no-plots")
    assert bench(*few)[0] == 0
    assert bench(*few, "--seed", "1", how={"no_host": True})[0] == 1


@pytest.mark.parametrize("tp", [1, 2])
def test_each_rank_has_a_link(bench: Bench, tp: int) -> None:
    _, rows = bench(*TTFT, "--backends", "dram", "--link-gbps", "dram=10", "--tp-size", str(tp), "--no-plots")
    assert {row["link_gbps"] for row in rows if row["backend"] == "dram"} == {10.0 * tp}


def test_a_trace_ends_with_its_engine(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Not when its last request is due."""
    path = tmp_path / "trace.jsonl"
    requests = [{"timestamp": at, "input_length": 64, "output_length": 2, "hash_ids": [at]} for at in (0, 1, 300_000)]
    path.write_text("\n".join(json.dumps(request) for request in requests))
    start = time.monotonic()
    arguments = ("trace", str(path), "--backends", "hbm", "--speed", "1", "--no-plots")
    status, _ = bench(*arguments, how={"crash_after": 1})
    assert status == 1
    assert time.monotonic() - start < 60
    assert "gives up" in capsys.readouterr().err


def test_links_are_measured_where_nobody_says_them(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = [
        {"gpu": 0, "peer": None, "read_gbps": 55.0, "write_gbps": 54.0},
        {"gpu": 0, "peer": 1, "read_gbps": 390.0, "write_gbps": 1.0},
        {"gpu": 0, "peer": 2, "read_gbps": 397.0, "write_gbps": 1.0},
        {"gpu": 0, "peer": 3, "not_measured": "GPU 3 is in use"},
        {"gpu": 1, "peer": None, "read_gbps": 99.0},
    ]
    monkeypatch.setattr(ttft.bandwidth, "run", lambda: (found, None))
    assert ttft.measured_links(0) == {"dram": 55.0, "stock": 55.0, "peer": 397.0, "mtier": 397.0}
    monkeypatch.setattr(ttft.bandwidth, "run", lambda: (found[4:], "it did not answer within 9.5 s"))
    assert ttft.measured_links(0) == {}
    assert "not known (it did not answer within 9.5 s); give them as --link-gbps" in capsys.readouterr().err

    asked: list[int] = []

    def measured(gpu: int) -> dict[str, float]:
        asked.append(gpu)
        return {"dram": 10.0}

    monkeypatch.setattr(ttft, "measured_links", measured)
    monkeypatch.setattr(runs, "has_gpu", lambda: True)
    monkeypatch.setattr(runs, "gpu_bytes", lambda: 1 << 40)
    long = ("ttft", "--sizes", "64", "--rounds", "1", "--backends", "dram", "--engine-args", '{"base_gpu_id": 2}')
    status, rows = bench(*long)
    assert status == 0
    assert asked == [2]
    assert {row.get("link_gbps") for row in rows} == {None, 10.0}
    bench(*long, "--quick")
    bench(*long, "--link-gbps", "dram=20")
    assert asked == [2], "where it is said, or has to be quick, nothing is measured"


def test_timeline(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runs, "has_gpu", lambda: True)
    monkeypatch.setattr(runs, "gpu_bytes", lambda: 1 << 40)
    file = tmp_path / "a folder of its own" / "timelines.jsonl"
    arguments = (*TTFT, "--backends", "stock,dram,hbm", "--timeline", str(file), "--timeline-size", "64")
    status, rows = bench(*arguments)
    assert status == 0
    recorded = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["backend"], row["hit"]) for row in recorded} == {
        (backend, hit) for backend in ("stock", "dram") for hit in ("tier", "hbm")
    }
    assert {row["run"] for row in recorded} == {rows[0]["run"]}
    assert {row["prompt_tokens"] for row in recorded} == {64}
    mine = [row for row in recorded if (row["backend"], row["hit"]) == ("dram", "tier")]
    assert [(row["gpu"], row["kernel"], row["total_ms"]) for row in mine] == [
        (0, "all", 6.0),
        (0, "attention", 4.0),
        (0, "moe", 2.0),
        (1, "page_copy_bulk", 8.0),
        (1, "all", 8.0),
    ]
    assert all(-1 < row["first_ms"] < row["last_ms"] < 10 for row in mine), "they count from the asking"
    out = capsys.readouterr().out
    assert "Where the GPUs' time goes: stock, 64 tokens" in out
    assert re.search(r"^ *attention +0 +4.00 +4.00 ", out, re.MULTILINE)

    status, again = bench(*arguments, how={"no_profiler": True})
    assert status == 0, "what was measured stands without it"
    assert len(file.read_text().splitlines()) == len(recorded)
    assert len(again) == 2 * len(rows)
    assert all(row["complete"] for row in again)
    assert "dram: no timeline: CUPTI is taken" in capsys.readouterr().err


def test_variants_of_a_tier(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As documented: one tier with two configurations in one run, in tables and plots beside each other."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    (command,) = re.findall(r"^sglang-xmem bench (ttft .*--variant .*)$", text, re.MULTILINE)
    arguments = [*shlex.split(command), "--xmem-config", '{"dram": {"threads": 1}}', "--link-gbps", "dram=10"]
    status, rows = bench(*arguments, how={"log": {"starts": str(tmp_path / "starts")}})
    assert status == 0
    hits = {row["backend"]: row for row in rows if row["backend"] not in ("hbm", "recompute")}
    assert set(hits) == {"dram", "dram+two"}
    assert all(0 <= row["transfer_hidden"] <= 1 for row in hits.values())
    assert (tmp_path / "starts").read_text().split() == ['dram{"dram":{"threads":1}}', 'dram{"dram":{"threads":2}}']
    out = capsys.readouterr().out
    assert out.index(" dram  ") < out.index(" dram+two  ")
    assert "dram+two" in (tmp_path / "rows.svg").read_text()
    settings = json.loads((tmp_path / "rows.runs.jsonl").read_text())["settings"]
    assert settings["variants"] == {"two": '{"dram": {"threads": 2}}'}


def test_auto_and_its_variant_are_called_by_the_tier(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.tiers, "verdict", lambda tier, *_, banks: ({"takes": "dram", "found": []}, {}))
    status, rows = bench(*TTFT, "--backends", "auto,auto+two", "--variant", "two={}")
    assert status == 0
    assert {row["backend"] for row in rows} == {"hbm", "recompute", "dram", "dram+two"}


def test_a_tier_is_asked_for_its_room(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def verdict(tier: str, config: str | None, gpus: list[int | None], pool_bytes: int, *, banks: bool) -> Any:
        asked.append((tier, config, gpus, pool_bytes))
        reason = "there is room for 60.00 GB" if len(asked) > 1 else None
        found = [{"tier": tier, "reason": reason}]
        return {"takes": None if reason else tier, "found": found}, {}

    monkeypatch.setattr(runs.tiers, "engine_gpus", lambda tp_size, base: [base + rank for rank in range(tp_size)])
    monkeypatch.setattr(runs.tiers, "verdict", verdict)
    arguments = ("--backends", "peer,mtier", "--hicache-size", "100", "--xmem-config", "{}", "--tp-size", "2")
    status, rows = bench(*TTFT, *arguments, "--engine-args", '{"base_gpu_id": 4}')
    assert (status, rows) == (2, [])
    assert "--backends mtier cannot be used with --hicache-size 100: mtier: there is room for 60.00 GB." in (
        capsys.readouterr().err
    )
    assert asked == [(name, "{}", [4, 5], 100 * 10**9) for name in ("peer", "mtier")]


def test_shape_without_gpu_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ttft"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_sizing_is_sglangs() -> None:
    qwen = KVShape.of({"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "torch_dtype": "bfloat16"})
    assert qwen.rank_bytes == 98304
    # "tier=peer pool=60.00 GB (610368 tokens)" is what SGLang made of --hicache-size 60, its padding page included.
    assert sizing.host_pool_tokens(60, qwen, 64) + 64 == 610368
    assert sizing.hicache_gb(610304, qwen) == 60
    tp8 = KVShape.of({"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128}, tp_size=8)
    assert tp8.rank_bytes == 98304 // 4  # heads are replicated
    assert KVShape.of({**vars(qwen), "num_hidden_layers": 2, "num_key_value_heads": 1}, 1, "fp8_e4m3").itemsize == 1


def test_throughput(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = bench(
        "throughput",
        "--size",
        "128",
        "--hit-ratios",
        "0,50,80,90,100",
        "--concurrency",
        "1,2",
        "--quick",
        "--backends",
        "hbm,stock,dram,recompute",
    )
    assert status == 0, capsys.readouterr().err
    cells = {(row["backend"], row["hit_ratio"], row["concurrency"]) for row in rows}
    ratios = (0.0, 0.5, 0.8, 0.9, 1.0)
    assert cells == {(b, r, c) for b in ("hbm", "stock", "dram") for r in ratios for c in (1, 2)} | {
        ("recompute", 0.0, 1),
        ("recompute", 0.0, 2),
    }
    for row in rows:
        assert row["samples_unproven"] == 0
        assert row["min"] <= row["tokens_per_s"] <= row["max"]
        hit = int(128 * row["hit_ratio"]) // 16 * 16
        assert hit - 16 <= row["measured_hit_ratio"] * 128 <= hit + 0.1
        assert row["hits"]["device" if row["backend"] == "hbm" else "host"] in (hit, hit - 16)


def test_throughput_unproven_hits_fail(bench: Bench) -> None:
    arguments = ("throughput", "--size", "128", "--quick", "--backends", "dram", "--hit-ratios", "100", "--no-plots")
    status, rows = bench(*arguments, how={"no_host": True})
    assert status == 1
    assert rows[0]["samples"] == 0


MULTITURN = ("multiturn", "--quick", "--think", "0.01", "--no-plots")


def test_multiturn(bench: Bench) -> None:
    status, rows = bench(*MULTITURN, "--backends", "stock,dram", "--device-tokens", "1K")
    assert status == 0
    for backend in ("stock", "dram"):
        mine = {row["turn"]: row for row in rows if row["backend"] == backend}
        assert list(mine) == [0, 1, 2, None]
        assert [mine[turn]["prompt_tokens"] for turn in range(3)] == [384, 464, 544]
        # A turn finds all of the turns before it, wherever that lies by now.
        assert mine[1]["hit_ratio"]["total"] == pytest.approx(384 / 464, abs=0.04)
        assert mine[2]["hit_ratio"]["total"] == pytest.approx(464 / 544, abs=0.04)
        assert mine[None]["hits"]["host"] > 0
        assert mine[None]["samples"] == 9
        assert set(mine[None]["ttft_ms"]) >= {"p50", "p90", "p99", "min", "max"}


def test_multiturn_and_trace_against_a_server(bench: Bench, tmp_path: Path) -> None:
    fake = FakeEngine(page_size=16, max_total_tokens=1024, enable_hierarchical_cache=True)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["stream"]
            with lock:
                reply = fake.generate(body["input_ids"], body["sampling_params"])
            self.send_response(200)
            self.end_headers()
            for count in range(1, len(reply["output_ids"]) + 1):
                piece = {**reply, "output_ids": reply["output_ids"][:count]}
                self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        status, rows = bench(*MULTITURN, "--url", url, "--vocab", "1000")
        assert status == 0
        assert {row["backend"] for row in rows} == {"server"}
        assert rows[-1]["hit_ratio"]["total"] > 0.4
        path = tmp_path / "trace.jsonl"
        line = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}
        path.write_text(f"{json.dumps(line)}\n" * 3)
        status, rows = bench("trace", str(path), "--url", url, "--speed", "max", "--no-plots")
        assert status == 0
        assert rows[-1]["samples"] == 3
    finally:
        server.shutdown()
        server.server_close()


def test_trace(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 400 * i, "input_length": 1000, "output_length": 50, "hash_ids": [0, 1 + i % 2]} for i in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asks = tmp_path / "asks"
    how = {"log": {"asks": str(asks)}}
    status, rows = bench("trace", str(path), "--backends", "dram", "--speed", "2", "--no-plots", how=how)
    assert status == 0
    assert len(asks.read_text().splitlines()) == 2 + 4 + 4, "the warm-up: two alone, then four at once"
    (row,) = rows
    assert row["samples"] == 4
    assert row["output_tokens"] == 4 * 8  # tiny cuts answers
    assert row["ideal_hit_ratio"] == pytest.approx((512 + 1000 + 1000) / 4000, abs=1e-3)
    assert row["hit_ratio"]["total"] == pytest.approx(row["ideal_hit_ratio"], abs=0.02)
    assert 0.5 <= row["seconds"] < 1.2  # 1.2 s of the trace at twice its speed, from when the first is really sent
    status, rows = bench("trace", str(path), "--backends", "dram", "--speed", "max", "--limit", "2", "--no-plots")
    assert status == 0
    assert rows[-1]["samples"] == 2
    status, rows = bench("trace", str(path), "--backends", "dram", "--speed", "max", "--share", "0.9", "--no-plots")
    assert status == 0
    assert (rows[-1]["share"], rows[-1]["samples"] in (2, 4)) == (0.9, True)
    assert bench("trace", str(path), "--backends", "dram", "--share", "0")[0] == 2


def test_tokens_and_backends() -> None:
    assert [runs.parse_tokens(text) for text in ("512", "80K", " 1k ")] == [512, 81920, 1024]
    assert runs.parse_backends("dram, stock,dram") == ["dram", "stock"]
    with pytest.raises(ConfigError):
        runs.parse_tokens("0")


def test_links_from_copy_results(tmp_path: Path) -> None:
    path = tmp_path / "copy.jsonl"
    rows = [{"path": "peer_load", "contiguous_gbps": 350.0}, {"path": "peer_load", "contiguous_gbps": 354.0}]
    rows += [{"path": "host_load", "contiguous_gbps": 55.4}, {"path": "host_store", "waived": "no GPU"}]
    rows += [{"path": "peer_load", "contiguous_gbps": 397.0, "memory": "context"}]
    rows += [{"path": "host_load", "contiguous_gbps": 90.0, "memory": "tier", "device": "cpu"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ttft.link_gbps(str(path)) == {"peer": 354.0, "mtier": 354.0, "dram": 55.4, "stock": 55.4}

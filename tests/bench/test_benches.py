"""The engine benchmarks over the fake worker: rows, proofs, refusals, crashes and interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_xmem import cli
from sglang_xmem.bench import engine, multiturn, progress, runs, shapes, sizing, trace, ttft
from sglang_xmem.bench.sizing import KVShape
from sglang_xmem.errors import ConfigError
from tests.bench.fake_worker import FAKE_WORKER, Bench


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Run `sglang-xmem bench ...` with the fake worker: exit status and all rows of its output file."""
    monkeypatch.setattr(engine, "WORKER", (sys.executable, str(FAKE_WORKER)))
    monkeypatch.setattr(runs, "has_gpu", lambda: False)
    monkeypatch.setattr(runs.gpus, "visible_gpus", lambda: range(0))
    monkeypatch.setattr(sizing, "available_host_bytes", lambda: 10**11)
    monkeypatch.setenv("PYTHONPATH", str(Path(engine.__file__).resolve().parents[2]))

    def run(*arguments: str, how: dict[str, Any] | None = None) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setenv("FAKE_ENGINE", json.dumps(how or {}))
        output = tmp_path / "rows.jsonl"
        shape = [] if "--shapes" in arguments else ["--shape", "tiny"]
        status = cli.main(["bench", *arguments, *shape, "--output", str(output)])
        if status == cli.INTERRUPTED:
            raise KeyboardInterrupt  # pytest's own; the command has done its part
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return status, rows

    return run


TTFT = ("ttft", "--sizes", "64,128", "--rounds", "2", "--quick")


def test_ttft_rows(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, rows = bench(*TTFT, "--backends", "hbm,stock,dram,recompute", "--link-gbps", "dram=10")
    assert status == 0, capsys.readouterr().err
    assert {(row["engine"], row["backend"]) for row in rows} == {
        (engine, backend) for engine in ("stock", "dram") for backend in ("hbm", "recompute", engine)
    }
    hbm = {row["prompt_tokens"]: row for row in rows if (row["engine"], row["backend"]) == ("dram", "hbm")}
    for row in rows:
        assert {"bench", "run", "backend", "prompt_tokens", "ttft_ms", "hits", "outputs_equal"} <= set(row)
        assert row["machine"] == "CPU"
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
            load_ms = row["kv_bytes"] / 10e6
            mine = hbm[row["prompt_tokens"]]["ttft_ms"]["p50"]
            assert row["floor_ms"] == pytest.approx(mine - 0.01 + max(0.01, load_ms) + min(0.01, load_ms) / 4, abs=2e-3)
            assert row["over_floor"] == pytest.approx(row["ttft_ms"]["p50"] / row["floor_ms"], rel=2e-2)
            assert row["enqueue_us"] == 1, "what the tier counted for this one request"
            assert row["load_ms"] == pytest.approx(load_ms, abs=1e-3)
        assert (row["shape"], row["gpu"]) == ("tiny", "CPU")
    out = capsys.readouterr().out
    assert "TTFT of a hit, tiny, page 16 (CPU engine: says nothing about speed)" in out
    about = json.loads((tmp_path / "rows.runs.jsonl").read_text())
    assert about["run"] == rows[0]["run"]
    assert {"commit", "command", "versions", "settings"} <= set(about)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.runs.jsonl"], "nothing else"


@pytest.mark.parametrize("backend", ["dram", "hbm"])
def test_hits_come_after_other_prompts(backend: str) -> None:
    """Those of HBM too, which leave the prompt its place: warm caches of the CPU are nobody's advantage."""
    workload = ttft.Workload([64, 128], 1, 16, 4, seed=0, warm_ups=1, settle_s=0)
    others = workload.fillers[: ttft.OTHERS_BETWEEN]
    assert workload.device_tokens >= max(workload.sizes) + sum(map(len, others)) + 4 * workload.page
    assert sum(map(len, workload.fillers)) >= workload.device_tokens, "a flood takes the prompt's place"
    names = {workload.prompt(size): size for size in workload.sizes}
    asked: list[Any] = []

    class Engine:
        def ask(self, prompt: Any, count: int = 1) -> Any:
            asked.append(names[prompt])
            return SimpleNamespace(device=0, host=0, output=[0] * count, ttft_ms=1.0, forward_ms=None)

        def flood(self, prompts: Any) -> None:
            asked.append({len(workload.fillers): "flood", len(others): "others"}[len(prompts)])

        def warm_up(self, lengths: Any) -> None: ...

        def tier_counts(self) -> dict[str, int]:
            return {}

    report = SimpleNamespace(sample=lambda **sample: None, step=lambda doing: None)
    ttft.measure(Engine(), workload, backend, report)  # type: ignore[arg-type]
    tier = backend != "hbm"
    a_round = [["flood", size, size, "others", size] if tier else [size, "others", size] for size in (64, 128)]
    assert asked == [64, 64, 128, 128, "flood", *a_round[0], *a_round[1]]


def test_several_shapes(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with all backends, its own bytes of a token, and a table."""
    monkeypatch.setattr(runs, "has_gpu", lambda: True)
    names = ("qwen3-8b", "qwen3-next-small")
    arguments = ("--shapes", ",".join(names), "--sizes", "256", "--rounds", "1", "--link-gbps", "stock=10")
    status, rows = bench("ttft", *arguments, "--backends", "stock", "--quick")
    out, err = capsys.readouterr()
    assert status == 0, err
    assert list(dict.fromkeys(row["shape"] for row in rows)) == list(names)
    tier = {row["shape"]: row for row in rows if row["backend"] == "stock"}
    assert [tier[name]["hits"]["host"] for name in names] == [192, 192]
    # 36 layers of a matrix of 128 x 128 floats for 32 heads, and three inputs of 8192 channels; 12 layers of K and V.
    state = 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert [tier[name]["kv_bytes"] for name in names] == [192 * 147456, 192 * 24576 + state]
    assert [f"TTFT of a hit, {name}, page 64" in out for name in names] == [True, True]
    assert "qwen3-next-small stock: " in err


def test_a_model_with_states_gets_slots_for_them(tmp_path: Path) -> None:
    arguments = ["bench", "ttft", "--shapes", "qwen3-next-small", "--sizes", "80K", "--engine-args", "{}"]
    args = cli.parser().parse_args(arguments)
    args.names, args.on_gpu, args.engine_options, args.page_size = ["peer"], True, {}, 64
    args.scratch = SimpleNamespace(name=str(tmp_path))
    args.config = shapes.config_of("qwen3-next-small")
    kv = args.kv = KVShape.of(args.config)
    assert kv.state_bytes == pytest.approx(77e6, rel=0.01)
    tokens = 114_000
    engine = runs.engine_options(args, "peer", sizing.Need(81920, 16, tokens, 213_000, tokens, 4), 31)
    stock = runs.engine_options(args, "stock", sizing.Need(81920, 16, tokens, 213_000, tokens, 4), 31)
    assert stock["hicache_mem_layout"] == "page_first", "SGLang's MambaPoolHost has no layer_first"
    slots = engine["max_mamba_cache_size"]
    args.names, args.tiny = ["hbm"], False
    (plan,) = ttft.plans_of(args)
    # Page 64: the state is at 81856, and the prompt has tokens after it.
    assert len(plan.workload.prompt(81920)) == 81888
    assert {len(filler) for filler in plan.workload.fillers} == {8160}
    assert slots >= tokens / 8192 + 4 * 4
    # SGLang divides the pool as the GPU's pools are: both parts have to hold what is asked again.
    on_gpu = tokens * kv.rank_bytes + slots * kv.state_bytes
    pool = sizing.hicache_gb(213_000, kv) * 1e9 / on_gpu
    assert pool * tokens >= 213_000
    assert pool * slots >= 213_000 / 8192 + 30


def test_time_limit(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends in time, whatever its engines do."""
    arguments = ("--backends", "stock,dram", "--time-limit", "8")
    began = time.monotonic()
    status, _ = bench(*TTFT, *arguments, how={"seconds": 3600.0})
    assert status == 1
    assert time.monotonic() - began < 600
    err = capsys.readouterr().err
    assert "error: dram: not run: --time-limit 8 s is over" in err
    assert "error: stock: " in err


def test_rows_are_written_before_an_engine_has_ended(bench: Bench, tmp_path: Path) -> None:
    _, rows = bench(*TTFT, "--backends", "dram", how={"at_shutdown": str(tmp_path / "rows.jsonl")})
    assert [row for row in rows if row.get("seen_at_shutdown")] == [{"seen_at_shutdown": len(rows) - 1}]


def test_floor_and_auto(bench: Bench) -> None:
    status, rows = bench(*TTFT, "--backends", "hbm,recompute")
    assert status == 0
    assert {(row["engine"], row["backend"]) for row in rows} == {("hbm", "hbm"), ("hbm", "recompute")}
    _, rows = bench(*TTFT, "--backends", "stock,auto", "--seed", "1")
    order = list(dict.fromkeys(row["engine"] for row in rows if row["run"] == rows[-1]["run"]))
    assert order == ["stock", "dram"], "auto goes by its tier's name"


def test_unproven_hits_fail(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = bench(*TTFT, "--backends", "dram", how={"no_host": True})
    assert status == 1
    tier = [row for row in rows if row["backend"] == "dram"]
    assert [(row["samples"], row["samples_unproven"]) for row in tier] == [(0, 2), (0, 2)]
    assert all(row["ttft_ms"]["p50"] is None for row in tier)
    assert "has proof of its hit" in capsys.readouterr().err


def test_wrong_outputs_fail(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = bench(*TTFT, "--backends", "dram", how={"wrong_output": True})
    assert status == 1
    out, err = capsys.readouterr()
    assert "outputs differ" in err
    assert "DIFFER" in out


def test_a_crash_leaves_what_is_done(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    how = {"crash_after": 12, "crash_in": ["dram"]}
    status, rows = bench(*TTFT, "--backends", "dram,stock", how=how)
    assert status == 1
    assert {row["engine"] for row in rows if row["complete"]} == {"stock"}
    assert {row["engine"] for row in rows if not row["complete"]} == {"dram"}
    err = capsys.readouterr().err
    assert "ended with status 9" in err
    assert "the fake engine gives up" in err
    status, _ = bench("multiturn", "--quick", "--backends", "dram", how={"fail_after": 12})
    assert status == 1
    assert "error: dram: ValueError: the fake engine refuses" in capsys.readouterr().err


def test_timeout(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = bench(*TTFT, "--backends", "dram", "--timeout", "2", how={"seconds": 5.0})
    assert status == 1
    assert "longer than --timeout 2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "arguments"),
    [
        (signal.SIGINT, ["ttft", "--sizes", "64,128", "--rounds", "5000"]),
        (signal.SIGTERM, ["multiturn", "--turns", "100", "--think", "0.2"]),
    ],
)
def test_interrupt_writes_what_is_done(tmp_path: Path, sent: signal.Signals, arguments: list[str]) -> None:
    output, asks = tmp_path / "rows.jsonl", tmp_path / "asks"
    code = (
        f"import sys; from sglang_xmem.bench import engine; engine.WORKER = (sys.executable, {str(FAKE_WORKER)!r})\n"
        f"from sglang_xmem import cli; sys.exit(cli.main(['bench', *{arguments!r}, '--shape', 'tiny',"
        f" '--backends', 'dram', '--quick', '--output', {str(output)!r}]))"
    )
    how = json.dumps({"seconds": 0.02, "asks": str(asks)})
    environment = {**os.environ, "FAKE_ENGINE": how, "PYTHONPATH": str(Path(cli.__file__).resolve().parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    # Far enough for a sample of each kind, and not for a finished run, however slow the machine is at importing.
    while not (asks.exists() and len(asks.read_text().splitlines()) >= 60):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.1)
    process.send_signal(sent)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows
    assert not any(row["complete"] for row in rows)


def test_whoever_embeds_a_benchmark_hears_of_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a test run goes on for minutes after the signal that ended one of its benchmarks."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), runs.terminated_as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ttft", "--backends", "dram", "--sizes", "80K"), "longer than the model's context of 16384"),
        (("ttft", "--backends", "dram,peer"), "peer is unavailable with --hicache-size 1: peer: it needs GPUs"),
        (("ttft", "--backends", "nvme"), "choose from hbm, "),
        (("ttft", "--backends", ""), "empty"),
        (("ttft", "--sizes", "none"), "not a number of tokens"),
        (("ttft", "--sizes", "999999999999K"), "not a number of tokens"),
        (("ttft", "--backends", "dram", "--sizes", "16,64"), "--sizes 16 has no hit"),
        (("ttft", "--engine-args", "[]"), "not a JSON object"),
        (("ttft", "--engine-args", '{"hicache_use_xmem": false}'), "names hicache_use_xmem, which the benchmark sets"),
        (("ttft", "--engine-args", '{"page_size": 32}'), "names page_size, which the benchmark sets itself"),
        (("ttft", "--backends", "stock", "--xmem-config", "{nope"), "is not JSON"),
        (("ttft", "--link-gbps", "dram=fast"), "not a list of rates"),
        (("ttft", "--link-gbps", "dram=nan"), "not a list of rates"),
        (("throughput", "--hit-ratios", "0,101"), "not percentages"),
        (("throughput", "--size", "8K", "--concurrency", "400", "--hicache-size", "1"), "Use --hicache-size"),
        (("ttft", "--shapes", "tiny,nothing"), "--shape nothing is not a shape"),
        (("multiturn", "--device-tokens", "64"), "does not fit into a KV pool"),
        (("multiturn", "--preset", "agentic-174k"), "longer than the model's context"),
        (("trace", "/nowhere.jsonl"), "cannot be read"),
        (("trace", "/nowhere.jsonl", "--speed", "-1"), "not a speed"),
        (("trace", "/nowhere.jsonl", "--speed", "inf"), "not a speed"),
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
        (("ttft", "--page-size", "0"), "--page-size"),
        (("ttft", "--max-unproven", "nan"), "--max-unproven"),
        (("ttft", "--timeout", "inf"), "--timeout"),
        (("throughput", "--requests", "-1"), "--requests"),
        (("multiturn", "--think", "-0.5"), "--think"),
        (("trace", "x", "--concurrency", "0"), "--concurrency"),
    ],
)
def test_numbers_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], option: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    assert f"argument {option}:" in capsys.readouterr().err


def test_shape_without_gpu_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ttft"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_links(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sglang_xmem.doctor import bandwidth

    found: list[dict[str, Any]] = [
        {"gpu": 0, "peer": None, "read_gbps": 55.0},
        {"gpu": 0, "peer": 1, "read_gbps": 390.0},
        {"gpu": 0, "peer": 2, "read_gbps": 397.0},
        {"gpu": 0, "peer": 3, "not_measured": "GPU 3 is in use"},
        {"gpu": 1, "peer": None, "read_gbps": 99.0},
    ]
    monkeypatch.setattr(bandwidth, "run", lambda: (found, None))
    args = SimpleNamespace(engine_options={}, tp_size=1, xmem_config=None)
    measured: Any = ttft.measured_links
    assert measured(args) == {"dram": 55.0, "stock": 55.0, "peer": 397.0, "mtier": 397.0}
    args.xmem_config = '{"dram": {"relays": [1]}}'
    assert measured(args)["dram"] == 55.0 + 99.0, "a relay brings its own link"
    assert measured(args)["stock"] == 55.0
    monkeypatch.setattr(bandwidth, "run", lambda: ([], "it did not respond within 9.5 s"))
    assert measured(args) == {}
    assert "not known (it did not respond within 9.5 s). Give them as --link-gbps." in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "ms"), [("dram", 3.0), ("stock", 3.0), ("peer", 6.0)])
def test_the_floor_of_latents_lets_ranks_share_their_links(backend: str, ms: float) -> None:
    kv = KVShape.of(shapes.config_of("deepseek-v2-lite"), 2)
    row = {"backend": backend, "ttft_ms": {"p50": 9.0}, "hits": {"host": 81856}}
    hbm = {"ttft_ms": {"p50": 5.0}, "forward_ms": 4.0}
    link = 2 * 81856 * kv.rank_bytes / 6e6  # of both ranks together
    assert ttft._transfer(row, [], kv, link, hbm)["load_ms"] == pytest.approx(ms)


def test_sizing_is_sglangs() -> None:
    qwen = KVShape.of(shapes.config_of("qwen3-30b-a3b"))
    assert (qwen.rank_bytes, qwen.hybrid) == (98304, False)
    # "tier=peer pool=60.00 GB (610368 tokens)" is what SGLang made of --hicache-size 60, its padding page included.
    assert sizing.host_pool_tokens(60, qwen, 64) + 64 == 610368
    assert sizing.hicache_gb(610304, qwen) == 60
    assert KVShape.of(shapes.config_of("qwen3-30b-a3b"), tp_size=8).rank_bytes == 98304 // 4  # heads are replicated
    assert KVShape.of(shapes.config_of("qwen3-30b-a3b"), 1, "fp8_e4m3").rank_bytes == 98304 // 2


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_shapes_are_what_their_help_says(name: str, tmp_path: Path) -> None:
    words, kv = shapes.SHAPES[name], KVShape.of(shapes.config_of(name))
    if "kB a token" in words:
        assert f"{kv.rank_bytes / 1e3:.0f} kB a token" in words
    assert kv.hybrid == ("full attention" in words)
    tokenizer = json.loads((shapes.write_shape(name, tmp_path) / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == shapes.config_of(name)["vocab_size"]


def test_throughput(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    cells = ("--size", "128", "--hit-ratios", "0,50,100", "--concurrency", "1,2", "--quick")
    status, rows = bench("throughput", *cells, "--backends", "hbm,stock,dram,recompute")
    assert status == 0, capsys.readouterr().err
    found = {(row["backend"], row["hit_ratio"], row["concurrency"]) for row in rows}
    assert found == {(b, r, c) for b in ("hbm", "stock", "dram") for r in (0.0, 0.5, 1.0) for c in (1, 2)} | {
        ("recompute", 0.0, 1),
        ("recompute", 0.0, 2),
    }
    for row in rows:
        assert row["samples_unproven"] == 0
        assert row["min"] <= row["tokens_per_s"] <= row["max"]
        hit = int(128 * row["hit_ratio"]) // 16 * 16
        assert hit - 16 <= row["measured_hit_ratio"] * 128 <= hit + 0.1
        assert row["hits"]["device" if row["backend"] == "hbm" else "host"] in (hit, hit - 16)
        assert row["inter_token_ms"]["p50"] is not None
    arguments = ("throughput", "--size", "128", "--quick", "--backends", "dram", "--hit-ratios", "100")
    status, rows = bench(*arguments, how={"no_host": True})
    assert status == 1
    assert rows[-1]["samples"] == 0


def test_multiturn(bench: Bench) -> None:
    arguments = ("multiturn", "--quick", "--think", "0.01", "--device-tokens", "1K")
    status, rows = bench(*arguments, "--backends", "stock,dram")
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


def test_the_agentic_preset_fits_a_test_machine() -> None:
    arguments = cli.parser().parse_args(["bench", "multiturn", "--preset", "agentic-174k", "--page-size", "64"])
    arguments.tiny = False
    agents = multiturn.workload_of(arguments)
    assert (agents.agents, agents.turns) == (10, 5)
    turns = [agents.prompt_tokens(turn) for turn in range(5)]
    assert 170 * 1024 <= min(turns) <= sum(turns) / 5 <= 176 * 1024
    preset = multiturn.PRESETS["agentic-174k"]
    config = shapes.config_of(preset.shape)
    gb = agents.total_tokens * KVShape.of(config).rank_bytes / 1e9
    assert config["max_position_embeddings"] > agents.final_tokens
    assert 30 < gb < 60, "in a peer of 80 GB or host memory of 128 GB"
    assert 2 * agents.final_tokens <= agents.total_tokens * preset.on_gpu < agents.total_tokens / 2
    arguments.scale = 0.1
    smaller = multiturn.workload_of(arguments)
    assert smaller.prompt_tokens(0) == pytest.approx(agents.prompt_tokens(0) / 10, abs=2)


def test_two_engines_share_the_agents(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """They measure at the same time, and one that fails ends both."""
    words = "--preset agentic-174k --scale 0.005 --turns 3 --think 0.01 --engines 2 --output-tokens 4"
    arguments = tuple(words.split())
    status, rows = bench("multiturn", *arguments, "--agents", "5", "--backends", "stock,dram")
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "agents: 5, engines: 2" in out
    assert "dram: all turns " in out
    for row in rows:
        assert (row["preset"], row["engines"], row["scale"]) == ("agentic-174k", 2, 0.005)
        assert row["samples"] == (15 if row["turn"] is None else 5), "each agent once"
    warm = next(row for row in rows if (row["backend"], row["turn"]) == ("dram", 1))
    assert warm["hit_ratio"]["total"] > 0.9
    status, rows = bench("multiturn", *arguments, "--backends", "dram", how={"fail_after": 12})
    assert status == 1
    assert "the fake engine refuses" in capsys.readouterr().err
    assert bench("multiturn", "--engines", "9", "--agents", "3")[0] == 2
    assert "--engines 9 is more than --agents 3." in capsys.readouterr().err


def test_engines_wait_for_each_other(tmp_path: Path) -> None:
    gate = {"folder": str(tmp_path), "count": 2}
    first, second = (engine._Lines(None, {**gate, "name": name}) for name in "ab")
    waiting = threading.Thread(target=first.together, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    second.together()
    waiting.join(60)
    assert not waiting.is_alive()


def test_engines_of_one_machine_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.gpus, "visible_gpus", lambda: range(4))
    args: Any = SimpleNamespace(engines=2, tp_size=1, on_gpu=True, engine_options={}, xmem_config=None)
    first, second = (runs.engine_number(args, number) for number in (0, 1))
    assert [one.engine_options["base_gpu_id"] for one in (first, second)] == [0, 1]
    assert [json.loads(one.xmem_config)["peer"]["gpus"] for one in (first, second)] == [[2], [3]]
    args.xmem_config = '{"peer": {"gpus": [3]}}'
    assert json.loads(runs.engine_number(args, 0).xmem_config) == {"peer": {"gpus": [3]}}
    args.engines = 5
    with pytest.raises(ConfigError, match="--engines 5 need 5 GPUs, and there are 4"):
        runs.engine_number(args, 0)


@pytest.mark.parametrize(
    ("name", "layers"), [("qwen3-30b-a3b/4", 12), ("qwen3-next-small/2", 24), ("gpt-oss-20b/3", 8), ("tiny", 4)]
)
def test_shapes_with_a_part_of_the_layers(name: str, layers: int, tmp_path: Path) -> None:
    config = json.loads((shapes.write_shape(name, tmp_path) / "config.json").read_text())
    assert config["num_hidden_layers"] == layers == len(config.get("layer_types", range(layers)))


@pytest.mark.parametrize("name", ["gpt-5", "qwen3-8b/5", "qwen3-8b/0", "qwen3-8b/x", "qwen3-next-small/8", ""])
def test_shapes_that_there_are_not(name: str) -> None:
    with pytest.raises(ConfigError, match="--shape"):
        shapes.config_of(name)


SERVING = """
import json, sys
schedule, url, output = json.load(open(sys.argv[1])), *sys.argv[2:]
assert url == "http://there"
n = len(schedule["requests"])
if "FAIL" in schedule["requests"][0]["parts"][0][0]: sys.exit("no server")
json.dump(dict(errors=[""] * (n - 1) + ["gone"], input_lens=[100] * n, output_lens=[5] * n, ttfts=[0.5] * n,
    itls=[[0.01] * 4] * n, cached_tokens_details=[None] + [dict(device=20, host=30)] * (n - 1), duration=2.0,
    total_throughput=52.5), open(output, "w"))
"""


def test_trace(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What goes to bench_serving, and what its result becomes; the real one is in test_bench_engine.py."""
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 400 * i, "input_length": 1000, "output_length": 50, "hash_ids": [0, 1 + i % 2]} for i in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(trace, "GENERATOR", (sys.executable, "-c", SERVING))
    monkeypatch.setattr(trace, "_healthy", lambda url: True)
    status, rows = bench("trace", str(path), "--url", "http://there", "--speed", "2")
    assert status == 1
    assert "error: server: 3 of 4 requests were answered" in capsys.readouterr().err
    (row,) = rows
    assert (row["backend"], row["samples"], row["complete"]) == ("server", 3, False)
    assert row["ttft_ms"]["p50"] == 500
    assert row["inter_token_ms"]["p50"] == 10
    assert row["e2e_ms"]["p99"] == pytest.approx(540), "0.5 s to the first token and four more"
    assert row["hit_ratio"] == {"device": 0.1333, "host": 0.2, "total": 0.3333}
    assert row["ideal_hit_ratio"] == pytest.approx((512 + 1000 + 1000) / 4000, abs=1e-3)
    monkeypatch.setattr(trace, "GENERATOR", (sys.executable, "-c", "import sys; sys.exit('no server')"))
    assert bench("trace", str(path), "--url", "http://there")[0] == 1
    assert "| no server" in capsys.readouterr().err
    requests = trace.workloads.read_trace(path, max_tokens=520)
    schedule = trace._schedule(requests, 2.0, 7, 1024)
    assert schedule["concurrency"] is None
    assert [request["at_s"] for request in schedule["requests"]] == [0, 0.2, 0.4, 0.6]
    assert schedule["requests"][1]["parts"] == [["0 block 0", 512], ["0 block 2", 8]]
    at_once = trace._schedule(requests, None, 7, 1024)
    assert (at_once["concurrency"], at_once["requests"][1]["at_s"]) == (7, None)


def test_flags_of_a_server() -> None:
    options = {"model_path": "/m", "enable_metrics": True, "skip_tokenizer_init": False, "x": None, "c": {"a": 1}}
    assert trace.as_flags(options) == ["--model-path", "/m", "--enable-metrics", "--c", '{"a": 1}']


def test_tokens_and_backends() -> None:
    assert [runs.parse_tokens(text) for text in ("512", "80K", " 1k ")] == [512, 81920, 1024]
    assert runs.parse_backends("dram, stock,dram") == ["dram", "stock"]
    with pytest.raises(ConfigError):
        runs.parse_tokens("0")


def test_time_left_does_not_count_starts_as_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    bar = progress.Progress([4])
    bar.engine("dram")
    bar._started -= 3600  # an hour to start
    bar._bar.start_t -= 3600
    bar.started()
    bar.step("half")
    bar.step("of it")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dram: of it (2/4, about 00:0"), last

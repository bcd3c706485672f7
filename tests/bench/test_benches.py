"""The benchmarks that start engines, over the fake worker: rows, proofs, refusals, crashes and interrupts."""

from __future__ import annotations

import json
import multiprocessing
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
from sglang_xmem.bench import engine, multiturn, setup, shapes, sizing, ttft
from sglang_xmem.bench.setup import Setup
from sglang_xmem.bench.sizing import KVShape, Need
from sglang_xmem.doctor import bandwidth
from sglang_xmem.errors import ConfigError
from tests.bench.fake_worker import FAKE_WORKER, Bench


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Run `sglang-xmem bench ...` with the fake worker: exit status and all rows of its output file."""
    monkeypatch.setattr(engine, "WORKER", (sys.executable, str(FAKE_WORKER)))
    monkeypatch.setattr(setup, "has_gpu", lambda: False)
    monkeypatch.setattr(setup.gpus, "visible_gpus", lambda: range(0))
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
    status, rows = bench(*TTFT, "--backends", "hbm,stock,auto,recompute")
    out, err = capsys.readouterr()
    assert status == 0, err
    assert {(row["engine"], row["backend"]) for row in rows} == {
        (engine, backend) for engine in ("stock", "dram") for backend in ("hbm", "recompute", engine)
    }, "auto goes by its tier's name"
    for row in rows:
        whole = row["prompt_tokens"] - 16
        expected = {"hbm": {"device": whole, "host": 0}, "recompute": {"device": 0, "host": 0}}
        assert row["hits"] == expected.get(row["backend"], {"device": 0, "host": whole})
        assert (row["shape"], row["gpu"], row["machine"]) == ("tiny", "CPU", "CPU")
        assert (row["complete"], row["samples_unproven"], row["outputs_equal"]) == (True, 0, True)
        assert row["outputs_tell_prompts_apart"]
        assert {"time", "commit", "command", "versions"} <= set(row["made_by"])
        if row["backend"] == "dram":
            assert row["kv_bytes"] == whole * 2048, "of shape tiny: K and V, 4 layers, 2 heads of 64, 2 bytes"
            assert row["enqueue_us"] == 1, "what the tier counted for this one request"
    assert "ttft, shape tiny, page_size 16, tp_size 1 (CPU engine: says nothing about speed)" in out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"], "nothing else"
    status, rows = bench(*TTFT, "--backends", "hbm,recompute")
    assert status == 0
    run = [row for row in rows if row["run"] == rows[-1]["run"]]
    assert {(row["engine"], row["backend"]) for row in run} == {("hbm", "hbm"), ("hbm", "recompute")}


def a_case(pooled: bool = True, links: Any = None, kv: KVShape | None = None) -> ttft.Ttft:
    args = cli.parser().parse_args(["bench", *TTFT, "--rounds", "1", "--output-tokens", "4"])
    kv = kv or KVShape.of(shapes.config_of("tiny"))
    one: Any = SimpleNamespace(args=args, page=16, tiny=True, on_gpu=False, kv=kv)
    return ttft.Ttft(one, pooled, links or {})


@pytest.mark.parametrize("pooled", [True, False])
def test_hits_come_after_other_prompts(pooled: bool) -> None:
    """Those of HBM too, which leave the prompt its place: warm caches of the CPU are nobody's advantage."""
    case, asked = a_case(pooled), list[Any]()
    case.settle_s = 0
    assert case.device_tokens >= max(case.sizes) + ttft.OTHERS_BETWEEN * case.filler_tokens + 4 * case.page
    assert case.fillers * case.filler_tokens >= case.device_tokens, "a flood takes the prompt's place"

    class Engine:
        def draw(self, seed: str, count: int) -> Any:
            return (seed, count)

        def ask(self, prompt: Any, count: int = 1) -> Any:
            asked.append(prompt[1])
            return SimpleNamespace(device=0, host=0, output=[0] * count, ttft_ms=1.0, forward_ms=None)

        def flood(self, prompts: Any) -> None:
            asked.append({case.fillers: "flood", ttft.OTHERS_BETWEEN: "others"}[len(prompts)])

        def warm_up(self, lengths: Any) -> None: ...

        def tier_counts(self) -> dict[str, int]:
            return {}

    report = SimpleNamespace(sample=lambda **sample: None, step=lambda doing: None)
    case.measure(Engine(), report)  # type: ignore[arg-type]
    a_round = [["flood", size, size, "others", size] if pooled else [size, "others", size] for size in (64, 128)]
    assert asked == [64, 64, 128, 128, "flood", *a_round[0], *a_round[1]]


def test_several_shapes(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with all backends, its own bytes of a token, and a table."""
    monkeypatch.setattr(setup, "has_gpu", lambda: True)
    names = ["qwen3-8b", "qwen3-next-small"]
    arguments = ("--shapes", ",".join(names), "--sizes", "256", "--rounds", "1", "--backends", "stock", "--quick")
    status, rows = bench("ttft", *arguments)
    out, err = capsys.readouterr()
    assert status == 0, err
    assert list(dict.fromkeys(row["shape"] for row in rows)) == names
    tier = [row for row in rows if row["backend"] == "stock"]
    assert [row["hits"]["host"] for row in tier] == [192, 192]
    # 36 layers of a matrix of 128 x 128 floats for 32 heads, and three inputs of 8192 channels; 12 layers of K and V.
    state = 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert [row["kv_bytes"] for row in tier] == [192 * 147456, 192 * 24576 + state]
    assert [f"ttft, shape {name}, page_size 64" in out for name in names] == [True, True]
    assert "qwen3-next-small stock: " in err


def a_setup(monkeypatch: pytest.MonkeyPatch, shape: str, *arguments: str) -> Setup:
    """Of a machine with four GPUs."""
    monkeypatch.setattr(setup, "has_gpu", lambda: True)
    monkeypatch.setattr(setup.gpus, "visible_gpus", lambda: range(4))
    monkeypatch.setattr(Setup, "_check_tier", lambda self, backend, *_: backend)
    args = cli.parser().parse_args(["bench", "ttft", "--shapes", shape, *arguments])
    return Setup(args, shape)


def test_a_model_with_states_gets_slots_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    one = a_setup(monkeypatch, "qwen3-next-small", "--sizes", "80K")
    assert one.kv.state_bytes == pytest.approx(77e6, rel=0.01)
    tokens = 114_000
    need = Need(81920, 16, tokens, 213_000, 4)
    assert one.options("stock", need, 31, None)["hicache_mem_layout"] == "page_first", "MambaPoolHost has no other"
    slots = one.options("peer", need, 31, None)["max_mamba_cache_size"]
    assert slots >= tokens / 8192 + 4 * 4
    # SGLang divides the pool as the GPU's pools are: both parts have to hold what is asked again.
    on_gpu = tokens * one.kv.rank_bytes + slots * one.kv.state_bytes
    pool = sizing.hicache_gb(213_000, one.kv) * 1e9 / on_gpu
    assert pool * tokens >= 213_000
    assert pool * slots >= 213_000 / 8192 + 30
    assert ttft.Ttft(one, True, {}).short == 32, "the state is at the last whole page; the prompt has tokens after it"


def test_engines_of_one_machine_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def options(count: int, *arguments: str) -> list[dict[str, Any]]:
        one = a_setup(monkeypatch, "qwen3-8b", *arguments)
        return [found for found, _ in one.plan("peer", *[a_case()] * count).engines]

    engines = options(2)
    assert [one["base_gpu_id"] for one in engines] == [0, 1]
    assert [json.loads(one["hicache_xmem_config"])["peer"]["gpus"] for one in engines] == [[2], [3]]
    named = options(2, "--xmem-config", '{"peer": {"gpus": [3]}}')
    assert [json.loads(one["hicache_xmem_config"]) for one in named] == [{"peer": {"gpus": [3]}}] * 2
    assert "base_gpu_id" not in options(1)[0]
    with pytest.raises(ConfigError, match="--engines 5 need 5 GPUs, and there are 4"):
        options(5)


def test_the_time_limit_and_the_timeout_end_engines(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    began, how = time.monotonic(), {"seconds": 3600.0}
    assert bench(*TTFT, "--backends", "stock,dram", "--time-limit", "8", how=how)[0] == 1
    assert time.monotonic() - began < 600
    err = capsys.readouterr().err
    assert "error: dram: not run: --time-limit 8 s is over" in err
    assert "error: stock: " in err
    assert bench(*TTFT, "--backends", "dram", "--timeout", "2", how=how)[0] == 1
    assert "longer than --timeout 2 s" in capsys.readouterr().err


def test_rows_are_written_before_an_engine_has_ended(bench: Bench, tmp_path: Path) -> None:
    _, rows = bench(*TTFT, "--backends", "dram", how={"at_shutdown": str(tmp_path / "rows.jsonl")})
    assert [row for row in rows if row.get("seen_at_shutdown")] == [{"seen_at_shutdown": len(rows) - 1}]


def test_wrong_and_unproven_hits_fail(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*TTFT, "--backends", "dram", how={"wrong_output": True})[0] == 1
    out, err = capsys.readouterr()
    assert "outputs differ" in err
    assert "DIFFER" in out
    status, rows = bench(*TTFT, "--backends", "dram", how={"no_host": True})
    tier = [row for row in rows if row["backend"] == "dram"][-2:]
    assert (status, [(row["samples"], row["samples_unproven"]) for row in tier]) == (1, [(0, 2), (0, 2)])
    assert all(row["ttft_ms"]["p50"] is None for row in tier)
    assert "2 of 2 samples have no proof of their hit" in capsys.readouterr().err
    arguments = ("throughput", "--size", "128", "--quick", "--backends", "dram", "--hit-ratios", "100")
    status, rows = bench(*arguments, how={"no_host": True})
    assert (status, rows[-1]["samples"]) == (1, 0)


def test_a_crash_leaves_what_is_done(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = bench(*TTFT, "--backends", "dram,stock", how={"crash_after": 12, "crash_in": ["dram"]})
    assert status == 1
    assert {row["engine"] for row in rows if row["complete"]} == {"stock"}
    assert {row["engine"] for row in rows if not row["complete"]} == {"dram"}
    err = capsys.readouterr().err
    assert "ended with status 9" in err
    assert "the fake engine gives up" in err
    assert bench("multiturn", "--quick", "--backends", "dram", how={"fail_after": 12})[0] == 1
    assert "error: dram: ValueError: the fake engine refuses" in capsys.readouterr().err
    assert bench("multiturn", "--quick", "--backends", "dram", how={"refuse": True})[0] == 1
    assert "error: dram: ValueError: the fake engine does not start" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("ttft --backends dram --sizes 80K", "longer than the model's context of 16384"),
        ("ttft --backends dram,peer", "peer is unavailable with --hicache-size 1: peer: it needs GPUs"),
        ("ttft --backends nvme", "argument --backends: nvme: choose from hbm, "),
        ("ttft --backends ,", "argument --backends: ',' is empty"),
        ("ttft --sizes none", "argument --sizes: 'none' is not a number of tokens"),
        ("ttft --sizes 999999999999K", "not a number of tokens"),
        ("ttft --sizes 0", "not a number of tokens"),
        ("ttft --backends dram --sizes 16,64", "--sizes 16 has no hit"),
        ("ttft --engine-args []", "argument --engine-args: '[]' is not a JSON object"),
        ('ttft --engine-args {"hicache_use_xmem":false}', "names hicache_use_xmem, which the benchmark sets"),
        ('ttft --engine-args {"page_size":32}', "names page_size, which the benchmark sets itself"),
        ("ttft --backends stock --xmem-config {nope", "is not JSON"),
        ("ttft --shapes tiny,nothing", "--shape nothing is not a shape"),
        ("ttft --shapes qwen3-8b", "This machine has no GPU, which --shape qwen3-8b needs"),
        ("ttft --rounds -1", "argument --rounds: '-1' is not a number of at least 1"),
        ("ttft --page-size 0", "argument --page-size"),
        ("ttft --timeout inf", "argument --timeout"),
        ("throughput --hit-ratios 0,101", "argument --hit-ratios: '101' is not a number from 0 to 100"),
        ("throughput --size 8K --concurrency 400 --hicache-size 1", "Use --hicache-size"),
        ("throughput --requests -1", "argument --requests"),
        ("multiturn --device-tokens 64", "does not fit into a KV pool"),
        ("multiturn --preset agentic-174k", "longer than the model's context"),
        ("multiturn --engines 9 --agents 3", "--engines 9 is more than --agents 3."),
        ("multiturn --think -0.5", "argument --think"),
        ("trace /nowhere.jsonl", "cannot be read"),
        ("trace /nowhere.jsonl --url there", "--url there is not an address"),
        ("trace /nowhere.jsonl --speed -1", "argument --speed: '-1' is not a number from"),
        ("trace /nowhere.jsonl --speed inf", "argument --speed"),
        ("trace /nowhere.jsonl --share 0", "argument --share"),
    ],
)
def test_refused_before_it_runs(bench: Bench, capsys: pytest.CaptureFixture[str], arguments: str, words: str) -> None:
    try:
        status, rows = bench(*arguments.split())
    except SystemExit as ended:  # argparse's
        status, rows = int(ended.code or 0), []
    assert (status, rows) == (2, [])
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_links(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured = [(0, None, 55.0), (0, 1, 390.0), (0, 2, 397.0), (1, None, 99.0)]
    found: list[dict[str, Any]] = [{"gpu": gpu, "peer": peer, "read_gbps": gbps} for gpu, peer, gbps in measured]
    found.append({"gpu": 0, "peer": 3, "not_measured": "GPU 3 is in use"})
    monkeypatch.setattr(bandwidth, "run", lambda: (found, None))
    args: Any = SimpleNamespace(engine_args={}, tp_size=1, xmem_config=None)
    assert ttft.measured_links(args) == {"dram": 55.0, "stock": 55.0, "peer": 397.0, "mtier": 397.0}
    args.xmem_config = '{"dram": {"relays": [1]}}'
    assert ttft.measured_links(args)["dram"] == 55.0 + 99.0, "a relay brings its own link"
    assert ttft.measured_links(args)["stock"] == 55.0
    monkeypatch.setattr(bandwidth, "run", lambda: ([], "it did not respond within 9.5 s"))
    assert ttft.measured_links(args) == {}
    assert "not known (it did not respond within 9.5 s), so there is no floor." in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "ms"), [("dram", 3.0), ("stock", 3.0), ("peer", 6.0)])
def test_the_floor(backend: str, ms: float) -> None:
    """A load over its link and a forward pass are a pipeline; ranks with the same latents share their links."""
    kv = KVShape.of(shapes.config_of("deepseek-v2-lite"), 2)
    row = {"backend": backend, "ttft_ms": {"p50": 9.0}, "hits": {"host": 81856}}
    hbm = {"ttft_ms": {"p50": 5.0}, "forward_ms": 4.0}
    links = {backend: 2 * 81856 * kv.rank_bytes / 6e6}  # of both ranks together
    found = a_case(links=links, kv=kv).transfer(row, [], hbm)
    assert (found["cpu_ms"], found["hbm_forward_ms"], found["load_ms"]) == (1.0, 4.0, pytest.approx(ms))
    floor_ms = 1.0 + max(4.0, ms) + min(4.0, ms) / 27
    assert found["floor_ms"] == pytest.approx(floor_ms, abs=1e-3)
    assert found["over_floor"] == pytest.approx(9.0 / floor_ms, abs=1e-3)


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


def test_shapes_with_a_part_of_the_layers() -> None:
    for name, layers in (("qwen3-30b-a3b/4", 12), ("qwen3-next-small/2", 24), ("gpt-oss-20b/3", 8), ("tiny", 4)):
        config = shapes.config_of(name)
        assert config["num_hidden_layers"] == layers == len(config.get("layer_types", range(layers)))
    for name in ("gpt-5", "qwen3-8b/5", "qwen3-8b/0", "qwen3-8b/x", "qwen3-next-small/8", ""):
        with pytest.raises(ConfigError, match="--shape"):
            shapes.config_of(name)


def test_throughput(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    cells = ("--size", "128", "--hit-ratios", "0,50,100", "--concurrency", "1,2", "--quick")
    status, rows = bench("throughput", *cells, "--backends", "hbm,stock,dram,recompute")
    assert status == 0, capsys.readouterr().err
    found = {(row["backend"], row["hit_ratio"], row["concurrency"]) for row in rows}
    expected = {(b, r, c) for b in ("hbm", "stock", "dram") for r in (0.0, 0.5, 1.0) for c in (1, 2)}
    assert found == expected | {("recompute", 0.0, 1), ("recompute", 0.0, 2)}
    for row in rows:
        assert row["samples_unproven"] == 0
        assert row["min"] <= row["tokens_per_s"] <= row["max"]
        hit = int(128 * row["hit_ratio"]) // 16 * 16
        assert hit - 16 <= row["measured_hit_ratio"] * 128 <= hit + 0.1
        assert row["hits"]["device" if row["backend"] == "hbm" else "host"] in (hit, hit - 16)
        assert row["inter_token_ms"]["p50"] is not None


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
    def agents(scale: str) -> multiturn.Agents:
        args = cli.parser().parse_args(["bench", "multiturn", "--preset", "agentic-174k", "--scale", scale])
        multiturn.fill_in(args, tiny=False)
        return multiturn.Agents(args, 64, range(args.agents))

    whole = agents("1")
    assert (whole.agents, whole.turns) == (10, 5)
    turns = [whole.prompt_tokens(turn) for turn in range(5)]
    assert 170 * 1024 <= min(turns) <= sum(turns) / 5 <= 176 * 1024
    config = shapes.config_of(multiturn.SHAPES["agentic-174k"])
    assert config["max_position_embeddings"] > whole.need.prompt + whole.need.output
    gb = whole.need.pool * KVShape.of(config).rank_bytes / 1e9
    assert 30 < gb < 60, "in a peer of 80 GB or host memory of 128 GB"
    assert whole.need.device is not None
    assert 2 * whole.need.prompt <= whole.need.device < whole.need.pool / 2
    assert agents("0.1").prompt_tokens(0) == pytest.approx(whole.prompt_tokens(0) / 10, abs=2)


def test_two_engines_share_the_agents(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """They measure at the same time, and one that fails ends both."""
    words = "--preset agentic-174k --scale 0.005 --turns 3 --think 0.01 --engines 2 --output-tokens 4 --agents 5"
    status, rows = bench("multiturn", *words.split(), "--backends", "stock,dram")
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "agents 5, engines 2" in out
    assert "dram: all turns " in out
    for row in rows:
        assert (row["preset"], row["engines"], row["scale"]) == ("agentic-174k", 2, 0.005)
        assert row["samples"] == (15 if row["turn"] is None else 5), "each agent once"
    warm = next(row for row in rows if (row["backend"], row["turn"]) == ("dram", 1))
    assert warm["hit_ratio"]["total"] > 0.9
    assert bench("multiturn", *words.split(), "--backends", "dram", how={"fail_after": 12})[0] == 1
    assert "the fake engine refuses" in capsys.readouterr().err


def test_engines_wait_for_each_other() -> None:
    """None goes on before all have come there."""
    came, pipes = list[float](), [multiprocessing.Pipe() for _ in range(2)]

    def work(end: Any, delay_s: float) -> None:
        time.sleep(delay_s)
        came.append(delay_s)
        engine.Report(end).together()
        end.send(("sample", len(came)))
        end.send(("done", None))

    for (_, end), delay_s in zip(pipes, (0.0, 0.5), strict=True):
        threading.Thread(target=work, args=(end, delay_s), daemon=True).start()
    workers: Any = [SimpleNamespace(connection=near) for near, _ in pipes]
    seen = list(engine.messages(workers, engine.Limit(time.monotonic() + 600, "--timeout 600 s")))
    assert seen == [("sample", 2), ("sample", 2)]


def test_tokens_are_the_same_in_another_process() -> None:
    drawn = engine.Client(None, 1024).draw("0 prompt 256", 300)
    code = "from sglang_xmem.bench.engine import Client; print(Client(None, 1024).draw('0 prompt 256', 8), end='')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == str(drawn[:8])
    assert min(drawn) >= engine.FIRST_TOKEN
    assert drawn[:8] != engine.Client(None, 1024).draw("1 prompt 256", 8)


def test_trace(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What goes to bench_serving, and what its result becomes; the real one is in test_bench_engine.py."""
    path = tmp_path / "trace.jsonl"
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    lines = [dict(zip(names, (400 * i, 1000, 50, [0, 1 + i % 2]), strict=True)) for i in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("trace", str(path), "--url", "http://there", "--max-tokens", "520")
    status, (row,) = bench(*arguments, "--speed", "2")
    assert status == 1
    assert "error: server: server http://there: 3 of 4 requests were answered" in capsys.readouterr().err
    assert (row["backend"], row["samples"], row["complete"], row["speed"]) == ("server", 3, True, "2")
    assert row["ttft_ms"]["p50"] == 500
    assert row["inter_token_ms"]["p50"] == 10
    assert row["e2e_ms"]["p99"] == pytest.approx(540), "0.5 s to the first token and four more"
    assert row["hit_ratio"] == {"device": 0.1333, "host": 0.2, "total": 0.3333}
    assert row["ideal_hit_ratio"] == pytest.approx((512 + 520 + 520) / 2080, abs=1e-3)
    for speed, words in (("2", "'use_trace_timestamps': True, 'slowdown_factor': 0.5"), ("max", "ency', '64'")):
        assert bench(*arguments, "--speed", speed, how={"crash_after": 1})[0] == 1
        err = capsys.readouterr().err
        assert "error: server: the engine's process ended with status 1" in err
        assert "| no server" in err
        assert words in err
        assert "[((520, 8, 0.0), True), ((520, 8, 400.0), True), ((520, 8, 800.0), True)" in err, "one system prompt"

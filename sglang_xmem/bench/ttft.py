"""`sglang-xmem bench ttft`: time to first token of a hit in each backend, by prompt length.

Wall time of `generate` with one output token. Each backend is an engine in its own process, on the same prompts. A
sample counts as a hit of the tier only where SGLang's `cached_tokens_details` says so; the others are counted and
shown. Results are appended to a JSON Lines file, a row a backend and prompt length, after each engine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from sglang_xmem.bench import environment, shapes

#: Backends that are an engine of their own. `hbm` and `recompute` are measured in each of these.
ENGINES = ("stock", "dram", "peer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backends", default="stock,dram,peer", help="engines to run: " + ",".join(ENGINES))
    parser.add_argument("--sizes", default="10K,40K,80K", help="prompt lengths in tokens; K is 1024")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=sorted(shapes.SHAPES), default="qwen3-30b-a3b", help="dummy weights")
    model.add_argument("--model", help="path of a model to run with its weights")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each hit")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--hicache-size", type=int, default=0, help="GB a rank; 0: what the prompts need, and a half")
    parser.add_argument("--stock-layout", default="layer_first", choices=["layer_first", "page_first"])
    parser.add_argument("--attention-backend", default=None)
    parser.add_argument("--xmem-config", default=None, help="--hicache-xmem-config of the tier engines")
    parser.add_argument("--engine-args", default="{}", help="JSON object of further sgl.Engine keywords")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900, help="seconds an engine may take")
    parser.add_argument("--output", type=Path, default=Path("ttft.jsonl"), help="JSON Lines file to append to")


def run(args: argparse.Namespace) -> int:
    sizes = sorted(parse_tokens(text) for text in args.sizes.split(","))
    backends = args.backends.split(",")
    for backend in backends:
        if backend not in ENGINES:
            raise SystemExit(f"--backends {backend}: choose from {', '.join(ENGINES)}.")
    run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    about = environment.describe()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about_path = args.output.with_name(f"{args.output.stem}.runs.jsonl")
    with about_path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"bench": "ttft", "run": run_id, **about}) + "\n")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for backend in backends:
            spec = engine_spec(args, backend, sizes, Path(folder))
            status, samples, seconds = run_engine(spec, Path(folder), backend, args.timeout)
            rows = summarize(samples, backend, run_id, args)
            with args.output.open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row) + "\n")
            for row in rows:
                show(row)
            bad = [row for row in rows if not row["outputs_equal"] or not row["samples"]]
            print(f"{backend}: engine status {status}, {seconds:.0f} s", file=sys.stderr, flush=True)
            failed = failed or status != 0 or bool(bad) or not rows
    return 1 if failed else 0


def parse_tokens(text: str) -> int:
    """`80K` is 81920 tokens."""
    text = text.strip()
    return int(text[:-1]) * 1024 if text[-1:] in "kK" else int(text)


def engine_spec(args: argparse.Namespace, backend: str, sizes: list[int], folder: Path) -> dict[str, Any]:
    """Everything that an engine's process needs, pool sizes included."""
    gpu = _has_gpu()
    config = shapes.SHAPES[args.shape] if args.model is None else _model_config(Path(args.model))
    model = args.model or str(shapes.write_shape(args.shape, folder))
    filler = 8192 if max(sizes) > 8192 else max(sizes)
    # One prompt of the largest size fits beside a page or two of others; so a flood of as much evicts it.
    max_total = -(-(max(sizes) + filler) // args.page_size) * args.page_size
    engine: dict[str, Any] = {
        "model_path": model,
        "skip_tokenizer_init": True,
        "page_size": args.page_size,
        "tp_size": args.tp_size,
        "max_total_tokens": max_total,
        "max_running_requests": 4,
        "context_length": max_total,
        "chunked_prefill_size": 8192,
        "random_seed": args.seed,
        "log_level": "info",
        "enable_hierarchical_cache": True,
        "hicache_write_policy": "write_through",
        "hicache_io_backend": "kernel",
        "enable_cache_report": True,
    }
    if args.model is None:
        engine["load_format"] = "dummy"
    if gpu:
        engine.update(attention_backend=args.attention_backend or "flashinfer", disable_decode_cuda_graph=True)
        engine.update(cuda_graph_max_bs_prefill=256)
    else:
        engine.update(device="cpu", attention_backend="torch_native", sampling_backend="pytorch", dtype="bfloat16")
        engine.update(disable_overlap_schedule=True)
    needed_tokens = sum(sizes) + 2 * max_total + 4 * filler
    token_bytes = shapes.kv_bytes_per_token(config) // args.tp_size
    engine["hicache_size"] = args.hicache_size or max(1, -(-needed_tokens * token_bytes * 3 // (2 * 10**9)))
    if backend == "stock":
        engine["hicache_mem_layout"] = args.stock_layout
    else:
        engine.update(hicache_use_xmem=True, hicache_xmem_tier=backend, hicache_mem_layout="layer_first")
        if args.xmem_config:
            engine["hicache_xmem_config"] = args.xmem_config
    engine.update(json.loads(args.engine_args))
    return {
        "engine": engine,
        "sizes": sizes,
        "filler_tokens": filler,
        "vocab": config["vocab_size"],
        "rounds": args.rounds,
        "seed": args.seed,
        "tier": True,
        "output_tokens": 16,
        "settle_s": 2.0 if gpu else 0.5,
        "samples": str(folder / f"{backend}.samples.jsonl"),
    }


def run_engine(
    spec: dict[str, Any], folder: Path, backend: str, timeout: float
) -> tuple[int, list[dict[str, Any]], float]:
    """Run one engine's process; what it has measured counts even where it fails."""
    path = folder / f"{backend}.spec.json"
    path.write_text(json.dumps(spec))
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang_xmem.bench.ttft_engine", str(path)],
        stdout=sys.stderr,
        start_new_session=True,
        env={**os.environ, **({} if _has_gpu() else {"SGLANG_USE_CPU_ENGINE": "1"})},
    )
    try:
        status = process.wait(timeout)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        _end_session(process)
        if isinstance(error, KeyboardInterrupt):
            raise
        status = 124
    finally:
        _end_session(process)
    samples_path = Path(spec["samples"])
    lines = samples_path.read_text().splitlines() if samples_path.exists() else []
    return status, [json.loads(line) for line in lines], time.monotonic() - start


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End the engine's own session: its ranks too, nobody else's processes."""
    import signal
    from contextlib import suppress

    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
            time.sleep(0.5)


def summarize(
    samples: list[dict[str, Any]], backend: str, run_id: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each backend and prompt length; unproven samples are counted, not used."""
    rows = []
    for kind, label in (("recompute", "recompute"), ("hbm", "hbm"), ("tier", backend)):
        of_kind = [s for s in samples if s["kind"] == kind]
        for size in sorted({s["prompt_tokens"] for s in of_kind}):
            here = [s for s in of_kind if s["prompt_tokens"] == size]
            proven = [s for s in here if s.get("proven", True)]
            times = [s["ms"] for s in proven]
            rows.append(
                {
                    "bench": "ttft",
                    "run": run_id,
                    "backend": label,
                    "engine": backend,
                    "prompt_tokens": size,
                    "ttft_ms": {
                        "p50": round(statistics.median(times), 3) if times else None,
                        "min": round(min(times), 3) if times else None,
                        "max": round(max(times), 3) if times else None,
                    },
                    "hits": {key: min(s[key] for s in proven) if proven else 0 for key in ("device", "host")},
                    "outputs_equal": all(s.get("outputs_equal", True) for s in here),
                    "samples": len(proven),
                    "samples_unproven": len(here) - len(proven),
                    "all_ms": [round(s["ms"], 3) for s in proven],
                    "shape": args.model or args.shape,
                    "page_size": args.page_size,
                    "tp_size": args.tp_size,
                }
            )
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table, on stdout."""
    ttft = row["ttft_ms"]
    print(
        f"{row['backend']:>10} {row['prompt_tokens']:>7} tokens  p50 {ttft['p50']} ms  ({ttft['min']} - {ttft['max']})"
        f"  device {row['hits']['device']} host {row['hits']['host']}"
        f"  equal {row['outputs_equal']}  unproven {row['samples_unproven']}  [{row['engine']}]",
        flush=True,
    )


def _has_gpu() -> bool:
    from sglang_xmem import gpus
    from sglang_xmem.errors import TierUnavailable

    try:
        return len(gpus.visible_gpus()) > 0
    except TierUnavailable:
        return False


def _model_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config

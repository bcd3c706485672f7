"""A recorded trace of requests in Mooncake's JSON Lines format, replayed by sglang.bench_serving's load generator.

Each line has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one per block of 512 tokens;
equal ids mean equal content. bench_serving's own dataset of this format makes prompts of a quarter of the recorded
length, with nearly the same words in all blocks; here prompts have their recorded length and distinct content. At real
or scaled time, requests are sent at the trace's times, even if earlier ones are still running; with `--speed max`,
--concurrency requests run at once. The GPU's own KV cache is on.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_xmem.bench import runs, sizing, stats, workloads
from sglang_xmem.bench.engine import EngineGone, Limit, Process
from sglang_xmem.bench.progress import Progress
from sglang_xmem.bench.runs import Results, Row
from sglang_xmem.bench.sizing import Need
from sglang_xmem.bench.workloads import TraceRequest
from sglang_xmem.errors import ConfigError

#: The backend's name with --url.
SERVER = "server"
#: Commands of a server and of the load generator; options follow.
LAUNCH = (sys.executable, "-m", "sglang.launch_server")
GENERATOR = (sys.executable, "-m", "sglang_xmem.bench.serving")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, runs.at_least(1)
    add("file", type=Path, help="JSON Lines file")
    runs.add_engine_arguments(parser, "hbm,stock,dram,peer")
    add("--url", default=None, help="a running server, such as http://127.0.0.1:30000; default: that of --backends")
    add("--vocab", type=runs.at_least(16), default=30000, help="with --url: ids are below this; default 30000")
    add("--speed", default="real", help="real, a factor such as 4 (four times as fast), or max; default real")
    add("--share", type=float, default=1.0, help="of the conversations, above 0 to 1; default 1")
    add("--limit", type=count, default=None, help="the first so many requests; default: all, with --quick 20")
    add("--max-tokens", default=None, help="cut prompts to this length; default: none, with --shape tiny 1K")
    add("--max-output", type=count, default=None, help="cut answers to so many tokens; default: none, tiny 8")
    add("--block-tokens", type=count, default=workloads.TRACE_BLOCK_TOKENS, help="tokens of a hash id; default 512")
    add("--concurrency", type=count, default=64, help="requests that may run at once; default 64, without a GPU 4")
    add("--device-tokens", default=None, help="the GPU's KV pool; default: SGLang's, or 4 prompts on a CPU")
    runs.add_output_argument(parser, "trace")


def parse_speed(text: str) -> float | None:
    """Factor of time; None: as fast as possible.

    Raises:
        ConfigError: neither a positive number nor a word that it knows.
    """
    if text == "max":
        return None
    try:
        speed = 1.0 if text == "real" else float(text)
        if not 1e-6 <= speed <= 1e6:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--speed {text} is not a speed. Give real, max or a factor such as 4.") from None
    return speed


def run(args: argparse.Namespace) -> int:
    args.tiny = args.model is None and args.shape == "tiny"
    speed = parse_speed(args.speed)
    if not 0 < args.share <= 1:
        raise ConfigError(f"--share {args.share:g} is not a share of conversations. Give a number above 0, at most 1.")
    cut = args.max_tokens or ("1K" if args.tiny else None)
    requests = workloads.read_trace(
        args.file,
        seed=args.seed,
        limit=args.limit or (20 if args.quick else None),
        max_tokens=runs.parse_tokens(cut) if cut else None,
        max_output=args.max_output or (8 if args.tiny else None),
        block_tokens=args.block_tokens,
        share=args.share,
    )
    if args.url is None:
        runs.settle(args)
        vocab = args.config["vocab_size"]
        concurrency = args.concurrency if args.on_gpu else min(4, args.concurrency)
        options = _options(args, requests, concurrency)
    else:
        if not args.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {args.url} is not an address. Give one such as http://127.0.0.1:30000.")
        if not _healthy(args.url):
            raise ConfigError(f"No server answers at --url {args.url}. Start one first.")
        vocab, concurrency, options = args.vocab, args.concurrency, {SERVER: None}
    prompts = sum(len(request.prompt) for request in requests)
    results = Results(
        "trace",
        args,
        trace=args.file.name,
        speed=args.speed,
        share=args.share,
        **{**runs.about(args), "shape": args.url or args.model or args.shape},
        ideal_hit_ratio=round(workloads.reusable_tokens(requests) / prompts, 4),
    )
    failed = interrupted = False
    with Progress([1] * len(options)) as progress, tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_") as folder:
        schedule = Path(folder) / "schedule.json"
        schedule.write_text(json.dumps(_schedule(requests, speed, concurrency, vocab)))
        for backend, engine in options.items():
            progress.engine(backend)
            problem, rows, log, name = None, [], "", backend
            try:
                with runs.terminated_as_interrupt():
                    until = runs.limit(args)
                    if not until.left_s:
                        raise EngineGone(f"not run: {until.name} is over")
                    if engine is None:
                        rows = [generate(schedule, args.url, until, Path(folder))]
                    else:
                        rows, name = _with_server(args, backend, engine, schedule, Path(folder), progress, until)
            except EngineGone as error:
                problem, log = str(error), error.log
            except KeyboardInterrupt:
                problem, interrupted = "interrupted", True
            for row in rows:
                if row["samples"] < len(requests):
                    problem = f"{row['samples']} of {len(requests)} requests were answered"
            results.write([{"backend": name, **row} for row in rows], engine=name, complete=problem is None)
            for line in runs.last_words(log):
                progress.say(f"  | {line}")
            if problem is not None:
                failed = True
                progress.say(f"error: {backend}: {problem}")
            progress.step("replayed")
            if interrupted:
                break
    results.finish()
    return runs.INTERRUPTED if interrupted else int(failed)


def _options(args: argparse.Namespace, requests: Sequence[TraceRequest], concurrency: int) -> dict[str, Any]:
    """Keywords of each backend's engine."""
    prompt = max(len(request.prompt) for request in requests)
    output = max(request.output_tokens for request in requests)
    longest = sizing.pages_up(prompt + output, args.page_size)
    device: int | None = None
    if args.device_tokens or not args.on_gpu:
        wanted = runs.parse_tokens(args.device_tokens) if args.device_tokens else 4 * longest
        device = sizing.pages_up(wanted, args.page_size)
    pool_gb = args.hicache_size
    if not pool_gb:
        # All of the trace, if memory has as much free; a cache that is too small is a result too.
        free = sizing.available_host_bytes()
        if args.on_gpu and any(name not in ("stock", "dram") for name in args.names if runs.has_pool(name)):
            free = min(free, (runs.gpu_bytes() or free) * args.tp_size)  # one peer for each rank
        wanted_gb = sizing.hicache_gb(workloads.distinct_tokens(requests) * 3 // 2, args.kv)
        pool_gb = min(wanted_gb, max(1, free * 8 // 10 // 10**9 // args.tp_size))
    need = Need(prompt, output, device, longest, longest + args.page_size, concurrency)
    return {name: runs.fitting_options(args, name, need, pool_gb) for name in args.names}


def _schedule(requests: Sequence[TraceRequest], speed: float | None, concurrency: int, vocab: int) -> dict[str, Any]:
    """For sglang_xmem.bench.serving: parts of prompts as [seed, count], arrivals in s, None without times."""
    return {
        "vocab": vocab,
        "concurrency": concurrency if speed is None else None,
        "requests": [
            {
                "at_s": None if speed is None else request.arrival_s / speed,
                "parts": [[part.seed, part.count] for part in request.prompt.parts],  # type: ignore[union-attr]
                "output": request.output_tokens,
            }
            for request in requests
        ],
    }


def _with_server(
    args: argparse.Namespace,
    backend: str,
    engine: dict[str, Any],
    schedule: Path,
    folder: Path,
    progress: Progress,
    until: Limit,
) -> tuple[list[Row], str]:
    """A server of its own for a backend; its row, and the backend's name with `auto` resolved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # bench_serving counts a token where its text comes.
    options = {**engine, "skip_tokenizer_init": False, "host": "127.0.0.1", "port": port}
    command = [*LAUNCH, *as_flags(options)]
    log = None if args.verbose else folder / f"{backend}.log"
    with Process(command, log, runs.cpu_environment(args)) as server:
        url = f"http://127.0.0.1:{port}"
        while not _healthy(url):
            if server.popen.poll() is not None:
                raise EngineGone(f"the server ended with status {server.popen.poll()}", server.log())
            if not until.left_s:
                raise EngineGone(f"the server took longer than {until.name} to start", server.log())
            time.sleep(0.5)
        progress.started()
        row = generate(schedule, url, until, folder)
        name = server.tier or backend if backend == runs.AUTO else backend
        server.popen.terminate()
        server.end_s = min(server.end_s, until.left_s)
        return [row], name


def as_flags(options: dict[str, Any]) -> list[str]:
    """Keywords of sgl.Engine as the server's flags."""
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif isinstance(value, dict):
            flags += [flag, json.dumps(value)]
        elif value is not False and value is not None:
            flags += [flag, str(value)]
    return flags


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def generate(schedule: Path, url: str, until: Limit, folder: Path) -> Row:
    """Replay a schedule against a server.

    Raises:
        EngineGone: the load generator failed.
    """
    output, log = folder / "serving.jsonl", folder / "serving.log"
    output.unlink(missing_ok=True)
    command = [*GENERATOR, str(schedule), url, str(output)]
    with Process(command, log, dict(os.environ)) as generator:
        try:
            generator.popen.wait(until.left_s)
        except subprocess.TimeoutExpired:
            raise EngineGone(f"the replay took longer than {until.name}", generator.log()) from None
        if generator.popen.returncode or not output.exists():
            raise EngineGone(f"the load generator ended with status {generator.popen.returncode}", generator.log())
    return summarize(json.loads(output.read_text().splitlines()[-1]))


def summarize(found: dict[str, Any]) -> Row:
    """A row of bench_serving's result with details."""
    good = [index for index, error in enumerate(found["errors"]) if not error]
    prompts = sum(found["input_lens"][index] for index in good)
    hits = {
        place: sum((found["cached_tokens_details"][index] or {}).get(place) or 0 for index in good)
        for place in ("device", "host")
    }
    share = {place: round(count / max(1, prompts), 4) for place, count in hits.items()}
    gaps = [sum(found["itls"][index]) / len(found["itls"][index]) for index in good if found["itls"][index]]
    return {
        "ttft_ms": stats.summary([1e3 * found["ttfts"][index] for index in good]),
        "e2e_ms": stats.summary([1e3 * (found["ttfts"][index] + sum(found["itls"][index])) for index in good]),
        "inter_token_ms": stats.summary([1e3 * gap for gap in gaps]),
        "hits": hits,
        "hit_ratio": {**share, "total": round(sum(hits.values()) / max(1, prompts), 4)},
        "samples": len(good),
        "samples_unproven": 0,
        "prompt_tokens": prompts,
        "output_tokens": sum(found["output_lens"][index] for index in good),
        "seconds": round(found["duration"], 3),
        "tokens_per_s": round(found["total_throughput"], 2),
    }

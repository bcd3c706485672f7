"""`sglang-xmem bench trace FILE`: replays a recorded trace of requests in Mooncake's JSON Lines format.

A line has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one for each block of 512 tokens;
equal ids are equal content. At real or scaled time requests are sent when the trace says, whatever the engine has still
to do; with `--speed max` as many run at once as --concurrency says. The GPU's own KV cache is on.
"""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_xmem.bench import multiturn, runs, sizing, stats, workloads
from sglang_xmem.bench.engine import threads, warm_up
from sglang_xmem.bench.runs import EnginePlan, Measurement, Results, Sample
from sglang_xmem.bench.workloads import TraceRequest
from sglang_xmem.errors import ConfigError

AS_FAST_AS_POSSIBLE = "max"
#: Requests at most that a warm-up sends at once.
WARM_UP_REQUESTS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="JSON Lines file")
    runs.add_engine_arguments(parser, "hbm,stock,dram,peer")
    multiturn.add_server_arguments(parser)
    parser.add_argument("--speed", default="real", help="real, a factor such as 4 (four times as fast), or max")
    parser.add_argument("--share", type=float, default=1.0, help="replay so many of the conversations, above 0 to 1")
    parser.add_argument(
        "--limit", type=runs.at_least(1), default=None, help="the first so many requests; with --quick 20"
    )
    parser.add_argument("--max-tokens", default=None, help="cut prompts to this length; with --shape tiny 1K")
    parser.add_argument(
        "--max-output", type=runs.at_least(1), default=None, help="cut answers to so many tokens; with --shape tiny 8"
    )
    parser.add_argument(
        "--block-tokens", type=runs.at_least(1), default=workloads.TRACE_BLOCK_TOKENS, help="tokens of one hash id"
    )
    parser.add_argument(
        "--concurrency", type=runs.at_least(1), default=64, help="requests that may run at once; without a GPU 4"
    )
    parser.add_argument(
        "--device-tokens", default=None, help="the GPU's KV pool; default: SGLang's, or 4 prompts on a CPU"
    )
    runs.add_output_arguments(parser, "trace")


def parse_speed(text: str) -> float | None:
    """Factor of time; None: as fast as possible.

    Raises:
        ConfigError: neither a positive number nor a word that it knows.
    """
    if text == AS_FAST_AS_POSSIBLE:
        return None
    try:
        speed = 1.0 if text == "real" else float(text)
        if not 0 < speed < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--speed {text} is not a speed; give real, max or a factor such as 4.") from None
    return speed


@dataclass(frozen=True)
class Replay:
    """Requests, and how they are sent."""

    requests: list[TraceRequest]
    speed: float | None
    concurrency: int


def run(args: argparse.Namespace) -> int:
    tiny = args.model is None and args.shape == "tiny"
    speed = parse_speed(args.speed)
    if not 0 < args.share <= 1:
        raise ConfigError(f"--share {args.share:g} is not a share of conversations; give a number above 0, at most 1.")
    cut = args.max_tokens or ("1K" if tiny else None)
    requests = workloads.read_trace(
        args.file,
        seed=args.seed,
        limit=args.limit or (20 if args.quick else None),
        max_tokens=runs.parse_tokens(cut) if cut else None,
        max_output=args.max_output or (8 if tiny else None),
        block_tokens=args.block_tokens,
        share=args.share,
    )
    if args.url is None:
        runs.settle(args)
        replay = Replay(requests, speed, args.concurrency if args.on_gpu else min(4, args.concurrency))
        plans, device_tokens = _plans(args, replay)
    else:
        multiturn.settle_server(args)
        replay = Replay(requests, speed, args.concurrency)
        plans, device_tokens = [EnginePlan(multiturn.SERVER, {}, len(requests))], None
    settings = runs.parameters(
        args,
        url=args.url,
        trace=args.file.name,
        speed=args.speed,
        requests=len(requests),
        share=args.share,
        max_tokens=cut,
        max_output=args.max_output,
        block_tokens=args.block_tokens,
        concurrency=replay.concurrency,
        device_tokens=device_tokens,
    )
    results = Results("trace", args, settings)
    about = {
        "trace": args.file.name,
        "speed": args.speed,
        "share": args.share,
        "shape": args.url or args.model or args.shape,
        "page_size": args.page_size,
        "tp_size": args.tp_size,
        "device_tokens": device_tokens,
        "ideal_hit_ratio": round(
            workloads.reusable_tokens(requests) / sum(len(request.prompt) for request in requests), 4
        ),
    }

    def measure_engine(engine: Any, plan: EnginePlan, measurement: Measurement) -> None:
        page = args.page_size or 1
        shapes = [(len(request.prompt), request.output_tokens) for request in requests]
        longest = max(tokens for tokens, _ in shapes)
        warm_up(engine, [(2 * page, 4), (longest, 4)], shapes[: min(replay.concurrency, WARM_UP_REQUESTS)])
        measure(engine, replay, measurement)

    def rows(plan: EnginePlan, samples: list[Sample], name: str) -> list[dict[str, Any]]:
        return [{**row, **about} for row in summarize(samples, name)]

    def check(row: dict[str, Any]) -> str | None:
        return (
            None if row["samples"] == len(requests) else f"{row['samples']} of {len(requests)} requests were answered"
        )

    if args.url is not None:
        return multiturn.run_server(args, plans[0], results, measure_engine, rows)
    return runs.run_engines(args, plans, results, measure_engine, rows, check)


def _plans(args: argparse.Namespace, replay: Replay) -> tuple[list[EnginePlan], int | None]:
    prompt = max(len(request.prompt) for request in replay.requests)
    output = max(request.output_tokens for request in replay.requests)
    longest = sizing.pages_up(prompt + output, args.page_size)
    device: int | None = None
    if args.device_tokens or not args.on_gpu:
        wanted = runs.parse_tokens(args.device_tokens) if args.device_tokens else 4 * longest
        device = sizing.pages_up(wanted, args.page_size)
    if args.hicache_size:
        size_gb = args.hicache_size
    else:
        # All of the trace, if host memory has room for that; a cache that is too small is a result too.
        room = sizing.available_host_bytes()
        memory = runs.gpu_bytes() if args.on_gpu else None
        if memory is not None and not all(runs.in_host_memory(name) for name in args.names if runs.has_pool(name)):
            room = min(room, memory * args.tp_size)  # one peer for each rank
        room_gb = max(1, room * 8 // 10 // 10**9 // args.tp_size)
        size_gb = min(sizing.hicache_gb(workloads.distinct_tokens(replay.requests) * 3 // 2, args.kv), room_gb)
    plans = []
    for backend in args.names:
        engine = runs.fitting_options(
            args,
            backend,
            prompt_tokens=prompt,
            output_tokens=output,
            device_tokens=device,
            host_tokens_needed=longest,
            context_tokens=longest + args.page_size,
            hicache_gb=size_gb,
            running=replay.concurrency,
        )
        if args.on_gpu and "disable_decode_cuda_graph" not in args.engine_options:
            engine.pop("disable_decode_cuda_graph")  # answers are decoded as in production
        plans.append(EnginePlan(backend, engine, len(replay.requests)))
    return plans, device


def measure(engine: Any, replay: Replay, measurement: Measurement) -> None:
    """Send every request at its time, or as soon as there is room."""
    # At the trace's times nothing but the engine may hold a request back.
    count = replay.concurrency if replay.speed is None else max(1, min(len(replay.requests), 1024))
    with engine.concurrent(), threads(count) as pool:
        start = time.perf_counter()
        failed = threading.Event()

        def send(request: TraceRequest, due_s: float | None) -> None:
            began = time.perf_counter() - start
            try:
                answer = engine.ask(request.prompt, request.output_tokens)
            except BaseException:
                failed.set()
                raise
            measurement.add(
                prompt_tokens=len(request.prompt),
                began_s=began,
                ended_s=time.perf_counter() - start,
                late_ms=0.0 if due_s is None else max(0.0, (began - due_s) * 1e3),
                answer=answer,
            )
            measurement.step("replaying")

        futures = []
        for request in replay.requests:
            due_s = None if replay.speed is None else request.arrival_s / replay.speed
            if due_s is not None:
                failed.wait(max(0.0, due_s - (time.perf_counter() - start)))
            if failed.is_set():
                break
            futures.append(pool.submit(send, request, due_s))
        for future in futures:
            future.result()


def summarize(samples: list[Sample], backend: str) -> list[dict[str, Any]]:
    """One row."""
    if not samples:
        return []
    times = [s["answer"].ttft_ms for s in samples]
    seconds = max(s["ended_s"] for s in samples) - min(s["began_s"] for s in samples)
    outputs = sum(len(s["answer"].output) for s in samples)
    prompts = sum(s["prompt_tokens"] for s in samples)
    gaps = [
        (s["answer"].total_ms - s["answer"].ttft_ms) / (len(s["answer"].output) - 1)
        for s in samples
        if len(s["answer"].output) > 1
    ]
    return [
        {
            "backend": backend,
            "ttft_ms": stats.summary(times),
            "inter_token_ms": stats.summary(gaps),
            "late_ms": stats.summary([s["late_ms"] for s in samples]),
            "hits": {place: sum(getattr(s["answer"], place) for s in samples) for place in ("device", "host")},
            "hit_ratio": multiturn.hit_ratios(samples),
            "samples": len(samples),
            "samples_unproven": 0,
            "prompt_tokens": prompts,
            "output_tokens": outputs,
            "seconds": round(seconds, 3),
            "tokens_per_s": round((prompts + outputs) / seconds, 2),
        }
    ]

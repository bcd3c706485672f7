"""`sglang-xmem bench multiturn`: agents that share a system prompt, each with a context that grows by turns.

A turn's prompt is all of the turns before it with the model's answers, and what the turn adds. Between an answer and
the next turn an agent thinks. TTFT by turn, and what share of the prompts came from which cache. Each backend is an
engine in its own process; with --url it is a server that runs already, as it is.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from typing import Any

from sglang_xmem.bench import runs, sizing, stats
from sglang_xmem.bench.engine import EngineGone, RequestFailed, threads, warm_up
from sglang_xmem.bench.progress import Progress
from sglang_xmem.bench.runs import EnginePlan, Measurement, Results, Sample
from sglang_xmem.bench.server import ServerClient
from sglang_xmem.bench.workloads import Agents

SERVER = "server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_engine_arguments(parser, "hbm,stock,dram,peer")
    add_server_arguments(parser)
    parser.add_argument(
        "--agents", type=runs.at_least(1), default=None, help="at work at once; default 8, with --quick 3"
    )
    parser.add_argument(
        "--turns", type=runs.at_least(1), default=None, help="requests of each; default 5, with --quick 3"
    )
    parser.add_argument("--system-tokens", default=None, help="shared by all; default 2K, with --shape tiny 128")
    parser.add_argument("--context-tokens", default=None, help="an agent's own; default 28K, with --shape tiny 256")
    parser.add_argument("--turn-tokens", default=None, help="added by a turn; default 512, with --shape tiny 64")
    parser.add_argument(
        "--output-tokens", type=runs.at_least(1), default=None, help="of an answer; default 128, tiny 16"
    )
    parser.add_argument(
        "--think", type=runs.at_least(0, float), default=None, help="mean s between turns; default 1, with --quick 0.05"
    )
    parser.add_argument(
        "--device-tokens", default=None, help="the GPU's KV pool; default: half of all agents' contexts, two at least"
    )
    runs.add_output_arguments(parser, "multiturn")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks that also ask a running server."""
    parser.add_argument("--url", default=None, help="a running server, such as http://127.0.0.1:30000")
    parser.add_argument(
        "--vocab", type=runs.at_least(2), default=None, help="with --url: prompts' ids are below this; default 30000"
    )


def run(args: argparse.Namespace) -> int:
    tiny = args.model is None and args.shape == "tiny"
    agents = Agents(
        agents=args.agents or (3 if args.quick else 8),
        turns=args.turns or (3 if args.quick else 5),
        system_tokens=runs.parse_tokens(args.system_tokens or ("128" if tiny else "2K")),
        context_tokens=runs.parse_tokens(args.context_tokens or ("256" if tiny else "28K")),
        turn_tokens=runs.parse_tokens(args.turn_tokens or ("64" if tiny else "512")),
        output_tokens=args.output_tokens or (16 if tiny else 128),
        think_s=args.think if args.think is not None else (0.05 if args.quick else 1.0),
        seed=args.seed,
    )
    if args.url is None:
        runs.settle(args)
        plans, device_tokens = _plans(args, agents)
    else:
        settle_server(args)
        plans, device_tokens = [EnginePlan(SERVER, {}, agents.agents * agents.turns)], None
    workload = {name: getattr(agents, name) for name in agents.__dataclass_fields__}
    results = Results("multiturn", args, runs.parameters(args, url=args.url, device_tokens=device_tokens, **workload))
    about = {
        "shape": args.url or args.model or args.shape,
        "page_size": args.page_size,
        "tp_size": args.tp_size,
        "device_tokens": device_tokens,
    }

    def measure_engine(engine: Any, plan: EnginePlan, measurement: Measurement) -> None:
        page = args.page_size or 1
        lengths = (2 * page, 2 * page, *[agents.system_tokens + agents.context_tokens] * 2)
        turns = [(max(2 * page, agents.turn_tokens), agents.output_tokens)] * agents.agents
        warm_up(engine, [(length, agents.output_tokens) for length in lengths], turns)
        measure(engine, agents, measurement)

    def rows(plan: EnginePlan, samples: list[Sample], name: str) -> list[dict[str, Any]]:
        return [{**row, **about} for row in summarize(samples, name, agents)]

    def check(row: dict[str, Any]) -> str | None:
        return None if row["samples"] else f"turn {row['turn']}: no request was answered"

    if args.url is not None:
        return run_server(args, plans[0], results, measure_engine, rows)
    return runs.run_engines(args, plans, results, measure_engine, rows, check)


def settle_server(args: argparse.Namespace) -> None:
    """Defaults of a run against a server, whose shape and sizes are its own."""
    args.on_gpu, args.engine_options = False, {}
    args.vocab = args.vocab or 30000


def _plans(args: argparse.Namespace, agents: Agents) -> tuple[list[EnginePlan], int]:
    longest = sizing.pages_up(agents.final_tokens, args.page_size)
    if args.device_tokens:
        device = sizing.pages_up(runs.parse_tokens(args.device_tokens), args.page_size)
    else:
        device = sizing.pages_up(max(2 * longest, agents.total_tokens // 2), args.page_size)
    pool = agents.system_tokens + agents.agents * sizing.pages_up(agents.final_tokens, args.page_size)
    size_gb = args.hicache_size or sizing.hicache_gb(max(pool, device) * 3 // 2, args.kv)
    options = {
        name: runs.fitting_options(
            args,
            name,
            prompt_tokens=agents.final_tokens - agents.output_tokens,
            output_tokens=agents.output_tokens,
            device_tokens=device,
            host_tokens_needed=pool,
            context_tokens=longest + args.page_size,
            hicache_gb=size_gb,
            running=agents.agents,
        )
        for name in args.names
    }
    for engine in options.values():
        if args.on_gpu and "disable_decode_cuda_graph" not in args.engine_options:
            # Answers are decoded as in production.
            engine.pop("disable_decode_cuda_graph")
            engine["cuda_graph_max_bs_decode"] = agents.agents
    return [EnginePlan(name, engine, agents.agents * agents.turns) for name, engine in options.items()], device


def run_server(
    args: argparse.Namespace, plan: EnginePlan, results: Results, measure_server: runs.Measure, rows: runs.Summarize
) -> int:
    """What `runs.run_engines` does for engines, for one server that runs already."""
    client = ServerClient(args.url, args.vocab, args.timeout)
    problem, status = None, 0
    with Progress(plan.steps) as progress:
        measurement = Measurement(progress)
        progress.engine(plan.backend, plan.steps)
        try:
            with runs.terminated_as_interrupt():
                measure_server(client, plan, measurement)
        except (EngineGone, RequestFailed) as error:
            problem, status = str(error), 1
        except KeyboardInterrupt:
            client.stopped = True
            problem, status = "interrupted", runs.INTERRUPTED
        results.write(rows(plan, measurement.samples, plan.backend), plan.backend, 0, complete=problem is None)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    results.finish()
    return status


def measure(engine: Any, agents: Agents, measurement: Measurement) -> None:
    """All agents at once, each with its turns one after another."""
    with engine.concurrent(), threads(agents.agents) as pool:
        start = time.perf_counter()
        over = threading.Event()

        def work(agent: int) -> None:
            prompt = agents.first(agent)
            for turn in range(agents.turns):
                began = time.perf_counter() - start
                answer = engine.ask(prompt, agents.output_tokens)
                measurement.add(
                    agent=agent,
                    turn=turn,
                    prompt_tokens=len(prompt),
                    began_s=began,
                    ended_s=time.perf_counter() - start,
                    answer=answer,
                )
                measurement.step(f"turn {turn + 1} of {agents.turns}")
                if turn + 1 < agents.turns:
                    prompt = agents.following(prompt, answer.output, agent, turn + 1)
                    if over.wait(agents.think(agent, turn + 1)):
                        return

        try:
            for future in [pool.submit(work, agent) for agent in range(agents.agents)]:
                future.result()
        finally:
            over.set()  # who thinks need not finish the thought


def hit_ratios(samples: list[Sample]) -> dict[str, float]:
    """Share of prompt tokens that came from each cache."""
    total = sum(s["prompt_tokens"] for s in samples)
    device, host = (sum(getattr(s["answer"], place) for s in samples) for place in ("device", "host"))
    return {
        "device": round(device / total, 4),
        "host": round(host / total, 4),
        "total": round((device + host) / total, 4),
    }


def summarize(samples: list[Sample], backend: str, agents: Agents) -> list[dict[str, Any]]:
    """A row for each turn (from 0), and one of all (turn null)."""
    rows = []
    for turn in [*range(agents.turns), None]:
        here = [s for s in samples if turn is None or s["turn"] == turn]
        if not here:
            continue
        times = [s["answer"].ttft_ms for s in here]
        row: dict[str, Any] = {
            "backend": backend,
            "turn": turn,
            "prompt_tokens": round(stats.percentile([s["prompt_tokens"] for s in here], 50)),
            "ttft_ms": stats.summary(times),
            "hits": {place: sum(getattr(s["answer"], place) for s in here) for place in ("device", "host")},
            "hit_ratio": hit_ratios(here),
            "samples": len(here),
            "agents": agents.agents,
            "all_ms": [round(ms, 3) for ms in times],
        }
        if turn is None:
            seconds = max(s["ended_s"] for s in here) - min(s["began_s"] for s in here)
            tokens = sum(s["prompt_tokens"] + len(s["answer"].output) for s in here)
            row.update(seconds=round(seconds, 3), tokens_per_s=round(tokens / seconds, 2))
        rows.append({**row, "samples_unproven": 0})
    return rows

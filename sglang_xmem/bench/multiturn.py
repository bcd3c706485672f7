"""Agents that share a system prompt, each with a context that grows by turns: TTFT by turn.

A turn's prompt is all of the turns before it with the model's answers, and what the turn adds. Between an answer and
the next turn an agent thinks. TTFT by turn, and what share of the prompts came from which cache. Each backend is an
engine in its own process. (For a server that runs already, sglang.bench_serving has the dataset agentic-trace.)
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from sglang_xmem.bench import runs, sizing, stats
from sglang_xmem.bench.engine import Client, Report
from sglang_xmem.bench.runs import EnginePlan, Results, Row, Sample
from sglang_xmem.bench.sizing import Need
from sglang_xmem.bench.workloads import Agents

WORKLOAD = Agents

#: Workloads by name: agents, turns, tokens of system prompt, context, each turn and each answer, seconds of thought,
#: and whether the GPU's KV pool is SGLang's own size; else it holds half of all contexts, two at least.
PRESETS: dict[str, tuple[int, int, int, int, int, int, float, bool]] = {
    "default": (8, 5, 2048, 28 * 1024, 512, 128, 1.0, False),
    # The coding agents of public reports: ten contexts, five turns of 174K tokens each.
    "agentic-174k": (10, 5, 4096, 168 * 1024, 1024, 256, 2.0, True),
    "tiny": (8, 5, 128, 256, 64, 16, 1.0, False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_engine_arguments(parser, "hbm,stock,dram,peer")
    parser.add_argument(
        "--preset",
        choices=[name for name in PRESETS if name != "tiny"],
        default="default",
        help="default: 8 agents, 5 turns, contexts of 30K tokens; agentic-174k: 10 contexts, 5 turns of 174K tokens, "
        "the GPU's KV pool as large as SGLang makes it. The options below change a preset; numbers are the default's",
    )
    count = runs.at_least(1)
    parser.add_argument("--agents", type=count, default=None, help="at work at once; default 8, with --quick 3")
    parser.add_argument("--turns", type=count, default=None, help="requests of each; default 5, with --quick 3")
    parser.add_argument("--system-tokens", default=None, help="shared by all; default 2K, with --shape tiny 128")
    parser.add_argument("--context-tokens", default=None, help="an agent's own; default 28K, with --shape tiny 256")
    parser.add_argument("--turn-tokens", default=None, help="added by a turn; default 512, with --shape tiny 64")
    parser.add_argument("--output-tokens", type=count, default=None, help="of an answer; default 128, tiny 16")
    parser.add_argument(
        "--think", type=runs.at_least(0, float), default=None, help="mean s between turns; default 1, with --quick 0.05"
    )
    parser.add_argument(
        "--device-tokens", default=None, help="the GPU's KV pool; default: half of all agents' contexts, two at least"
    )
    runs.add_output_argument(parser, "multiturn")


def run(args: argparse.Namespace) -> int:
    runs.settle(args)
    agents, own_pool = workload_of(args)
    longest = sizing.pages_up(agents.final_tokens, args.page_size)
    device: int | None = sizing.pages_up(max(2 * longest, agents.total_tokens // 2), args.page_size)
    if args.device_tokens:
        device = sizing.pages_up(runs.parse_tokens(args.device_tokens), args.page_size)
    elif own_pool and args.on_gpu:
        device = None
    pool = agents.system_tokens + agents.agents * longest
    pool_gb = args.hicache_size or sizing.hicache_gb(max(pool, device or 0) * 3 // 2, args.kv)
    prompt = agents.final_tokens - agents.output_tokens
    need = Need(prompt, agents.output_tokens, device, pool, longest + args.page_size, agents.agents)
    steps = agents.agents * agents.turns
    plans = [EnginePlan(args, n, runs.fitting_options(args, n, need, pool_gb), agents, steps) for n in args.names]
    results = Results("multiturn", args, preset=args.preset, device_tokens=device)

    def rows(plan: EnginePlan, samples: list[Sample], name: str) -> list[Row]:
        return summarize(samples, name, agents)

    def check(row: Row) -> str | None:
        return None if row["samples"] else f"turn {row['turn']}: no request was answered"

    return runs.run_engines(args, __name__, plans, results, rows, check)


def workload_of(args: argparse.Namespace) -> tuple[Agents, bool]:
    """The preset with what the options change, and whether the GPU's KV pool is SGLang's own size."""
    name = "tiny" if args.tiny and args.preset == "default" else args.preset
    agents, turns, system, context, turn, output, think, own_pool = PRESETS[name]

    def tokens(text: str | None, otherwise: int) -> int:
        return runs.parse_tokens(text) if text else otherwise

    quick = args.quick and args.preset == "default"
    found = Agents(
        agents=args.agents or (3 if quick else agents),
        turns=args.turns or (3 if quick else turns),
        system_tokens=tokens(args.system_tokens, system),
        context_tokens=tokens(args.context_tokens, context),
        turn_tokens=tokens(args.turn_tokens, turn),
        output_tokens=args.output_tokens or output,
        think_s=args.think if args.think is not None else 0.05 if quick else think,
        seed=args.seed,
        page=args.page_size,
    )
    return found, own_pool


def measure(engine: Client, agents: Agents, backend: str, report: Report) -> None:
    """All agents at once, each with its turns one after another."""
    alone = (2 * agents.page, 2 * agents.page, *[agents.system_tokens + agents.context_tokens] * 2)
    turns = [(max(2 * agents.page, agents.turn_tokens), agents.output_tokens)] * agents.agents
    engine.warm_up([(length, agents.output_tokens) for length in alone], turns)
    start = time.perf_counter()

    async def work(agent: int) -> None:
        prompt = agents.first(agent)
        for turn in range(agents.turns):
            began = time.perf_counter() - start
            answer = await engine.stream(prompt, agents.output_tokens)
            report.sample(
                turn=turn,
                prompt_tokens=len(prompt),
                output_tokens=len(answer.output),
                began_s=began,
                ended_s=time.perf_counter() - start,
                ttft_ms=answer.ttft_ms,
                device=answer.device,
                host=answer.host,
            )
            report.step(f"turn {turn + 1} of {agents.turns}")
            if turn + 1 < agents.turns:
                prompt = agents.following(prompt, answer.output, agent, turn + 1)
                await asyncio.sleep(agents.think(agent, turn + 1))

    async def everyone() -> None:
        await asyncio.gather(*(work(agent) for agent in range(agents.agents)))

    engine.run(everyone())


def hit_ratios(samples: list[Sample]) -> dict[str, float]:
    """Share of prompt tokens that came from each cache."""
    total = sum(s["prompt_tokens"] for s in samples)
    device, host = (sum(s[place] for s in samples) for place in ("device", "host"))
    return {
        "device": round(device / total, 4),
        "host": round(host / total, 4),
        "total": round((device + host) / total, 4),
    }


def summarize(samples: list[Sample], backend: str, agents: Agents) -> list[Row]:
    """A row for each turn (from 0), and one of all (turn null)."""
    rows = []
    for turn in [*range(agents.turns), None]:
        here = [s for s in samples if turn is None or s["turn"] == turn]
        if not here:
            continue
        times = [s["ttft_ms"] for s in here]
        row: dict[str, Any] = {
            "backend": backend,
            "turn": turn,
            "prompt_tokens": round(stats.median([s["prompt_tokens"] for s in here])),
            "ttft_ms": stats.summary(times),
            "hits": {place: sum(s[place] for s in here) for place in ("device", "host")},
            "hit_ratio": hit_ratios(here),
            "samples": len(here),
            "samples_unproven": 0,
            "agents": agents.agents,
            "all_ms": [round(ms, 3) for ms in times],
        }
        if turn is None:
            seconds = max(s["ended_s"] for s in here) - min(s["began_s"] for s in here)
            tokens = sum(s["prompt_tokens"] + s["output_tokens"] for s in here)
            row.update(seconds=round(seconds, 3), tokens_per_s=round(tokens / seconds, 2))
        rows.append(row)
    return rows

"""Agents that share a system prompt, each with a context that grows by turns: TTFT by turn.

A turn's prompt consists of all earlier turns, the model's answers and the turn's own tokens. An agent waits between an
answer and its next turn. Reports TTFT by turn, and the share of prompt tokens that came from each cache. Each backend
runs in its own engine process. (For a running server, sglang.bench_serving has the dataset agentic-trace.)
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

from sglang_xmem.bench import runs, sizing, stats
from sglang_xmem.bench.engine import Client, Report
from sglang_xmem.bench.runs import EnginePlan, Results, Row, Sample
from sglang_xmem.bench.sizing import Need
from sglang_xmem.bench.workloads import Agents
from sglang_xmem.errors import ConfigError

WORKLOAD = Agents


@dataclass(frozen=True)
class Preset:
    """A workload by name.

    Attributes:
        agents, turns, system, context, turn, output, think_s: as the options; tokens, and seconds of thought.
        on_gpu: share of the contexts that the GPU's KV pool holds; two contexts at least.
        shape: where none is named.
    """

    agents: int
    turns: int
    system: int
    context: int
    turn: int
    output: int
    think_s: float
    on_gpu: float = 0.5
    shape: str = "qwen3-30b-a3b"


PRESETS = {
    "default": Preset(8, 5, 2048, 28 * 1024, 512, 128, 1.0),
    # The coding agents of public reports: ten contexts, five turns of 174K tokens each. A quarter of the layers, since
    # all would need 175 GB of KV cache, and a context 30 s of an H100 to compute.
    "agentic-174k": Preset(10, 5, 4096, 168 * 1024, 1024, 256, 2.0, 0.3, "qwen3-30b-a3b/4"),
    "tiny": Preset(8, 5, 128, 256, 64, 16, 1.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_engine_arguments(parser, "hbm,stock,dram,peer")
    parser.set_defaults(shape=None)
    parser.add_argument(
        "--preset",
        choices=[name for name in PRESETS if name != "tiny"],
        default="default",
        help="default: 8 agents, 5 turns, contexts of 30K tokens; agentic-174k: 10 agents, 5 turns of 174K tokens, a "
        "GPU's KV pool of three contexts, shape qwen3-30b-a3b/4. The options below change a preset; numbers are the "
        "default's",
    )
    count = runs.at_least(1)
    scale = "of all numbers of tokens but the output's, for smaller machines; default 1"
    parser.add_argument("--scale", type=runs.at_least(1e-4, float, 1.0), default=1.0, help=scale)
    engines = "at the same time, each on GPUs of its own with a part of the agents; default 1"
    parser.add_argument("--engines", type=count, default=1, help=engines)
    parser.add_argument("--agents", type=count, default=None, help="at work at once; default 8, with --quick 3")
    parser.add_argument("--turns", type=count, default=None, help="requests of each; default 5, with --quick 3")
    parser.add_argument("--system-tokens", default=None, help="shared by all; default 2K, with --shape tiny 128")
    parser.add_argument("--context-tokens", default=None, help="an agent's own; default 28K, with --shape tiny 256")
    parser.add_argument("--turn-tokens", default=None, help="added by a turn; default 512, with --shape tiny 64")
    parser.add_argument("--output-tokens", type=count, default=None, help="of an answer; default 128, tiny 16")
    parser.add_argument(
        "--think", type=runs.at_least(0, float), default=None, help="mean s between turns; default 1, with --quick 0.05"
    )
    pool = "an engine's KV pool on its GPU; default: half of its agents' contexts, two at least"
    parser.add_argument("--device-tokens", default=None, help=pool)
    runs.add_output_argument(parser, "multiturn")


def run(args: argparse.Namespace) -> int:
    preset = PRESETS[args.preset]
    args.shape = args.shape or preset.shape
    runs.settle(args)
    whole = workload_of(args)
    if args.engines > whole.agents:
        raise ConfigError(f"--engines {args.engines} is more than --agents {whole.agents}. Give each engine an agent.")
    plans, devices = [], []
    for name in args.names:
        engines = []
        for number in range(args.engines):
            agents = replace(whole, share=(number, args.engines))
            longest = sizing.pages_up(agents.final_tokens, args.page_size)
            device = sizing.pages_up(max(2 * longest, int(agents.total_tokens * preset.on_gpu)), args.page_size)
            if args.device_tokens:
                device = sizing.pages_up(runs.parse_tokens(args.device_tokens), args.page_size)
            pool = agents.system_tokens + len(agents.mine) * longest
            pool_gb = args.hicache_size or sizing.hicache_gb(max(pool, device) * 5 // 4, args.kv)
            prompt = agents.final_tokens - agents.output_tokens
            need = Need(prompt, agents.output_tokens, device, pool, longest + args.page_size, len(agents.mine))
            on = runs.engine_number(args, number)
            engines.append((runs.fitting_options(on, name, need, pool_gb), agents))
            devices.append(device)
        (options, agents), *more = engines
        plans.append(EnginePlan(args, name, options, agents, whole.agents * whole.turns, more=tuple(more)))
    about = {"preset": args.preset, "scale": args.scale, "engines": args.engines, "device_tokens": devices[0]}
    results = Results("multiturn", args, **about)

    def rows(plan: EnginePlan, samples: list[Sample], name: str) -> list[Row]:
        return summarize(samples, name, whole)

    def check(row: Row) -> str | None:
        return None if row["samples"] else f"turn {row['turn']}: no request was answered"

    return runs.run_engines(args, __name__, plans, results, rows, check)


def workload_of(args: argparse.Namespace) -> Agents:
    """The preset with what the options change."""
    preset = PRESETS["tiny" if args.tiny and args.preset == "default" else args.preset]

    def tokens(text: str | None, otherwise: int) -> int:
        return max(1, round((runs.parse_tokens(text) if text else otherwise) * args.scale))

    quick = args.quick and args.preset == "default"
    return Agents(
        agents=args.agents or (3 if quick else preset.agents),
        turns=args.turns or (3 if quick else preset.turns),
        system_tokens=tokens(args.system_tokens, preset.system),
        context_tokens=tokens(args.context_tokens, preset.context),
        turn_tokens=tokens(args.turn_tokens, preset.turn),
        output_tokens=args.output_tokens or preset.output,
        think_s=args.think if args.think is not None else 0.05 if quick else preset.think_s,
        seed=args.seed,
        page=args.page_size,
    )


def measure(engine: Client, agents: Agents, backend: str, report: Report) -> None:
    """All agents at once, each with its turns one after another."""
    alone = (2 * agents.page, 2 * agents.page, *[agents.system_tokens + agents.context_tokens] * 2)
    turns = [(max(2 * agents.page, agents.turn_tokens), agents.output_tokens)] * len(agents.mine)
    engine.warm_up([(length, agents.output_tokens) for length in alone], turns)
    report.together()
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
        await asyncio.gather(*(work(agent) for agent in agents.mine))

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

"""Agents that share a system prompt, each with a context that grows by turns: TTFT by turn.

A turn's prompt consists of all earlier turns, the model's answers and the turn's own tokens. An agent waits between an
answer and its next turn. Reports TTFT by turn, and the share of prompt tokens that came from each cache. Each backend
runs in its own engine process. (For a running server, sglang.bench_serving has the dataset agentic-trace.)
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from typing import Any

from sglang_xmem.bench import runs, setup, stats
from sglang_xmem.bench.engine import Case, Client, Report, Row, Sample
from sglang_xmem.bench.setup import Setup, number, tokens
from sglang_xmem.bench.sizing import Need, pages_up
from sglang_xmem.errors import ConfigError

_OPTIONS = ("agents", "turns", "system_tokens", "context_tokens", "turn_tokens", "output_tokens", "think")
#: Values of these options by preset; `tiny` replaces the default for that shape.
PRESETS = {
    "default": (8, 5, 2048, 28 * 1024, 512, 128, 1.0),
    "tiny": (8, 5, 128, 256, 64, 16, 1.0),
    # The coding agents of public reports: ten contexts, five turns of 174K tokens each.
    "agentic-174k": (10, 5, 4096, 168 * 1024, 1024, 256, 2.0),
}
QUICK = {"agents": 3, "turns": 3, "think": 0.05}
#: Shape of a preset. With all layers these agents would need 175 GB of KV cache, and a context 30 s of an H100.
SHAPES = {"agentic-174k": "qwen3-30b-a3b/4"}
#: Share of an engine's contexts that its GPU's KV pool holds; two contexts at least.
ON_GPU = {"default": 0.5, "agentic-174k": 0.3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    setup.add_engine_arguments(parser, "multiturn", "hbm,stock,dram,peer")
    add, count = parser.add_argument, number(1)
    about = "default: 8 agents, 5 turns, contexts of 30K tokens; agentic-174k: 10 agents, 5 turns of 174K tokens, a "
    about += "GPU's KV pool of three contexts, shape qwen3-30b-a3b/4. The options below change a preset; numbers are "
    add("--preset", choices=list(ON_GPU), default="default", help=about + "the default's")
    about = "of all numbers of tokens but the output's, for smaller machines; default 1"
    add("--scale", type=number(1e-4, float, 1.0), default=1.0, help=about)
    about = "at the same time, each on GPUs of its own with a part of the agents; default 1"
    add("--engines", type=count, default=1, help=about)
    add("--agents", type=count, help="at work at once; default 8, with --quick 3")
    add("--turns", type=count, help="requests of each; default 5, with --quick 3")
    add("--system-tokens", type=tokens, help="shared by all; default 2K, with --shape tiny 128")
    add("--context-tokens", type=tokens, help="an agent's own; default 28K, with --shape tiny 256")
    add("--turn-tokens", type=tokens, help="added by a turn; default 512, with --shape tiny 64")
    add("--output-tokens", type=count, help="of an answer; default 128, with --shape tiny 16")
    add("--think", type=number(0, float), help="mean s between turns; default 1, with --quick 0.05")
    about = "an engine's KV pool on its GPU; default: half of its agents' contexts, two at least"
    add("--device-tokens", type=tokens, help=about)


def run(args: argparse.Namespace) -> int:
    one = Setup(args, args.shape or SHAPES.get(args.preset))
    fill_in(args, one.tiny)
    if args.engines > args.agents:
        raise ConfigError(f"--engines {args.engines} is more than --agents {args.agents}. Give each engine an agent.")
    cases = [Agents(args, one.page, range(index, args.agents, args.engines)) for index in range(args.engines)]
    plans = [one.plan(name, *cases) for name in args.backends]
    about = {"preset": args.preset, "scale": args.scale, "engines": args.engines}
    return runs.run("multiturn", args, plans, **about, device_tokens=cases[0].need.device)


def fill_in(args: argparse.Namespace, tiny: bool) -> None:
    """Give options that were not given their preset's values, and scale numbers of tokens."""
    plain = args.preset == "default"
    values = dict(zip(_OPTIONS, PRESETS["tiny" if tiny and plain else args.preset], strict=True))
    for name, value in {**values, **(QUICK if args.quick and plain else {})}.items():
        given = getattr(args, name)
        found = value if given is None else given
        if name.endswith("_tokens") and name != "output_tokens":
            found = max(1, round(found * args.scale))
        setattr(args, name, found)


class Agents(Case):
    """Agents that work on contexts of their own behind one system prompt, all at once.

    Args:
        args: after `fill_in`.
        mine: numbers of the agents that this engine has.
    """

    def __init__(self, args: argparse.Namespace, page: int, mine: range) -> None:
        self.page, self.mine, self.seed, self.agents, self.turns = page, mine, args.seed, args.agents, args.turns
        self.system_tokens, self.context_tokens = args.system_tokens, args.context_tokens
        self.turn_tokens, self.output_tokens, self.think_s = args.turn_tokens, args.output_tokens, args.think
        self.steps = len(mine) * self.turns
        prompt = self.prompt_tokens(self.turns - 1)
        longest = pages_up(prompt + self.output_tokens, page)
        own = self.system_tokens + len(mine) * (prompt + self.output_tokens - self.system_tokens)
        device = pages_up(args.device_tokens or max(2 * longest, int(own * ON_GPU[args.preset])), page)
        held = self.system_tokens + len(mine) * longest
        self.need = Need(prompt, self.output_tokens, device, max(held, device), len(mine))

    def prompt_tokens(self, turn: int) -> int:
        """Length of the prompt of `turn`, from 0."""
        return self.system_tokens + self.context_tokens + turn * (self.output_tokens + self.turn_tokens)

    def think(self, agent: int, turn: int) -> float:
        """Seconds before `turn`: 0.5 to 1.5 times the mean."""
        return self.think_s * random.Random(f"{self.seed} think {turn} {agent}").uniform(0.5, 1.5)

    def measure(self, engine: Client, report: Report) -> None:
        """All agents at once, each with its turns one after another."""
        system = engine.draw(f"{self.seed} system", self.system_tokens)
        first = {a: system + engine.draw(f"{self.seed} context {a}", self.context_tokens) for a in self.mine}
        engine.warm_up(
            [2 * self.page] * 2 + [self.prompt_tokens(0)] * 2,
            [max(2 * self.page, self.turn_tokens)] * len(first),
            self.output_tokens,
        )
        report.together()
        start = time.perf_counter()

        async def work(agent: int) -> None:
            prompt = first[agent]
            for turn in range(self.turns):
                began = time.perf_counter() - start
                answer = await engine.stream(prompt, self.output_tokens)
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
                report.step(f"turn {turn + 1} of {self.turns}")
                if turn + 1 < self.turns:
                    more = engine.draw(f"{self.seed} turn {turn + 1} {agent}", self.turn_tokens)
                    prompt = prompt + answer.output + more
                    await asyncio.sleep(self.think(agent, turn + 1))

        async def everyone() -> None:
            await asyncio.gather(*map(work, first))

        engine.run(everyone())

    def rows(self, samples: list[Sample], backend: str) -> list[Row]:
        """A row for each turn (from 0), and one of all (turn null)."""
        rows = []
        for turn in [*range(self.turns), None]:
            here = [s for s in samples if turn is None or s["turn"] == turn]
            if not here:
                continue
            times, prompts = [s["ttft_ms"] for s in here], sum(s["prompt_tokens"] for s in here)
            hits = {place: sum(s[place] for s in here) for place in ("device", "host")}
            row: dict[str, Any] = {
                "backend": backend,
                "turn": turn,
                "prompt_tokens": round(stats.median([s["prompt_tokens"] for s in here])),
                "ttft_ms": stats.summary(times),
                "hits": hits,
                "hit_ratio": stats.hit_ratio(hits, prompts),
                "samples": len(here),
                "samples_unproven": 0,
                "agents": self.agents,
                "all_ms": [round(ms, 3) for ms in times],
            }
            if turn is None:
                seconds = max(s["ended_s"] for s in here) - min(s["began_s"] for s in here)
                whole = prompts + sum(s["output_tokens"] for s in here)
                row |= {"seconds": round(seconds, 3), "tokens_per_s": round(whole / seconds, 2)}
            rows.append(row)
        return rows

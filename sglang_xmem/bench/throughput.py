"""tokens/s at given hit ratios and concurrencies.

Each backend runs in its own engine process. New prompts begin like earlier ones: at a hit ratio of 80 %, the first 80 %
of each prompt are in the tier and the rest is new. Before each cell, a flood of other prompts evicts all prompts from
the GPU's pool, and `cached_tokens_details` proves where hits came from. `hbm` keeps all prompts in the GPU's pool;
`recompute` has no cache and is measured at 0 % only.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from sglang_xmem.bench import runs, setup, stats
from sglang_xmem.bench.engine import Case, Client, Report, Row, Sample, Tokens
from sglang_xmem.bench.setup import HBM, RECOMPUTE, Setup, has_pool, number, several, tokens
from sglang_xmem.bench.sizing import Need, least_hit, pages_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    setup.add_engine_arguments(parser, "throughput", "hbm,stock,dram,peer,recompute")
    add, ratios = parser.add_argument, "percent that hits; default 0,50,80,90,100, with --quick 0,50,100"
    add("--size", type=tokens, help="prompt length in tokens; default 8K, with --shape tiny 256")
    add("--hit-ratios", type=several(number(0, float, 100)), help=ratios)
    add("--concurrency", type=several(number(1)), help="requests at once; default 1,4,8, with --quick 2")
    add("--output-tokens", type=number(1), help="of each request; default 16, with --quick 4")
    add("--requests", type=number(1), help="of each cell; default twice the largest concurrency")
    add("--rounds", type=number(1), help="samples of each cell; default 3, with --quick 2")


def run(args: argparse.Namespace) -> int:
    one = Setup(args, args.shape)
    return runs.run("throughput", args, [one.plan(name, Throughput(one, name)) for name in args.backends])


class Throughput(Case):
    """What is asked of a backend's engine: cells of a hit ratio at a concurrency, each with a number of requests."""

    def __init__(self, one: Setup, backend: str) -> None:
        args = one.args
        self.backend, self.page, self.seed = backend, one.page, args.seed
        self.size = args.size or (256 if one.tiny else 8192)
        self.output_tokens = args.output_tokens or (4 if args.quick else 16)
        self.levels = sorted(args.concurrency or ([2] if args.quick else [1, 4, 8]))
        percents = args.hit_ratios or ([0, 50, 100] if args.quick else [0, 50, 80, 90, 100])
        # Descending, so that a prompt's last pages are used before new ones push.
        self.ratios = [0.0] if backend == RECOMPUTE else sorted((p / 100 for p in percents), reverse=True)
        self.requests = args.requests or 2 * self.levels[-1]
        self.rounds = args.rounds or (2 if args.quick else 3)
        self.settle_s = 2.0 if one.on_gpu else 0.2  # for writing through to the tier
        self.fillers = self.levels[-1] + 2  # push all others out of the GPU's pool
        self.steps = 1 + len(self.ratios) * len(self.levels) * self.rounds
        request = pages_up(self.size + self.output_tokens, self.page)
        # What one round adds to a cache between two uses of the same prompt's last page.
        new = sum(pages_up(self.size - self.hit_tokens(r) + self.output_tokens, self.page) for r in self.ratios)
        asked_again = self.requests * (request + new)
        # With `hbm` the GPU's pool has all that is asked again, else no more than runs at once and one request.
        device = self.levels[-1] * request + (asked_again if backend == HBM else request)
        pool = asked_again + self.fillers * request + self.page
        self.need = Need(self.size, self.output_tokens, device, pool, self.levels[-1])

    def hit_tokens(self, ratio: float) -> int:
        """Tokens of a prompt that were asked before, in whole pages."""
        return round(self.size * ratio) // self.page * self.page

    def prompts(self, engine: Client, ratio: float, cell: str) -> list[Tokens]:
        """Each the beginning of what was asked before under its index, and tokens that this cell alone has."""
        hit = self.hit_tokens(ratio)
        bases = (engine.draw(f"{self.seed} base {index}", hit) for index in range(self.requests))
        return [base + engine.draw(f"{self.seed} {cell} {i}", self.size - hit) for i, base in enumerate(bases)]

    def measure(self, engine: Client, report: Report) -> None:
        most = self.levels[-1]
        flood = [engine.draw(f"{self.seed} filler {index}", self.size) for index in range(self.fillers)]
        if not has_pool(self.backend):
            flood = []
        for level in self.levels * 2:  # batches of each concurrency, compiled and loaded
            engine.warm_up([], [self.size] * level, self.output_tokens)
        if self.backend != RECOMPUTE:
            engine.ask_all(self.prompts(engine, 1.0, "base"), most)
            engine.ask_all(flood, most)
        time.sleep(self.settle_s)  # write-through to the tier ends in the background
        report.step("warming up")
        cells = [(level, ratio) for level in self.levels for ratio in self.ratios]
        for round_ in range(self.rounds):
            for level, ratio in cells:
                engine.ask_all(flood, most)
                prompts = self.prompts(engine, ratio, f"round {round_} {level} {ratio:g}")
                start = time.perf_counter()
                answers = engine.ask_all(prompts, level, self.output_tokens)
                seconds = time.perf_counter() - start
                found = [{**asdict(answer), "output": len(answer.output)} for answer in answers]
                report.sample(ratio=ratio, level=level, seconds=seconds, answers=found)
                report.step(f"{ratio:.0%} hits, {level} at once, round {round_ + 1}")

    def rows(self, samples: list[Sample], backend: str) -> list[Row]:
        """A row for each cell.

        tokens/s are those of prompts and answers by the time from the first request to the last token, in each round; a
        round with requests whose hit has no proof counts them and keeps its rate, because their work is in it.
        """
        rows = []
        for level, ratio in sorted({(s["level"], s["ratio"]) for s in samples}):
            here = [s for s in samples if (s["level"], s["ratio"]) == (level, ratio)]
            answers = [answer for s in here for answer in s["answers"]]
            good = [answer for answer in answers if self.proven(answer, self.hit_tokens(ratio))]
            rates = [self.requests * (self.size + self.output_tokens) / s["seconds"] for s in here]
            seconds = stats.median([s["seconds"] for s in here])
            hits = sum(answer["device"] + answer["host"] for answer in answers)
            # What loads cost those who decode.
            gaps = [(a["total_ms"] - a["ttft_ms"]) / (a["output"] - 1) for a in answers if a["output"] > 1]
            rows.append(
                {
                    "backend": backend,
                    "hit_ratio": ratio,
                    "concurrency": level,
                    "tokens_per_s": round(stats.median(rates), 2),
                    "min": round(min(rates), 2),
                    "max": round(max(rates), 2),
                    "tokens_per_s_all": [round(rate, 2) for rate in rates],
                    "requests_per_s": round(self.requests / seconds, 4),
                    "output_tokens_per_s": round(self.requests * self.output_tokens / seconds, 2),
                    "ttft_ms": stats.summary([answer["ttft_ms"] for answer in answers]),
                    "inter_token_ms": stats.summary(gaps),
                    "hits": {place: min(answer[place] for answer in answers) for place in ("device", "host")},
                    "measured_hit_ratio": round(hits / (len(answers) * self.size), 4),
                    "samples": len(good),
                    "samples_unproven": len(answers) - len(good),
                    "prompt_tokens": self.size,
                    "output_tokens": self.output_tokens,
                }
            )
        return rows

    def proven(self, answer: dict[str, Any], hit_tokens: int) -> bool:
        """Whether a request found what it should, where it should."""
        hit, other = (answer[place] for place in (("device", "host") if self.backend == HBM else ("host", "device")))
        return bool(least_hit(hit_tokens, self.page) <= hit <= hit_tokens and other <= self.page)

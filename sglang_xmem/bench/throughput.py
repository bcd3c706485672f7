"""tokens/s at given hit ratios and concurrencies.

Each backend runs in its own engine process. New prompts begin like earlier ones: at a hit ratio of 80 %, the first 80 %
of each prompt are in the tier and the rest is new. Before each cell, a flood of other prompts evicts all prompts from
the GPU's pool, and `cached_tokens_details` proves where hits came from. `hbm` keeps all prompts in the GPU's pool;
`recompute` has no cache and is measured at 0 % only.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from typing import Any

from sglang_xmem.bench import runs, sizing, stats
from sglang_xmem.bench.engine import Client, Report
from sglang_xmem.bench.runs import HBM, RECOMPUTE, EnginePlan, Results, Row, Sample
from sglang_xmem.bench.sizing import Need
from sglang_xmem.bench.workloads import Drawn, Prompt
from sglang_xmem.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_engine_arguments(parser, "hbm,stock,dram,peer,recompute")
    parser.add_argument("--size", default=None, help="prompt length in tokens; default 8K, with --shape tiny 256")
    parser.add_argument(
        "--hit-ratios", default=None, help="percent that hits; default 0,50,80,90,100, with --quick 0,50,100"
    )
    parser.add_argument("--concurrency", default=None, help="requests at once; default 1,4,8, with --quick 2")
    parser.add_argument(
        "--output-tokens", type=runs.at_least(1), default=None, help="of each request; default 16, with --quick 4"
    )
    parser.add_argument(
        "--requests", type=runs.at_least(1), default=None, help="of each cell; default twice the largest concurrency"
    )
    parser.add_argument(
        "--rounds", type=runs.at_least(1), default=None, help="samples of each cell; default 3, with --quick 2"
    )
    runs.add_output_argument(parser, "throughput")


def parse_ratios(text: str) -> list[float]:
    """Shares from percent, ascending.

    Raises:
        ConfigError: not numbers of 0 to 100.
    """
    try:
        ratios = sorted({float(part) / 100 for part in text.split(",")})
        if not all(0 <= ratio <= 1 for ratio in ratios):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--hit-ratios {text} are not percentages. Give some such as 0,50,100.") from None
    return ratios


@dataclass(frozen=True)
class Workload:
    """What is asked of each engine; tokens a request `size` and `output_tokens`, `requests` in a cell."""

    size: int
    ratios: list[float]
    levels: list[int]
    output_tokens: int
    requests: int
    rounds: int
    page: int
    seed: int
    settle_s: float

    @property
    def request_tokens(self) -> int:
        """A request's place in the GPU's pool."""
        return sizing.pages_up(self.size + self.output_tokens, self.page)

    def device_tokens(self, backend: str) -> int:
        """Of the GPU's pool: as many requests as run at once, and one more; with `hbm` all that is asked again."""
        if backend != HBM:
            return (max(self.levels) + 1) * self.request_tokens
        return self.requests * self.request_tokens + self._new_tokens + max(self.levels) * self.request_tokens

    @property
    def _new_tokens(self) -> int:
        """What one round of all ratios adds to a cache, between two uses of the same prompt's last page."""
        new = sum(sizing.pages_up(self.size - self.hit_tokens(r) + self.output_tokens, self.page) for r in self.ratios)
        return self.requests * new

    @property
    def pool_tokens(self) -> int:
        """Of HiCache's pool: all prompts, what one round adds to them, and the flood."""
        return self.requests * self.request_tokens + self._new_tokens + len(self.fillers) * self.request_tokens

    def hit_tokens(self, ratio: float) -> int:
        """Tokens of a prompt that were asked before, in whole pages."""
        return round(self.size * ratio) // self.page * self.page

    def prompt(self, index: int, ratio: float, cell: str) -> Prompt:
        """The beginning of what was asked before under this index, and tokens that this cell alone has."""
        hit = self.hit_tokens(ratio)
        rest = Drawn(f"{self.seed} {cell} {index}", self.size - hit)
        return Prompt(()).then(Drawn(f"{self.seed} base {index}", hit), rest)

    @property
    def fillers(self) -> list[Prompt]:
        """Prompts that push all others out of the GPU's pool."""
        return [Prompt.drawn(f"{self.seed} filler {index}", self.size) for index in range(max(self.levels) + 2)]

    def steps(self, backend: str) -> int:
        """Cells that progress counts."""
        return 1 + (1 if backend == RECOMPUTE else len(self.ratios)) * len(self.levels) * self.rounds


WORKLOAD = Workload


def run(args: argparse.Namespace) -> int:
    runs.settle(args)
    levels = [runs.parse_tokens(level) for level in (args.concurrency or ("2" if args.quick else "1,4,8")).split(",")]
    workload = Workload(
        size=runs.parse_tokens(args.size or ("256" if args.tiny else "8K")),
        ratios=parse_ratios(args.hit_ratios or ("0,50,100" if args.quick else "0,50,80,90,100")),
        levels=sorted(set(levels)),
        output_tokens=args.output_tokens or (4 if args.quick else 16),
        requests=args.requests or 2 * max(levels),
        rounds=args.rounds or (2 if args.quick else 3),
        page=args.page_size,
        seed=args.seed,
        settle_s=2.0 if args.on_gpu else 0.2,
    )
    pool = workload.pool_tokens
    pool_gb = args.hicache_size or sizing.hicache_gb((pool + args.page_size) * 5 // 4, args.kv)
    context = workload.request_tokens + args.page_size
    plans = []
    for name in args.names:
        device = workload.device_tokens(name)
        need = Need(workload.size, workload.output_tokens, device, pool, context, max(workload.levels))
        options = runs.fitting_options(args, name, need, pool_gb)
        plans.append(EnginePlan(args, name, options, workload, workload.steps(name)))
    results = Results("throughput", args)

    def rows(plan: EnginePlan, samples: list[Sample], name: str) -> list[Row]:
        return summarize(samples, name, workload)

    def check(row: Row) -> str | None:
        wrong = runs.unproven(row, args.max_unproven)
        return wrong and f"{row['hit_ratio']:.0%} hits, concurrency {row['concurrency']}: {wrong}"

    return runs.run_engines(args, __name__, plans, results, rows, check)


def measure(engine: Client, workload: Workload, backend: str, report: Report) -> None:
    """All cells in rounds, hit ratios descending, so that a prompt's last pages are used before new ones push."""
    most = max(workload.levels)
    flood = workload.fillers if runs.has_pool(backend) else []
    for level in workload.levels:  # batches of each concurrency, compiled and loaded
        for _ in range(2):
            engine.warm_up([], [(workload.size, workload.output_tokens)] * level)
    if backend != RECOMPUTE:
        engine.ask_all([workload.prompt(index, 1.0, "base") for index in range(workload.requests)], most)
        engine.ask_all(flood, most)
    time.sleep(workload.settle_s)  # write-through to the tier ends in the background
    report.step("warming up")
    ratios = [0.0] if backend == RECOMPUTE else sorted(workload.ratios, reverse=True)
    for round_number in range(workload.rounds):
        for level in workload.levels:
            for ratio in ratios:
                engine.ask_all(flood, most)
                cell = f"round {round_number} {level} {ratio:g}"
                prompts = [workload.prompt(index, ratio, cell) for index in range(workload.requests)]
                start = time.perf_counter()
                answers = engine.ask_all(prompts, level, workload.output_tokens)
                seconds = time.perf_counter() - start
                found = [{**asdict(answer), "output": len(answer.output)} for answer in answers]
                report.sample(ratio=ratio, level=level, seconds=seconds, answers=found)
                report.step(f"{ratio:.0%} hits, {level} at once, round {round_number + 1}")


def summarize(samples: list[Sample], backend: str, workload: Workload) -> list[Row]:
    """A row for each hit ratio and concurrency.

    tokens/s are those of prompts and answers by the time from the first request to the last token, in each round; a
    round with requests whose hit has no proof counts them and keeps its rate, because their work is in it.
    """
    rows = []
    for level, ratio in sorted({(s["level"], s["ratio"]) for s in samples}):
        here = [s for s in samples if (s["level"], s["ratio"]) == (level, ratio)]
        answers = [answer for s in here for answer in s["answers"]]
        good = [answer for answer in answers if proven(answer, backend, workload.hit_tokens(ratio), workload.page)]
        tokens = workload.requests * (workload.size + workload.output_tokens)
        rates = [tokens / s["seconds"] for s in here]
        seconds = stats.median([s["seconds"] for s in here])
        hits = sum(answer["device"] + answer["host"] for answer in answers)
        rows.append(
            {
                "backend": backend,
                "hit_ratio": ratio,
                "concurrency": level,
                "tokens_per_s": round(stats.median(rates), 2),
                "min": round(min(rates), 2),
                "max": round(max(rates), 2),
                "tokens_per_s_all": [round(rate, 2) for rate in rates],
                "requests_per_s": round(workload.requests / seconds, 4),
                "output_tokens_per_s": round(workload.requests * workload.output_tokens / seconds, 2),
                "ttft_ms": stats.summary([answer["ttft_ms"] for answer in answers]),
                "inter_token_ms": stats.summary(inter_token_ms(answers)),
                "hits": {place: min(answer[place] for answer in answers) for place in ("device", "host")},
                "measured_hit_ratio": round(hits / (len(answers) * workload.size), 4),
                "samples": len(good),
                "samples_unproven": len(answers) - len(good),
                "prompt_tokens": workload.size,
                "output_tokens": workload.output_tokens,
            }
        )
    return rows


def inter_token_ms(answers: list[dict[str, Any]]) -> list[float]:
    """Mean time between tokens of each answer that has several, in ms: what loads cost those who decode."""
    return [(a["total_ms"] - a["ttft_ms"]) / (a["output"] - 1) for a in answers if a["output"] > 1]


def proven(answer: dict[str, Any], backend: str, hit_tokens: int, page: int) -> bool:
    """Whether a request found what it should, where it should."""
    hit, other = (answer["device"], answer["host"]) if backend == HBM else (answer["host"], answer["device"])
    return bool(runs.least_hit(hit_tokens, page) <= hit <= hit_tokens and other <= page)

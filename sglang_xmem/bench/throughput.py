"""`sglang-xmem bench throughput`: tokens/s where a given share of each prompt hits, at several concurrencies.

Each backend is an engine in its own process. Prompts that were asked before share their beginning with new ones: at a
hit ratio of 80 %, the first 80 % of each prompt lie in the tier and the rest is new. Before each cell a flood pushes
all prompts out of the GPU's pool, and the samples prove by `cached_tokens_details` where their hits came from.
`hbm` keeps all prompts in the GPU's pool; `recompute` has no cache, so it is measured without hits alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_xmem.bench import runs, sizing, stats
from sglang_xmem.bench.engine import threads
from sglang_xmem.bench.runs import HBM, RECOMPUTE, EnginePlan, Measurement, Results, Sample
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
    runs.add_output_arguments(parser, "throughput")


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
        raise ConfigError(f"--hit-ratios {text} are not percentages; give some such as 0,50,100.") from None
    return ratios


@dataclass(frozen=True)
class Workload:
    """What is asked of each engine; tokens a request `size` and `output_tokens`, `requests` in a cell."""

    size: int
    ratios: Sequence[float]
    levels: Sequence[int]
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

    def base(self, index: int) -> Prompt:
        """A prompt that is asked before measuring."""
        return Prompt.drawn(f"{self.seed} base {index}", self.size)

    def prompt(self, index: int, ratio: float, cell: str) -> Prompt:
        """The `index`th base's beginning, and tokens that this cell alone has."""
        hit = self.hit_tokens(ratio)
        rest = Drawn(f"{self.seed} {cell} {index}", self.size - hit)
        return Prompt(()).then(Drawn(f"{self.seed} base {index}", hit), rest)

    @property
    def fillers(self) -> list[Prompt]:
        """Prompts that take the place of all others in the GPU's pool."""
        return [Prompt.drawn(f"{self.seed} filler {index}", self.size) for index in range(max(self.levels) + 2)]

    def steps(self, backend: str) -> int:
        """Cells that progress counts."""
        ratios = 1 if backend == RECOMPUTE else len(self.ratios)
        return 1 + ratios * len(self.levels) * self.rounds


def run(args: argparse.Namespace) -> int:
    runs.settle(args)
    tiny = args.model is None and args.shape == "tiny"
    levels = [runs.parse_tokens(level) for level in (args.concurrency or ("2" if args.quick else "1,4,8")).split(",")]
    workload = Workload(
        size=runs.parse_tokens(args.size or ("256" if tiny else "8K")),
        ratios=parse_ratios(args.hit_ratios or ("0,50,100" if args.quick else "0,50,80,90,100")),
        levels=sorted(set(levels)),
        output_tokens=args.output_tokens or (4 if args.quick else 16),
        requests=args.requests or 2 * max(levels),
        rounds=args.rounds or (2 if args.quick else 3),
        page=args.page_size,
        seed=args.seed,
        settle_s=2.0 if args.on_gpu else 0.2,
    )
    plans = [EnginePlan(name, _engine(args, workload, name), workload.steps(name)) for name in args.names]
    settings = runs.parameters(
        args,
        size=workload.size,
        hit_ratios=workload.ratios,
        concurrency=workload.levels,
        output_tokens=workload.output_tokens,
        requests=workload.requests,
        rounds=workload.rounds,
    )
    results = Results("throughput", args, settings)

    def measure_engine(engine: Any, plan: EnginePlan, measurement: Measurement) -> None:
        measure(engine, workload, plan.backend, measurement)

    def rows(plan: EnginePlan, samples: list[Sample], name: str) -> list[dict[str, Any]]:
        about = {"shape": args.model or args.shape, "page_size": args.page_size, "tp_size": args.tp_size}
        return [{**row, **about} for row in summarize(samples, name, workload)]

    def check(row: dict[str, Any]) -> str | None:
        wrong = runs.unproven(row, args.max_unproven)
        return wrong and f"{row['hit_ratio']:.0%} hits, concurrency {row['concurrency']}: {wrong}"

    return runs.run_engines(args, plans, results, measure_engine, rows, check)


def _engine(args: argparse.Namespace, workload: Workload, backend: str) -> dict[str, Any]:
    """Keywords of sgl.Engine; refuses what cannot fit."""
    needed = workload.pool_tokens + args.page_size
    size_gb = args.hicache_size or sizing.hicache_gb(needed * 5 // 4, args.kv)
    options = runs.fitting_options(
        args,
        backend,
        prompt_tokens=workload.size,
        output_tokens=workload.output_tokens,
        device_tokens=workload.device_tokens(backend),
        host_tokens_needed=workload.pool_tokens,
        context_tokens=workload.request_tokens + args.page_size,
        hicache_gb=size_gb,
        running=max(workload.levels),
    )
    if args.on_gpu and "disable_decode_cuda_graph" not in args.engine_options:
        # Several tokens of output at once are decoded as in production.
        options.pop("disable_decode_cuda_graph")
        options["cuda_graph_max_bs_decode"] = max(workload.levels)
    return {**options, **args.engine_options}


def measure(engine: Any, workload: Workload, backend: str, measurement: Measurement) -> None:
    """All cells in rounds, hit ratios descending, so that a prompt's last pages are used before new ones push."""
    bases = [workload.base(index) for index in range(workload.requests)]
    pooled = runs.has_pool(backend)
    flood = workload.fillers if pooled else []
    with engine.concurrent():
        for index, level in enumerate(workload.levels):  # batches of each concurrency, compiled and loaded
            warm_up = [Prompt.drawn(f"warm up {index} {i}", workload.size) for i in range(level)]
            for _ in range(2):
                ask_all(engine, warm_up, level, workload.output_tokens)
        if backend != RECOMPUTE:
            ask_all(engine, bases, max(workload.levels), 1)
            ask_all(engine, flood, max(workload.levels), 1)
        time.sleep(workload.settle_s)  # write-through to the tier ends in the background
        measurement.step("warming up")
        ratios = [0.0] if backend == RECOMPUTE else sorted(workload.ratios, reverse=True)
        for round_number in range(workload.rounds):
            for level in workload.levels:
                for ratio in ratios:
                    ask_all(engine, flood, max(workload.levels), 1)
                    cell = f"round {round_number} {level} {ratio:g}"
                    prompts = [workload.prompt(index, ratio, cell) for index in range(workload.requests)]
                    start = time.perf_counter()
                    answers = ask_all(engine, prompts, level, workload.output_tokens)
                    seconds = time.perf_counter() - start
                    measurement.add(ratio=ratio, level=level, seconds=seconds, answers=answers)
                    measurement.step(f"{ratio:.0%} hits, {level} at once, round {round_number + 1}")


def ask_all(engine: Any, prompts: Sequence[Prompt], level: int, output_tokens: int) -> list[Any]:
    """Ask for all, `level` at once; answers in the order of prompts."""
    if not prompts:
        return []
    with threads(level) as pool:
        return list(pool.map(lambda prompt: engine.ask(prompt, output_tokens), prompts))


def summarize(samples: list[Sample], backend: str, workload: Workload) -> list[dict[str, Any]]:
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
        rows.append(
            {
                "backend": backend,
                "hit_ratio": ratio,
                "concurrency": level,
                "tokens_per_s": round(stats.percentile(rates, 50), 2),
                "min": round(min(rates), 2),
                "max": round(max(rates), 2),
                "tokens_per_s_all": [round(rate, 2) for rate in rates],
                "requests_per_s": round(workload.requests / stats.percentile([s["seconds"] for s in here], 50), 4),
                "output_tokens_per_s": round(
                    workload.requests * workload.output_tokens / stats.percentile([s["seconds"] for s in here], 50), 2
                ),
                "ttft_ms": stats.summary([answer.ttft_ms for answer in answers]),
                "hits": {
                    "device": min(answer.device for answer in answers),
                    "host": min(answer.host for answer in answers),
                },
                "measured_hit_ratio": round(
                    sum(answer.device + answer.host for answer in answers) / (len(answers) * workload.size), 4
                ),
                "samples": len(good),
                "samples_unproven": len(answers) - len(good),
                "prompt_tokens": workload.size,
                "output_tokens": workload.output_tokens,
            }
        )
    return rows


def proven(answer: Any, backend: str, hit_tokens: int, page: int) -> bool:
    """Whether a request found what it should, where it should."""
    hit = answer.device if backend == HBM else answer.host
    other = answer.host if backend == HBM else answer.device
    return bool(runs.least_hit(hit_tokens, page) <= hit <= hit_tokens and other <= page)

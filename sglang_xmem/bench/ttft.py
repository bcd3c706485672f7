"""Time to first token of a hit in each backend, by prompt length, with proof of each hit, a floor and a ceiling.

Measures the wall time of `generate` with one output token. Each backend runs in its own engine process, on the same
prompts. A sample counts as a hit of the tier only if SGLang's `cached_tokens_details` confirms it. Other samples are
counted and shown; too many fail the run. Every engine also measures hits in the GPU's own pool (`hbm`) and prompts
without a cached prefix (`recompute`); named alone, these use stock SGLang without HiCache. The floor is the least time
of a tier hit: CPU time, plus the slower of forward pass and link, plus one layer of the faster one. With several
shapes, each runs all backends before the next; engines share compiled kernels through the caches in the user's home.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

from sglang_xmem.bench import runs, sizing, stats
from sglang_xmem.bench.engine import Answer, Client, Report
from sglang_xmem.bench.runs import HBM, RECOMPUTE, EnginePlan, Results, Row, Sample
from sglang_xmem.bench.sizing import KVShape, Need
from sglang_xmem.bench.workloads import Prompt
from sglang_xmem.config import AUTO, parse_options
from sglang_xmem.errors import ConfigError

FILLER_TOKENS = 8192
#: Other prompts that are asked between a prompt and its hit in HBM, so that the host's caches are as cold for that as
#: they are for a hit in the tier, which comes after a flood.
OTHERS_BETWEEN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_engine_arguments(parser, "hbm,stock,dram,peer,recompute", shape_list=True)
    sizes = "prompt lengths in tokens, K is 1024; default 10K,40K,80K, with --shape tiny 256,1K"
    parser.add_argument("--sizes", default=None, help=sizes)
    parser.add_argument(
        "--rounds", type=runs.at_least(1), default=None, help="samples of each hit; default 5, with --quick 2"
    )
    parser.add_argument("--output-tokens", type=runs.at_least(1), default=16, help="that are compared; default 16")
    parser.add_argument(
        "--link-gbps",
        default=None,
        help="what a backend's link carries, such as peer=397,dram=55.4 in GB/s; default: measured, in up to 10 s",
    )
    runs.add_output_argument(parser, "ttft")


def run(args: argparse.Namespace) -> int:
    each = runs.settle_shapes(args)
    args = each[0]
    links = parse_links(args.link_gbps)
    plans = [plan for one in each for plan in plans_of(one)]
    if not links and args.on_gpu and not args.quick and any(runs.has_pool(plan.backend) for plan in plans):
        links = measured_links(args)
    elif links:
        links = {tier: gbps * args.tp_size for tier, gbps in links.items()}  # each rank's part comes through its own
    results = Results("ttft", args)
    references: dict[tuple[str, int], tuple[str, list[int]]] = {}

    def rows(plan: EnginePlan, samples: list[Sample], name: str) -> list[Row]:
        found = summarize(samples, name, plan.args.kv, links)
        return [compared(row, samples, plan, references) for row in found]

    def check(row: Row) -> str | None:
        at = f"{row['backend']} at {row['prompt_tokens']} tokens"
        if not row["outputs_equal"]:
            return f"{at}: the outputs differ from those of the engine's first hit in HBM"
        wrong = runs.unproven(row, args.max_unproven)
        return wrong and f"{at}: {wrong}"

    return runs.run_engines(args, __name__, plans, results, rows, check)


def plans_of(args: argparse.Namespace) -> list[EnginePlan]:
    """The engines of one shape.

    Args:
        args: after `settle`.

    Raises:
        ConfigError: "Problem. Fix."
    """
    default = "256,1K" if args.tiny else "10K,40K,80K"
    sizes = sorted({runs.parse_tokens(text) for text in (args.sizes or default).split(",")})
    if min(sizes) <= args.page_size:
        raise ConfigError(
            f"--sizes {min(sizes)} has no hit: hits are whole pages of {args.page_size} tokens and leave the last "
            "token to compute. Give more than a page."
        )
    workload = Workload(
        sizes=sizes,
        rounds=args.rounds or (2 if args.quick else 5),
        page=args.page_size,
        output_tokens=args.output_tokens,
        seed=args.seed,
        warm_ups=1 if args.quick else 3,
        settle_s=2.0 if args.on_gpu else 0.5,
        short=args.page_size // 2 if args.kv.state_bytes else 0,
    )
    # No larger than that needs: pinning host memory is what an engine's start waits for.
    pool_gb = args.hicache_size or sizing.hicache_gb(workload.seen_tokens * 5 // 4, args.kv)
    need = Need(max(sizes), args.output_tokens, workload.device_tokens, workload.pool_tokens, workload.device_tokens, 4)
    # The floor and the ceiling come with every engine; alone they need one.
    engines = [name for name in args.names if name not in (HBM, RECOMPUTE)] or [HBM]
    options = {name: runs.fitting_options(args, name, need, pool_gb) for name in engines}
    for engine in options.values():
        engine.setdefault("enable_metrics", True)  # replies say when the forward pass began and ended
    return [EnginePlan(args, name, options[name], workload, workload.steps) for name in engines]


@dataclass(frozen=True)
class Workload:
    """What is asked of each engine.

    Attributes:
        sizes: prompt lengths, ascending.
        rounds: samples of each hit.
        page: tokens.
        output_tokens: that are compared.
        seed: of the prompts.
        warm_ups: rounds that do not count.
        settle_s: seconds for writing through to the tier.
        short: tokens that prompts are shorter than their size. Linear attention has a state where a prompt's last whole
            page ends, and the same prompt hits there only if that is not its last token.
    """

    sizes: list[int]
    rounds: int
    page: int
    output_tokens: int
    seed: int
    warm_ups: int
    settle_s: float
    short: int = 0

    @property
    def filler_tokens(self) -> int:
        return min(FILLER_TOKENS, max(self.sizes))

    @property
    def device_tokens(self) -> int:
        """Of the GPU's pool: one prompt of the largest size and a few others fit; so a flood of as much evicts it."""
        one_more = sizing.pages_up(self.filler_tokens + 1, self.page)
        return sizing.pages_up(max(self.sizes) + self.output_tokens, self.page) + (OTHERS_BETWEEN + 1) * one_more

    def prompt(self, size: int) -> Prompt:
        return Prompt.drawn(f"{self.seed} prompt {size}", size - self.short)

    @property
    def fillers(self) -> list[Prompt]:
        """Prompts that push all others out of the GPU's pool."""
        count = -(-self.device_tokens // self.filler_tokens) + 1
        tokens = self.filler_tokens - self.short
        return [Prompt.drawn(f"{self.seed} filler {index}", tokens) for index in range(count)]

    @property
    def steps(self) -> int:
        """Answers that progress counts."""
        return self.warm_ups + len(self.sizes) * (1 + self.rounds)

    @property
    def pool_tokens(self) -> int:
        """What HiCache's pool has to hold so that nothing that is asked again falls out."""
        kept = [size + self.output_tokens for size in self.sizes] + [self.filler_tokens + 1] * len(self.fillers)
        return sum(sizing.pages_up(tokens, self.page) for tokens in kept)

    @property
    def seen_tokens(self) -> int:
        """All that the pool comes to hold: what is asked again, and the prompts of the warm-up."""
        return self.pool_tokens + self.warm_ups * sizing.pages_up(5 * self.page + 2 * self.filler_tokens, self.page)


WORKLOAD = Workload


def measure(engine: Client, workload: Workload, backend: str, report: Report) -> None:
    """Ask every prompt cold and again, which is the reference of outputs, then in rounds from the tier and from HBM.

    A flood between samples pushes the prompt out of the GPU's pool. It asks for prompts that are in the tier
    themselves, which is much faster than prefilling new ones. A few of them come before the hit in HBM as well, where
    they leave the prompt its place.
    """
    page, fillers = workload.page, workload.fillers
    for _ in range(workload.warm_ups):  # kernels of every batch shape that follows, compiled and loaded
        engine.warm_up([(length, 4) for length in (page * 2, workload.filler_tokens)] * 2)
        report.step("warming up")
    reference: dict[int, list[int]] = {}

    def sample(kind: str, size: int, answer: Answer, proven: bool, **more: Any) -> None:
        values = {"ms": answer.ttft_ms, "device": answer.device, "host": answer.host, "forward_ms": answer.forward_ms}
        report.sample(kind=kind, prompt_tokens=size, proven=proven, **values, **more)

    for size in workload.sizes:
        prompt = workload.prompt(size)
        answer = engine.ask(prompt)
        reference[size] = engine.ask(prompt, workload.output_tokens).output
        sample(RECOMPUTE, size, answer, answer.device + answer.host <= page, reference=reference[size])
        report.step(f"{size} tokens, first time")
    engine.flood(fillers)
    time.sleep(workload.settle_s)  # write-through to the tier ends in the background
    for round_number in range(workload.rounds):
        for size in workload.sizes:
            prompt, least = workload.prompt(size), runs.least_hit(size, page)
            if runs.has_pool(backend):
                engine.flood(fillers)
                before = engine.tier_counts()
                answer = engine.ask(prompt)
                after = engine.tier_counts()
                moved, enqueue_ns = (after.get(n, 0) - before.get(n, 0) for n in ("bytes:load", "enqueue_ns:load"))
                again = engine.ask(prompt, workload.output_tokens)
                equal = again.output == reference[size] and again.output[:1] == answer.output
                proven = answer.host >= least and answer.device <= page
                more = {"moved_bytes": moved, "enqueue_us": enqueue_ns / 1e3} if after else {}
                sample("tier", size, answer, proven, outputs_equal=equal, **more)
            else:
                engine.ask(prompt)
            engine.flood(fillers[:OTHERS_BETWEEN])
            engine.tier_counts()  # asked here too, so that it is on neither hit's side
            answer = engine.ask(prompt)
            sample(HBM, size, answer, answer.device >= least, outputs_equal=answer.output == reference[size][:1])
            report.step(f"{size} tokens, round {round_number + 1} of {workload.rounds}")


def summarize(samples: list[Sample], backend: str, kv: KVShape, links: dict[str, float]) -> list[Row]:
    """A row for each kind of hit and prompt length; unproven samples are counted, not used."""
    rows: list[Row] = []
    hbm: dict[int, Row] = {}
    references = [tuple(s["reference"]) for s in samples if s["kind"] == RECOMPUTE]
    for kind, label in ((RECOMPUTE, RECOMPUTE), (HBM, HBM), ("tier", backend)):
        of_kind = [s for s in samples if s["kind"] == kind]
        for size in sorted({s["prompt_tokens"] for s in of_kind}):
            here = [s for s in of_kind if s["prompt_tokens"] == size]
            proven = [s for s in here if s["proven"]]
            times = [s["ms"] for s in proven]
            forward = [s["forward_ms"] for s in proven if s["forward_ms"] is not None]
            row: Row = {
                "backend": label,
                "prompt_tokens": size,
                "ttft_ms": stats.summary(times),
                "forward_ms": round(stats.median(forward), 3) if forward else None,
                "hits": {key: min(s[key] for s in proven) if proven else 0 for key in ("device", "host")},
                "outputs_equal": all(s.get("outputs_equal", True) for s in here),
                # A model of dummy weights may answer all prompts alike; then equal outputs say nothing of the KV.
                "outputs_tell_prompts_apart": len(set(references)) > 1 if len(references) > 1 else None,
                "samples": len(proven),
                "samples_unproven": len(here) - len(proven),
                "all_ms": [round(ms, 3) for ms in times],
            }
            if kind == HBM:
                hbm[size] = row
            if kind == "tier" and times:
                row.update(_transfer(row, proven, kv, links.get(label), hbm.get(size)))
            rows.append(row)
    return rows


def _transfer(row: Row, proven: list[Sample], kv: KVShape, link: float | None, hbm: Row | None) -> Row:
    """Bytes that a hit moved, the rate that its TTFT amounts to, and how far it is above its floor, with its parts."""
    label = row["backend"]
    p50, counted = row["ttft_ms"]["p50"], [s["moved_bytes"] for s in proven if "moved_bytes" in s]
    # Stock HiCache does not count bytes.
    moved = round(stats.median(counted) * kv.tp_size) if counted else kv.hit_bytes(row["hits"]["host"])
    least: float = moved
    if kv.replicated and label not in ("peer", "mtier"):
        # Ranks that hold the same bytes can bring a part each over PCIe and pass it on over NVLink.
        least = moved / kv.tp_size
    found: Row = {"kv_bytes": moved, "gbps": round(moved / p50 / 1e6, 3), "link_gbps": link}
    if counted:
        found["enqueue_us"] = round(stats.median([s["enqueue_us"] for s in proven]), 1)
    if link and hbm is not None and hbm["ttft_ms"]["p50"] and hbm["forward_ms"] and moved:
        cpu_ms, load_ms = hbm["ttft_ms"]["p50"] - hbm["forward_ms"], least / link / 1e6
        floor = stats.floor_ms(cpu_ms, hbm["forward_ms"], load_ms, kv.layers)
        parts = {"cpu_ms": cpu_ms, "hbm_forward_ms": hbm["forward_ms"], "load_ms": load_ms, "floor_ms": floor}
        found.update({name: round(ms, 3) for name, ms in parts.items()}, over_floor=round(p50 / floor, 4))
    return found


def compared(
    row: Row, samples: list[Sample], plan: EnginePlan, references: dict[tuple[str, int], tuple[str, list[int]]]
) -> Row:
    """A row with its engine's answer compared to the first engine's, at the prompt's first hit in HBM.

    Within an engine every hit has to give what that gave; so this is the comparison across backends. A difference is
    shown and does not fail the run: it says that two engines compute differently, hits or not.
    """
    size = row["prompt_tokens"]
    mine = next((s["reference"] for s in samples if s["kind"] == RECOMPUTE and s["prompt_tokens"] == size), None)
    if mine is None:
        return row
    first_engine, first = references.setdefault((plan.args.shape, size), (plan.backend, mine))
    return {**row, "outputs_compared_with": first_engine, "outputs_equal_across": mine == first}


def parse_links(text: str | None) -> dict[str, float]:
    """GB/s of each backend's link, of `peer=354,dram=55.4`.

    Raises:
        ConfigError: not that.
    """
    if not text:
        return {}
    try:
        links = {name.strip(): float(value) for name, value in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        links = {}
    if not links or not all(0 < rate < 1e6 for rate in links.values()):
        raise ConfigError(f"--link-gbps {text} is not a list of rates. Give one such as peer=354,dram=55.4.")
    return _with_kin(links)


def measured_links(args: argparse.Namespace) -> dict[str, float]:
    """GB/s that contiguous copies reach, from host memory and from the best peer, by all ranks' links together.

    As the doctor measures them. Relays of tier dram bring a link each. Empty where nothing could be measured: it is no
    reason to stop.
    """
    from sglang_xmem.doctor import bandwidth

    rows, problem = bandwidth.run()
    if problem is not None:
        print(f"The links' rates are not known ({problem}). Give them as --link-gbps.", file=sys.stderr)
    rates = {(row["gpu"], row["peer"] is None): 0.0 for row in rows}
    for row in rows:
        key = row["gpu"], row["peer"] is None
        rates[key] = max(rates[key], row.get("read_gbps", 0.0))
    gpu = int(args.engine_options.get("base_gpu_id", 0))
    links = {"stock": rates.get((gpu, True), 0.0) * args.tp_size, "peer": rates.get((gpu, False), 0.0) * args.tp_size}
    relays = parse_options(AUTO, args.xmem_config).tiers["dram"].relays
    links["dram"] = links["stock"] + sum(rates.get((relay, True), 0.0) for relay in relays)
    return _with_kin({name: gbps for name, gbps in links.items() if gbps})


def _with_kin(links: dict[str, float]) -> dict[str, float]:
    """The same for backends over the same link."""
    for name, other in (("stock", "dram"), ("mtier", "peer")):
        if other in links:
            links.setdefault(name, links[other])
    return links

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
from typing import Any

from sglang_xmem.bench import runs, setup, stats
from sglang_xmem.bench.engine import Answer, Case, Client, Report, Row, Sample
from sglang_xmem.bench.setup import HBM, RECOMPUTE, Setup, has_pool, number, several, tokens
from sglang_xmem.bench.sizing import Need, least_hit, pages_up
from sglang_xmem.config import AUTO, parse_options
from sglang_xmem.errors import ConfigError

FILLER_TOKENS = 8192
#: Other prompts that are asked between a prompt and its hit in HBM, so that the host's caches are as cold for that as
#: they are for a hit in the tier, which comes after a flood.
OTHERS_BETWEEN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    setup.add_engine_arguments(parser, "ttft", "hbm,stock,dram,peer,recompute", multiple=True)
    sizes = "prompt lengths in tokens, K is 1024; default 10K,40K,80K, with --shape tiny 256,1K"
    parser.add_argument("--sizes", type=several(tokens), help=sizes)
    parser.add_argument("--rounds", type=number(1), help="samples of each hit; default 5, with --quick 2")
    parser.add_argument("--output-tokens", type=number(1), default=16, help="that are compared; default 16")


def run(args: argparse.Namespace) -> int:
    setups = [Setup(args, shape) for shape in (args.shapes if args.shapes and not args.model else [None])]
    # The floor and the ceiling come with every engine; alone they need one.
    backends = list(filter(has_pool, args.backends)) or [HBM]
    measures = setups[0].on_gpu and not args.quick and backends != [HBM]
    links = measured_links(args) if measures else {}
    plans = [one.plan(name, Ttft(one, has_pool(name), links)) for one in setups for name in backends]
    for plan in plans:
        plan.engines[0][0].setdefault("enable_metrics", True)  # replies say when the forward pass began and ended
    return runs.run("ttft", args, plans)


class Ttft(Case):
    """What is asked of each engine of a shape.

    Args:
        pooled: it has a HiCache pool, so there are hits in it.
        links: GB/s that contiguous copies reach over all ranks' links to a tier, as far as they are known.

    Raises:
        ConfigError: "Problem. Fix."
    """

    def __init__(self, one: Setup, pooled: bool, links: dict[str, float]) -> None:
        args = one.args
        self.page, self.kv, self.seed, self.pooled, self.links = one.page, one.kv, args.seed, pooled, links
        self.sizes = sorted(args.sizes or ([256, 1024] if one.tiny else [10240, 40960, 81920]))
        if self.sizes[0] <= one.page:
            raise ConfigError(
                f"--sizes {self.sizes[0]} has no hit: hits are whole pages of {one.page} tokens and leave the last "
                "token to compute. Give more than a page."
            )
        self.output_tokens = args.output_tokens
        self.rounds = args.rounds or (2 if args.quick else 5)
        self.warm_ups = 1 if args.quick else 3
        self.settle_s = 2.0 if one.on_gpu else 0.5  # for writing through to the tier
        # Linear attention has a state where a prompt's last whole page ends, and the same prompt hits there only if
        # that is not its last token; so prompts are that much shorter than their size.
        self.short = one.page // 2 if one.kv.state_bytes else 0
        self.filler_tokens = min(FILLER_TOKENS, self.sizes[-1])
        filler, largest = pages_up(self.filler_tokens + 1, self.page), self.sizes[-1] + self.output_tokens
        # One prompt of the largest size and a few others fit into the GPU's pool; so a flood of as much evicts it.
        self.device_tokens = pages_up(largest, self.page) + (OTHERS_BETWEEN + 1) * filler
        self.fillers = -(-self.device_tokens // self.filler_tokens) + 1
        kept = self.fillers * filler + sum(pages_up(size + self.output_tokens, self.page) for size in self.sizes)
        warm = pages_up(5 * self.page + 2 * self.filler_tokens, self.page)
        # No larger a pool than that needs: pinning host memory is what an engine's start waits for.
        seen = kept + self.warm_ups * warm
        self.need = Need(self.sizes[-1], self.output_tokens, self.device_tokens, seen, running=4)
        self.steps = self.warm_ups + len(self.sizes) * (1 + self.rounds)

    def measure(self, engine: Client, report: Report) -> None:
        """Ask each prompt cold and again, which is the reference of outputs, then in rounds from the tier and from HBM.

        A flood between samples pushes the prompt out of the GPU's pool. It asks for prompts that are in the tier
        themselves, which is much faster than prefilling new ones. A few of them come before the hit in HBM as well,
        where they leave the prompt its place.
        """
        page, filler = self.page, self.filler_tokens - self.short
        fillers = [engine.draw(f"{self.seed} filler {index}", filler) for index in range(self.fillers)]
        prompts = {size: engine.draw(f"{self.seed} prompt {size}", size - self.short) for size in self.sizes}
        for _ in range(self.warm_ups):
            engine.warm_up([page * 2, self.filler_tokens] * 2)
            report.step("warming up")
        reference: dict[int, list[int]] = {}

        def sample(kind: str, size: int, answer: Answer, proven: bool, **more: Any) -> None:
            more |= {"kind": kind, "prompt_tokens": size, "proven": proven, "forward_ms": answer.forward_ms}
            report.sample(ms=answer.ttft_ms, device=answer.device, host=answer.host, **more)

        for size, prompt in prompts.items():
            answer = engine.ask(prompt)
            reference[size] = engine.ask(prompt, self.output_tokens).output
            sample(RECOMPUTE, size, answer, answer.device + answer.host <= page, reference=reference[size])
            report.step(f"{size} tokens, first time")
        engine.flood(fillers)
        time.sleep(self.settle_s)  # write-through to the tier ends in the background
        for round_ in range(self.rounds):
            for size, prompt in prompts.items():
                least = least_hit(size, page)
                if self.pooled:
                    engine.flood(fillers)
                    before = engine.tier_counts()
                    answer = engine.ask(prompt)
                    after = engine.tier_counts()
                    moved, enqueue_ns = (after.get(n, 0) - before.get(n, 0) for n in ("bytes:load", "enqueue_ns:load"))
                    again = engine.ask(prompt, self.output_tokens)
                    equal = again.output == reference[size] and again.output[:1] == answer.output
                    proven = answer.host >= least and answer.device <= page
                    more = {"moved_bytes": moved, "enqueue_us": enqueue_ns / 1e3} if after else {}
                    sample("tier", size, answer, proven, outputs_equal=equal, **more)
                else:
                    engine.ask(prompt)
                engine.flood(fillers[:OTHERS_BETWEEN])
                engine.tier_counts()  # asked here too, so that it is on neither hit's side
                answer = engine.ask(prompt)
                equal = answer.output == reference[size][:1]
                sample(HBM, size, answer, answer.device >= least, outputs_equal=equal)
                report.step(f"{size} tokens, round {round_ + 1} of {self.rounds}")

    def rows(self, samples: list[Sample], backend: str) -> list[Row]:
        """A row for each kind of hit and prompt length; unproven samples are counted, not used."""
        rows: list[Row] = []
        hbm: dict[int, Row] = {}
        references = [tuple(s["reference"]) for s in samples if s["kind"] == RECOMPUTE]
        for kind, label in ((RECOMPUTE, RECOMPUTE), (HBM, HBM), ("tier", backend)):
            for size in self.sizes:
                here = [s for s in samples if (s["kind"], s["prompt_tokens"]) == (kind, size)]
                if not here:
                    continue
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
                    row |= self.transfer(row, proven, hbm.get(size))
                rows.append(row)
        return rows

    def transfer(self, row: Row, proven: list[Sample], hbm: Row | None) -> Row:
        """Bytes that a hit moved, the rate that its TTFT amounts to, and how far it is above its floor, with its parts.

        A load and a forward pass that go layer by layer are a pipeline of two stages: the slower one in full, and one
        layer of the faster one.
        """
        p50, counted = row["ttft_ms"]["p50"], [s["moved_bytes"] for s in proven if "moved_bytes" in s]
        kv, link = self.kv, self.links.get(row["backend"])
        # Stock HiCache does not count bytes.
        moved = round(stats.median(counted) * kv.tp_size) if counted else kv.hit_bytes(row["hits"]["host"])
        # Ranks that hold the same bytes can bring a part each over PCIe and pass it on over NVLink.
        shared = kv.replicated and row["backend"] not in ("peer", "mtier")
        found: Row = {"kv_bytes": moved, "gbps": round(moved / p50 / 1e6, 3), "link_gbps": link}
        if counted:
            found["enqueue_us"] = round(stats.median([s["enqueue_us"] for s in proven]), 1)
        if link and hbm is not None and hbm["ttft_ms"]["p50"] and hbm["forward_ms"] and moved:
            forward_ms, load_ms = hbm["forward_ms"], moved / (kv.tp_size if shared else 1) / link / 1e6
            cpu_ms = hbm["ttft_ms"]["p50"] - forward_ms
            floor_ms = cpu_ms + max(forward_ms, load_ms) + min(forward_ms, load_ms) / kv.layers
            parts = {"cpu_ms": cpu_ms, "hbm_forward_ms": forward_ms, "load_ms": load_ms, "floor_ms": floor_ms}
            found |= {name: round(ms, 3) for name, ms in parts.items()} | {"over_floor": round(p50 / floor_ms, 4)}
        return found


def measured_links(args: argparse.Namespace) -> dict[str, float]:
    """GB/s that contiguous copies reach, from host memory and from the best peer, by all ranks' links together.

    As the doctor measures them. Relays of tier dram bring a link each. Empty where nothing could be measured: it is no
    reason to stop.
    """
    from sglang_xmem.doctor import bandwidth

    rows, problem = bandwidth.run()
    if problem is not None:
        print(f"The links' rates are not known ({problem}), so there is no floor.", file=sys.stderr)
    rates = {(row["gpu"], row["peer"] is None): 0.0 for row in rows}
    for row in rows:
        key = row["gpu"], row["peer"] is None
        rates[key] = max(rates[key], row.get("read_gbps", 0.0))
    gpu = int(args.engine_args.get("base_gpu_id", 0))
    host, peer = (rates.get((gpu, is_host), 0.0) * args.tp_size for is_host in (True, False))
    relays = parse_options(AUTO, args.xmem_config).tiers["dram"].relays
    links = {"stock": host, "dram": host + sum(rates.get((relay, True), 0.0) for relay in relays)}
    links |= {"peer": peer, "mtier": peer}
    return {name: gbps for name, gbps in links.items() if gbps}

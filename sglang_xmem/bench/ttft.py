"""`sglang-xmem bench ttft`: time to first token of a hit in each backend, by prompt length.

Wall time of `generate` with one output token. Each backend is an engine in its own process, on the same prompts. A
sample counts as a hit of the tier only where SGLang's `cached_tokens_details` says so; the others are counted and
shown, and too many fail the run. The floor (`hbm`, a hit in the GPU's own pool) and the ceiling (`recompute`) are
measured in every engine; named alone they get one of stock SGLang without HiCache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_xmem.bench import report, runs, sizing, stats, timeline
from sglang_xmem.bench.engine import RequestFailed
from sglang_xmem.bench.runs import HBM, RECOMPUTE, EnginePlan, Measurement, Results, Sample
from sglang_xmem.bench.workloads import Prompt
from sglang_xmem.doctor import bandwidth
from sglang_xmem.errors import ConfigError

FILLER_TOKENS = 8192
#: Other prompts that are asked between a prompt and its hit in HBM, so that the host's caches are as cold for that as
#: they are for a hit in the tier, which comes after a flood.
OTHERS_BETWEEN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_engine_arguments(parser, "hbm,stock,dram,peer,recompute")
    parser.add_argument(
        "--sizes",
        default=None,
        help="prompt lengths in tokens, K is 1024; default 10K,40K,80K, with --shape tiny 256,1K",
    )
    parser.add_argument(
        "--rounds", type=runs.at_least(1), default=None, help="samples of each hit; default 5, with --quick 2"
    )
    parser.add_argument(
        "--passes", type=runs.at_least(1), default=1, help="runs of each engine; every other one in reverse order"
    )
    parser.add_argument("--output-tokens", type=runs.at_least(1), default=16, help="tokens that are compared")
    parser.add_argument(
        "--link-gbps",
        default=None,
        help="what a backend's link carries: peer=397,dram=55.4 in GB/s, or a copy.jsonl of bench copy, for the share "
        "of the link and how much of the transfer hid behind compute; default: measured first, in up to 10 s",
    )
    parser.add_argument(
        "--timeline",
        type=Path,
        default=None,
        metavar="FILE",
        help="also record a hit in the tier and one in HBM, after all measuring, and append the GPUs' kernels by name "
        "to this JSON Lines file; needs a GPU",
    )
    parser.add_argument("--timeline-size", default=None, help="which of --sizes is recorded; default: the largest")
    runs.add_output_arguments(parser, "ttft")


def run(args: argparse.Namespace) -> int:
    runs.settle(args)
    tiny = args.model is None and args.shape == "tiny"
    sizes = sorted(
        {runs.parse_tokens(text) for text in (args.sizes or ("256,1K" if tiny else "10K,40K,80K")).split(",")}
    )
    if min(sizes) <= args.page_size:
        raise ConfigError(
            f"--sizes {min(sizes)} has no hit: hits are whole pages of {args.page_size} tokens and leave the last "
            "token to compute; give more than a page."
        )
    rounds = args.rounds or (2 if args.quick else 5)
    if args.timeline is not None and not args.on_gpu:
        raise ConfigError(f"--timeline {args.timeline} records GPUs, and this machine has none; leave it out.")
    recorded_size = runs.parse_tokens(args.timeline_size) if args.timeline_size else max(sizes)
    if recorded_size not in sizes:
        raise ConfigError(f"--timeline-size {args.timeline_size} is none of --sizes; give one of those.")
    links = link_gbps(args.link_gbps)
    if not links and args.on_gpu and not args.quick and any(runs.has_pool(name) for name in args.names):
        links = measured_links(int(args.engine_options.get("base_gpu_id", 0)))
    links = {tier: gbps * args.tp_size for tier, gbps in links.items()}  # each rank's part comes through its own
    workload = Workload(sizes, rounds, args.page_size, args.output_tokens, args.seed, args.quick, args.on_gpu)
    # The floor and the ceiling come with every engine; alone they need one.
    engines = [name for name in args.names if name not in (HBM, RECOMPUTE)] or [HBM]
    options = {name: _engine(args, workload, name) for name in engines}
    plans = [
        EnginePlan(name, options[name], workload.steps, sequence)
        for sequence in range(args.passes)
        for name in (engines if sequence % 2 == 0 else reversed(engines))
    ]
    settings = runs.parameters(args, sizes=sizes, rounds=rounds, output_tokens=args.output_tokens)
    results = Results("ttft", args, settings)
    outputs = _Outputs()
    timelines: list[list[dict[str, Any]]] = []
    if args.timeline is not None:
        args.timeline.parent.mkdir(parents=True, exist_ok=True)

    def measure_engine(engine: Any, plan: EnginePlan, measurement: Measurement) -> None:
        measure(engine, workload, measurement, tier=runs.has_pool(plan.backend))
        if args.timeline is not None:
            try:
                found = record(engine, workload, recorded_size, tier=runs.has_pool(plan.backend))
            except RequestFailed as error:  # what was measured stands
                measurement.progress.say(f"{plan.backend}: no timeline: {error}")
                return
            about = {"bench": "timeline", "run": results.run, "backend": plan.backend}
            rows = [{**about, **row} for row in found]
            report.append_rows(args.timeline, rows)
            if rows:
                timelines.append(rows)

    def rows(plan: EnginePlan, samples: list[Sample], name: str) -> list[dict[str, Any]]:
        about = {"shape": args.model or args.shape, "page_size": args.page_size, "tp_size": args.tp_size}
        about["outputs_tell_prompts_apart"] = outputs_tell_prompts_apart(samples)
        found = [{**row, **about} for row in summarize(samples, name, args.kv.bytes, links)]
        return [outputs.compare(row, samples, plan.backend) for row in found]

    def check(row: dict[str, Any]) -> str | None:
        at = f"{row['backend']} at {row['prompt_tokens']} tokens"
        if not row["outputs_equal"]:
            return f"{at}: the outputs differ from those of the engine's first hit in HBM"
        wrong = runs.unproven(row, args.max_unproven)
        return wrong and f"{at}: {wrong}"

    status = runs.run_engines(args, plans, results, measure_engine, rows, check)
    for recorded in timelines:
        report.show_table(*timeline.table(recorded))
    return status


class Workload:
    """What is asked of each engine.

    Args:
        sizes: prompt lengths, ascending.
        rounds: samples of each hit.
        page: tokens.
        output_tokens: that are compared.
        seed: of the prompts.
        quick: warm up once in place of three times.
        on_gpu: whether writes to the tier are asynchronous and long.
    """

    def __init__(
        self, sizes: Sequence[int], rounds: int, page: int, output_tokens: int, seed: int, quick: bool, on_gpu: bool
    ) -> None:
        self.sizes, self.rounds, self.page, self.output_tokens = sizes, rounds, page, output_tokens
        self.warm_ups = 1 if quick else 3
        self.settle_s = 2.0 if on_gpu else 0.5
        self.filler_tokens = min(FILLER_TOKENS, max(sizes))
        # One prompt of the largest size fits beside a few others; so a flood of as much evicts it.
        one_more = sizing.pages_up(self.filler_tokens + 1, page)
        self.device_tokens = sizing.pages_up(max(sizes) + output_tokens, page) + (OTHERS_BETWEEN + 1) * one_more
        self.prompts = {size: Prompt.drawn(f"{seed} prompt {size}", size) for size in sizes}
        count = -(-self.device_tokens // self.filler_tokens) + 1
        self.fillers = [Prompt.drawn(f"{seed} filler {index}", self.filler_tokens) for index in range(count)]
        self.others = self.fillers[:OTHERS_BETWEEN]

    @property
    def steps(self) -> int:
        """Answers that progress counts."""
        return self.warm_ups + len(self.sizes) + self.rounds * len(self.sizes)

    @property
    def pool_tokens(self) -> int:
        """What HiCache's pool has to hold so that nothing that is asked again falls out."""
        kept = [size + self.output_tokens for size in self.sizes] + [self.filler_tokens + 1] * len(self.fillers)
        return sum(sizing.pages_up(tokens, self.page) for tokens in kept)

    @property
    def seen_tokens(self) -> int:
        """All that the pool comes to hold: what is asked again, and the prompts of the warm-up."""
        return self.pool_tokens + self.warm_ups * sizing.pages_up(3 * self.page + self.filler_tokens, self.page)


def _engine(args: argparse.Namespace, workload: Workload, backend: str) -> dict[str, Any]:
    """Keywords of sgl.Engine; refuses what cannot fit."""
    # No larger than that takes: pinning host memory is what an engine's start waits for.
    size_gb = args.hicache_size or sizing.hicache_gb(workload.seen_tokens * 5 // 4, args.kv)
    return runs.fitting_options(
        args,
        backend,
        prompt_tokens=max(workload.sizes),
        output_tokens=workload.output_tokens,
        device_tokens=workload.device_tokens,
        host_tokens_needed=workload.pool_tokens,
        context_tokens=workload.device_tokens,
        hicache_gb=size_gb,
        running=4,
    )


def measure(engine: Any, workload: Workload, measurement: Measurement, tier: bool) -> None:
    """Ask every prompt cold and again, which is the reference of outputs, then in rounds from the tier and from HBM.

    A flood between samples pushes the prompt out of the GPU's pool. It asks for prompts that are in the tier
    themselves, which takes a fraction of the time that prefilling new ones would. A few of them come before the hit in
    HBM as well, where they leave the prompt its place.
    """
    page = workload.page
    for index in range(workload.warm_ups):  # kernels of every batch shape that follows, compiled and loaded
        for length in (page * 2, workload.filler_tokens):
            for _ in range(2):
                engine.ask(Prompt.drawn(f"warm up {index}", length), 4)
        measurement.step("warming up")
    reference: dict[int, list[int]] = {}
    for size in workload.sizes:
        answer = engine.ask(workload.prompts[size])
        reference[size] = engine.ask(workload.prompts[size], workload.output_tokens).output
        proven = answer.device + answer.host <= page
        measurement.add(kind=RECOMPUTE, prompt_tokens=size, proven=proven, reference=reference[size], **_sample(answer))
        measurement.step(f"{size} tokens, first time")
    engine.flood(workload.fillers)
    engine.settle(workload.settle_s)  # write-through to the tier ends in the background
    for round_number in range(workload.rounds):
        for size in workload.sizes:
            prompt = workload.prompts[size]
            if tier:
                engine.flood(workload.fillers)
                answer = engine.ask(prompt)
                check = engine.ask(prompt, workload.output_tokens)
                measurement.add(
                    kind="tier",
                    prompt_tokens=size,
                    proven=_is_hit(answer, "tier", size, page),
                    outputs_equal=check.output == reference[size] and check.output[:1] == answer.output,
                    **_sample(answer),
                )
            else:
                engine.ask(prompt)
            engine.flood(workload.others)
            answer = engine.ask(prompt)
            measurement.add(
                kind=HBM,
                prompt_tokens=size,
                proven=_is_hit(answer, HBM, size, page),
                outputs_equal=answer.output == reference[size][:1],
                **_sample(answer),
            )
            measurement.step(f"{size} tokens, round {round_number + 1} of {workload.rounds}")


def record(engine: Any, workload: Workload, size: int, tier: bool) -> list[dict[str, Any]]:
    """What the GPUs did during a hit in the tier and one in HBM: rows of `timeline.by_kernel`.

    A hit that is not what it should be has no rows.

    Raises:
        RequestFailed: SGLang did not record.
    """
    prompt = workload.prompts[size]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_") as folder:
        engine.record(workload.fillers[0], Path(folder))  # a process's first recording is the slowest
    if tier:
        engine.flood(workload.fillers)
    else:
        engine.ask(prompt)
    for hit in ("tier", HBM) if tier else (HBM,):
        if hit == HBM:
            engine.flood(workload.others)
        with tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_") as folder:
            answer, asked_ms = engine.record(prompt, Path(folder))
            kernels = timeline.by_kernel(timeline.read_traces(Path(folder)), asked_ms)
        if _is_hit(answer, hit, size, workload.page):
            about = {"hit": hit, "prompt_tokens": size, "recorded_ttft_ms": round(answer.ttft_ms, 3)}
            rows += [{**about, **row} for row in kernels]
    return rows


def _is_hit(answer: Any, kind: str, size: int, page: int) -> bool:
    """Whether an answer's prompt came from where it should have."""
    least = runs.least_hit(size, page)
    if kind == HBM:
        return bool(answer.device >= least)
    return bool(answer.host >= least and answer.device <= page)


def _sample(answer: Any) -> dict[str, Any]:
    return {"ms": answer.ttft_ms, "device": answer.device, "host": answer.host}


def summarize(samples: list[Sample], backend: str, token_bytes: int, links: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each kind of hit and prompt length; unproven samples are counted, not used."""
    rows = []
    hbm_ms: dict[int, float] = {}
    for kind, label in ((RECOMPUTE, RECOMPUTE), (HBM, HBM), ("tier", backend)):
        of_kind = [s for s in samples if s["kind"] == kind]
        for size in sorted({s["prompt_tokens"] for s in of_kind}):
            here = [s for s in of_kind if s["prompt_tokens"] == size]
            proven = [s for s in here if s["proven"]]
            times = [s["ms"] for s in proven]
            row: dict[str, Any] = {
                "backend": label,
                "prompt_tokens": size,
                "ttft_ms": stats.summary(times),
                "hits": {key: min(s[key] for s in proven) if proven else 0 for key in ("device", "host")},
                "outputs_equal": all(s.get("outputs_equal", True) for s in here),
                "samples": len(proven),
                "samples_unproven": len(here) - len(proven),
                "all_ms": [round(ms, 3) for ms in times],
            }
            if kind == HBM and times:
                hbm_ms[size] = stats.percentile(times, 50)
            if kind == "tier" and times:
                row.update(_transfer(row, token_bytes, links.get(report.tier_of(label)), hbm_ms.get(size)))
            rows.append(row)
    return rows


def outputs_tell_prompts_apart(samples: list[Sample]) -> bool | None:
    """Whether prompts of several lengths gave several outputs; None where there was only one.

    A model of dummy weights may answer all prompts alike. Then equal outputs say nothing of the KV.
    """
    references = [tuple(s["reference"]) for s in samples if s["kind"] == RECOMPUTE]
    return len(set(references)) > 1 if len(references) > 1 else None


def _transfer(row: dict[str, Any], token_bytes: int, link: float | None, hbm_ms: float | None) -> dict[str, Any]:
    """Bytes that a hit moved, the rate that its TTFT amounts to, and what that is of the link's."""
    moved = row["hits"]["host"] * token_bytes
    p50 = row["ttft_ms"]["p50"]
    found: dict[str, Any] = {"kv_bytes": moved, **stats.transfer_rates(moved, p50, link)}
    if link and hbm_ms is not None and moved:
        found["transfer_hidden"] = round(stats.transfer_hidden(p50, hbm_ms, moved, link), 4)
    return found


class _Outputs:
    """Answers to the same prompts at their first hit in HBM, compared from engine to engine.

    Within an engine every hit has to give what that gave; so this is the comparison across backends.
    A difference is shown and does not fail the run: it says that two engines compute differently, hits or not.
    """

    def __init__(self) -> None:
        self._first: dict[int, tuple[str, list[int]]] = {}

    def compare(self, row: dict[str, Any], samples: list[Sample], engine: str) -> dict[str, Any]:
        size = row["prompt_tokens"]
        mine = next((s["reference"] for s in samples if s["kind"] == RECOMPUTE and s["prompt_tokens"] == size), None)
        if mine is None:
            return row
        first_engine, first = self._first.setdefault(size, (engine, mine))
        return {**row, "outputs_compared_with": first_engine, "outputs_equal_across": mine == first}


def link_gbps(text: str | None) -> dict[str, float]:
    """GB/s of each backend's link, from `peer=354,dram=55.4` or from the contiguous copies in a copy.jsonl.

    Raises:
        ConfigError: neither of these.
    """
    if not text:
        return {}
    if "=" in text:
        try:
            links = {name.strip(): float(value) for name, value in (pair.split("=") for pair in text.split(","))}
        except ValueError:
            links = {}
        if not links or any(rate <= 0 for rate in links.values()):
            raise ConfigError(f"--link-gbps {text} is not a list of rates; give one such as peer=354,dram=55.4.")
    else:
        try:
            copies = [json.loads(line) for line in Path(text).read_text().splitlines() if line.strip()]
        except (OSError, ValueError):
            raise ConfigError(f"--link-gbps {text} is not a readable copy.jsonl; give one of bench copy.") from None
        links = {}
        for path, name in (("peer_load", "peer"), ("host_load", "dram")):
            rates = [
                row["contiguous_gbps"]
                for row in copies
                if row.get("path") == path
                and "contiguous_gbps" in row
                and row.get("memory", "tier") == "tier"  # not a mapping that was measured beside the tier's
                and row.get("device") != "cpu"
            ]
            if rates:
                links[name] = max(rates)
    return _with_kin(links)


def measured_links(gpu: int) -> dict[str, float]:
    """GB/s that contiguous copies to a GPU reach, from host memory and from the best of its peers, as the doctor finds.

    Empty where nothing could be measured: it is no reason to stop.
    """
    rows, problem = bandwidth.run()
    if problem is not None:
        print(f"The links' rates are not known ({problem}); give them as --link-gbps.", file=sys.stderr)
    links: dict[str, float] = {}
    for row in rows:
        if row["gpu"] == gpu and "read_gbps" in row:
            name = "dram" if row["peer"] is None else "peer"
            links[name] = max(links.get(name, 0.0), row["read_gbps"])
    return _with_kin(links)


def _with_kin(links: dict[str, float]) -> dict[str, float]:
    """The same for backends over the same link."""
    for name, other in (("stock", "dram"), ("mtier", "peer")):
        if other in links:
            links.setdefault(name, links[other])
    return links

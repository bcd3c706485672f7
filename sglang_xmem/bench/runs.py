"""What the engine benchmarks share: options, backends, results files, and the loop over engines.

A benchmark describes its workload for each backend as an `EnginePlan`; `run_engines` runs the engines one after another
and writes what each has measured, also where it crashed or was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_xmem import gpus
from sglang_xmem.bench import environment, report, shapes, sizing
from sglang_xmem.bench.engine import EngineGone, EngineProcess, RequestFailed
from sglang_xmem.bench.progress import Progress
from sglang_xmem.bench.report import tier_of
from sglang_xmem.bench.sizing import KVShape
from sglang_xmem.config import parse_options
from sglang_xmem.doctor import tiers
from sglang_xmem.errors import ConfigError, TierUnavailable
from sglang_xmem.tiers import tier_classes

#: Backends beside the tiers. `hbm` is SGLang without HiCache, `recompute` SGLang without any cache of prefixes,
#: `auto` the tier that --hicache-xmem-tier auto takes.
HBM, RECOMPUTE, STOCK, AUTO = "hbm", "recompute", "stock", "auto"
#: Of a prompt; above what any model takes, and below what does not fit into memory as a list.
MOST_TOKENS = 1 << 27
#: Keywords of sgl.Engine that rows speak of, and that benchmarks have options of their own for.
OWN_ENGINE_ARGUMENTS = frozenset(
    {
        "model_path",
        "page_size",
        "tp_size",
        "random_seed",
        "disable_radix_cache",
        "enable_hierarchical_cache",
        "hicache_size",
        "hicache_ratio",
        "hicache_mem_layout",
        "hicache_use_xmem",
        "hicache_xmem_tier",
        "hicache_xmem_config",
    }
)
#: What ends a run that was interrupted, as a shell reports SIGINT.
INTERRUPTED = 130


def backend_names() -> tuple[str, ...]:
    """All that --backends takes, in the order in which tables show them."""
    return (HBM, *tier_classes(), AUTO, STOCK, RECOMPUTE)


def at_least(least: float, kind: type[int] | type[float] = int, most: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number of a kind within limits."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most):
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return number


def parse_tokens(text: str) -> int:
    """`80K` is 81920 tokens.

    Raises:
        ConfigError: not a positive number, or more than any model takes.
    """
    text = text.strip()
    try:
        value = int(text[:-1]) * 1024 if text[-1:] in ("k", "K") else int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MOST_TOKENS:
        raise ConfigError(f"{text!r} is not a number of tokens; give one such as 512 or 80K.")
    return value


def parse_backends(text: str, variants: Collection[str] = ()) -> list[str]:
    """The names in a comma-separated list.

    Args:
        variants: names that a tier's may have behind a plus sign.

    Raises:
        ConfigError: an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        tier, plus, variant = name.partition("+")
        if tier not in backend_names():
            raise ConfigError(f"--backends {name}: choose from {', '.join(backend_names())}.")
        if plus and tier in (HBM, RECOMPUTE, STOCK):
            raise ConfigError(f"--backends {name}: {tier} has no tier to configure; leave +{variant} out.")
        if plus and variant not in variants:
            known = ", ".join(variants) or "none"
            raise ConfigError(f"--backends {name}: give its configuration as --variant {variant}=JSON (now: {known}).")
    if not names:
        raise ConfigError(f"--backends is empty; choose from {', '.join(backend_names())}.")
    return list(dict.fromkeys(names))


def has_gpu() -> bool:
    """Whether SGLang will find a GPU here."""
    try:
        return len(gpus.visible_gpus()) > 0
    except TierUnavailable:
        return False


def gpu_bytes() -> int | None:
    """Memory of the first GPU; None without one."""
    with suppress(Exception):
        return sum(gpus.memory_bytes(0))
    return None


# ---- options ----


def add_engine_arguments(parser: argparse.ArgumentParser, backends: str) -> None:
    """Options of every benchmark that starts engines."""
    parser.add_argument("--backends", default=backends, help="comma-separated: " + ",".join(backend_names()))
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=sorted(shapes.SHAPES), default="qwen3-30b-a3b", help="dummy weights")
    model.add_argument("--model", help="path of a model to run with its weights")
    parser.add_argument("--page-size", type=at_least(1), default=None, help="tokens; default 64, with --shape tiny 16")
    parser.add_argument("--tp-size", type=at_least(1), default=1, help="tensor parallel ranks (1)")
    parser.add_argument(
        "--hicache-size", type=at_least(0), default=0, help="GB a rank; 0: what the workload needs, and some"
    )
    parser.add_argument(
        "--stock-layout",
        default="layer_first",
        choices=["layer_first", "page_first"],
        help="of stock's pool (layer_first)",
    )
    parser.add_argument("--attention-backend", default=None, help="SGLang's option (its own choice)")
    parser.add_argument("--xmem-config", default=None, help="--hicache-xmem-config of the tier engines")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another --hicache-xmem-config for backends that are called TIER+NAME, such as peer+rank; may be repeated",
    )
    parser.set_defaults(variants={})  # `settle` reads --variant; a server that runs already has none
    parser.add_argument("--engine-args", default="{}", help="JSON object of further sgl.Engine keywords")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (0)")
    parser.add_argument("--timeout", type=at_least(1, float), default=900, help="seconds an engine may take")
    parser.add_argument("--quick", action="store_true", help="the least that still shows something; says little")
    parser.add_argument(
        "--max-unproven",
        type=at_least(0, float, 1),
        default=0.2,
        help="share of samples without proof of their hit that fails a run",
    )
    parser.add_argument("--verbose", action="store_true", help="let the engines' logs through to stderr")


def add_output_arguments(parser: argparse.ArgumentParser, bench: str) -> None:
    """Options of every benchmark that writes rows."""
    parser.add_argument("--output", type=Path, default=Path(f"{bench}.jsonl"), help="JSON Lines file to append to")
    parser.add_argument("--resume", action="store_true", help="skip what the output file has of the same parameters")
    parser.add_argument("--no-plots", action="store_true", help="write no CSV, PNG and SVG beside the output")


def settle(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on other options, and refuse what cannot work.

    Raises:
        ConfigError: one sentence.
    """
    args.variants = dict(parse_variant(text) for text in args.variant)
    args.names = parse_backends(args.backends, args.variants)
    args.on_gpu = has_gpu()
    args.scratch = tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_")  # lives as long as args
    tiny = args.model is None and args.shape == "tiny"
    if not args.on_gpu and args.model is None and not tiny:
        raise ConfigError(f"this machine has no GPU, which --shape {args.shape} needs; use --shape tiny.")
    if args.page_size is None:
        args.page_size = 16 if tiny else 64
    try:
        args.engine_options = json.loads(args.engine_args)
        if not isinstance(args.engine_options, dict):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--engine-args {args.engine_args!r} is not a JSON object; give one of keywords.") from None
    for name in sorted(OWN_ENGINE_ARGUMENTS & args.engine_options.keys()):
        raise ConfigError(f"--engine-args names {name}, which the benchmark sets itself; use its own options.")
    parse_options(AUTO, args.xmem_config)
    args.config = shapes.SHAPES[args.shape] if args.model is None else _model_config(Path(args.model))
    args.kv = KVShape.of(args.config, args.tp_size, str(args.engine_options.get("kv_cache_dtype", "auto")))


def parse_variant(text: str) -> tuple[str, str]:
    """Name and configuration of `NAME=JSON`.

    Raises:
        ConfigError: not that.
    """
    name, equals, config = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--variant {text} is not NAME=JSON; give one such as rank='{{\"peer\": ...}}'.")
    parse_options(AUTO, config)
    return name, config


def config_of(args: argparse.Namespace, backend: str) -> str | None:
    """--hicache-xmem-config of a backend."""
    variant = backend.partition("+")[2]
    config: str | None = args.variants[variant] if variant else args.xmem_config
    return config


def _model_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(f"--model {path} has no readable config.json; give a model's directory.") from None
    return {**config, **config.get("text_config", {})}


def parameters(args: argparse.Namespace, **own: Any) -> dict[str, Any]:
    """What decides a result, apart from the backend: the same on two runs that may be put together."""
    return {
        "model": args.model or args.shape,
        "page_size": args.page_size,
        "tp_size": args.tp_size,
        "hicache_size": args.hicache_size,
        "stock_layout": args.stock_layout,
        "attention_backend": args.attention_backend,
        "xmem_config": args.xmem_config,
        **({"variants": args.variants} if args.variants else {}),
        "engine_args": args.engine_options,
        "seed": args.seed,
        "quick": args.quick,
        **own,
    }


# ---- engines ----


@dataclass(frozen=True)
class EnginePlan:
    """An engine to run.

    Attributes:
        backend: its name in --backends.
        engine: keywords of sgl.Engine.
        steps: of progress that its measuring takes, about.
        sequence: number of the pass, where each backend runs several times.
    """

    backend: str
    engine: dict[str, Any]
    steps: int
    sequence: int = 0


def fitting_options(
    args: argparse.Namespace,
    backend: str,
    *,
    prompt_tokens: int,
    output_tokens: int,
    device_tokens: int | None,
    host_tokens_needed: int,
    context_tokens: int,
    hicache_gb: int,
    running: int,
) -> dict[str, Any]:
    """`engine_options`, after what cannot fit has been refused: by `sizing.check_fits`, and by the tier itself.

    Args:
        prompt_tokens, output_tokens: of the largest request.
        host_tokens_needed: what HiCache's pool has to hold, where the backend has one.
    """
    sizing.check_fits(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        device_tokens=device_tokens,
        host_tokens_needed=host_tokens_needed if has_pool(backend) else 0,
        hicache_size_gb=hicache_gb,
        shape=args.kv,
        page=args.page_size,
        max_context=args.config.get("max_position_embeddings"),
        in_host_memory=in_host_memory(backend),
        gpu_bytes=gpu_bytes() if args.on_gpu else None,
    )
    if has_pool(backend) and not in_host_memory(backend):
        check_tier(args, backend, hicache_gb)
    return engine_options(
        args,
        backend,
        device_tokens=device_tokens,
        context_tokens=context_tokens,
        hicache_gb=hicache_gb,
        running=running,
    )


def check_tier(args: argparse.Namespace, backend: str, hicache_gb: int) -> None:
    """Ask a tier that is no host memory whether it is there and has the room, as SGLang's launcher would.

    An engine would take a minute to say so, and others may be before it.

    Raises:
        ConfigError: it cannot hold the pool.
    """
    engine = tiers.engine_gpus(args.tp_size, int(args.engine_options.get("base_gpu_id", 0)))
    answer, _ = tiers.verdict(tier_of(backend), config_of(args, backend), engine, hicache_gb * 10**9, banks=False)
    if answer["takes"] is None:
        reasons = "; ".join(f"{found['tier']}: {found['reason']}" for found in answer["found"])
        raise ConfigError(f"--backends {backend} cannot be used with --hicache-size {hicache_gb}: {reasons}.")


def engine_options(
    args: argparse.Namespace,
    backend: str,
    *,
    device_tokens: int | None,
    context_tokens: int,
    hicache_gb: int,
    running: int,
) -> dict[str, Any]:
    """Keywords of sgl.Engine for a backend.

    Args:
        args: after `settle`.
        backend: its name.
        device_tokens: size of the GPU's KV pool; None leaves it to SGLang.
        context_tokens: longest request with its answer.
        hicache_gb: size of HiCache's pool, GB a rank.
        running: requests that may run at once.
    """
    engine: dict[str, Any] = {
        "model_path": args.model or str(shapes.write_shape(args.shape, Path(args.scratch.name))),
        "skip_tokenizer_init": True,
        "page_size": args.page_size,
        "tp_size": args.tp_size,
        "max_running_requests": running,
        "context_length": context_tokens,
        "chunked_prefill_size": 8192,
        "random_seed": args.seed,
        "log_level": "info",
        "enable_cache_report": True,
    }
    if device_tokens is not None:
        engine["max_total_tokens"] = device_tokens
    if args.model is None:
        engine["load_format"] = "dummy"
    if args.on_gpu:
        engine.update(attention_backend=args.attention_backend or "flashinfer", disable_decode_cuda_graph=True)
        engine.update(cuda_graph_max_bs_prefill=256)
    else:
        engine.update(device="cpu", attention_backend="torch_native", sampling_backend="pytorch", dtype="bfloat16")
        engine.update(disable_overlap_schedule=True)
    if backend == RECOMPUTE:
        engine["disable_radix_cache"] = True
    elif backend != HBM:
        engine.update(
            enable_hierarchical_cache=True,
            hicache_write_policy="write_through",
            hicache_io_backend="kernel",
            hicache_size=hicache_gb,
        )
        if backend == STOCK:
            engine["hicache_mem_layout"] = args.stock_layout
        else:
            tier, config = tier_of(backend), config_of(args, backend)
            engine.update(hicache_use_xmem=True, hicache_xmem_tier=tier, hicache_mem_layout="layer_first")
            if config:
                engine["hicache_xmem_config"] = config
    return {**engine, **args.engine_options}


def in_host_memory(backend: str) -> bool:
    """Whether a backend's pool lies in host memory, where SGLang's limits apply."""
    tier = tier_classes().get(tier_of(backend))
    return backend == STOCK or (tier is not None and tier.traits.counts_as_host_ram)


def has_pool(backend: str) -> bool:
    """Whether a backend has a HiCache pool."""
    return backend not in (HBM, RECOMPUTE)


class Results:
    """Rows of one run, appended to a JSON Lines file; `NAME.runs.jsonl` beside it says what made them.

    Args:
        bench: name of the benchmark.
        args: with output, resume and no_plots.
        parameters: see `parameters`; --resume continues the last run in the file with the same.
    """

    def __init__(self, bench: str, args: argparse.Namespace, parameters: dict[str, Any]) -> None:
        self.bench = bench
        self.path: Path = args.output
        self.plots = not args.no_plots
        about = environment.describe()
        machine = {"gpus": about["gpus"], "commit": about["commit"], "sglang": about["versions"].get("sglang")}
        self.key = hashlib.sha256(json.dumps([parameters, machine], sort_keys=True).encode()).hexdigest()[:12]
        self.run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        #: Rows of engines that are done.
        self.earlier: list[dict[str, Any]] = []
        rows = report.read_rows(self.path) if self.path.exists() else []
        if args.resume:
            mine = [row for row in rows if row.get("bench") == bench and row.get("parameters") == self.key]
            if mine:
                self.run = mine[-1]["run"]
                self.earlier = [row for row in mine if row["run"] == self.run and row["complete"]]
        self.done: set[tuple[str, int]] = {(row["engine"], row.get("pass", 0)) for row in self.earlier}
        header = {"bench": bench, "run": self.run, "parameters": self.key, **about, "settings": parameters}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            report.append_rows(self.path, [])
            report.append_rows(self.path.with_name(f"{self.path.stem}.runs.jsonl"), [header])
        except OSError as error:
            raise ConfigError(f"--output {self.path} cannot be written: {error.strerror}; name another file.") from None

    def write(self, rows: Sequence[dict[str, Any]], engine: str, sequence: int, complete: bool) -> list[dict[str, Any]]:
        """Append an engine's rows; `complete` says that they are all."""
        whole = [
            {
                "bench": self.bench,
                "run": self.run,
                **row,
                "engine": engine,
                "pass": sequence,
                "complete": complete,
                "parameters": self.key,
            }
            for row in rows
        ]
        report.append_rows(self.path, whole)
        return whole

    def finish(self) -> None:
        """The run's table on stdout, and CSV and plots beside the output."""
        rows = report.rows_of_run(report.read_rows(self.path), self.run)
        if not rows:
            return
        report.print_table(rows)
        if self.plots:
            for path in report.write_files(rows, self.path):
                print(path, file=sys.stderr)


Sample = dict[str, Any]


@dataclass
class Measurement:
    """What measuring gets to work with: a place for samples and the progress bar."""

    progress: Progress
    samples: list[Sample] = field(default_factory=list)

    def add(self, **sample: Any) -> None:
        """Keep a sample; it counts also if the engine ends before the next."""
        self.samples.append(sample)

    def step(self, doing: str, count: int = 1) -> None:
        """Say what has been done."""
        self.progress.step(doing, count)


Measure = Callable[[Any, EnginePlan, Measurement], None]
Summarize = Callable[[EnginePlan, list[Sample], str], list[dict[str, Any]]]
Check = Callable[[dict[str, Any]], str | None]


def run_engines(
    args: argparse.Namespace,
    plans: Sequence[EnginePlan],
    results: Results,
    measure: Measure,
    summarize: Summarize,
    check: Check,
) -> int:
    """Run engines one after another; returns the exit status.

    Args:
        args: after `settle`.
        plans: in order.
        results: where rows go, after each engine.
        measure: takes an engine through its workload.
        summarize: rows of a plan's samples; the third argument is the backend's name, `auto` resolved.
        check: what is wrong with a row, None if nothing.
    """
    failed, interrupted = False, False
    todo = [plan for plan in plans if (plan.backend, plan.sequence) not in results.done]
    for plan in plans:
        if plan not in todo:
            print(f"{plan.backend}: in {results.path} already, run {results.run}", file=sys.stderr)
    for row in results.earlier:  # what was wrong with them still is
        if text := check(row):
            print(f"error: {row['engine']}: {text}", file=sys.stderr)
            failed = True
    with Progress(sum(plan.steps for plan in todo)) as progress:
        for plan in todo:
            measurement = Measurement(progress)
            name, problem, log = plan.backend, None, ""
            started = time.monotonic()
            progress.engine(plan.backend, plan.steps)
            with tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_") as folder:
                try:
                    with terminated_as_interrupt():
                        environment_of_engine = {} if args.on_gpu else {"SGLANG_USE_CPU_ENGINE": "1"}
                        with EngineProcess(
                            plan.engine,
                            args.config["vocab_size"],
                            Path(folder),
                            args.timeout,
                            environment_of_engine,
                            args.verbose,
                        ) as engine:
                            engine.wait_ready()
                            if tier_of(plan.backend) == AUTO and engine.tier:
                                name = plan.backend.replace(AUTO, engine.tier, 1)
                            progress.started()
                            measure(engine, plan, measurement)
                except EngineGone as error:
                    problem, log = str(error), error.log
                except RequestFailed as error:
                    problem = f"a request failed: {error}"
                except KeyboardInterrupt:
                    interrupted, problem = True, "interrupted"
            rows = results.write(
                summarize(plan, measurement.samples, name), plan.backend, plan.sequence, complete=problem is None
            )
            problems = [text for row in rows if (text := check(row))]
            if problem is not None:
                problems.append(problem)
            elif not rows:
                problems.append("nothing was measured")
            progress.say(f"{plan.backend}: {time.monotonic() - started:.0f} s, {len(rows)} rows")
            for line in _last_words(log):
                progress.say(f"  | {line}")
            for text in dict.fromkeys(problems):
                progress.say(f"error: {plan.backend}: {text}")
            failed = failed or bool(problems)
            progress.engine_done()
            if interrupted:
                break
    results.finish()
    return INTERRUPTED if interrupted else 1 if failed else 0


def _last_words(log: str, count: int = 20) -> list[str]:
    """What sglang_xmem refused with, or else the end of an engine's log."""
    lines = log.splitlines()
    # SGLang logs its whole configuration in one line of many kilobytes.
    return [line for line in lines if line.startswith("sglang_xmem: ")] or [line[:300] for line in lines[-count:]]


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as an interrupt does: with what is finished written, and no process left behind."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def least_hit(tokens: int, page: int) -> int:
    """Tokens that a hit of so many has at least: up to two pages less, but one page.

    A prompt's last token is always computed again, with what else is in its page, and a page more may be.
    """
    return max(tokens - 2 * page, min(tokens, page))


def unproven(row: dict[str, Any], limit: float) -> str | None:
    """What is wrong with a row's proofs: no proven sample, or too many without."""
    all_samples = row["samples"] + row["samples_unproven"]
    if not row["samples"]:
        return f"no sample of {all_samples} has proof of its hit"
    if row["samples_unproven"] > limit * all_samples:
        return f"{row['samples_unproven']} of {all_samples} samples have no proof of their hit"
    return None

"""What the engine benchmarks share: options, backends, results files, and the loop over engines.

A benchmark describes its workload for each backend as an `EnginePlan`; `run_engines` runs the engines one after another
and writes what each has measured, also where it crashed or was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_xmem import gpus
from sglang_xmem.bench import environment, report, shapes, sizing
from sglang_xmem.bench.engine import EngineGone, EngineProcess, Limit
from sglang_xmem.bench.progress import Progress
from sglang_xmem.bench.sizing import KVShape, Need
from sglang_xmem.cli import INTERRUPTED
from sglang_xmem.config import AUTO, parse_options
from sglang_xmem.doctor import tiers
from sglang_xmem.errors import ConfigError, Unavailable
from sglang_xmem.tiers import tier_classes

#: Backends that are not tiers. `hbm` is SGLang without HiCache, `recompute` SGLang without any cache of prefixes,
#: `auto` the tier that --hicache-xmem-tier auto uses.
HBM, RECOMPUTE, STOCK = "hbm", "recompute", "stock"
#: Of a prompt; above what any model takes, and below what does not fit into memory as a list.
MOST_TOKENS = 1 << 27
#: What ended an engine that a user stopped.
INTERRUPT = "interrupted"
#: Seconds of --time-limit that are kept for ending the last engine.
ENDING_S = 20.0
#: Share of a GPU's memory for weights and pools. SGLang's own leaves more for activations than chunks of 8K tokens
#: need, and a model of 61 GB would have no pool for 80K tokens left in 80 GB.
MEM_FRACTION = 0.88
#: Keywords of sgl.Engine that rows speak of, and that benchmarks have options of their own for.
OWN_ENGINE_ARGUMENTS = {"model_path", "page_size", "tp_size", "random_seed", "disable_radix_cache"} | {
    f"hicache_{name}" for name in ("size", "ratio", "mem_layout", "use_xmem", "xmem_tier", "xmem_config")
}

Row = dict[str, Any]
Sample = dict[str, Any]


def backend_names() -> tuple[str, ...]:
    """All that --backends takes, in the order in which tables show them."""
    return (HBM, *tier_classes(), AUTO, STOCK, RECOMPUTE)


def has_pool(backend: str) -> bool:
    """Whether a backend has a HiCache pool."""
    return backend not in (HBM, RECOMPUTE)


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
        raise ConfigError(f"{text!r} is not a number of tokens. Give one such as 512 or 80K.")
    return value


def parse_backends(text: str) -> list[str]:
    """The names in a comma-separated list.

    Raises:
        ConfigError: an unknown name, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = ", ".join(backend_names())
    for name in names:
        if name not in backend_names():
            raise ConfigError(f"--backends {name}: choose from {known}.")
    if not names:
        raise ConfigError(f"--backends is empty. Choose from {known}.")
    return list(dict.fromkeys(names))


def has_gpu() -> bool:
    """Whether SGLang will find a GPU here."""
    try:
        return len(gpus.visible_gpus()) > 0
    except Unavailable:
        return False


def gpu_bytes() -> int | None:
    """Memory of the first GPU; None without one."""
    with suppress(Exception):
        return sum(gpus.memory_bytes(0))
    return None


# ---- options ----


def add_engine_arguments(parser: argparse.ArgumentParser, backends: str, *, shape_list: bool = False) -> None:
    """Options of every benchmark that starts engines.

    Args:
        shape_list: it takes several shapes.
    """
    add, names = parser.add_argument, ",".join(backend_names())
    about = "; ".join(f"{name}: {words}" for name, words in shapes.SHAPES.items())
    layouts = ["layer_first", "page_first"]
    add("--backends", default=backends, help=f"comma-separated, of {names}; default {backends}")
    model = parser.add_mutually_exclusive_group()
    about = f"runs with dummy weights; NAME/4 has a quarter of the layers. {about}. Default: the first, or the preset's"
    default = "qwen3-30b-a3b"
    if shape_list:
        model.add_argument("--shapes", "--shape", dest="shape", default=default, help=f"comma-separated; {about}")
    else:
        model.add_argument("--shape", default=default, help=about)
    model.add_argument("--model", help="path of a model to run with its weights")
    add("--page-size", type=at_least(1), default=None, help="tokens; default 64, with --shape tiny 16")
    add("--tp-size", type=at_least(1), default=1, help="GPUs for tensor parallelism; default 1")
    add(
        "--hicache-size",
        type=at_least(0),
        default=0,
        help="GB per rank; default: what the workload needs and a reserve",
    )
    layout = "of stock HiCache's pool; default layer_first, with linear attention page_first, which SGLang needs there"
    add("--stock-layout", default=None, choices=layouts, help=layout)
    add(
        "--attention-backend",
        default=None,
        help="SGLang's option; default flashinfer for K and V, else SGLang's choice",
    )
    add("--xmem-config", default=None, help="--hicache-xmem-config of engines with a tier; default: none")
    add("--engine-args", default="{}", help="JSON object of further sgl.Engine keywords; default: none")
    add("--seed", type=int, default=0, help="of the prompts; default 0")
    add("--timeout", type=at_least(1, float), default=1800, help="seconds per engine; default 1800")
    limit = "seconds for the whole command; later engines are not started; default: none"
    add("--time-limit", type=at_least(1, float), default=None, help=limit)
    parser.set_defaults(began=time.monotonic(), engines=1)
    add("--quick", action="store_true", help="the smallest useful run; not for conclusions")
    unproven = "a run fails if a larger share of samples has no proof of its hit; default 0.2"
    add("--max-unproven", type=at_least(0, float, 1), default=0.2, help=unproven)
    add("--verbose", action="store_true", help="print the engines' logs on stderr")


def add_output_argument(parser: argparse.ArgumentParser, bench: str) -> None:
    """--output of every benchmark that writes rows."""
    name = f"{bench}.jsonl"
    parser.add_argument(
        "--output", type=Path, default=Path(name), help=f"JSON Lines file to append to; default {name} in this folder"
    )


def settle(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on other options, and refuse what cannot work.

    Raises:
        ConfigError: "Problem. Fix."
    """
    args.names = parse_backends(args.backends)
    args.on_gpu = has_gpu()
    args.scratch = tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_")  # lives as long as args
    args.tiny = args.model is None and args.shape == "tiny"
    args.config = shapes.config_of(args.shape) if args.model is None else _model_config(Path(args.model))
    if not args.on_gpu and args.model is None and not args.tiny:
        raise ConfigError(f"This machine has no GPU, which --shape {args.shape} needs. Use --shape tiny.")
    if args.page_size is None:
        args.page_size = 16 if args.tiny else 64
    try:
        args.engine_options = json.loads(args.engine_args)
        if not isinstance(args.engine_options, dict):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--engine-args {args.engine_args!r} is not a JSON object. Give one of keywords.") from None
    for name in sorted(OWN_ENGINE_ARGUMENTS & args.engine_options.keys()):
        raise ConfigError(f"--engine-args names {name}, which the benchmark sets itself. Use its own options.")
    parse_options(AUTO, args.xmem_config)
    args.kv = KVShape.of(args.config, args.tp_size, str(args.engine_options.get("kv_cache_dtype", "auto")))


def settle_shapes(args: argparse.Namespace) -> list[argparse.Namespace]:
    """`settle` for each of --shapes: options of their own, in that order.

    Raises:
        ConfigError: "Problem. Fix."
    """
    names = list(dict.fromkeys(name.strip() for name in args.shape.split(",") if name.strip())) or [args.shape]
    found = [argparse.Namespace(**{**vars(args), "shape": name}) for name in names]
    for one in found:
        settle(one)
    return found if args.model is None else found[:1]


def limit(args: argparse.Namespace) -> Limit:
    """When an engine that starts now has to be done."""
    now = time.monotonic()
    timeout = Limit(now + args.timeout, f"--timeout {args.timeout:g} s")
    if args.time_limit is None:
        return timeout
    end = args.began + args.time_limit - min(ENDING_S, args.time_limit / 4)
    return min(timeout, Limit(end, f"--time-limit {args.time_limit:g} s"), key=lambda found: found.at)


def about(args: argparse.Namespace) -> Row:
    """What all rows say of their engines."""
    return {"shape": args.model or args.shape, "page_size": args.page_size, "tp_size": args.tp_size}


def _model_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(f"--model {path} has no readable config.json. Give a model's directory.") from None
    return {**config, **config.get("text_config", {})}


# ---- engines ----


@dataclass(frozen=True)
class EnginePlan:
    """An engine to run.

    Attributes:
        args: of its benchmark and shape, after `settle`.
        backend: its name in --backends.
        engine: keywords of sgl.Engine.
        workload: of the benchmark's module, a dataclass.
        steps: of progress that its measuring has, about.
        more: keywords and workload of each further engine that runs at the same time.
    """

    args: argparse.Namespace
    backend: str
    engine: dict[str, Any]
    workload: Any
    steps: int
    more: tuple[tuple[dict[str, Any], Any], ...] = ()

    def processes(self, module: str, folder: Path, until: Limit) -> Iterator[EngineProcess]:
        """Start its engines, one by one; each has a folder of its own in `folder`."""
        gate = folder / "together"
        gate.mkdir()
        for number, (engine, workload) in enumerate([(self.engine, self.workload), *self.more]):
            spec = {"module": module, "engine": engine, "vocab": self.args.config["vocab_size"]}
            spec |= {"workload": asdict(workload), "backend": self.backend}
            spec["together"] = {"folder": str(gate), "name": str(number), "count": 1 + len(self.more)}
            own = folder / str(number)
            own.mkdir()
            yield EngineProcess(spec, own, until, cpu_environment(self.args), self.args.verbose)


def fitting_options(args: argparse.Namespace, backend: str, need: Need, pool_gb: int) -> dict[str, Any]:
    """Keywords of sgl.Engine for a backend, after what cannot fit has been refused.

    Args:
        args: after `settle`.
        pool_gb: --hicache-size of a backend that has a pool, GB a rank.

    Raises:
        ConfigError: "Problem. Fix."
    """
    sizing.check_fits(
        need,
        args.kv,
        args.page_size,
        max_context=args.config.get("max_position_embeddings"),
        gpu_bytes=gpu_bytes() if args.on_gpu else None,
        pool_gb=pool_gb if has_pool(backend) else None,
    )
    if backend == STOCK:
        free = sizing.available_host_bytes()
        ranks = args.tp_size * args.engines
        if pool_gb * 10**9 * ranks > free:
            raise ConfigError(
                f"HiCache's pool of {pool_gb * ranks} GB does not fit into the {free / 1e9:.1f} GB of host "
                "memory that SGLang may have. Ask for shorter prompts or fewer of them."
            )
    elif has_pool(backend):
        check_tier(args, backend, pool_gb)
    return engine_options(args, backend, need, pool_gb)


def engine_number(args: argparse.Namespace, number: int) -> argparse.Namespace:
    """Options of one of --engines that run at the same time: GPUs of its own to compute on, and peers of its own.

    Raises:
        ConfigError: the machine has too few GPUs.
    """
    if args.engines == 1 or not args.on_gpu:
        return args
    used, all_of_them = args.engines * args.tp_size, len(gpus.visible_gpus())
    if used > all_of_them:
        raise ConfigError(f"--engines {args.engines} need {used} GPUs, and there are {all_of_them}. Use fewer.")
    options = {**args.engine_options, "base_gpu_id": number * args.tp_size}
    text = args.xmem_config or "{}"
    config = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    peers = list(range(used + number, all_of_them, args.engines))
    if peers:
        config["peer"] = {"gpus": peers, **config.get("peer", {})}
    one = {"engine_options": options, "xmem_config": json.dumps(config) if config else None}
    return argparse.Namespace(**{**vars(args), **one})


def check_tier(args: argparse.Namespace, backend: str, pool_gb: int) -> None:
    """Ask a tier whether it is there and has the free capacity, as SGLang's launcher would.

    An engine would need a minute to say so, and others may be before it.

    Raises:
        ConfigError: it cannot hold the pool.
    """
    engine = tiers.engine_gpus(args.tp_size, int(args.engine_options.get("base_gpu_id", 0)))
    answer, _ = tiers.verdict(backend, args.xmem_config, engine, pool_gb * 10**9, banks=False)
    if answer["takes"] is None:
        reasons = "; ".join(f"{found['tier']}: {found['reason']}" for found in answer["found"])
        raise ConfigError(f"--backends {backend} is unavailable with --hicache-size {pool_gb}: {reasons}.")


def engine_options(args: argparse.Namespace, backend: str, need: Need, pool_gb: int) -> dict[str, Any]:
    """Keywords of sgl.Engine for a backend."""
    engine: dict[str, Any] = {
        "model_path": args.model or str(shapes.write_shape(args.shape, Path(args.scratch.name))),
        "skip_tokenizer_init": True,
        "page_size": args.page_size,
        "tp_size": args.tp_size,
        "max_running_requests": need.running,
        "context_length": need.context,
        "chunked_prefill_size": 8192,
        "random_seed": args.seed,
        "log_level": "info",
        "enable_cache_report": True,
    }
    if need.device is not None:
        engine["max_total_tokens"] = need.device
        if args.kv.state_bytes:
            # Slots for the states of what the pool holds, and those that a running request takes.
            engine["max_mamba_cache_size"] = need.device // sizing.TOKENS_OF_A_STATE + 4 * need.running + 8
    if args.model is None:
        engine["load_format"] = "dummy"
    if args.on_gpu:
        engine.update(cuda_graph_max_bs_prefill=256)
        if need.device is not None:
            engine["mem_fraction_static"] = MEM_FRACTION
        if need.output == 1:  # nothing is decoded
            engine["disable_decode_cuda_graph"] = True
        else:
            engine["cuda_graph_max_bs_decode"] = need.running
        plain = not args.kv.hybrid and not args.config.get("kv_lora_rank")
        attention = args.attention_backend or ("flashinfer" if plain else None)
        if attention:
            engine["attention_backend"] = attention
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
            hicache_size=pool_gb,
        )
        if backend == STOCK:
            engine["hicache_mem_layout"] = args.stock_layout or ("page_first" if args.kv.state_bytes else "layer_first")
        else:
            engine.update(hicache_use_xmem=True, hicache_xmem_tier=backend)
            if args.xmem_config:
                engine["hicache_xmem_config"] = args.xmem_config
    return {**engine, **args.engine_options}


# ---- results ----


class Results:
    """Rows of one run, appended to a JSON Lines file; `NAME.runs.jsonl` in the same folder says what made them.

    Args:
        bench: name of the benchmark.
        args: the command's, with `output`.
        program: that makes them.
        about: of every row; `machine` and `gpu` are added.
    """

    def __init__(self, bench: str, args: argparse.Namespace, *, program: str = "sglang-xmem", **about: Any) -> None:
        self.path: Path = args.output
        self.run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        made_by = environment.describe(program)
        gpus = made_by["gpus"]
        self.head = {"bench": bench, "run": self.run, "machine": environment.machine(gpus), "gpu": (gpus or ["CPU"])[0]}
        self.head |= about
        settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, list))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            report.append_rows(self.path, [])
            runs = self.path.with_name(f"{self.path.stem}.runs.jsonl")
            report.append_rows(runs, [{"bench": bench, "run": self.run, **made_by, "settings": settings}])
        except OSError as error:
            raise ConfigError(f"--output {self.path} cannot be written: {error.strerror}. Name another file.") from None

    def write(self, rows: Sequence[Row], **about: Any) -> list[Row]:
        """Append rows; returns them with what all have."""
        whole = [{**self.head, **row, **about} for row in rows]
        report.append_rows(self.path, whole)
        return whole

    def finish(self) -> None:
        """The run's table on stdout."""
        rows = [row for row in report.read_rows(self.path) if row.get("run") == self.run]
        if rows:
            report.print_table(rows)
            print(
                f"Rows: {self.path}; again, and as a plot: sglang-xmem bench report {self.path} --plot NAME.png",
                file=sys.stderr,
            )


@dataclass
class Outcome:
    """What a run of engines came to."""

    problems: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def status(self) -> int:
        return INTERRUPTED if self.interrupted else 1 if self.problems else 0


def run_engines(
    args: argparse.Namespace,
    module: str,
    plans: Sequence[EnginePlan],
    results: Results,
    summarize: Callable[[EnginePlan, list[Sample], str], list[Row]],
    check: Callable[[Row], str | None],
) -> int:
    """Run engines one after another; returns the exit status.

    Args:
        args: after `settle`.
        module: the benchmark's, which has WORKLOAD and `measure`.
        summarize: rows of a plan's samples; the third argument is the backend's name, `auto` resolved.
        check: what is wrong with a row, None if nothing.
    """
    outcome = Outcome()
    several = len({plan.args.shape for plan in plans}) > 1
    with Progress([plan.steps for plan in plans]) as progress:
        for plan in plans:
            label = f"{plan.args.shape} {plan.backend}" if several else plan.backend
            until, started = limit(args), time.monotonic()
            progress.engine(label)
            if not until.left_s:
                outcome.problems.append(f"not run: {until.name} is over")
                progress.say(f"error: {label}: {outcome.problems[-1]}")
                continue
            try:
                with (
                    terminated_as_interrupt(),
                    tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_") as folder,
                    ExitStack() as running,
                ):
                    engines = [running.enter_context(each) for each in plan.processes(module, Path(folder), until)]
                    samples, name, problem, log = _listen(plan, engines, progress)
                    # On disk before the engine's processes are waited for.
                    rows = summarize(plan, samples, name)
                    rows = results.write(rows, **about(plan.args), engine=name, complete=problem is None)
                    problems = [text for row in rows if (text := check(row))]
                    if problem is not None:
                        problems.append(problem)
                    elif not rows:
                        problems.append("nothing was measured")
                    progress.say(f"{label}: {time.monotonic() - started:.0f} s, {len(rows)} rows")
                    for line in last_words(log):
                        progress.say(f"  | {line}")
                    for text in dict.fromkeys(problems):
                        progress.say(f"error: {label}: {text}")
                    outcome.problems += problems
                    if problem == INTERRUPT:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                outcome.interrupted = True
                break
    results.finish()
    return outcome.status


def _listen(
    plan: EnginePlan, engines: Sequence[EngineProcess], progress: Progress
) -> tuple[list[Sample], str, str | None, str]:
    """Engines' samples, the backend's name with `auto` resolved, what ended them early, and the log of who did."""
    inbox: queue.SimpleQueue[dict[str, Any] | EngineGone | None] = queue.SimpleQueue()

    def pass_on(engine: EngineProcess) -> None:
        try:
            for message in engine.messages():
                inbox.put(message)
            inbox.put(None)
        except EngineGone as error:
            inbox.put(error)

    for engine in engines:
        threading.Thread(target=pass_on, args=(engine,), daemon=True).start()
    samples: list[Sample] = []
    name, ready, done = plan.backend, 0, 0
    try:
        while done < len(engines):
            message = inbox.get()
            if message is None:
                done += 1
            elif isinstance(message, EngineGone):
                for engine in engines:
                    engine.end_s = 0.0
                return samples, name, str(message), message.log
            elif "sample" in message:
                samples.append(message["sample"])
            elif "step" in message:
                progress.step(message["step"])
            else:
                ready += 1
                if ready == len(engines):
                    progress.started()
                name = engines[0].tier or name if plan.backend == AUTO else name
    except KeyboardInterrupt:
        return samples, name, INTERRUPT, ""
    return samples, name, None, ""


def cpu_environment(args: argparse.Namespace) -> dict[str, str]:
    """Variables for SGLang's processes: without a GPU it has its CPU engine or nothing."""
    return {} if args.on_gpu else {"SGLANG_USE_CPU_ENGINE": "1"}


def last_words(log: str, count: int = 20) -> list[str]:
    """What sglang_xmem refused with, or else the end of an engine's log."""
    lines = log.splitlines()
    # SGLang logs its whole configuration in one line of many kilobytes.
    return [line for line in lines if line.startswith("sglang_xmem: ")] or [line[:300] for line in lines[-count:]]


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as an interrupt does: with what is finished written, and no process left behind.

    A program that has a handler of its own hears of it too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        if callable(before):
            before(number, frame)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- proofs ----


def least_hit(tokens: int, page: int) -> int:
    """Tokens that a hit of so many has at least: up to two pages less, but one page.

    A prompt's last token is always computed again, with what else is in its page, and a page more may be.
    """
    return max(tokens - 2 * page, min(tokens, page))


def unproven(row: Row, limit: float) -> str | None:
    """What is wrong with a row's proofs: no proven sample, or too many without."""
    all_samples = row["samples"] + row["samples_unproven"]
    if not row["samples"]:
        return f"no sample of {all_samples} has proof of its hit"
    if row["samples_unproven"] > limit * all_samples:
        return f"{row['samples_unproven']} of {all_samples} samples have no proof of their hit"
    return None

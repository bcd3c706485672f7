"""Options of the benchmarks that start engines, keywords of engines, and what is refused before one starts."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sglang_xmem import gpus
from sglang_xmem.bench import shapes, sizing
from sglang_xmem.bench.engine import Case, Limit
from sglang_xmem.bench.sizing import KVShape, Need
from sglang_xmem.config import AUTO, parse_options
from sglang_xmem.doctor import tiers
from sglang_xmem.errors import ConfigError
from sglang_xmem.tiers import tier_classes

#: Backends that are not tiers. `hbm` is SGLang without HiCache, `recompute` SGLang without any cache of prefixes,
#: `auto` the tier that --hicache-xmem-tier auto uses.
HBM, RECOMPUTE, STOCK = "hbm", "recompute", "stock"
BACKENDS = (HBM, *tier_classes(), AUTO, STOCK, RECOMPUTE)
#: Of a prompt; above what any model takes, and below what does not fit into memory as a list.
MOST_TOKENS = 1 << 27
#: Seconds of --time-limit that are kept for ending the last engine.
ENDING_S = 20.0
#: Share of a GPU's memory for weights and pools. SGLang's own leaves more for activations than chunks of 8K tokens
#: need, and a model of 61 GB would have no pool for 80K tokens left in 80 GB.
MEM_FRACTION = 0.88
#: Keywords of sgl.Engine that rows speak of, and that benchmarks have options of their own for.
OWN_ENGINE_ARGUMENTS = {"model_path", "page_size", "tp_size", "random_seed", "disable_radix_cache"} | {
    f"hicache_{name}" for name in ("size", "ratio", "use_xmem", "xmem_tier", "xmem_config")
}


def has_pool(backend: str) -> bool:
    """Whether a backend has a HiCache pool."""
    return backend not in (HBM, RECOMPUTE)


def has_gpu() -> bool:
    """Whether SGLang will find a GPU here."""
    return gpus.count() > 0


def gpu_bytes() -> int | None:
    """Memory of the first GPU; None without one."""
    with suppress(Exception):
        return sum(gpus.memory_bytes(0))
    return None


# ---- types of options ----


def number(least: float, kind: type[int] | type[float] = int, most: float = math.inf) -> Callable[[str], Any]:
    """A finite number of a kind within limits."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most):
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return parse


def tokens(text: str) -> int:
    """`80K` is 81920 tokens."""
    text = text.strip()
    try:
        value = int(text[:-1]) * 1024 if text[-1:] in ("k", "K") else int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens. Give one such as 512 or 80K.")
    return value


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """One of some names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text}: choose from {', '.join(names)}.")
        return text

    return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A comma-separated list, each value once."""

    def parse(text: str) -> list[Any]:
        found = list(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} is empty. Give one or more, with commas between them.")
        return found

    return parse


def json_object(text: str) -> dict[str, Any]:
    """A JSON object of keywords."""
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object. Give one of keywords.")


def add_output_argument(parser: argparse.ArgumentParser, bench: str) -> None:
    """--output of every benchmark that writes rows."""
    name = f"{bench}.jsonl"
    about = f"JSON Lines file to append to; default {name} in this folder"
    parser.add_argument("--output", type=Path, default=Path(name), help=about)


def add_engine_arguments(parser: argparse.ArgumentParser, bench: str, backends: str, *, multiple: bool = False) -> None:
    """Options of every benchmark that starts engines.

    Args:
        multiple: it takes several shapes.
    """
    add, about = parser.add_argument, f"comma-separated, of {','.join(BACKENDS)}; default {backends}"
    add("--backends", type=several(one_of(BACKENDS)), default=backends, help=about)
    model = parser.add_mutually_exclusive_group()
    about = "; ".join(f"{name}: {words}" for name, words in shapes.SHAPES.items())
    about = f"runs with dummy weights; NAME/4 has a quarter of the layers. {about}. Default: the first, or the preset's"
    if multiple:
        model.add_argument("--shapes", "--shape", type=several(str), help=f"comma-separated; {about}")
    else:
        model.add_argument("--shape", help=about)
    model.add_argument("--model", help="path of a model to run with its weights")
    add("--page-size", type=number(1), help="tokens; default 64, with --shape tiny 16")
    add("--tp-size", type=number(1), default=1, help="GPUs for tensor parallelism; default 1")
    about = "GB per rank; default: what the workload needs and a reserve"
    add("--hicache-size", type=number(0), default=0, help=about)
    add("--attention-backend", help="SGLang's option; default flashinfer for K and V, else SGLang's choice")
    add("--xmem-config", help="--hicache-xmem-config of engines with a tier; default: none")
    add("--engine-args", type=json_object, default={}, help="JSON object of further sgl.Engine keywords; default: none")
    add("--seed", type=int, default=0, help="of the prompts; default 0")
    add("--timeout", type=number(1, float), default=1800.0, help="seconds per engine; default 1800")
    about = "seconds for the whole command; later engines are not started; default: none"
    add("--time-limit", type=number(1, float), help=about)
    add("--quick", action="store_true", help="the smallest useful run; not for conclusions")
    add("--verbose", action="store_true", help="print the engines' logs on stderr")
    parser.set_defaults(began=time.monotonic())
    add_output_argument(parser, bench)


def limit(args: argparse.Namespace) -> Limit:
    """When an engine that starts now has to be done."""
    timeout = Limit(time.monotonic() + args.timeout, f"--timeout {args.timeout:g} s")
    if args.time_limit is None:
        return timeout
    end = args.began + args.time_limit - min(ENDING_S, args.time_limit / 4)
    return min(timeout, Limit(end, f"--time-limit {args.time_limit:g} s"))


# ---- engines ----


class Plan(NamedTuple):
    """What is measured at the same time.

    Attributes:
        setup: of the engines.
        backend: that rows name.
        engines: keywords and case of each; the first one's case makes the rows.
    """

    setup: Setup
    backend: str
    engines: list[tuple[dict[str, Any], Case]]


class Setup:
    """A shape or a model, and how engines of it start.

    Args:
        args: of a command with `add_engine_arguments`.
        shape: where no --model is named.

    Attributes:
        tiny: it is the shape for machines without a GPU.
        shape: its name, or the model's path.
        page: tokens.
        config: of the model.
        kv: bytes of a token.

    Raises:
        ConfigError: "Problem. Fix."
    """

    def __init__(self, args: argparse.Namespace, shape: str | None) -> None:
        shape = shape or next(iter(shapes.SHAPES))
        self.args, self.on_gpu, self.shape = args, has_gpu(), args.model or shape
        self.tiny = self.shape == "tiny"
        self.config = _model_config(Path(args.model)) if args.model else shapes.config_of(shape)
        if not (self.on_gpu or args.model or self.tiny):
            raise ConfigError(f"This machine has no GPU, which --shape {shape} needs. Use --shape tiny.")
        self.page: int = args.page_size or (16 if self.tiny else 64)
        for name in sorted(OWN_ENGINE_ARGUMENTS & args.engine_args.keys()):
            raise ConfigError(f"--engine-args names {name}, which the benchmark sets itself. Use its own options.")
        parse_options(AUTO, args.xmem_config)
        self.kv = KVShape.of(self.config, args.tp_size, str(args.engine_args.get("kv_cache_dtype", "auto")))
        self._scratch = tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_")  # lives as long as this

    @property
    def about(self) -> dict[str, Any]:
        """What all rows say of their engines."""
        return {"shape": self.shape, "page_size": self.page, "tp_size": self.args.tp_size}

    @property
    def environment(self) -> dict[str, str]:
        """Variables for SGLang's processes: without a GPU it has its CPU engine or nothing."""
        return {} if self.on_gpu else {"SGLANG_USE_CPU_ENGINE": "1"}

    def plan(self, backend: str, *cases: Case, pool_gb: int | None = None) -> Plan:
        """Engines of a backend, after what cannot fit has been refused.

        Several run at the same time, each on GPUs of its own to compute on, with peers of its own.

        Args:
            pool_gb: GB a rank where --hicache-size is not given; None: what a case needs, and a reserve.

        Raises:
            ConfigError: "Problem. Fix."
        """
        engines, takes = [], backend
        for index, case in enumerate(cases):
            own: dict[str, Any] = {}
            xmem_config = self.args.xmem_config
            if len(cases) > 1 and self.on_gpu:
                own["base_gpu_id"], xmem_config = self._own_gpus(index, len(cases))
            size = self.args.hicache_size or pool_gb or sizing.hicache_gb(case.need.pool * 5 // 4, self.kv)
            max_context = self.config.get("max_position_embeddings")
            case.need.check(self.kv, self.page, max_context, size if has_pool(backend) else None)
            if has_pool(backend) and backend != STOCK:
                takes = self._check_tier(backend, size, xmem_config, own.get("base_gpu_id"))
            engines.append(({**self.options(backend, case.need, size, xmem_config), **own}, case))
        return Plan(self, takes, engines)

    def _own_gpus(self, engine: int, engines: int) -> tuple[int, str | None]:
        """First GPU of an engine, and its --hicache-xmem-config: other GPUs are peers, assigned round-robin."""
        used, known = engines * self.args.tp_size, len(gpus.visible_gpus())
        if used > known:
            raise ConfigError(f"--engines {engines} need {used} GPUs, and there are {known}. Use fewer.")
        text = self.args.xmem_config or "{}"
        config = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
        peers = list(range(used + engine, known, engines))
        if peers:
            config["peer"] = {"gpus": peers, **config.get("peer", {})}
        return engine * self.args.tp_size, json.dumps(config) if config else None

    def _check_tier(self, backend: str, pool_gb: int, xmem_config: str | None, base_gpu: int | None) -> str:
        """The tier that serves, asked as SGLang's launcher would ask it; an engine needs a minute to say no."""
        base = int(self.args.engine_args.get("base_gpu_id", 0)) if base_gpu is None else base_gpu
        engine = tiers.engine_gpus(self.args.tp_size, base)
        answer, _ = tiers.verdict(backend, xmem_config, engine, pool_gb * 10**9, banks=False)
        if answer["takes"] is None:
            reasons = "; ".join(f"{found['tier']}: {found['reason']}" for found in answer["found"])
            raise ConfigError(f"--backends {backend} is unavailable with --hicache-size {pool_gb}: {reasons}.")
        return str(answer["takes"])

    def options(self, backend: str, need: Need, pool_gb: int, xmem_config: str | None) -> dict[str, Any]:
        """Keywords of sgl.Engine for a backend."""
        args = self.args
        engine: dict[str, Any] = {
            "model_path": args.model or str(shapes.write_shape(self.shape, Path(self._scratch.name))),
            "skip_tokenizer_init": True,
            "page_size": self.page,
            "tp_size": args.tp_size,
            "max_running_requests": need.running,
            "context_length": sizing.pages_up(need.prompt + need.output, self.page) + self.page,
            "chunked_prefill_size": 8192,
            "random_seed": args.seed,
            "log_level": "info",
            "enable_cache_report": True,
        }
        if need.device is not None:
            engine["max_total_tokens"] = need.device
            if self.kv.state_bytes:
                # Slots for the states of what the pool holds, and those that a running request takes.
                engine["max_mamba_cache_size"] = need.device // sizing.TOKENS_OF_A_STATE + 4 * need.running + 8
        if args.model is None:
            engine["load_format"] = "dummy"
        if self.on_gpu:
            engine["cuda_graph_max_bs_prefill"] = 256
            if need.device is not None:
                engine["mem_fraction_static"] = MEM_FRACTION
            if need.output == 1:  # nothing is decoded
                engine["disable_decode_cuda_graph"] = True
            else:
                engine["cuda_graph_max_bs_decode"] = need.running
            plain = not self.kv.hybrid and not self.config.get("kv_lora_rank")
            if attention := args.attention_backend or ("flashinfer" if plain else None):
                engine["attention_backend"] = attention
        else:
            engine |= {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch"}
            engine |= {"dtype": "bfloat16", "disable_overlap_schedule": True}
        if backend == RECOMPUTE:
            engine["disable_radix_cache"] = True
        elif backend != HBM:
            engine |= {"enable_hierarchical_cache": True, "hicache_size": pool_gb, "hicache_io_backend": "kernel"}
            engine["hicache_write_policy"] = "write_through"
            if backend == STOCK:  # with linear attention SGLang has no other
                engine["hicache_mem_layout"] = "page_first" if self.kv.state_bytes else "layer_first"
            else:
                engine |= {"hicache_use_xmem": True, "hicache_xmem_tier": backend}
                if xmem_config:
                    engine["hicache_xmem_config"] = xmem_config
        return {**engine, **args.engine_args}


def _model_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        raise ConfigError(f"--model {path} has no readable config.json. Give a model's directory.") from None
    return {**config, **config.get("text_config", {})}

"""A recorded trace of requests in Mooncake's JSON Lines format, replayed by sglang.bench_serving.

Each line has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one per block of 512 tokens;
equal ids mean equal content. bench_serving's own dataset of this format makes prompts of a quarter of the recorded
length, with nearly the same words in all blocks; here prompts have their recorded length and distinct content. At real
or scaled time, requests are sent at the trace's times, even if earlier ones are still running; with `--speed max`,
--concurrency requests run at once. The GPU's own KV cache is on.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec

from sglang_xmem.bench import runs, setup, sizing, stats
from sglang_xmem.bench.engine import Case, Client, Report, Row, Sample, Tokens
from sglang_xmem.bench.setup import Plan, Setup, has_pool, number, tokens
from sglang_xmem.bench.sizing import Need
from sglang_xmem.errors import ConfigError

#: The backend's name with --url.
SERVER = "server"
#: Command of a server; options follow.
LAUNCH = (sys.executable, "-m", "sglang.launch_server")
#: Tokens of one hash id in Mooncake's traces (kvcache-ai/Mooncake, FAST25-release/traces).
BLOCK_TOKENS = 512
#: Of a trace's timestamp, in ms: a hundred years.
MOST_MS = 3.2e12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, count = parser.add_argument, number(1)
    add("file", type=Path, help="JSON Lines file")
    setup.add_engine_arguments(parser, "trace", "hbm,stock,dram,peer")
    add("--url", help="a running server, such as http://127.0.0.1:30000; default: that of --backends")
    add("--vocab", type=number(16), default=30000, help="with --url: ids are below this; default 30000")
    add("--speed", type=parse_speed, default="real", help="real, a factor such as 4, or max; default real")
    add("--share", type=number(1e-9, float, 1), default=1.0, help="of the conversations, above 0 to 1; default 1")
    add("--limit", type=count, help="the first so many requests; default: all, with --quick 20")
    add("--max-tokens", type=tokens, help="cut prompts to this length; default: none, with --shape tiny 1K")
    add("--max-output", type=count, help="cut answers to so many tokens; default: none, with --shape tiny 8")
    add("--block-tokens", type=count, default=BLOCK_TOKENS, help="tokens of a hash id; default 512")
    add("--concurrency", type=count, default=64, help="requests that may run at once; default 64, without a GPU 4")
    add("--device-tokens", type=tokens, help="the GPU's KV pool; default: SGLang's, or 4 prompts on a CPU")


def parse_speed(text: str) -> float:
    """Factor of time; infinity for `max`."""
    return {"real": 1.0, "max": math.inf}.get(text) or float(number(1e-6, float, 1e6)(text))


def run(args: argparse.Namespace) -> int:
    if args.url is not None and not args.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {args.url} is not an address. Give one such as http://127.0.0.1:30000.")
    tiny = args.model is None and args.shape == "tiny"
    requests = read_trace(
        args.file,
        block_tokens=args.block_tokens,
        seed=args.seed,
        limit=args.limit or (20 if args.quick else None),
        max_tokens=args.max_tokens or (1024 if tiny else None),
        max_output=args.max_output or (8 if tiny else None),
        share=args.share,
    )
    one = Setup(args, "tiny" if args.url else args.shape)
    case = Replay(one, requests)
    prompts, reusable = sum(request.input_length for request in requests), reusable_tokens(requests, args.block_tokens)
    if args.url is None:
        plans = _plans(one, case, prompts + sum(request.output_length for request in requests) - reusable)
    else:
        one.shape, one.config = args.url, {"vocab_size": args.vocab}
        plans = [Plan(one, SERVER, [({"url": args.url}, case)])]
    speed = "max" if args.speed == math.inf else f"{args.speed:g}"
    about = {"trace": args.file.name, "speed": speed, "share": args.share}
    return runs.run("trace", args, plans, **about, ideal_hit_ratio=round(reusable / prompts, 4))


def _plans(one: Setup, case: Replay, distinct_tokens: int) -> list[Plan]:
    """A server of each backend, with pools for as much of all distinct tokens as memory has free.

    A cache that is too small is a result too.
    """
    args, free = one.args, sizing.available_host_bytes()
    if one.on_gpu and any(name not in ("stock", "dram") for name in args.backends if has_pool(name)):
        free = min(free, (setup.gpu_bytes() or free) * args.tp_size)  # one peer for each rank
    most_gb = max(1, free * 8 // 10 // 10**9 // args.tp_size)
    pool_gb = min(sizing.hicache_gb(distinct_tokens * 3 // 2, one.kv), most_gb)
    plans = [one.plan(name, case, pool_gb=pool_gb) for name in args.backends]
    for plan in plans:
        plan.engines[0][0]["skip_tokenizer_init"] = False  # bench_serving counts a token where its text comes
    return plans


# ---- replay ----


class Server:
    """A server that starts with the keywords of sgl.Engine, or the one at a URL.

    Raises:
        RuntimeError: it ended while it started, or does not respond.
    """

    def __init__(self, url: str | None = None, **options: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self._process = (url or f"http://127.0.0.1:{port}").rstrip("/"), None
        if url is None:
            self._process = subprocess.Popen([*LAUNCH, *as_flags({**options, "host": "127.0.0.1", "port": port})])
            while not self._is_healthy():
                if self._process.poll() is not None:
                    raise RuntimeError(f"the server ended with status {self._process.poll()}")
                time.sleep(0.5)
        elif not self._is_healthy():
            raise RuntimeError(f"no server responds at --url {url}")

    def _is_healthy(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
            return bool(response.status == 200)
        return False

    def shutdown(self) -> None:
        """End a server that was started here."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def as_flags(options: dict[str, Any]) -> list[str]:
    """Keywords of sgl.Engine as the server's flags."""
    flags = []
    for name, value in options.items():
        if value is not False and value is not None:
            flags.append(f"--{name.replace('_', '-')}")
            flags += [] if value is True else [json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


class Replay(Case):
    """Requests that come `speed` times as fast as recorded, or `concurrency` at once where that is infinite."""

    steps = 1

    def __init__(self, one: Setup, requests: list[Request]) -> None:
        args = one.args
        self.requests, self.block_tokens, self.speed, self.seed = requests, args.block_tokens, args.speed, args.seed
        self.concurrency = args.concurrency if one.on_gpu or args.url else min(4, args.concurrency)
        prompt = max(request.input_length for request in requests)
        output = max(request.output_length for request in requests)
        longest = sizing.pages_up(prompt + output, one.page)
        wanted = args.device_tokens or (None if one.on_gpu else 4 * longest)
        device = None if wanted is None else sizing.pages_up(wanted, one.page)
        self.need = Need(prompt, output, device, longest, self.concurrency)

    def start(self, options: dict[str, Any]) -> Server:
        return Server(**options)

    def measure(self, engine: Client, report: Report) -> None:
        """By bench_serving, in this process: its client, clock and cache report, for prompts given as tokens."""
        if importlib.util.find_spec("datasets") is None:
            # Of SGLang's dependencies, and used for datasets of pictures alone.
            sys.modules["datasets"] = types.ModuleType("datasets")
            sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
        from sglang.benchmark import serving
        from sglang.benchmark.datasets import DatasetRow

        @functools.cache
        def drawn(block: int, count: int) -> Tokens:
            return engine.draw(f"{self.seed} block {block}", count)

        rows = []
        for request in self.requests:
            prompt = [token for block in request.blocks(self.block_tokens) for token in drawn(*block)]
            rows.append(DatasetRow(prompt, len(prompt), request.output_length, timestamp=request.timestamp))
        serving.get_dataset = lambda *_: rows
        command = ["--backend", "sglang", "--base-url", engine.engine.url, "--dataset-name", "random-ids"]
        # No warm-up: it would be the first prompt's.
        command += ["--num-prompts", str(len(rows)), "--warmup-requests", "0", "--disable-tqdm", "--cache-report"]
        if self.speed == math.inf:
            command += ["--max-concurrency", str(self.concurrency)]
        else:
            timed = {"use_trace_timestamps": True, "slowdown_factor": 1 / self.speed}
            serving.get_request = functools.partial(serving.get_request, **timed)
        with tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_") as folder:
            output = Path(folder) / "rows.jsonl"
            sys.argv = ["bench_serving", *command, "--output-details", "--output-file", str(output)]
            serving.cli_main()
            report.sample(**json.loads(output.read_text()))
        report.step("replayed")

    def rows(self, samples: list[Sample], backend: str) -> list[Row]:
        """A row of bench_serving's result."""
        return [{"backend": backend, "requests": len(self.requests), **summarize(found)} for found in samples]


def summarize(found: dict[str, Any]) -> Row:
    """What a row says of bench_serving's result with details; of requests that were answered."""
    columns = [found[key] for key in ("errors", "input_lens", "output_lens", "ttfts", "itls", "cached_tokens_details")]
    good = [request[1:] for request in zip(*columns, strict=True) if not request[0]]
    prompts = sum(prompt for prompt, *_ in good)
    hits = {place: sum((request[-1] or {}).get(place) or 0 for request in good) for place in ("device", "host")}
    return {
        "ttft_ms": stats.summary([1e3 * first for _, _, first, _, _ in good]),
        "e2e_ms": stats.summary([1e3 * (first + sum(gaps)) for _, _, first, gaps, _ in good]),
        "inter_token_ms": stats.summary([1e3 * sum(gaps) / len(gaps) for *_, gaps, _ in good if gaps]),
        "hits": hits,
        "hit_ratio": stats.hit_ratio(hits, prompts),
        "samples": len(good),
        "samples_unproven": 0,
        "prompt_tokens": prompts,
        "output_tokens": sum(output for _, output, *_ in good),
        "seconds": round(found["duration"], 3),
        "tokens_per_s": round(found["total_throughput"], 2),
    }


# ---- traces ----


class Request(msgspec.Struct):
    """One line of a trace: when it came (ms), and tokens of the prompt, of the answer, and the prompt's blocks."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=MOST_MS)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=setup.MOST_TOKENS)]
    output_length: Annotated[int, msgspec.Meta(ge=0, le=setup.MOST_TOKENS)]
    hash_ids: list[int]

    def blocks(self, block_tokens: int) -> list[tuple[int, int]]:
        """Ids of the prompt's blocks, and how many of each one's tokens there are."""
        lefts = range(self.input_length, 0, -block_tokens)
        return [(block, min(block_tokens, left)) for block, left in zip(self.hash_ids, lefts, strict=False)]


def read_trace(
    path: Path,
    *,
    block_tokens: int = BLOCK_TOKENS,
    seed: int = 0,
    limit: int | None = None,
    max_tokens: int | None = None,
    max_output: int | None = None,
    share: float = 1.0,
) -> list[Request]:
    """Read a trace in Mooncake's format; times are from its first request on.

    Args:
        path: JSON Lines file.
        block_tokens: tokens of one id.
        seed: of the choice of conversations.
        limit: the first so many requests.
        max_tokens: longer prompts are cut at their end, so that shared prefixes stay.
        max_output: longer answers are cut.
        share: of conversations, above 0 to 1. A trace of many GPUs' requests sees its blocks again on time scales that
            one GPU's cache does not reach; some of its conversations keep theirs.

    Raises:
        ConfigError: the file is missing, or a line is not of that format.
    """
    requests = list(_parsed(path, limit if share >= 1 else None, block_tokens))
    if share < 1:
        requests = _of_some_conversations(requests, share, seed)[:limit]
    if not requests:
        part, fix = ("", "Name another file") if share >= 1 else (f" in a share of {share:g}", "Give more (--share)")
        raise ConfigError(f"The trace {path} has no requests{part}. {fix}.")
    first = min(request.timestamp for request in requests)
    for request in requests:
        request.timestamp -= first
        request.input_length = min(request.input_length, max_tokens or setup.MOST_TOKENS)
        request.output_length = min(max(request.output_length, 1), max_output or setup.MOST_TOKENS)
    return sorted(requests, key=lambda request: request.timestamp)


def _parsed(path: Path, limit: int | None, block_tokens: int) -> Iterator[Request]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"The trace {path} cannot be read: {error.strerror}. Name another file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The trace {path} is not UTF-8 text. Name another file.") from None
    for count, line in enumerate([line for line in lines if line.strip()][:limit], 1):
        try:
            request = msgspec.json.decode(line, type=Request)
        except (msgspec.MsgspecError, RecursionError) as error:
            names = "timestamp, input_length, output_length and hash_ids"
            what = f"Line {count} of {path} is not a request of a Mooncake trace ({error})"
            raise ConfigError(f"{what}. Give JSON objects with {names}.") from None
        blocks = -(-request.input_length // block_tokens)
        if len(request.hash_ids) != blocks:
            raise ConfigError(
                f"Line {count} of {path} has {len(request.hash_ids)} hash_ids for a prompt of {request.input_length} "
                f"tokens, which is {blocks} blocks of {block_tokens}. Give the trace's own size of blocks "
                "(--block-tokens)."
            )
        yield request


def _of_some_conversations(requests: Sequence[Request], share: float, seed: int) -> list[Request]:
    """All requests of about `share` of the conversations.

    A conversation is what has the same block behind those that all requests begin with, such as a system prompt.
    """
    common = len(os.path.commonprefix([request.hash_ids for request in requests]))
    kept = []
    for index, request in enumerate(requests):
        name = f"block {request.hash_ids[common]}" if len(request.hash_ids) > common else f"request {index}"
        if random.Random(f"{seed} conversation {name}").random() < share:
            kept.append(request)
    return kept


def reusable_tokens(requests: Sequence[Request], block_tokens: int) -> int:
    """Prompt tokens that a cache without limits would hold already, by whole blocks seen before as a prefix."""
    seen: set[int] = set()
    reusable = 0
    for request in requests:
        prefix, unbroken = 0, True
        for block in request.blocks(block_tokens):
            prefix = hash((prefix, block))
            unbroken = unbroken and prefix in seen
            reusable += block[1] if unbroken else 0
            seen.add(prefix)
    return reusable

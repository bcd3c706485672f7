#!/usr/bin/env python3
"""What a hit on a page of the bank costs against one of the engine's own: bank.py --output docs/results/bank.jsonl.

Starts mtierd and engines with dummy weights of a shape, one GPU or several, and writes a JSON row per case as soon as
it is known:

own_hit                an ordinary hit in the tier: the prompt was pushed out of the GPU's cache
second_engine          the first hit, and later ones, of an engine that never computed the prompt
after_restart          the same of an engine that was stopped and started again
after_service_restart  the same after the service was killed; 0 tokens are found where its memory went with it
start_up               seconds until an engine serves: with its pool in the bank, twice, and stock's
mla_tp2                bytes of the bank for a prompt of an MLA model over two ranks, and of two pools of their own

    python scripts/bench/bank.py --cases own_hit,second_engine,after_restart,after_service_restart --limit 580
    python scripts/bench/bank.py --cases start_up --pool-gb 60 --limit 400
    python scripts/bench/bank.py --cases mla_tp2 --limit 500

Without a GPU it runs shape tiny with short prompts, which shows that it works and says nothing about times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.sglang_server import CPU_OPTIONS, Answer, Server, ServerFailed, launch_server_command, tier_in
from sglang_xmem.bench import environment
from sglang_xmem.bench.shapes import config_of, write_shape

GB = 10**9
SHARING = ("own_hit", "second_engine", "after_restart", "after_service_restart")
CASES = (*SHARING, "start_up", "mla_tp2")
BANK: Mapping[str, Any] = {"hicache_use_xmem": True, "hicache_xmem_tier": "bank"}
FLOOD_TOKENS = 8192


class OutOfTime(Exception):
    """--limit is over."""


class Size(NamedTuple):
    """How large everything is, which depends on whether there is a GPU."""

    gpus: int
    shape: str
    mla: str
    tokens: int
    page: int
    pool_gb: float
    bank_gb: float


class Service:
    """mtierd with one bank of host or GPU memory."""

    def __init__(self, folder: Path, bank: str, gigabytes: float, gpu: int) -> None:
        self.socket = folder / f"mtierd-{random.randrange(1 << 32):x}.sock"
        place = f"gpu:{gpu}" if bank == "gpu" else f"host:{round(gigabytes * 1000)}MB"
        self._command = [sys.executable, "-m", "sglang_xmem.cli", "mtierd", "--socket", str(self.socket)]
        self._log = (folder / "mtierd.log").open("ab")
        self._bank = place
        self.start()

    def start(self) -> None:
        begun = time.monotonic()
        self.process = subprocess.Popen([*self._command, "--bank", self._bank], stdout=self._log, stderr=self._log)
        while self.status() is None:
            if time.monotonic() - begun > 120 or self.process.poll() is not None:
                raise OutOfTime(f"mtierd with --bank {self._bank} does not answer")
            time.sleep(0.2)
        self.start_s = time.monotonic() - begun

    def status(self) -> dict[str, Any] | None:
        done = subprocess.run([*self._command, "--status", "--json"], capture_output=True, text=True, check=False)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else None

    def page_bytes(self) -> int:
        """Of all pages that can be found."""
        spaces = (self.status() or {"spaces": []})["spaces"]
        return sum(int(space["pages"]) * int(space["frame_bytes"]) for space in spaces)

    def held_bytes(self) -> int:
        """Of all frames that hold something."""
        spaces = (self.status() or {"spaces": []})["spaces"]
        return sum((int(space["frames"]) - int(space["free"])) * int(space["frame_bytes"]) for space in spaces)

    def pool_bytes(self) -> int:
        """What pools of their own would take for what each rank holds."""
        spaces = (self.status() or {"spaces": []})["spaces"]
        return sum(int(each["held"]) * int(space["frame_bytes"]) for space in spaces for each in space["sessions"])

    def kill(self) -> None:
        """Kill what serves; what keeps its memory, if anything does, lives on and starts it again."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]) if children else self.process.pid, signal.SIGKILL)
        if not children:
            self.process.wait(20)
            self.start()
        until(lambda: self.status() is not None, 30)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self._log.close()


class Bench:
    """One run: makes models, starts servers, writes rows.

    Args:
        deadline: time.monotonic() at which everything has to be over.
    """

    def __init__(self, arguments: argparse.Namespace, size: Size, folder: Path, deadline: float) -> None:
        self.size, self.folder = size, folder
        self._arguments, self._deadline = arguments, deadline
        self._number = 0
        facts = environment.describe("scripts/bench/bank.py")
        self._facts = {
            "bench": "bank",
            "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "bank": arguments.bank,
            "gpu": facts["gpus"][0] if facts["gpus"] else "cpu",
            **facts,
        }

    def row(self, case: str, **facts: Any) -> None:
        text = json.dumps({**self._facts, "case": case, **facts})
        print(text, flush=True)
        with self._arguments.output.open("a") as file:
            file.write(text + "\n")

    def left_s(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 5:
            raise OutOfTime("--limit is over")
        return left

    def service(self, gigabytes: float) -> Service:
        return Service(self.folder, self._arguments.bank, gigabytes, max(0, self.size.gpus - 1))

    @contextlib.contextmanager
    def engine(self, model: Path, service: Service | None, gpu: int, **options: Any) -> Iterator[Engine]:
        """A server, warm; in the bank of `service`."""
        self._number += 1
        variables = {"MTIER_SOCKET": str(service.socket)} if service else {}
        if self.size.gpus and options.get("tp_size", 1) == 1:
            variables["CUDA_VISIBLE_DEVICES"] = str(min(gpu, self.size.gpus - 1))
        if not self.size.gpus and "tp_size" in options:
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"  # of each rank
        everything = {**self._options(model), **(BANK if service else {}), **options}
        begun = time.monotonic()
        log = self.folder / f"engine{self._number}.log"
        with Server(launch_server_command(), everything, log, variables) as server:
            try:
                server.wait_ready(self.left_s())
            except ServerFailed as error:
                raise OutOfTime(str(error)[-1500:]) from None
            start_s = time.monotonic() - begun
            if service and tier_in(server.log()) != "bank":
                raise OutOfTime(f"the engine is in tier {tier_in(server.log())}")
            yield Engine(self, server, start_s)

    def _options(self, model: Path) -> dict[str, Any]:
        size = self.size
        options: dict[str, Any] = {
            "model_path": str(model),
            "load_format": "dummy" if (model / "tokenizer.json").exists() else "auto",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "page_size": size.page,
            "max_total_tokens": size.tokens + 2 * FLOOD_TOKENS if size.gpus else 1024,
            "max_running_requests": 4,
            "context_length": size.tokens + 4096 if size.gpus else 1024,
            "chunked_prefill_size": FLOOD_TOKENS if size.gpus else 512,
            "random_seed": 0,
            "enable_hierarchical_cache": True,
            "hicache_write_policy": "write_through",
        }
        if not size.gpus:
            return {**options, **CPU_OPTIONS, "hicache_ratio": 4.0}
        return {
            **options,
            "hicache_size": round(size.pool_gb),
            "attention_backend": "flashinfer",
            "disable_decode_cuda_graph": True,
            "cuda_graph_max_bs_prefill": 256,
            "mem_fraction_static": 0.85,  # the second engine finds a GPU that is half full; max_total_tokens decides
        }


class Engine:
    """A server, and what is asked of it."""

    def __init__(self, bench: Bench, server: Server, start_s: float) -> None:
        self._bench, self.server, self.start_s = bench, server, start_s
        model = config_of(bench.size.shape)
        self._vocabulary = min(1000, int(model["vocab_size"]))

    def ask(self, name: str, tokens: int | None = None, output: int = 8) -> Answer:
        self._bench.left_s()
        generator = random.Random(name)
        count = self._bench.size.tokens + 14 if tokens is None else tokens
        ids = [generator.randrange(3, self._vocabulary) for _ in range(count)]
        return self.server.generate(ids, output)

    def warm_up(self) -> None:
        """Compile what cold prompts, hits in the GPU and hits in the bank need."""
        tokens = min(self._bench.size.tokens, FLOOD_TOKENS)
        for _ in range(2):
            for _ in range(2):
                self.ask("warm", tokens)
            time.sleep(0.5)
            self.flush()

    def flood(self, name: str) -> None:
        """Push everything out of the GPU's cache."""
        size = self._bench.size
        each, everything = (FLOOD_TOKENS, size.tokens + 2 * FLOOD_TOKENS) if size.gpus else (size.tokens, 1024)
        for number in range(-(-everything // each)):
            self.ask(f"flood {name} {number}", each - 2, 1)

    def flush(self) -> None:
        until(lambda: self.server.request("POST", "/flush_cache?timeout=10")[0] == 200, 60)

    def stop(self) -> None:
        self.server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.process.wait(30)


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise OutOfTime(f"what was waited for did not come within {timeout_s:g} s")
        time.sleep(0.2)


def found(answer: Answer, place: str) -> int:
    return answer.cached.get(place) or 0


def sharing(bench: Bench, rounds: int) -> None:
    """Rows of a prompt's hits: the engine's own, another engine's, and after restarts."""
    size = bench.size
    model = write_shape(size.shape, bench.folder)
    own_ms: float | None = None

    def hits(case: str, engine: Engine, expected: Answer, place: str, again: Callable[[int], None]) -> float | None:
        """Ask `rounds` times; returns the median of what came from `place`."""
        answers = []
        for number in range(rounds):
            again(number)
            answers.append(engine.ask("A"))
        proven = [each for each in answers if found(each, place) >= size.tokens // size.page * size.page]
        median = statistics.median(each.ttft_ms for each in proven) if proven else None
        own = median if place == "host" else own_ms
        bench.row(
            case,
            shape=size.shape,
            prompt_tokens=size.tokens + 14,
            ttft_ms=round(median, 1) if median else None,
            first_ms=round(answers[0].ttft_ms, 1),
            all_ms=[round(each.ttft_ms, 1) for each in answers],
            own_hit_ms=round(own, 1) if own else None,
            of_own_hit=round(median / own, 3) if median and own else None,
            found_tokens=[found(each, place) for each in answers],
            outputs_equal=all(each.output_ids == expected.output_ids for each in answers),
            cold_ms=round(cold.ttft_ms, 1),
            start_s=round(engine.start_s, 1),
        )
        return median

    with bench.service(size.bank_gb) as service:
        with bench.engine(model, service, 0) as first:
            first.warm_up()
            cold = first.ask("A")
            expected = first.ask("A")
            until(lambda: service.page_bytes() > 0, 60)
            own_ms = hits("own_hit", first, expected, "host", lambda n: first.flood(f"own {n}"))
            with bench.engine(model, service, 1) as second:
                second.warm_up()
                hits("second_engine", second, expected, "storage", lambda n: second.flush() if n else None)
                second.stop()
        with bench.engine(model, service, 0) as again:
            again.warm_up()
            hits("after_restart", again, expected, "storage", lambda n: again.flush() if n else None)
            again.flush()
            service.kill()
            again.ask("notices", 2 * size.page)  # and joins again
            time.sleep(2)
            again.flush()
            hits("after_service_restart", again, expected, "storage", lambda n: again.flush() if n else None)


def start_up(bench: Bench) -> None:
    """Seconds until an engine serves, with a pool that was just made, with one that was there, and with stock's."""
    model = write_shape(bench.size.shape, bench.folder)
    seconds: dict[str, float] = {}
    with bench.service(bench.size.pool_gb + 1) as service:
        seconds["service_s"] = service.start_s
        for name in ("bank_first_s", "bank_s"):
            with bench.engine(model, service, 0) as engine:
                seconds[name] = engine.start_s
                engine.stop()
    with bench.engine(model, None, 0) as engine:
        seconds["stock_s"] = engine.start_s
    bench.row(
        "start_up", shape=bench.size.shape, pool_gb=bench.size.pool_gb, **{k: round(v, 1) for k, v in seconds.items()}
    )


def mla_tp2(bench: Bench) -> None:
    """Bytes of a prompt of an MLA model over two ranks with equal pages: in the bank, and in pools of their own."""
    size = bench.size
    if size.gpus:
        model = write_shape(size.mla, bench.folder)
    else:
        model = bench.folder / "mla"
        script = Path(__file__).resolve().parents[1] / "make_tiny_model.py"
        subprocess.run([sys.executable, str(script), str(model), "--kind", "mla"], check=True)
    with bench.service(size.bank_gb) as service, bench.engine(model, service, 0, tp_size=2) as engine:
        cold = engine.ask("A")
        engine.ask("A")
        until(lambda: service.page_bytes() > 0, 60)
        time.sleep(3)
        pages, in_use, private = service.page_bytes(), service.held_bytes(), service.pool_bytes()
        engine.flush()
        hit = engine.ask("A")
        bench.row(
            "mla_tp2",
            shape=size.mla if size.gpus else "tiny",
            prompt_tokens=size.tokens + 14,
            ttft_ms=round(hit.ttft_ms, 1),
            cold_ms=round(cold.ttft_ms, 1),
            found_tokens=found(hit, "storage"),
            outputs_equal=hit.output_ids == cold.output_ids,
            page_bytes=pages,
            bank_bytes=in_use,
            private_bytes=private,
        )


def sizes(arguments: argparse.Namespace) -> Size:
    """What the machine and the options give."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return Size(0, "tiny", "", 384, 16, 0.05, 0.5)
    pool = arguments.pool_gb
    bank = arguments.bank_gb or 2 * pool + 2
    return Size(gpus, arguments.shape, "deepseek-v2-lite", arguments.tokens // 64 * 64, 64, pool, bank)


def main() -> int:
    """Run the cases that were asked for; 1 where one did not come to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="comma separated; default all")
    parser.add_argument("--bank", choices=("host", "gpu"), default="host", help="memory of the bank")
    parser.add_argument("--shape", default="qwen3-8b", help="of sglang_xmem/bench/shapes; with a GPU")
    parser.add_argument("--tokens", type=int, default=81920, help="of the prompt; with a GPU")
    parser.add_argument("--pool-gb", type=float, default=28, help="--hicache-size of each engine; with a GPU")
    parser.add_argument("--bank-gb", type=float, help="default: two pools and 2 GB")
    parser.add_argument("--rounds", type=int, default=3, help="hits of each case")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for everything")
    parser.add_argument("--logs", type=Path, help="folder that keeps the logs")
    parser.add_argument("--output", type=Path, default=Path("bank.jsonl"), help="JSON Lines file to append to")
    arguments = parser.parse_args()
    cases = arguments.cases.split(",")
    unknown = set(cases) - set(CASES)
    if unknown:
        parser.error(f"--cases knows no {', '.join(sorted(unknown))}. Name some of {', '.join(CASES)}.")
    size = sizes(arguments)
    deadline = time.monotonic() + arguments.limit
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments, size, Path(scratch), deadline)
        works: list[tuple[Sequence[str], Callable[[], None]]] = [
            (SHARING, lambda: sharing(bench, arguments.rounds)),
            (("start_up",), lambda: start_up(bench)),
            (("mla_tp2",), lambda: mla_tp2(bench)),
        ]
        for names, work in works:
            if not set(cases) & set(names):
                continue
            if "mla_tp2" in names and size.gpus == 1:
                print("mla_tp2 needs two GPUs", file=sys.stderr)
                continue
            try:
                work()
            except (OutOfTime, ServerFailed, OSError) as error:
                bench.row(names[-1], error=str(error)[-1500:])
                failed = True
        if arguments.logs:
            shutil.copytree(scratch, arguments.logs, ignore=shutil.ignore_patterns("*.sock"), dirs_exist_ok=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

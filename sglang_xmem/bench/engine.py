"""One engine in a process of its own, and the client that drives it over JSON lines.

`python -m sglang_xmem.bench.engine SPEC.json` is the worker. The engine's own process is the unit of isolation:
backends never share a CUDA context, a cache or an allocator. Commands come on stdin and replies go to stdout; what
SGLang prints goes to stderr. Times are taken in the worker, around the engine's own calls.

    {"id": 1, "op": "ask", "prompt": [["seed", 256]], "max_new_tokens": 1}     one request, alone
    {"id": 2, "op": "flood", "prompts": [...]}                                one after another, answers left out
    {"id": 3, "op": "settle", "seconds": 0.5}                                 what goes on in the background ends
    {"id": 4, "op": "record", "folder": ..., "prompt": ...}                   one request under SGLang's profiler
    {"id": 5, "op": "open"} ... {"id": 9, "op": "close"}                      between them requests run concurrently:
    {"id": 6, "op": "ask", ...}                                               streamed, replies in order of their end
    {"id": 10, "op": "exit"}
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sglang_xmem.bench.workloads import Materializer, Prompt

#: Command that starts a worker; the specification's path follows.
WORKER = (sys.executable, "-m", "sglang_xmem.bench.engine")
#: The line that a scheduler with a tier logs once at start.
TIER_LINE = re.compile(r"sglang_xmem: tier=(\w+)")


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        ttft_ms: from asking to the first token; of a request alone with one output token, the whole call.
        total_ms: from asking to the last token.
        device: prompt tokens taken from the GPU's KV pool, by `cached_tokens_details`.
        host: prompt tokens taken from HiCache's pool, by the same.
        output: generated tokens.
    """

    ttft_ms: float
    total_ms: float
    device: int
    host: int
    output: list[int]

    @staticmethod
    def of(reply: dict[str, Any], ttft_ms: float, total_ms: float) -> Answer:
        """Of SGLang's reply to /generate or Engine.generate."""
        details = reply["meta_info"].get("cached_tokens_details") or {}
        device, host = details.get("device") or 0, details.get("host") or 0
        return Answer(ttft_ms, total_ms, device, host, list(reply["output_ids"]))


class EngineGone(RuntimeError):
    """The engine's process ended, or took too long; the message says which, `log` has its last words."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that ask; an interrupt does not wait for them. Those end with the engine, which fails what they ask."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def warm_up(engine: Any, alone: Sequence[tuple[int, int]], at_once: Sequence[tuple[int, int]]) -> None:
    """Kernels of the batch shapes that follow, compiled and loaded, by prompts that nobody else has.

    Batches of several requests are among them: a kernel that is compiled while something is measured holds up all that
    wait behind it.

    Args:
        engine: has `ask` and `concurrent`, as EngineProcess.
        alone, at_once: (prompt tokens, output tokens) of requests, one after the other and then together.
    """
    seed = f"warm up {random.SystemRandom().random()}"  # a server may still hold what an earlier run asked

    def ask(numbered: tuple[int, tuple[int, int]]) -> None:
        number, (tokens, output_tokens) = numbered
        engine.ask(Prompt.drawn(f"{seed} {number}", tokens), output_tokens)

    numbered = list(enumerate([*alone, *at_once]))
    for request in numbered[: len(alone)]:
        ask(request)
    if at_once:
        with engine.concurrent(), threads(len(at_once)) as pool:
            list(pool.map(ask, numbered[len(alone) :]))


class RequestFailed(RuntimeError):
    """The engine answered a request with an error."""


# ---- in the engine's process ----


def sampling(max_new_tokens: int) -> dict[str, Any]:
    """Greedy, and as many tokens as asked for."""
    return {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}


class Worker:
    """Answers commands with an engine.

    Args:
        engine: an sgl.Engine.
        vocab: ids of prompts are below this.
        commands: where commands come from, a line each.
        replies: where replies go to.
    """

    def __init__(self, engine: Any, vocab: int, commands: IO[str], replies: IO[str]) -> None:
        self._engine = engine
        self._tokens = Materializer(vocab)
        self._commands = commands
        self._replies = replies

    def serve(self) -> None:
        """Until "exit", or the end of commands."""
        for line in iter(self._commands.readline, ""):
            command = json.loads(line)
            operation, number = command["op"], command["id"]
            if operation == "exit":
                self.reply(number)
                return
            if operation == "open":
                # SGLang's loop: its tasks live there.
                self.reply(number)
                self._engine.loop.run_until_complete(self._concurrently())
            elif operation in ("ask", "record"):
                try:
                    values = asdict(self._ask(command)) if operation == "ask" else self._record(command)
                except Exception as error:
                    values = {"error": str(error)}
                self.reply(number, **values)
            elif operation == "flood":
                for prompt in command["prompts"]:
                    self._generate(self._tokens(Prompt.from_json(prompt)), 1)
                self.reply(number)
            elif operation == "settle":
                time.sleep(command["seconds"])
                self.reply(number)
            else:
                self.reply(number, error=f"unknown operation {operation!r}")

    def reply(self, number: int, **values: Any) -> None:
        self._replies.write(json.dumps({"id": number, **values}) + "\n")
        self._replies.flush()

    def _generate(self, ids: list[int], max_new_tokens: int) -> Any:
        return self._engine.generate(input_ids=ids, sampling_params=sampling(max_new_tokens))

    def _ask(self, command: dict[str, Any]) -> Answer:
        ids = self._tokens(Prompt.from_json(command["prompt"]))
        start = time.perf_counter()
        reply = self._generate(ids, command["max_new_tokens"])
        elapsed_ms = (time.perf_counter() - start) * 1e3
        return Answer.of(reply, elapsed_ms, elapsed_ms)

    def _record(self, command: dict[str, Any]) -> dict[str, Any]:
        self._engine.start_profile(output_dir=command["folder"], activities=["GPU"], with_stack=False)
        try:
            asked = time.time()
            answer = self._ask({**command, "max_new_tokens": 1})
        finally:
            self._engine.stop_profile()  # returns once the traces are written
        return {"asked_ms": asked * 1e3, "answer": asdict(answer)}

    async def _concurrently(self) -> None:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        while True:
            line = await loop.run_in_executor(None, self._commands.readline)
            command = json.loads(line) if line else {"op": "close", "id": -1}
            if command["op"] == "close":
                await asyncio.gather(*tasks)
                self.reply(command["id"])
                return
            task = asyncio.create_task(self._stream(command))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _stream(self, command: dict[str, Any]) -> None:
        try:
            ids = self._tokens(Prompt.from_json(command["prompt"]))
            start = time.perf_counter()
            stream = await self._engine.async_generate(
                input_ids=ids, sampling_params=sampling(command["max_new_tokens"]), stream=True
            )
            first_ms, last = None, None
            async for piece in stream:
                last = piece
                if first_ms is None:
                    first_ms = (time.perf_counter() - start) * 1e3
            if first_ms is None or last is None:
                raise RequestFailed("the request ended without a token")
            answer = Answer.of(last, first_ms, (time.perf_counter() - start) * 1e3)
            self.reply(command["id"], **asdict(answer))
        except Exception as error:
            self.reply(command["id"], error=f"{type(error).__name__}: {error}")


def main(make_engine: Callable[..., Any] | None = None) -> None:
    """The worker. `make_engine` stands in for sgl.Engine in tests."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    # Descriptors of its own for the protocol: SGLang and its processes print to stdout.
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    started = time.perf_counter()
    if make_engine is None:
        import sglang as sgl

        make_engine = sgl.Engine
    engine = make_engine(**spec["engine"])
    try:
        worker = Worker(engine, spec["vocab"], commands, replies)
        worker.reply(0, seconds=round(time.perf_counter() - started, 2))
        worker.serve()
    finally:
        engine.shutdown()


# ---- in the benchmark's process ----


class EngineProcess:
    """A worker and its engine; a context manager that leaves no process behind.

    Args:
        engine: keywords of sgl.Engine.
        vocab: ids of prompts are below this.
        folder: for the specification and the log.
        timeout_s: the engine's whole life; what takes longer raises EngineGone.
        environment: variables on top of this process's own.
        verbose: let the engine's log through to stderr.
    """

    def __init__(
        self,
        engine: dict[str, Any],
        vocab: int,
        folder: Path,
        timeout_s: float,
        environment: dict[str, str] | None = None,
        verbose: bool = False,
    ) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[dict[str, Any]]] = {0: Future()}
        self._lock = threading.Lock()
        self._gone = False
        self._log = folder / "engine.log"
        path = folder / "engine.json"
        path.write_text(json.dumps({"engine": engine, "vocab": vocab}))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*WORKER, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if verbose else log,
                text=True,
                env={**os.environ, **(environment or {})},
                # A session of its own: its process group holds SGLang's processes and nothing else, and an interrupt
                # from the terminal reaches this process alone.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with contextlib.suppress(EngineGone):
                self._call(30.0, op="exit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        self._end_session()

    def wait_ready(self) -> float:
        """Return once the engine serves: the seconds that it took."""
        return float(self._result(self._waiting[0], None)["seconds"])

    @property
    def tier(self) -> str | None:
        """The tier that the engine's log names; None for stock SGLang, and where the log went to stderr."""
        match = TIER_LINE.search(self.log())
        return match.group(1) if match else None

    def log(self) -> str:
        """What the engine wrote so far."""
        with contextlib.suppress(OSError):  # the folder goes with the engine
            return self._log.read_text(encoding="utf-8", errors="replace")
        return ""

    def ask(self, prompt: Prompt, max_new_tokens: int = 1) -> Answer:
        """One request; nothing else runs beside it, except between `concurrent`'s begin and end."""
        reply = self._call(None, op="ask", prompt=prompt.to_json(), max_new_tokens=max_new_tokens)
        return Answer(**{name: reply[name] for name in Answer.__dataclass_fields__})

    def record(self, prompt: Prompt, folder: Path) -> tuple[Answer, float]:
        """One request for one token under SGLang's profiler; its traces are in `folder` then.

        Returns:
            the answer, and when it was asked for, in ms of Unix time.
        """
        reply = self._call(None, op="record", prompt=prompt.to_json(), folder=str(folder))
        return Answer(**reply["answer"]), float(reply["asked_ms"])

    def flood(self, prompts: Sequence[Prompt]) -> None:
        """Ask for one token of each, one after another."""
        self._call(None, op="flood", prompts=[prompt.to_json() for prompt in prompts])

    def settle(self, seconds: float) -> None:
        """Wait for what goes on in the background, such as writing through to the tier."""
        self._call(None, op="settle", seconds=seconds)

    @contextlib.contextmanager
    def concurrent(self) -> Iterator[None]:
        """Within, `ask` may be called from several threads at once, and streams."""
        self._call(None, op="open")
        yield
        self._call(None, op="close")

    def _call(self, timeout_s: float | None, **command: Any) -> dict[str, Any]:
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._gone:
                raise self._ended()
            number = next(self._ids)
            self._waiting[number] = future
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps({"id": number, **command}) + "\n")
                self._process.stdin.flush()
            except OSError:
                raise self._ended() from None
        return self._result(future, timeout_s)

    def _result(self, future: Future[dict[str, Any]], timeout_s: float | None) -> dict[str, Any]:
        left_s = self._deadline - time.monotonic()
        try:
            reply = future.result(max(0.0, left_s if timeout_s is None else min(timeout_s, left_s)))
        except TimeoutError:
            raise EngineGone(f"the engine took longer than --timeout {self._timeout_s:g} s", self.log()) from None
        if "error" in reply:
            raise RequestFailed(reply["error"])
        return reply

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, KeyError):  # another's words on the protocol's descriptor
                reply = json.loads(line)
                self._waiting[reply["id"]].set_result(reply)
                if reply["id"]:
                    del self._waiting[reply["id"]]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with self._lock:
            self._gone = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(self._ended())

    def _ended(self) -> EngineGone:
        return EngineGone(f"the engine's process ended with status {self._process.poll()}", self.log())

    def _end_session(self) -> None:
        """End what is left of the engine's own session: its ranks too, nobody else's processes."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._reader.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


if __name__ == "__main__":
    main()

"""One engine in a process of its own, which runs a benchmark's requests; and the process that listens to it.

`python -m sglang_xmem.bench.engine SPEC.json` is the worker. A process is the unit of isolation: backends never share
a CUDA context, a cache or an allocator. The worker makes the engine and calls `measure` of the benchmark's module,
which reports samples and steps; they go to the parent as JSON, a line each, so that what was measured before a crash
or an interrupt is kept. What SGLang prints goes to a log.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from sglang_xmem.bench.workloads import Materializer, Prompt

#: Command that starts a worker; the specification's path follows.
WORKER = (sys.executable, "-m", "sglang_xmem.bench.engine")
#: The line that a scheduler with a tier logs once at start.
TIER_LINE = re.compile(r"sglang_xmem: tier=(\w+)")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        ttft_ms: from asking to the first token; of a request alone with one output token, the whole call.
        total_ms: from asking to the last token.
        device: prompt tokens found in the GPU's KV pool, by `cached_tokens_details`.
        host: prompt tokens found in HiCache's pool, by the same.
        output: generated tokens.
        forward_ms: GPU work until the first token, by SGLang's own clock; None where it does not say.
    """

    ttft_ms: float
    total_ms: float
    device: int
    host: int
    output: list[int]
    forward_ms: float | None = None

    @staticmethod
    def of(reply: dict[str, Any], ttft_ms: float, total_ms: float) -> Answer:
        """Of SGLang's reply to Engine.generate."""
        meta = reply["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        device, host = details.get("device") or 0, details.get("host") or 0
        began, ended = meta.get("forward_entry_time"), meta.get("prefill_finished_time")
        forward_ms = round((ended - began) * 1e3, 3) if began and ended else None
        return Answer(ttft_ms, total_ms, device, host, list(reply["output_ids"]), forward_ms)


class Report(Protocol):
    """Where a benchmark's `measure` reports to."""

    def sample(self, **values: Any) -> None: ...
    def step(self, doing: str) -> None: ...
    def together(self) -> None: ...


# ---- in the engine's process ----


class Client:
    """Asks an engine of this process for greedy answers of a given length.

    Args:
        engine: an sgl.Engine.
        vocab: ids of prompts are below this.
    """

    def __init__(self, engine: Any, vocab: int) -> None:
        self._engine = engine
        self._tokens = Materializer(vocab)

    def ask(self, prompt: Prompt, output_tokens: int = 1) -> Answer:
        """One request, alone."""
        ids = self._tokens(prompt)
        start = time.perf_counter()
        reply = self._engine.generate(input_ids=ids, sampling_params=_sampling(output_tokens))
        elapsed_ms = (time.perf_counter() - start) * 1e3
        return Answer.of(reply, elapsed_ms, elapsed_ms)

    def flood(self, prompts: Sequence[Prompt]) -> None:
        """Ask for one token of each, one after another."""
        for prompt in prompts:
            self.ask(prompt)

    def tier_counts(self) -> dict[str, int]:
        """What the first rank's tier counted since its start, such as "bytes:load"; empty for an engine without one."""
        states = self._engine.get_server_info()["internal_states"]
        return (states[0].get("sglang_xmem") or {}).get("counts", {}) if states else {}

    def run(self, work: Awaitable[_Result]) -> _Result:
        """Run a coroutine that uses `stream`, in SGLang's own loop, where its tasks live."""
        result: _Result = self._engine.loop.run_until_complete(work)
        return result

    async def stream(self, prompt: Prompt, output_tokens: int) -> Answer:
        """One request of several at once."""
        ids = self._tokens(prompt)
        start = time.perf_counter()
        pieces = await self._engine.async_generate(input_ids=ids, sampling_params=_sampling(output_tokens), stream=True)
        first_ms, last = None, None
        async for piece in pieces:
            last = piece
            if first_ms is None:
                first_ms = (time.perf_counter() - start) * 1e3
        if first_ms is None or last is None:
            raise RuntimeError("a request ended without a token")
        return Answer.of(last, first_ms, (time.perf_counter() - start) * 1e3)

    def ask_all(self, prompts: Sequence[Prompt], level: int, output_tokens: int = 1) -> list[Answer]:
        """Ask for all, `level` at once; answers in the order of prompts."""
        semaphore = asyncio.Semaphore(level)

        async def one(prompt: Prompt) -> Answer:
            async with semaphore:
                return await self.stream(prompt, output_tokens)

        async def all_of_them() -> list[Answer]:
            return list(await asyncio.gather(*map(one, prompts)))

        return self.run(all_of_them())

    def warm_up(self, alone: Sequence[tuple[int, int]], at_once: Sequence[tuple[int, int]] = ()) -> None:
        """Kernels of the batch shapes that follow, compiled and loaded, by prompts that nobody else has.

        Batches of several requests are among them: a kernel that is compiled while something is measured holds up all
        that wait behind it.

        Args:
            alone, at_once: (prompt tokens, output tokens) of requests, one after the other and then together.
        """
        seed = f"warm up {random.SystemRandom().random()}"
        for number, (tokens, output_tokens) in enumerate(alone):
            self.ask(Prompt.drawn(f"{seed} {number}", tokens), output_tokens)
        if at_once:
            prompts = [Prompt.drawn(f"{seed} at once {n}", tokens) for n, (tokens, _) in enumerate(at_once)]
            self.ask_all(prompts, len(prompts), max(output_tokens for _, output_tokens in at_once))


def _sampling(output_tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}


class _Lines:
    """Report of a worker: JSON lines."""

    def __init__(self, file: Any, together: dict[str, Any]) -> None:
        self._file, self._together = file, together

    def write(self, **message: Any) -> None:
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def sample(self, **values: Any) -> None:
        self.write(sample=values)

    def step(self, doing: str) -> None:
        self.write(step=doing)

    def together(self) -> None:
        """Wait until each engine of this measurement has come here: a file for each in a folder."""
        folder = Path(self._together["folder"])
        (folder / self._together["name"]).touch()
        while len(list(folder.iterdir())) < self._together["count"]:
            time.sleep(0.02)


def main(make_engine: Callable[..., Any] | None = None) -> int:
    """The worker. Tests give a `make_engine` instead of sgl.Engine."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    lines = _Lines(os.fdopen(os.dup(1), "w", encoding="utf-8"), spec["together"])
    os.dup2(2, 1)  # SGLang and its processes print to stdout
    if make_engine is None:
        import sglang as sgl

        make_engine = sgl.Engine
    module = importlib.import_module(spec["module"])
    engine = make_engine(**spec["engine"])
    try:
        lines.write(ready=True)
        workload = module.WORKLOAD(**spec["workload"])
        module.measure(Client(engine, spec["vocab"]), workload, spec["backend"], lines)
        lines.write(done=True)
    except Exception as error:  # the parent shows it with the log
        lines.write(error=f"{type(error).__name__}: {error}")
        return 1
    finally:
        engine.shutdown()
    return 0


# ---- in the benchmark's process ----


class EngineGone(RuntimeError):
    """The engine's process ended or failed, or took too long; the message says which, `log` has its last words."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Limit:
    """A time on time.monotonic(), and the option that it comes from, such as "--timeout 1800 s"."""

    at: float
    name: str

    @property
    def left_s(self) -> float:
        """Seconds until then, not below 0."""
        return max(0.0, self.at - time.monotonic())


class Process:
    """A process with a session of its own; a context manager that leaves nothing of it behind.

    Args:
        command: to run.
        log: file for its stderr, and for its stdout unless `piped`. None lets both through to this stderr.
        environment: variables on top of this process's own.
        piped: stdout is read by the caller.

    Attributes:
        end_s: seconds that it has to end by itself once its work is done.
    """

    end_s = 30.0

    def __init__(
        self, command: Sequence[str], log: Path | None, environment: dict[str, str], *, piped: bool = False
    ) -> None:
        self._log = log
        with contextlib.ExitStack() as stack:
            err = stack.enter_context(log.open("wb")) if log is not None else sys.stderr.fileno()
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else err,
                stderr=err,
                encoding="utf-8",
                env={**os.environ, **environment},
                # Its process group holds SGLang's processes and nothing else, and the terminal's interrupt reaches
                # this process alone.
                start_new_session=True,
            )

    def __enter__(self: _Result) -> _Result:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is left of the session: ranks too, nobody else's processes."""
        if error is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(self.end_s)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.popen.wait(0.5)
        # A process that waits for the kernel to unpin its memory is not worth a traceback.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(10)

    def log(self) -> str:
        """What it wrote so far."""
        with contextlib.suppress(OSError):
            return self._log.read_text(encoding="utf-8", errors="replace") if self._log else ""
        return ""

    @property
    def tier(self) -> str | None:
        """The tier that the log names; None for stock SGLang, and where the log went to stderr."""
        match = TIER_LINE.search(self.log())
        return match.group(1) if match else None


class EngineProcess(Process):
    """A worker and its engine.

    Args:
        spec: `module`, `engine` (keywords of sgl.Engine), `vocab`, `workload` (keywords of the module's WORKLOAD),
            `backend`, and of engines that measure at the same time `together`: `folder`, this one's `name`, `count`.
        folder: for the specification and the log.
        limit: of the engine's whole life.
        environment: variables on top of this process's own.
        verbose: let the engine's log through to stderr.
    """

    def __init__(
        self, spec: dict[str, Any], folder: Path, limit: Limit, environment: dict[str, str], verbose: bool = False
    ) -> None:
        self._limit = limit
        path = folder / "engine.json"
        path.write_text(json.dumps(spec))
        super().__init__([*WORKER, str(path)], None if verbose else folder / "engine.log", environment, piped=True)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the worker reports, until it is done.

        Raises:
            EngineGone: it failed, ended early, or took too long.
        """
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=self._limit.left_s)
            except queue.Empty:
                raise EngineGone(f"the engine took longer than {self._limit.name}", self.log()) from None
            if line is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.popen.wait(5)
                raise EngineGone(f"the engine's process ended with status {self.popen.poll()}", self.log())
            try:
                message = json.loads(line)
            except ValueError:  # another's words on the protocol's descriptor
                continue
            if "error" in message:
                raise EngineGone(message["error"], self.log())
            if "done" in message:
                self.end_s = min(self.end_s, self._limit.left_s)
                return
            yield message

    def _read(self, lines: queue.SimpleQueue[str | None]) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as file:
            for line in file:
                lines.put(line)
        lines.put(None)


if __name__ == "__main__":
    sys.exit(main())

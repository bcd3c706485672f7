"""One engine in a process of its own, which measures a benchmark's case; and the process that listens to it.

A process is the unit of isolation: backends never share a CUDA context, a cache or an allocator. The worker,
`python -m sglang_xmem.bench.engine FD`, gets a case and the engine's keywords through the connection FD and reports
samples and steps through it as they come, so that what was measured before a crash or an interrupt is kept. What the
worker, SGLang and its processes print goes to a log.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from sglang_xmem.bench.sizing import Need

#: Command that starts a worker; the connection's file descriptor follows.
WORKER = (sys.executable, "-m", "sglang_xmem.bench.engine")
#: The lowest ids of most vocabularies are special tokens.
FIRST_TOKEN = 3
#: Seconds that a worker has to end its engine once it has measured.
END_S = 30.0

Tokens = list[int]
Row = dict[str, Any]
Sample = dict[str, Any]
_Result = TypeVar("_Result")


class Case(ABC):
    """What one engine measures. It goes to the engine's process, and makes rows in the benchmark's.

    Attributes:
        need: what it needs of the engine.
        steps: how many steps it reports.
    """

    need: Need
    steps: int

    def start(self, options: dict[str, Any]) -> Any:
        """Start the engine; it has `shutdown`."""
        import sglang as sgl

        return sgl.Engine(**options)

    @abstractmethod
    def measure(self, engine: Client, report: Report) -> None:
        """In the engine's process: ask, and report samples and steps."""

    @abstractmethod
    def rows(self, samples: list[Sample], backend: str) -> list[Row]:
        """Rows of what was measured, be it all or not."""


# ---- in the engine's process ----


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
    output: Tokens
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


class Client:
    """Asks an engine of this process for greedy answers of a given length.

    Args:
        engine: of `Case.start`.
        vocab: ids of prompts are below this.
    """

    def __init__(self, engine: Any, vocab: int) -> None:
        self.engine = engine
        self._ids = range(FIRST_TOKEN, vocab)

    def draw(self, seed: str, count: int) -> Tokens:
        """Tokens of a seed, the same in every process; fewer are a prefix of more."""
        return random.Random(seed).choices(self._ids, k=count)

    def ask(self, prompt: Tokens, output_tokens: int = 1) -> Answer:
        """One request, alone."""
        start = time.perf_counter()
        reply = self.engine.generate(input_ids=prompt, sampling_params=_sampling(output_tokens))
        elapsed_ms = (time.perf_counter() - start) * 1e3
        return Answer.of(reply, elapsed_ms, elapsed_ms)

    def flood(self, prompts: Sequence[Tokens]) -> None:
        """Ask for one token of each, one after another."""
        for prompt in prompts:
            self.ask(prompt)

    def tier_counts(self) -> dict[str, int]:
        """What the first rank's tier counted since its start, such as "bytes:load"; empty for an engine without one."""
        states = self.engine.get_server_info()["internal_states"]
        return (states[0].get("sglang_xmem") or {}).get("counts", {}) if states else {}

    def run(self, work: Awaitable[_Result]) -> _Result:
        """Run a coroutine that uses `stream`, in SGLang's own loop, where its tasks live."""
        result: _Result = self.engine.loop.run_until_complete(work)
        return result

    async def stream(self, prompt: Tokens, output_tokens: int) -> Answer:
        """One request of several at once."""
        sampling, start = _sampling(output_tokens), time.perf_counter()
        pieces = await self.engine.async_generate(input_ids=prompt, sampling_params=sampling, stream=True)
        first_ms, last = None, None
        async for piece in pieces:
            last = piece
            if first_ms is None:
                first_ms = (time.perf_counter() - start) * 1e3
        if first_ms is None or last is None:
            raise RuntimeError("a request ended without a token")
        return Answer.of(last, first_ms, (time.perf_counter() - start) * 1e3)

    def ask_all(self, prompts: Sequence[Tokens], level: int, output_tokens: int = 1) -> list[Answer]:
        """Ask for all, `level` at once; answers in the order of prompts."""
        semaphore = asyncio.Semaphore(level)

        async def one(prompt: Tokens) -> Answer:
            async with semaphore:
                return await self.stream(prompt, output_tokens)

        async def all_of_them() -> list[Answer]:
            return list(await asyncio.gather(*map(one, prompts)))

        return self.run(all_of_them())

    def warm_up(self, alone: Sequence[int], at_once: Sequence[int] = (), output_tokens: int = 4) -> None:
        """Kernels of the batch shapes that follow, compiled and loaded, by prompts that nobody else has.

        Batches of several requests are among them: a kernel that is compiled while something is measured holds up all
        that wait behind it.

        Args:
            alone, at_once: prompt tokens of requests, one after the other and then together.
        """
        seed = f"warm up {random.SystemRandom().random()}"
        for number, tokens in enumerate(alone):
            self.ask(self.draw(f"{seed} {number}", tokens), output_tokens)
        if at_once:
            prompts = [self.draw(f"{seed} at once {number}", tokens) for number, tokens in enumerate(at_once)]
            self.ask_all(prompts, len(prompts), output_tokens)


def _sampling(output_tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}


class Report:
    """Where a case reports to: the benchmark's process."""

    def __init__(self, parent: connection.Connection) -> None:
        self._parent = parent

    def sample(self, **values: Any) -> None:
        self._parent.send(("sample", values))

    def step(self, doing: str) -> None:
        self._parent.send(("step", doing))

    def together(self) -> None:
        """Wait until each engine of this measurement has come here."""
        self._parent.send(("waits", None))
        self._parent.recv()


def main(make_engine: Callable[..., Any] | None = None) -> int:
    """The worker. Tests give a `make_engine` instead of sgl.Engine."""
    parent = connection.Connection(int(sys.argv[1]))
    os.set_inheritable(parent.fileno(), False)  # its end says that this process has ended, whatever it left behind
    case, options, vocab = parent.recv()
    with contextlib.ExitStack() as stack:
        try:
            engine = make_engine(**options) if make_engine else case.start(options)
            stack.callback(engine.shutdown)
            parent.send(("serves", None))
            case.measure(Client(engine, vocab), Report(parent))
            parent.send(("done", None))
        except Exception as error:  # the parent shows it with the log
            parent.send(("error", f"{type(error).__name__}: {error}"))
            return 1
    return 0


# ---- in the benchmark's process ----


class EngineGone(RuntimeError):
    """An engine's process ended or failed, or took too long; the message says which, `log` is what it wrote."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class Limit(NamedTuple):
    """A time on time.monotonic(), and the option that it comes from, such as "--timeout 1800 s"."""

    at: float
    name: str

    @property
    def left_s(self) -> float:
        """Seconds until then, not below 0."""
        return max(0.0, self.at - time.monotonic())


class Worker:
    """A worker and its engine, in a session of their own; a context manager that leaves nothing of it behind.

    Args:
        case: to measure.
        options: keywords of the engine.
        vocab: of the model.
        log: file for what it prints; None lets it through to this stderr.
        environment: variables on top of this process's own.

    Attributes:
        connection: to it.
        grace_s: seconds that it has to end by itself; none until it has measured everything.
    """

    def __init__(
        self, case: Case, options: dict[str, Any], vocab: int, log: Path | None, environment: dict[str, str]
    ) -> None:
        self._log, self.grace_s = log, 0.0
        self.connection, far = multiprocessing.Pipe()
        with contextlib.ExitStack() as stack:
            stack.enter_context(far)
            self.process = subprocess.Popen(
                [*WORKER, str(far.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=stack.enter_context(log.open("wb")) if log is not None else sys.stderr.fileno(),
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=[far.fileno()],
                # Its process group holds SGLang's processes and nothing else, and the terminal's interrupt reaches
                # this process alone.
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # it has ended already, which its end of the connection will say
            self.connection.send((case, options, vocab))

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is left of the session: ranks too, nobody else's processes."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self.grace_s if error is None else 0)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.5)
        # A process that waits for the kernel to unpin its memory is not worth a traceback.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.connection.close()

    def log(self) -> str:
        """What it wrote so far."""
        with contextlib.suppress(OSError):
            return self._log.read_text(encoding="utf-8", errors="replace") if self._log else ""
        return ""


def messages(workers: Sequence[Worker], until: Limit) -> Iterator[tuple[str, Any]]:
    """What workers report, until all are done: kind ("serves", "sample" or "step") and value.

    Raises:
        EngineGone: one failed, ended early, or took too long.
    """
    left = {worker.connection: worker for worker in workers}
    waiting: list[connection.Connection] = []
    while left:
        ready = connection.wait(list(left), until.left_s)
        if not ready:
            raise EngineGone(f"the engine took longer than {until.name}", next(iter(left.values())).log())
        for each in ready:
            worker = left[each]  # type: ignore[index]
            try:
                kind, value = worker.connection.recv()
            except (EOFError, OSError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(5)
                status = worker.process.poll()
                raise EngineGone(f"the engine's process ended with status {status}", worker.log()) from None
            if kind == "error":
                raise EngineGone(value, worker.log())
            if kind == "waits":
                waiting.append(worker.connection)
                if len(waiting) == len(workers):
                    for one in waiting:
                        one.send(None)
            elif kind == "done":
                worker.grace_s = min(END_S, until.left_s)
                del left[worker.connection]
            else:
                yield kind, value


if __name__ == "__main__":
    sys.exit(main())

"""Starts SGLang through one of its entry points, takes it through a list of steps and reports what came back.

Servers are child processes that pytest talks to over HTTP. `sgl.Engine` lives in the process that makes it, and a
scheduler that fails kills that process; so engines run in children forked from a process that has imported SGLang
once. Importing takes far longer than anything that is tested here.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import queue
import random
import re
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from scripts.sglang_server import (
    CPU_OPTIONS,
    Answer,
    Server,
    answer_from,
    as_flags,
    launch_server_command,
    serve_command,
    tier_in,
)
from tests import REPOSITORY

Entry = Literal["engine", "launch_server", "serve"]
#: A step's name and its arguments, see `run_steps`.
Step = tuple[Any, ...]

#: On PYTHONPATH of every SGLang that runs here.
PLUGIN = Path(__file__).with_name("plugin")
#: Variables of that plugin, which says what they are.
LEAVE_OUT = "SGLANG_XMEM_TEST_LEAVE_OUT"
LAZY = "SGLANG_XMEM_TEST_LAZY"
FAULT = "SGLANG_XMEM_TEST_FAULT"
ALLOCATIONS = "SGLANG_XMEM_TEST_ALLOCATIONS"
DAX_ROOT = "SGLANG_XMEM_TEST_DAX_ROOT"

#: Found in the environment of every process of one run, and of nothing else.
MARKER = "SGLANG_XMEM_TEST_RUN"
#: Not in whole pages: the radix tree keeps whole ones, and once a request's prefill is done, a page that it computed
#: again gives way to the tree's. A hit in the tier finds no such page in the device pool, so its bits would differ.
PROMPT_TOKENS = 398
#: Holds two prompts of the pool below, and not three.
DEVICE_POOL_TOKENS = 1024
OUTPUT_TOKENS = 8
START_TIMEOUT_S = 120
SURVIVAL_S = 10.0

#: A small HiCache on the CPU engine. Layout and io backend are left to SGLang and to sglang_xmem.
BASE_OPTIONS: dict[str, Any] = {
    **CPU_OPTIONS,
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "page_size": 16,
    "max_total_tokens": DEVICE_POOL_TOKENS,
    "max_running_requests": 4,
    "context_length": 1024,
    "chunked_prefill_size": 512,
    "random_seed": 0,
    "log_level": "info",
    "enable_hierarchical_cache": True,
    "hicache_ratio": 4.0,
    "hicache_write_policy": "write_through",
}
#: Over BASE_OPTIONS, for an engine on a GPU; with an attention backend that runs on every GPU.
GPU_OPTIONS: dict[str, Any] = {**dict.fromkeys(CPU_OPTIONS), "attention_backend": "flashinfer"}
XMEM_DRAM: dict[str, Any] = {"hicache_use_xmem": True, "hicache_xmem_tier": "dram"}
#: What stock HiCache can do with sglang_cpu's copies.
STOCK: dict[str, Any] = {"hicache_mem_layout": "layer_first", "hicache_io_backend": "kernel"}

#: Variable of SGLang's storage backend `file`.
STORAGE_DIRECTORY = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"

#: Asked twice from the device pool, because write_through_selective stores at the second use.
EVICT_AND_ASK_AGAIN: tuple[Step, ...] = (
    ("ask", "cold", "A"),
    ("ask", "device_hit", "A"),
    ("ask", "device_hit_again", "A"),
    ("flood",),
    ("ask", "tier_hit", "A"),
    ("ask", "changed", "A with another prefix"),
)


@dataclass(frozen=True)
class Spec:
    """What to run.

    Attributes:
        entry: how SGLang is started.
        options: keywords of sgl.Engine, over BASE_OPTIONS; None removes one.
        steps: see `run_steps`.
        environment: variables for SGLang's processes.
        starts: how often SGLang is started and stopped in a row, each time with all steps.
        stop: signal that ends a server. After SIGKILL nothing else is signalled until the survivors are counted.
        start_timeout_s: a server is up by then.
        prompt_tokens: of each prompt.
        sglang: folder with another SGLang than the installed one, for entry "engine".
        forked: an engine or `launch_server` forks its processes, which have everything imported then; spawned ones, as
            users have them, import it again, which takes most of a test's time. Survivors are not found then.
        request: further fields of a server's requests.
    """

    entry: Entry
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Step] = EVICT_AND_ASK_AGAIN
    environment: Mapping[str, str] = field(default_factory=dict)
    starts: int = 1
    stop: Literal["SIGTERM", "SIGKILL", "SIGINT"] = "SIGTERM"
    start_timeout_s: float = START_TIMEOUT_S
    prompt_tokens: int = PROMPT_TOKENS
    sglang: str = ""
    forked: bool = False
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What happened.

    Attributes:
        starts: for each start the answers by the names that the steps gave them.
        log: everything that SGLang wrote.
        statuses: exit statuses of the engine's process or of each server.
        survivors: command lines of processes that outlived SGLang by SURVIVAL_S seconds.
    """

    starts: list[dict[str, Answer]]
    log: str
    statuses: list[int]
    survivors: list[str]

    @property
    def answers(self) -> dict[str, Answer]:
        """Those of the first start."""
        return self.starts[0]

    @property
    def tier(self) -> str | None:
        """The tier that the log names."""
        return tier_in(self.log)

    @property
    def loads(self) -> list[Load]:
        """Every load that SGLang asked for, as the tests' plugin logged it."""
        return loads_in(self.log)

    @property
    def lazy_loads(self) -> list[tuple[int, int]]:
        """For each load of a lazy copier, the number of parts that were waited for, and of all parts."""
        return [
            (int(waited), int(parts))
            for waited, parts in re.findall(r"xmem_e2e: lazy load: (\d+) of (\d+) parts", self.log)
        ]


class Load(NamedTuple):
    """What one load moved to the device.

    Attributes:
        moved: tokens (or states) by SGLang's names of pools; drafts that are packed with a pool are POOL+draft.
        wrong: how many of them do not hold what was stored, bytes compared; empty where copies are delayed.
    """

    moved: dict[str, int]
    wrong: dict[str, int]


def loads_in(log: str) -> list[Load]:
    """Every load that the tests' plugin logged."""
    found = re.findall(r"xmem_e2e: load (.*); wrong (.*); left out", log)
    return [Load(_counts(moved), _counts(wrong)) for moved, wrong in found]


def _counts(text: str) -> dict[str, int]:
    """The sums in "kv=384 mamba=1 mamba=1"."""
    counts: dict[str, int] = {}
    for name, count in re.findall(r"(\S+)=(\d+)", text):
        counts[name] = counts.get(name, 0) + int(count)
    return counts


class Refusal(NamedTuple):
    """How a start ended that was refused."""

    status: int
    stdout: str
    stderr: str


class _Client(Protocol):
    def generate(self, input_ids: Sequence[int], max_new_tokens: int, *, logprobs: bool = False) -> Answer: ...

    def flush_cache(self, wait_s: float = 10) -> bool: ...


# ---- in pytest's process ----


def run(spec: Spec, timeout_s: float = 300) -> Result:
    """Run `spec`; SGLang is gone afterwards.

    Raises:
        AssertionError: a step failed or SGLang did not start; the message holds the log's end.
    """
    with tempfile.TemporaryDirectory(prefix="sglang_xmem_e2e_") as scratch:
        if spec.entry == "engine":
            return _run_engine(spec, Path(scratch), timeout_s)
        return _run_server(spec, Path(scratch))


def start_refused(
    options: Mapping[str, Any],
    model: str,
    arguments: Sequence[str],
    timeout_s: float = 120,
    environment: Mapping[str, str] | None = None,
) -> Refusal:
    """Run `python -m sglang.launch_server` with arguments that it should refuse.

    Args:
        options: keywords of sgl.Engine over BASE_OPTIONS, as in Spec.
        model: model directory.
        arguments: put behind them as they are.
        environment: variables on top of this process's own.
    """
    command_line = [*as_flags({**BASE_OPTIONS, **options, "model_path": model}), *arguments]
    with tempfile.TemporaryDirectory(prefix="sglang_xmem_e2e_") as scratch:
        stdout, stderr = Path(scratch) / "stdout", Path(scratch) / "stderr"
        request = {
            "argv": command_line,
            "stdout": str(stdout),
            "stderr": str(stderr),
            "environment": dict(environment or {}),
        }
        status = _forker().run(request, timeout_s)
        return Refusal(status, stdout.read_text(errors="replace"), stderr.read_text(errors="replace"))


def _run_engine(spec: Spec, scratch: Path, timeout_s: float) -> Result:
    marker = uuid.uuid4().hex
    log, answers = scratch / "log", scratch / "answers.json"
    request = {
        "spec": dataclasses.asdict(spec),
        "forked": spec.forked,
        "answers": str(answers),
        "stdout": str(log),
        "stderr": str(log),
        "environment": {LEAVE_OUT: str(scratch / "leave_out"), **spec.environment, MARKER: marker},
    }
    status = _forker(spec.sglang).run(request, timeout_s)
    survivors = wait_for_end(marker)
    log_text = log.read_text(encoding="utf-8", errors="replace")
    assert status == 0, f"the engine's process ended with status {status}; its log ends:\n{_end(log_text)}"
    starts = [{name: Answer(**answer) for name, answer in start.items()} for start in json.loads(answers.read_text())]
    return Result(starts=starts, log=log_text, statuses=[status], survivors=survivors)


def _run_server(spec: Spec, scratch: Path) -> Result:
    options = _all_options(spec)
    result = Result(starts=[], log="", statuses=[], survivors=[])
    for _ in range(spec.starts):
        marker = uuid.uuid4().hex
        log_path = scratch / "log"
        environment = {LEAVE_OUT: str(scratch / "leave_out"), **_with_plugin(), **spec.environment, MARKER: marker}
        if spec.forked:
            made: Server = ForkedServer(options, log_path, environment)
        else:
            command = launch_server_command() if spec.entry == "launch_server" else serve_command()
            made = Server(command, options, log_path, environment)
        with made as server:
            try:
                server.wait_ready(spec.start_timeout_s)
                leave_out = Path(environment[LEAVE_OUT])
                result.starts.append(run_steps(ServerClient(server, spec.request), spec.steps, spec, leave_out))
                server.process.send_signal(signal.Signals[spec.stop])
                result.statuses.append(server.process.wait(60))
            except Exception as error:
                raise AssertionError(f"{error!r}; the server's log ends:\n{_end(server.log())}") from error
            # Before leaving the context, which kills the process group.
            result.survivors.extend(wait_for_end(marker))
            result = dataclasses.replace(result, log=result.log + server.log())
    return result


def _with_plugin(sglang: str = "") -> dict[str, str]:
    """Environment in which SGLang finds the tests' plugin; `sglang`: folder with another SGLang."""
    return {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [sglang, str(PLUGIN), str(REPOSITORY), os.environ.get("PYTHONPATH")])
        )
    }


def wait_for_end(marker: str, timeout_s: float = SURVIVAL_S) -> list[str]:
    """Wait until no process carries `marker`; returns the command lines of those that stay, which are killed."""
    deadline = time.monotonic() + timeout_s
    while _pids(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    stayed = []
    for pid in _pids(marker):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            os.kill(pid, signal.SIGKILL)
            stayed.append(f"{pid}: {command}")
    return stayed


def _pids(marker: str) -> list[int]:
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # A process that ended, one of another user, and a zombie (empty environment) all drop out here.
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _end(text: str, n_lines: int = 60) -> str:
    return "\n".join(text.splitlines()[-n_lines:])


class _Child:
    """A forked child of `_Forker`, with what a Popen has that Server uses. It leads a process group."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def end(self, status: int) -> None:
        self.returncode = status
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"child {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """With what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class _Forker:
    """A process with SGLang imported that forks a child for each request; any number of them may run."""

    def __init__(self, sglang: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_with_plugin(sglang)},
        )
        atexit.register(self._process.kill)
        self._started: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, request: Mapping[str, Any]) -> _Child:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        child = self._started.get()
        assert child is not None, "the process that forks engines is gone; see its message above"
        return child

    def run(self, request: Mapping[str, Any], timeout_s: float) -> int:
        """Exit status of the child, negative for a signal."""
        child = self.start(request)
        try:
            return child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            child.kill_group()
            return child.wait()
        except BaseException:  # an interrupt, mostly
            child.kill_group()
            raise

    def _listen(self) -> None:
        """Read what the process says: "started PID", and "ended PID STATUS" once the child is no more."""
        assert self._process.stdout is not None
        children: dict[int, _Child] = {}
        for line in self._process.stdout:
            what, *numbers = line.split()
            pid = int(numbers[0])
            if what == "started":
                children[pid] = _Child(pid)
                self._started.put(children[pid])
            else:
                children.pop(pid).end(int(numbers[1]))
        for child in children.values():
            child.end(-signal.SIGKILL)
        self._started.put(None)


class ForkedServer(Server):
    """`python -m sglang.launch_server` in processes that are forked, with everything imported, as `Spec.forked` says.

    Args:
        options: as of Spec.
        log_path, environment: as of Server.
    """

    def __init__(self, options: Mapping[str, Any], log_path: Path, environment: Mapping[str, str]) -> None:
        super().__init__((), options, log_path, environment)

    def _start(self, words: Sequence[str], environment: Mapping[str, str]) -> Any:
        self.log_path.write_bytes(b"")
        log = str(self.log_path)
        request = {"argv": list(words), "stdout": log, "stderr": log, "forked": True}
        return _forker().start({**request, "environment": dict(environment)})


@functools.cache
def _forker(sglang: str = "") -> _Forker:
    return _Forker(sglang)


# ---- steps ----


class _EngineClient:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def generate(self, input_ids: Sequence[int], max_new_tokens: int, *, logprobs: bool = False) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        start = time.perf_counter()
        reply = self._engine.generate(input_ids=list(input_ids), sampling_params=sampling, return_logprob=logprobs)
        return answer_from(reply, (time.perf_counter() - start) * 1e3)

    def flush_cache(self, wait_s: float = 10) -> bool:
        return bool(self._engine.flush_cache().success)  # does not wait


class ServerClient:
    """A server as `run_steps` wants it."""

    def __init__(self, server: Server, fields: Mapping[str, Any] | None = None) -> None:
        self._server = server
        self._fields = fields or {}

    def generate(self, input_ids: Sequence[int], max_new_tokens: int, *, logprobs: bool = False) -> Answer:
        return self._server.generate(input_ids, max_new_tokens, logprobs=logprobs, **self._fields)

    def flush_cache(self, wait_s: float = 10) -> bool:
        return self._server.request("POST", f"/flush_cache?timeout={wait_s:g}")[0] == 200


#: A prompt's name with this behind it names the prompt with other tokens at its beginning...
OTHER_PREFIX = " with another prefix"
#: ... and with this, a prompt that has some more tokens at its end.
LONGER = " and more"


def prompt(name: str, n_tokens: int = PROMPT_TOKENS) -> list[int]:
    """The prompt of that name: equal names give equal tokens in every process and session."""
    if name.endswith(OTHER_PREFIX):
        return [*prompt("another prefix", 16), *prompt(name.removesuffix(OTHER_PREFIX), n_tokens)[16:]]
    if name.endswith(LONGER):
        return [*prompt(name.removesuffix(LONGER), n_tokens), *prompt("more", 8)]
    generator = random.Random(name)
    return [generator.randrange(3, 1000) for _ in range(n_tokens)]


def run_steps(
    client: _Client, steps: Sequence[Step], spec: Spec | None = None, leave_out: Path | None = None
) -> dict[str, Answer]:
    """Take `client` through steps; returns the answers by their names.

    Steps: ("ask", name of the answer, name of the prompt), ("flood",) pushes everything out of the device pool,
    ("flush",) empties the caches, ("count_flushes", tries) as `count_flushes` and its count is printed,
    ("try", ...) is ("ask", ...) that may end in an error and then has no answer, ("fault", name) has copies fail from
    here on, ("rest", seconds) and ("sleep", seconds) do nothing, ("await_files", directory, count) waits until as many
    files have been written there,
    ("leave_out", pool, ...) leaves pools out of all further loads.

    Args:
        spec: what the client runs; without it, a prompt and a device pool have the usual sizes.
        leave_out: file that the plugin of this client's SGLang reads.
    """
    prompt_tokens = PROMPT_TOKENS if spec is None else spec.prompt_tokens
    pool_tokens = DEVICE_POOL_TOKENS if spec is None else _all_options(spec)["max_total_tokens"]
    answers: dict[str, Answer] = {}
    for number, (operation, *arguments) in enumerate(steps):
        if operation == "ask":
            name, prompt_name = arguments
            answers[name] = client.generate(prompt(prompt_name, prompt_tokens), OUTPUT_TOKENS, logprobs=True)
            print(f"harness: {name}: {answers[name]}", flush=True)
        elif operation == "try":
            name, prompt_name = arguments
            try:
                answers[name] = client.generate(prompt(prompt_name, prompt_tokens), OUTPUT_TOKENS, logprobs=True)
            except Exception as error:
                print(f"harness: {name} is lost: {error}", flush=True)
        elif operation == "fault":
            Path(os.environ[FAULT]).write_text(arguments[0])
        elif operation == "rest":
            time.sleep(arguments[0])
        elif operation == "flood":
            for index in range(pool_tokens // prompt_tokens + 2):
                client.generate(prompt(f"flood {number} {index}", prompt_tokens), 1)
        elif operation == "flush":
            assert client.flush_cache(), "flush_cache was refused"
        elif operation == "count_flushes":
            (tries,) = arguments
            print(f"harness: flushes accepted: {count_flushes(client, tries, prompt_tokens)} of {tries}", flush=True)
        elif operation == "await_files":
            _await_files(Path(arguments[0]), arguments[1])
        elif operation == "sleep":
            time.sleep(arguments[0])
        elif operation == "leave_out":
            assert leave_out is not None, "leave_out is not read"
            leave_out.write_text(",".join(arguments))
        else:
            raise ValueError(f"unknown step {operation!r}")
    return answers


def count_flushes(client: _Client, tries: int = 5, prompt_tokens: int = PROMPT_TOKENS) -> int:
    """How often `flush_cache` is accepted straight after an answer, which frees nothing by itself.

    SGLang refuses while the finished request is still in its running batch; a scheduler that stores slowly leaves it
    there for longer.
    """
    accepted = 0
    for number in range(tries):
        client.generate(prompt(f"before flush {number}", prompt_tokens), OUTPUT_TOKENS)
        accepted += client.flush_cache(0)
    return accepted


def flushes_accepted(model: str, options: Mapping[str, Any], tries: int = 5) -> int:
    """`count_flushes` of an engine with these options."""
    # Without the plugin: what it does takes time on the scheduler's thread.
    result = run(Spec("engine", model, options, [("count_flushes", tries)], {LEAVE_OUT: ""}, forked=True))
    (accepted,) = re.findall(r"harness: flushes accepted: (\d+) of", result.log)
    return int(accepted)


def _await_files(directory: Path, wanted: int, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while (found := sum(path.is_file() and path.stat().st_size > 0 for path in directory.rglob("*"))) < wanted:
        assert time.monotonic() < deadline, f"{found} of {wanted} files were written in {timeout_s:g} s"
        time.sleep(0.1)


def _all_options(spec: Spec) -> dict[str, Any]:
    merged = {**BASE_OPTIONS, **spec.options, "model_path": spec.model}
    return {name: value for name, value in merged.items() if value is not None}


# ---- in the forked child ----


def _fork_for_requests() -> None:
    """Body of the forking process. Returns in each child when it is done, for a regular exit of the interpreter."""
    import sglang.launch_server
    import sglang.srt.entrypoints.engine
    import sglang.srt.entrypoints.http_server

    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        # Every model's module: some start CUDA, and then nothing can be forked.
        import sglang.srt.models.registry  # noqa: F401

    children: dict[int, int] = {}  # descriptor -> process id
    poller = select.poll()
    poller.register(0, select.POLLIN)
    pending = b""
    while True:
        for descriptor, _ in poller.poll():
            if descriptor != 0:
                pid = children.pop(descriptor)
                print("ended", pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
                poller.unregister(descriptor)
                os.close(descriptor)
                continue
            read = os.read(0, 1 << 16)
            if not read:
                return
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                pid = os.fork()
                os.setpgid(pid, pid or os.getpid())  # by whichever of the two is first
                if pid == 0:
                    for other in children:
                        os.close(other)
                    _serve_request(json.loads(line))
                    return
                children[pidfd := os.pidfd_open(pid)] = pid
                poller.register(pidfd, select.POLLIN)
                print("started", pid, flush=True)


def _serve_request(request: Mapping[str, Any]) -> None:
    for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    os.environ.update(request["environment"])
    if request.get("forked"):
        multiprocessing.set_start_method("fork", force=True)
        multiprocessing.set_start_method = lambda *args, **kwargs: None  # SGLang would set it back
    if "argv" in request:
        sys.argv = ["sglang.launch_server", *request["argv"]]
        del sys.modules["sglang.launch_server"]
        runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
        return
    spec = Spec(**request["spec"])
    starts = []
    for _ in range(spec.starts):
        import sglang

        engine = sglang.Engine(**_all_options(spec))
        try:
            answers = run_steps(_EngineClient(engine), spec.steps, spec, Path(os.environ[LEAVE_OUT]))
        finally:
            engine.shutdown()
        starts.append({name: dataclasses.asdict(answer) for name, answer in answers.items()})
    Path(request["answers"]).write_text(json.dumps(starts))


if __name__ == "__main__":
    _fork_for_requests()

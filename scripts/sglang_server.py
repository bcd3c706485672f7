"""Start an SGLang server as a child process, use it over HTTP and stop it. Imports only the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

HOST = "127.0.0.1"
#: The line that sglang_xmem's scheduler logs once at startup.
TIER_LINE = re.compile(r"sglang_xmem: tier=(\w+)")
#: Options for a small model on a machine without a GPU.
CPU_OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,
}


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time; the message contains the end of its log."""


@dataclass(frozen=True)
class Answer:
    """The reply to one prompt.

    Attributes:
        output_ids: generated tokens.
        logprobs: their log probabilities, if asked for.
        cached: prompt tokens served from a cache, by location: device, host, storage.
        ttft_ms: time from sending the request to its first token.
        verifications: number of draft verifications; 0 without speculative decoding.
    """

    output_ids: list[int]
    logprobs: list[float]
    cached: dict[str, int]
    ttft_ms: float
    verifications: int = 0


def answer_from(reply: Mapping[str, Any], ttft_ms: float) -> Answer:
    """Parse SGLang's reply to /generate or Engine.generate, complete or the last piece of a stream."""
    meta = reply["meta_info"]
    details = meta.get("cached_tokens_details") or {}
    return Answer(
        output_ids=list(reply["output_ids"]),
        logprobs=[entry[0] for entry in meta.get("output_token_logprobs") or []],
        cached={place: count for place, count in details.items() if isinstance(count, int)},
        ttft_ms=ttft_ms,
        verifications=meta.get("spec_verify_ct") or 0,
    )


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Convert keywords of sgl.Engine to a command line: True gives the bare flag, None omits the option."""
    flags: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is False:
            flags.append(flag.replace("--", "--no-", 1))
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def tier_in(log: str) -> str | None:
    """Return the tier in the server's log; None without sglang_xmem."""
    match = TIER_LINE.search(log)
    return match.group(1) if match else None


class Server:
    """A running server, as a context manager that ends all its processes.

    Args:
        command: its command, e.g. [python, "-m", "sglang.launch_server"].
        options: keywords of sgl.Engine, turned into flags.
        log_path: file that receives its stdout and stderr.
        environment: variables in addition to this process's.
        arguments: appended to the options, so they take precedence.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: Mapping[str, Any],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.port = _free_port()
        self.log_path = log_path
        words = [*command, *as_flags(options), *arguments, "--host", HOST, "--port", str(self.port)]
        self.process = self._start(words, environment or {})

    def _start(self, words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.log_path.open("wb") as log:
            # A separate session: its process group contains only SGLang's processes.
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def log(self) -> str:
        """Return the server's log so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server passes its health check.

        Raises:
            ServerFailed: it ended before, or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.process.poll()
            if status is not None:
                raise ServerFailed(f"the server ended with status {status}: {self._reason()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/health", timeout_s=5)[0] == 200:
                    return
            time.sleep(0.2)
        raise ServerFailed(f"the server was not ready after {timeout_s:g} s: {self._reason()}")

    def request(self, method: str, path: str, timeout_s: float = 60) -> tuple[int, bytes]:
        """Send one HTTP request without a body; return status and body."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def generate(
        self, input_ids: Sequence[int], max_new_tokens: int, *, logprobs: bool = False, **fields: Any
    ) -> Answer:
        """Generate greedily over /generate, streamed to time the first token; `fields` are added to the request.

        Raises:
            ServerFailed: there is no answer, or it was cut short: when a server ends, its stream ends like any other.
        """
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True},
            "return_logprob": logprobs,
            "stream": True,
            **fields,
        }
        connection = http.client.HTTPConnection(HOST, self.port, timeout=600)
        try:
            start = time.perf_counter()
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise ServerFailed(f"/generate answered {response.status}: {response.read(2000)!r}")
            ttft_ms: float | None = None
            last: dict[str, Any] = {}
            is_whole = False
            for raw in response:
                line = raw.decode().strip()
                is_whole |= line == "data: [DONE]"
                if not line.startswith("data:") or is_whole:
                    continue
                if ttft_ms is None:
                    ttft_ms = (time.perf_counter() - start) * 1e3
                last = json.loads(line.removeprefix("data:"))
                if "error" in last:
                    raise ServerFailed(f"/generate failed: {last['error']}")
        finally:
            connection.close()
        if ttft_ms is None:
            raise ServerFailed(f"/generate ended without a token: {self._reason()}")
        if not is_whole:
            raise ServerFailed(f"/generate ended after {len(last['output_ids'])} tokens: {self._reason()}")
        return answer_from(last, ttft_ms)

    def stop(self, first: signal.Signals = signal.SIGTERM, grace_s: float = 20) -> int:
        """Signal the server, then kill the rest of its process group; return the server's exit status."""
        if self.process.poll() is None:
            self.process.send_signal(first)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def _reason(self) -> str:
        """Return sglang_xmem's refusal, or else the end of the log."""
        lines = self.log().splitlines()
        refusals = [line for line in lines if line.startswith("sglang_xmem: ")]
        # SGLang logs its whole configuration in one line of many kilobytes.
        return "\n".join(refusals or ["its log ends:", *(line[:400] for line in lines[-40:])])


def launch_server_command() -> list[str]:
    """`python -m sglang.launch_server` with the interpreter that runs this."""
    return [sys.executable, "-m", "sglang.launch_server"]


def serve_command() -> list[str]:
    """`sglang serve` as installed next to the interpreter that runs this."""
    return [str(Path(sys.executable).parent / "sglang"), "serve"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port

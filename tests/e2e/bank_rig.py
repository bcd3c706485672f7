"""A page bank's service and engines, for tests and the kill matrix."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.sglang_server import Answer, Server, tier_in
from tests.e2e import harness
from tests.e2e.harness import BASE_OPTIONS, OUTPUT_TOKENS, PROMPT_TOKENS, ForkedServer, ServerClient, prompt

BANK: dict[str, Any] = {"hicache_use_xmem": True, "hicache_xmem_tier": "bank", "log_level": "info"}


class Service:
    """mtierd, as a user starts it, with a bank of 256 MiB."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "mtierd.sock"
        command = [
            sys.executable,
            "-m",
            "sglang_xmem.cli",
            "mtierd",
            "--bank",
            "host:256MiB",
            "--share",
            "50",
            "--socket",
        ]
        self._command = [*command, str(self.socket)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        self.wait()

    def wait(self) -> None:
        """Return once it answers."""
        deadline = time.monotonic() + 60
        while subprocess.run([*self._asking, "--status"], capture_output=True, check=False).returncode != 0:
            assert time.monotonic() < deadline, "mtierd does not answer"
            time.sleep(0.2)

    @property
    def _asking(self) -> list[str]:
        return [sys.executable, "-m", "sglang_xmem.cli", "mtierd", "--socket", str(self.socket)]

    def status(self) -> dict[str, Any]:
        done = subprocess.run([*self._asking, "--status", "--json"], capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    def pages(self) -> int:
        """How many can be found."""
        return sum(space["pages"] for space in self.status()["spaces"])

    def flush(self) -> None:
        subprocess.run([*self._asking, "--flush"], check=True)

    def children(self) -> list[int]:
        """What serves, where the process that was started only keeps its memory."""
        pid = self.process.pid
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill_serving(self) -> None:
        """Kill what serves, and no more; its memory stays, and it is started again."""
        (child,) = self.children()
        os.kill(child, signal.SIGKILL)

    def kill(self) -> None:
        """Kill all of it, with its memory."""
        for pid in (self.process.pid, *self.children()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


class Engine:
    """A server, and what to ask it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client = ServerClient(server)

    def ask(self, name: str, n_tokens: int = PROMPT_TOKENS) -> Answer:
        return self.client.generate(prompt(name, n_tokens), OUTPUT_TOKENS, logprobs=True)

    def kill(self) -> None:
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait(20)


@contextlib.contextmanager
def engine(
    model: Path,
    service: Service,
    log: Path,
    options: Mapping[str, Any] = {},
    variables: Mapping[str, str] = {},
) -> Iterator[Engine]:
    """A server that is ready."""
    environment = {"MTIER_SOCKET": str(service.socket), **variables}
    everything = {**BASE_OPTIONS, **BANK, "model_path": str(model), **options}
    with ready(ForkedServer(everything, log, environment), "bank") as engine:
        yield engine


@contextlib.contextmanager
def ready(server: Server, tier: str) -> Iterator[Engine]:
    """Wait for a server whose pool is in `tier`, and stop it at the end."""
    with server:
        try:
            server.wait_ready(2 * harness.START_TIMEOUT_S)
            yield Engine(server)
        except Exception as error:
            raise AssertionError(f"{error!r}; the log ends:\n{server.log()[-6000:]}") from error
        assert tier_in(server.log()) == tier
        assert "Traceback" not in server.log()


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def places(answer: Answer) -> dict[str, int]:
    """Cached tokens by where they were, without the places that had none."""
    return {place: tokens for place, tokens in answer.cached.items() if tokens}

"""Each kind of the page bank's memory with a service under sanitizers: hostile clients, kills, restarts, other owners.

Of the address and undefined-behaviour sanitizers, and of the one that finds races among the service's threads. Where
the service has memory in GPUs, the driver is a stand-in, which is compiled without them.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from sglang_xmem.mtier.build import DAEMON, BuildError, Sanitizer, built
from sglang_xmem.mtier.client import DAX, GPU, HOST
from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, PATIENCE_S, Daemon, wait_until
from tests.mtier.test_bank_slabs import Engine
from tests.mtier.test_fuzz import MESSAGES, SEED
from tests.mtier.test_gpu_banks import Machine
from tests.unit.tiers.fake_dax import FakeDax

#: Of each of two processes, of which one is killed half-way.
COUNT = MESSAGES // 20


@pytest.fixture(params=["address", "thread"])
def sanitized(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with the service alone."""
    sanitizer: Sanitizer = request.param
    try:
        program = built(sanitize=sanitizer) / DAEMON
    except BuildError as error:
        pytest.skip(f"the compiler has no sanitizer of {sanitizer}: {error}")
    # ThreadSanitizer wants the addresses that it knows.
    start = "setarch -R " if sanitizer == "thread" else ""
    folder = tmp_path / sanitizer
    folder.mkdir()
    (folder / DAEMON).write_text(f'#!/bin/sh\nexec {start}{shlex.quote(str(program))} "$@"\n')
    (folder / DAEMON).chmod(0o755)
    return folder


class Memory(NamedTuple):
    """What the service has.

    Attributes:
        banks: its arguments; DEVICE is the device.
        kind: of memory, that engines ask for.
        survives: whether the pages are there for a service with another keeper.
    """

    banks: tuple[str, ...]
    kind: int
    survives: bool = False


MEMORIES = {
    "host": Memory((f"host:{16 * MIB}", f"host:{8 * MIB}"), HOST),  # present ahead
    "gpu": Memory((f"gpu:0:{16 * MIB}", f"gpu:1:{8 * MIB}"), GPU),
    "dax": Memory((f"host:{8 * MIB}", f"dax:DEVICE:{24 * MIB}"), DAX, survives=True),
}


@pytest.fixture
def device(tmpfs: Path) -> FakeDax:
    return FakeDax(tmpfs)


class Sanitized(Machine):
    """The service, over memory of one kind."""

    def __init__(self, machine: Machine, memory: Memory, device: FakeDax, sanitized: Path) -> None:
        vars(self).update(vars(machine))
        self.memory, self._device, self._sanitized = memory, device, sanitized
        self.daemons: list[Daemon] = []

    def serve(self) -> None:
        banks = [
            word for bank in self.memory.banks for word in ("--bank", bank.replace("DEVICE", str(self._device.path)))
        ]
        environment = {**self.driver, "MTIER_SYSFS_ROOT": str(self._device.root)}
        self.daemon = self._start_daemon(*banks, "--rest-after", "0", binaries=self._sanitized, environment=environment)
        self.daemons.append(self.daemon)

    def check(self) -> None:
        """The service ends as it should, and none had anything to say."""
        assert self.daemon.stop() == 0, self.daemon.log()[-4000:]
        for daemon in self.daemons:
            for words in ("ERROR: ", "runtime error", "WARNING: ThreadSanitizer"):
                assert words not in daemon.log(), daemon.log()[-8000:]


@pytest.fixture(params=MEMORIES)
def service(
    request: pytest.FixtureRequest,
    sanitized: Path,
    build: Path,
    fake_cuda: Path,
    start_daemon: StartDaemon,
    device: FakeDax,
    tmp_path: Path,
) -> Sanitized:
    return Sanitized(Machine(build, fake_cuda, start_daemon, tmp_path), MEMORIES[request.param], device, sanitized)


def hostile(service: Sanitized) -> None:
    """Two clients with no manners, of which one is killed, and the service with it."""
    command = [sys.executable, str(Path(__file__).with_name("test_fuzz.py")), str(service.daemon.socket_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    clients = [
        subprocess.Popen(
            [*command, str(COUNT), str(SEED * 100 + number), str(service.memory.kind)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    try:
        for client, last in zip(clients, (False, True), strict=True):
            assert client.stdout is not None
            assert client.stdout.readline() == "half\n"
            if not last:
                client.kill()
                service.daemon.restart()
            else:
                assert client.stdout.readline() == "done\n"
                assert client.wait(PATIENCE_S) == 0
    finally:
        for client in clients:
            client.kill()
            client.wait(PATIENCE_S)


def test_nothing_is_found(service: Sanitized) -> None:
    kind, survives = service.memory.kind, service.memory.survives
    service.serve()
    with Engine(service) as honest:

        def has_joined() -> bool:
            return bool(honest.ask("session.find([key(99)]) == 0 and session.alive"))

        assert honest.ask(f"join({kind}, 20)") is None
        assert honest.ask("globals().update(mine=session.claim(5))") is None
        assert honest.ask("[write(address, n) for n, address in enumerate(mine)]") == [None] * 5
        assert honest.ask("store(session, [10, 11, 12])") == [0] * 3
        hostile(service)
        # The index is made again of the frames, and the honest one's session is known.
        wait_until(has_joined, PATIENCE_S)
        assert honest.ask("[read(address) for address in mine]") == [[n] for n in range(5)]
        assert honest.ask("session.publish([key(n) for n in range(5)], mine)") == [0] * 5
        assert honest.ask("store(session, [20])") == [0]
        for _ in range(2):
            if survives:
                service.daemon.stop(signal.SIGKILL)
                service.serve()
            else:
                service.daemon.restart()
            wait_until(has_joined, PATIENCE_S)
            adopted = "[read(a) for a in session.adopt([key(n) for n in (0, 1, 2, 3, 4, 20, 21)])]"
            assert honest.ask(adopted) == [[n] for n in (0, 1, 2, 3, 4, 20)]
        assert honest.ask("session.damaged(session.adopt([key(20)]))") is None
        assert honest.ask(f"session.reported({PATIENCE_S})") is True
        assert honest.ask("session.find([key(20)])") == 0
    with Engine(service) as other:
        # Memory of spaces that nobody uses any more, empty for another one.
        wait_until(lambda: other.ask(f"join({kind}, 40, b'z' * 32)") is None, PATIENCE_S)
        assert other.ask("[read(a) for a in session.claim(40)]") == [[0]] * 40
        assert other.ask("session.close()") is None
    service.check()

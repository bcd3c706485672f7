"""Sessions of the page bank find each other's pages again, whatever happens to the service."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, AskedProcess, Daemon, wait_until

BANK = ("--bank", f"host:{8 * MIB}")
ROUNDS = 10
SESSIONS = 3
SCRIPT = """
import collections, json, sys, threading
from sglang_xmem import bank_link
from tests.mtier.test_bank_sessions import *

session = BankSession(MODEL, FRAME, 30, "chaos")
bank_link.RETRY_S, bank_link.MOST_RETRY_S = 0.05, 0.2
client.DEADLINE_S, client.PAUSE_S, client.MOST_PAUSE_S = 0.3, 0.05, 0.2
held = collections.deque()

def store(number):
    (address,) = held.append(session.claim(1)) or held[-1]
    view(session, address)[:] = number % 256
    session.publish([key(number)], held[-1])
    while len(held) > 20:  # what waits for the service is held
        session.release(held.popleft())

def adopted(number):
    addresses = session.adopt([key(number)])
    seen = [int(byte) for address in addresses for byte in view(session, address)[[0, -1]]]
    session.release(addresses)
    return seen

def ask():
    while True:
        session.find([key(0)])
        time.sleep(0.001)

for _ in range(2):
    threading.Thread(target=ask, daemon=True).start()
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_all_find_what_each_stores_after_anything_that_befalls_the_service(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    generator = random.Random(seed)
    daemon = start_daemon(*BANK)
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def pause(most_s: float) -> None:
        time.sleep(generator.uniform(0, most_s))

    def kill() -> None:
        wait_until(lambda: daemon.serving != 0, 20)
        daemon.send(signal.SIGKILL)

    def stop() -> None:
        wait_until(lambda: daemon.serving != 0, 20)
        daemon.send(signal.SIGSTOP)
        pause(1.5)
        daemon.send(signal.SIGCONT)

    def kill_stopped() -> None:
        wait_until(lambda: daemon.serving != 0, 20)
        daemon.send(signal.SIGSTOP)
        pause(0.8)
        kill()

    def start_anew() -> None:
        nonlocal daemon
        daemon.stop(signal.SIGKILL)
        pause(0.8)
        daemon = start_daemon(*BANK)

    faults: list[Callable[[], None]] = [kill, stop, kill_stopped, start_anew]
    with ExitStack() as stack:
        sessions = [stack.enter_context(AskedProcess(["-c", SCRIPT], variables)) for _ in range(SESSIONS)]
        assert [one.ask("session.alive") for one in sessions] == [True] * SESSIONS
        number = 0
        for _ in range(ROUNDS):
            befallen = generator.choices(faults, k=generator.randint(1, 3))
            for fault in befallen:
                pause(0.1)
                fault()
                number += 1
                sessions[generator.randrange(SESSIONS)].ask(f"store({number})")
            what = [fault.__name__ for fault in befallen]
            for one in sessions:
                number += 1
                one.ask(f"store({number})")
                for other in sessions:
                    assert shared(other, number), (what, number, state(sessions, daemon))
        assert [one.ask("session.lost") for one in sessions] == [False] * SESSIONS


def shared(session: AskedProcess, number: int) -> bool:
    """Whether a session soon has a page that another one has stored, with the right bytes."""
    deadline = time.monotonic() + 30
    while not (seen := session.ask(f"adopted({number})")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    assert seen == [number % 256] * 2
    return True


def state(sessions: list[AskedProcess], daemon: Daemon) -> str:
    counts = [one.ask("dict(session.counts, alive=session.alive)") for one in sessions]
    return f"{counts} {daemon.log()[-2000:]}"

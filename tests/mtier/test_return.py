"""A service whose memory went with its keeper gets it back from engines that live."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from sglang_xmem import bank
from sglang_xmem.bank import NEW, STALE, BankSession
from sglang_xmem.mtier.client import HOST, RETURN
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, REPLY_BYTES, REPLY_HEAD, Daemon, request, wait_until
from tests.mtier.test_bank_sessions import FRAME, MODEL, Other, fill, key, promised, view

BANK = ("--bank", f"host:{8 * MIB}")


@pytest.fixture
def daemon(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    monkeypatch.setattr("sglang_xmem.bank_link.RETRY_S", 0.1)
    monkeypatch.setattr("sglang_xmem.bank_link.MOST_RETRY_S", 0.2)
    daemon = start_daemon(*BANK)
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    return daemon


@pytest.fixture
def session(daemon: Daemon) -> Iterator[BankSession]:
    session = BankSession(MODEL, FRAME, 40, "model")
    yield session
    session.close()


def test_pages_sessions_and_pins_come_back_without_a_question(
    daemon: Daemon, session: BankSession, start_daemon: StartDaemon
) -> None:
    other, ended = Other(20), Other(20)
    try:
        fill(session, [1, 2])
        assert other.ask("len(session.adopt([key(1)]))") == 1
        own = session.claim(1)
        view(session, own[0])[:] = 3
        daemon.stop(signal.SIGKILL)
        assert session.find([key(1)]) == 0
        session.claim(1)
        ended.kill()
        anew = start_daemon(*BANK)
        wait_until(lambda: sorted(promised(anew)) == [20, 40], 20)
        assert session.find([key(1), key(2)]) == 2
        assert session.publish([key(3)], own) == [NEW]
        wait_until(lambda: other.ask("session.find([key(3)])") == 1, 20)
        assert other.ask("int(view(session, session.adopt([key(3)])[0])[9])") == 3
        (space,) = anew.status()["spaces"]
        assert {each["pid"]: each["held"] for each in space["sessions"]} == {os.getpid(): 4, other.process.pid: 2}
        assert space["restored"] == 2
        # A new engine finds them, also after the service alone is killed.
        third = BankSession(MODEL, FRAME, 60)
        assert [view(third, address)[5] for address in third.adopt([key(1), key(2), key(3)])] == [1, 2, 3]
        anew.restart()
        assert third.find([key(1), key(2), key(3)]) == 3
        third.close()
        assert not session.lost
    finally:
        other.kill()
        ended.kill()


def test_pages_that_are_stored_while_the_service_is_away_are_shared_later(
    daemon: Daemon, session: BankSession, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Other(20)
    try:
        with monkeypatch.context() as late:
            late.setattr("sglang_xmem.bank_link.socket_path", lambda: "/no such socket")
            daemon.stop(signal.SIGKILL)
            kept, freed = session.claim(2), session.claim(1)
            for number, address in enumerate((*kept, *freed), 1):
                view(session, address)[:] = number
                assert session.publish([key(number)], np.array([address])) == [STALE]
            # A freed frame, and one that has another page's bytes since.
            session.release(np.array([kept[1], *freed]))
            wait_until(lambda: kept[1] in session.claim(1), 20)
            assert session.counts["bank:private"] == 0
        start_daemon(*BANK)
        wait_until(lambda: other.ask("session.find([key(1)])") == 1, 20)
        wait_until(lambda: session.counts["bank:private"] == 2, 20)
        assert session.counts["bank:published"] == 1
        assert other.ask("[session.find([key(2)]), session.find([key(3)])]") == [0, 0]
        assert other.ask("int(view(session, session.adopt([key(1)])[0])[9])") == 1
    finally:
        other.kill()


def test_a_question_that_finds_the_service_sends_what_waits(
    daemon: Daemon, session: BankSession, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link's own thread may not look for the service for half a minute."""
    monkeypatch.setattr("sglang_xmem.bank_link.min", lambda *_: 1000.0, raising=False)
    daemon.stop(signal.SIGKILL)
    address = session.claim(1)
    session.publish([key(1)], address)
    time.sleep(1)
    session.find([key(1)])
    start_daemon(*BANK)
    wait_until(lambda: session.find([key(1)]) == 1, 20)


def test_few_messages_wait_for_the_service(
    daemon: Daemon, session: BankSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "MAX_LATER", 5)
    daemon.stop(signal.SIGKILL)
    address = session.claim(1)
    for number in range(8):
        session.publish([key(number)], address)
    assert session.counts["bank:private"] == 3


def test_an_engine_that_came_first_keeps_its_memory(
    daemon: Daemon,
    session: BankSession,
    start_daemon: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two spaces cannot have the same pages."""
    addresses = fill(session, [1])
    with monkeypatch.context() as late:
        late.setattr("sglang_xmem.bank_link.socket_path", lambda: "/no such socket")
        daemon.stop(signal.SIGKILL)
        anew = start_daemon("--bank", f"host:{16 * MIB}", "--share", "50")
        first = Other(28)
    try:
        wait_until(lambda: session.find([key(1)]) == 0 and session.lost, 20)
        assert promised(anew) == [28]
        assert (
            "(the service cannot take the memory back: engines have other memory for these pages by now)" in caplog.text
        )
        assert view(session, addresses[0])[0] == 1
        assert session.claim(30).size == 30
    finally:
        first.kill()


def test_pages_that_nobody_uses_make_place_for_those_that_come_back(
    daemon: Daemon, session: BankSession, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(session, [1, 2])
    with monkeypatch.context() as late:
        late.setattr("sglang_xmem.bank_link.socket_path", lambda: "/no such socket")
        daemon.stop(signal.SIGKILL)
        anew = start_daemon("--bank", f"host:{16 * MIB}", "--share", "50")
        first = Other(28)
        first.ask("len(fill(session, [1]))")
        first.kill()
        wait_until(lambda: promised(anew) == [], 20)
    wait_until(lambda: session.find([key(1), key(2)]) == 2, 20)
    assert promised(anew) == [40]


def test_memory_that_a_living_service_has_is_taken_by_no_other(
    build: Path, daemon: Daemon, session: BankSession, tmp_path: Path
) -> None:
    """Both would give the same number to two sessions."""
    slab, ledger = session._link._files
    fill(session, [1])
    refusal = "the service cannot take the memory back: another service has it"
    with Daemon(build, tmp_path / "another.sock", BANK) as another:
        assert give(another, [slab, ledger]) == (-3, refusal)
        assert another.status()["spaces"] == []
    assert session.find([key(1)]) == 1


@pytest.mark.parametrize("what", ["nothing", "one", "a file", "the wrong way round", "a ledger that may shrink"])
def test_what_is_no_memory_of_a_bank_is_refused(
    what: str, build: Path, daemon: Daemon, session: BankSession, tmp_path: Path
) -> None:
    slab, ledger = session._link._files
    ordinary = os.open(__file__, os.O_RDONLY)
    unsealed = os.memfd_create("mtier-pages")
    os.write(unsealed, os.pread(ledger, os.fstat(ledger).st_size, 0))
    sent = {"nothing": [], "one": [ledger], "a file": [ordinary] * 2, "the wrong way round": [ledger, slab]}
    with Daemon(build, tmp_path / "another.sock", BANK) as another:
        code, why = give(another, sent.get(what, [slab, unsealed]))
        assert code == -3
        assert "cannot take the memory back" in why
        assert another.status()["spaces"] == []
    os.close(ordinary)
    os.close(unsealed)


def give(daemon: Daemon, descriptors: Sequence[int]) -> tuple[int, str]:
    """The reply's code and text."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(daemon.socket_path))
        socket.send_fds(connection, [request(RETURN, bank=HOST)], list(descriptors))
        reply = connection.recv(70000)
    return int(REPLY_HEAD.unpack_from(reply)[4]), reply[REPLY_BYTES:].decode()

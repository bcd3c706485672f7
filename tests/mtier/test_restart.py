"""Pages, sessions and promises survive the service, whenever it is killed."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from sglang_xmem.bank import BankSession
from sglang_xmem.mtier.client import JOIN, SLAB
from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import (
    INVALID_ARGUMENT,
    MIB,
    REPLY_HEAD,
    SUCCESS,
    ClientProcess,
    Daemon,
    request,
    wait_until,
)
from tests.mtier.test_bank_sessions import FRAME, MODEL, OTHER, fill, join_request, joined, key, view


@pytest.fixture
def daemon(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    daemon = start_daemon("--bank", f"host:{8 * MIB}")
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    return daemon


def test_pages_are_found_after_a_kill_with_the_bytes_that_they_had(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 40)
    fill(session, list(range(30)))
    private = session.claim(5)  # never published
    session.close()
    first = daemon.serving
    for _ in range(3):
        before = daemon.serving
        assert daemon.restart() != before
        again = BankSession(MODEL, FRAME, 40)
        adopted = again.adopt([key(number) for number in range(31)])
        assert [view(again, address)[-1] for address in adopted] == list(range(30))
        assert again.find([key(30)]) == 0
        again.close()
    status = daemon.status()
    assert (status["keeper"], status["restarts"]) == (daemon.process.pid, 3)
    assert first != status["pid"]
    (space,) = status["spaces"]
    assert (space["restored"], space["pages"], space["free"]) == (30, 30, 128 - 30)
    assert private.size == 5
    # All of it ends with the keeper: then the memory is free.
    daemon.stop(signal.SIGKILL)


def test_a_page_whose_key_is_damaged_is_not_found_by_the_next_service(daemon: Daemon) -> None:
    """The negative control: without the seals the service would find the page under the damaged key."""
    session = BankSession(MODEL, FRAME, 8)
    addresses = fill(session, [1, 2, 3])
    frame = int(addresses[1] - session.slab.address) // FRAME
    damaged = bytearray(key(2))
    damaged[5] ^= 1
    with Raw(daemon) as raw:
        at = raw.frame(frame) + 32
        assert raw.ledger[at : at + 32] == key(2)
        raw.ledger[at : at + 32] = damaged
        daemon.restart()
        found = BankSession(MODEL, FRAME, 8)
        assert [found.find([name]) for name in (key(1), key(2), bytes(damaged), key(3))] == [1, 0, 0, 1]
        found.close()
        raw.ledger[at : at + 32] = key(2)  # and it is the seal that it was found out by
        daemon.restart()
        found = BankSession(MODEL, FRAME, 8)
        assert found.find([key(1), key(2), key(3)]) == 3
        found.close()


class Raw:
    """A session over its own messages, with its ledger mapped."""

    def __init__(self, daemon: Daemon) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(20)
        self.connection.connect(str(daemon.socket_path))
        self.connection.send(request(JOIN) + join_request(0, FRAME, 1, MODEL, session=random.getrandbits(60) + 1))
        reply, (fd,), _, _ = socket.recv_fds(self.connection, 70000, 1)
        _, _, frames, offset, _, _, _ = struct.unpack_from("=iIQQQQQ", reply, REPLY_HEAD.size)
        assert REPLY_HEAD.unpack_from(reply)[4] == 0
        self.ledger = mmap.mmap(fd, 64 * (frames + 1), offset=offset)
        os.close(fd)

    def slab_blocks(self) -> int:
        """Blocks of 512 bytes that are present of the slab."""
        self.connection.send(request(SLAB))
        _, (fd,), _, _ = socket.recv_fds(self.connection, 70000, 1)
        blocks = os.fstat(fd).st_blocks
        os.close(fd)
        return blocks

    def frame(self, number: int) -> int:
        return 64 * (number + 1)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.ledger.close()


def test_what_was_forgotten_stays_so(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 8)
    addresses = fill(session, [1, 2])
    subprocess.run([daemon._program, "--flush", "--socket", str(daemon.socket_path)], check=True)
    again = fill(session, [2])
    daemon.restart()
    other = BankSession(MODEL, FRAME, 8)
    assert other.find([key(1)]) == 0
    (found,) = other.adopt([key(2)])
    assert found - other.slab.address == again[0] - session.slab.address
    assert addresses.size == 2
    other.close()


def test_sessions_their_pins_and_promises_are_there_again(daemon: Daemon) -> None:
    """Also of a session that never says anything to the new service: its process lives."""
    silent = BankSession(MODEL, FRAME, 100)
    addresses = fill(silent, list(range(60)))
    claimed = silent.claim(40)
    daemon.restart()
    other = BankSession(MODEL, FRAME, 28)
    assert other.claim(28).size == 28  # all that is not the first one's
    assert [view(silent, address)[7] for address in addresses] == list(range(60))
    with pytest.raises(RuntimeError, match="no 1 free frames"):
        other.claim(1)
    (space,) = daemon.status()["spaces"]
    assert sorted(each["frames"] for each in space["sessions"]) == [28, 100]
    silent.release(claimed)  # needs no service
    assert silent.claim(40).size == 40
    other.close()


def test_a_session_is_the_same_after_a_restart_and_another_one_after_two_ends(
    daemon: Daemon, start_daemon: StartDaemon
) -> None:
    asked, again = (join_request(0, FRAME, 8, MODEL, session=91, again=n) for n in (0, 1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        code, what = joined(connection, daemon, asked)
        assert code == 0
        daemon.restart()
        assert connection.recv(1) == b""  # it is notified
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        assert joined(connection, daemon, again) == (0, what)
    daemon.stop(signal.SIGKILL)  # the keeper: nothing survives that
    start_daemon("--bank", f"host:{8 * MIB}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        assert joined(connection, daemon, again)[0] == INVALID_ARGUMENT
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        code, other = joined(connection, daemon, asked)
        assert code == 0
        assert other[0] != what[0]


WORD = (1 << 64) - 1


def sum_of(memory: bytes, start: int) -> int:
    """As sum_of of native/pages.h."""
    for (word,) in struct.iter_unpack("=Q", memory):
        start = (start ^ word) * 0x9E3779B97F4A7C15 & WORD
        start ^= start >> 32
    return start


#: struct SpaceHead of native/space_record.h: places of its label and sum, and its magic number.
LABEL_AT, SUM_AT, MAGIC = 48, 272, 0x315345474150544D
#: Its sessions' lines: place of the first one, and in it those of quota and sum.
LINES_AT, QUOTA_AT, LINE_SUM_AT = 320, 8, 96


@pytest.mark.parametrize("what", ["no end", "a quote", "quota"])
def test_a_record_that_an_engine_overwrote_is_not_believed(what: str, daemon: Daemon) -> None:
    """Its descriptor reaches the service's record too. With a right sum, the text alone shows what it is."""
    session = BankSession(MODEL, FRAME, 8, "label")
    fill(session, [1])
    with control(daemon) as record:
        head = bytearray(record.read(SUM_AT))
        assert struct.unpack("=Q", record.read(8))[0] == sum_of(head, MAGIC)
        if what != "quota":
            head[LABEL_AT : LABEL_AT + 64] = b"x" * 64 if what == "no end" else b'a"'.ljust(64, b"\0")
            record.seek(0)
            record.write(head + struct.pack("=Q", sum_of(head, MAGIC)))
        else:
            record.seek(LINES_AT)
            line = bytearray(record.read(LINE_SUM_AT))
            assert struct.unpack("=Q", record.read(8))[0] == sum_of(line, 1) | 1
            line[QUOTA_AT : QUOTA_AT + 8] = struct.pack("=Q", 1 << 40)
            record.seek(LINES_AT)
            record.write(line + struct.pack("=Q", sum_of(line, 1) | 1))
    daemon.restart()
    spaces = daemon.status()["spaces"]
    assert len(spaces) == (what == "quota")
    assert [each for space in spaces for each in space["sessions"]] == []
    other = BankSession(MODEL, FRAME, 128, "label")
    assert other.find([key(1)]) == len(spaces)
    other.close()
    session.close()


def control(daemon: Daemon) -> BinaryIO:
    """The file of the only space's record."""
    for file in Path(f"/proc/{daemon.serving}/fd").iterdir():
        if "memfd:mtier-pages" in os.readlink(file):
            return file.open("r+b", buffering=0)
    raise AssertionError("there is none")


def test_who_ends_while_no_service_runs_leaves_nothing_behind(daemon: Daemon) -> None:
    keep = BankSession(MODEL, FRAME, 28)
    script = """
    import sys
    from tests.mtier.test_bank_sessions import *
    session = BankSession(MODEL, FRAME, 100)
    fill(session, list(range(30)))
    session.claim(70)
    print("ready", flush=True)
    sys.stdin.read()
    """
    engine = subprocess.Popen(
        [sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert engine.stdout is not None
    assert engine.stdout.readline() == b"ready\n"
    os.kill(daemon.process.pid, signal.SIGSTOP)  # so that none is started
    daemon.send(signal.SIGKILL)
    engine.kill()
    engine.wait(20)
    os.kill(daemon.process.pid, signal.SIGCONT)
    wait_until(lambda: daemon.serving != 0 and "sessions" in json.dumps(daemon.status()), 20)
    (space,) = daemon.status()["spaces"]
    assert [each["frames"] for each in space["sessions"]] == [28]
    assert (space["free"], space["cached"]) == (98, 30)
    assert keep.claim(28).size == 28


def test_slabs_of_several_models_and_private_ones(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = start_daemon("--bank", f"host:{8 * MIB}", "--bank", f"host:{16 * MIB}", "--share", "25")
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    one, two, alone = BankSession(MODEL, FRAME, 8), BankSession(OTHER, 2 * FRAME, 60), BankSession(None, FRAME, 4)
    fill(one, [1])
    fill(two, [2])
    before = sorted((space["bank"], space["frames"]) for space in daemon.status()["spaces"])
    banks = [bank["available"] for bank in daemon.status()["banks"]]
    daemon.restart()
    status = daemon.status()
    assert [bank["available"] for bank in status["banks"]] == banks
    assert sorted((space["bank"], space["frames"]) for space in status["spaces"]) == before
    assert sorted(space["restored"] for space in status["spaces"]) == [0, 1, 1]
    again = BankSession(OTHER, 2 * FRAME, 1)
    assert view(again, again.adopt([key(2)])[0])[0] == 2
    for session in (one, two, again, alone):
        session.close()


def test_grants_are_counted_on_after_a_restart(build: Path, daemon: Daemon) -> None:
    with ClientProcess(build, daemon.socket_path) as other:
        assert other.ask("lib.init()") == SUCCESS
        assert other.ask(f"lib.malloc(0, {4 * MIB})[0]") == SUCCESS
        daemon.restart()
        assert daemon.available() == 4 * MIB
        assert other.ask("lib.init()") == SUCCESS
        other.kill()
        wait_until(lambda: daemon.available() == 8 * MIB, 20)


def test_a_service_that_hangs_is_replaced(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(environment={"MTIER_SILENCE_MS": "1500"})
    before = daemon.serving
    daemon.send(signal.SIGSTOP)
    wait_until(lambda: daemon.serving not in (0, before), 60)
    assert daemon.status()["restarts"] == 1
    assert "was ended by signal 9 and is restarted" in daemon.log()


def test_a_service_that_cannot_start_again_is_not_tried_for_ever(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--bank", f"host:{8 * MIB}")
    with Raw(daemon):
        pass
    journal = Path(f"{daemon.socket_path}.ledger")
    journal.unlink()
    journal.with_name(journal.name + ".new").mkdir()  # it cannot be written
    daemon.send(signal.SIGKILL)
    assert daemon.process.wait(60) == 1
    assert "cannot be written" in daemon.log()
    assert "which is dropped now" in daemon.log()  # what it finds may be what ends it
    assert "at every start" in daemon.log()


def test_stop_while_it_rests_between_two_starts(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    for _ in range(3):
        daemon.send(signal.SIGKILL)
        wait_until(lambda: daemon.serving != 0, 20)
    daemon.send(signal.SIGKILL)
    assert daemon.stop() in (0, 1)
    assert not daemon.socket_path.exists()

"""Sessions of the page bank in several processes: who finds what, what the dead leave, what bad messages do."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_xmem import bank
from sglang_xmem.bank import HAVE, NEW, STALE, BankSession
from sglang_xmem.bank_link import JOIN_REQUEST, PAGES_VERSION
from sglang_xmem.config import parse_options
from sglang_xmem.errors import ConfigError, Unavailable, sentence
from sglang_xmem.mtier import client
from sglang_xmem.mtier.client import bank_info
from sglang_xmem.mtier.daemon import status_text
from sglang_xmem.plan import make_plan
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers.bank import BankRankPlan, BankSettings, BankTier
from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import (
    INVALID_ARGUMENT,
    MIB,
    NOT_INITIALIZED,
    REPLY_BYTES,
    REPLY_HEAD,
    AskedProcess,
    Daemon,
    request,
    wait_until,
)

FRAME = 64 << 10
MODEL, OTHER = b"m" * 32, b"o" * 32


def key(number: int) -> bytes:
    """Ends with a zero, as one key of 256 does."""
    return number.to_bytes(31, "big") + b"\0"


@pytest.fixture
def daemon(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    daemon = start_daemon("--bank", f"host:{8 * MIB}")
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    return daemon


def fill(session: BankSession, numbers: list[int]) -> Any:
    """Store and publish a page each, filled with its number; returns the frames' addresses."""
    addresses = session.claim(len(numbers))
    for number, address in zip(numbers, addresses, strict=True):
        view(session, address)[:] = number
    assert session.publish([key(number) for number in numbers], addresses) == [NEW] * len(numbers)
    return addresses


def view(session: BankSession, address: int) -> Any:
    start = int(address) - session.slab.address
    return np.frombuffer(session.slab.owner, np.uint8)[start : start + session.frame_bytes]


SCRIPT = """
import json, sys
from tests.mtier.test_bank_sessions import *
session = BankSession(MODEL, FRAME, {frames}, "other")
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Other(AskedProcess):
    """A session of MODEL in another process."""

    def __init__(self, frames: int) -> None:
        script = SCRIPT.format(frames=frames)
        variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        super().__init__(["-c", script], variables)
        assert self.read_line() == "ready\n"


def test_another_process_finds_pages_and_a_kill_leaves_them(daemon: Daemon) -> None:
    other = Other(40)
    try:
        assert other.ask("len(fill(session, list(range(20))))") == 20
        session = BankSession(MODEL, FRAME, 40)
        keys = [key(number) for number in range(25)]
        assert session.find(keys) == 20
        assert session.find(keys[1:]) == 19
        assert session.find([key(99), *keys]) == 0
        adopted = session.adopt(keys)
        assert [view(session, address)[-1] for address in adopted] == list(range(20))
        # Mine are theirs too, and what is there already stays.
        mine = session.claim(2)
        view(session, mine[1])[:] = 99
        assert session.publish([key(3), key(99)], mine) == [HAVE, NEW]
        assert other.ask("int(view(session, session.adopt([key(99)])[0])[7])") == 99
        # Unpublished pages and pins are dropped with the process.
        assert other.ask("session.claim(19).size") == 19
        (space,) = daemon.status()["spaces"]
        held = {each["pid"]: each["held"] for each in space["sessions"]}
        assert held == {os.getpid(): 22, other.process.pid: 40}
        assert (space["shared"], space["cached"], space["free"]) == (21, 0, 128 - 41)
        words = status_text(daemon.status())
        assert f"{other.process.pid}" in words
        assert "published pages" in words
        other.kill()
        wait_until(lambda: len(daemon.status()["spaces"][0]["sessions"]) == 1, 10)
        assert session.find(keys) == 20
        assert session.held() == 22
        session.close()
        # The pages stay even without sessions.
        assert daemon.status()["spaces"][0]["sessions"] == []
        again = BankSession(MODEL, FRAME, 40)
        assert [view(again, address)[0] for address in again.adopt(keys)] == list(range(20))
        again.close()
    finally:
        other.kill()


def test_a_frame_that_two_pages_hold_stays_until_both_are_freed(daemon: Daemon) -> None:
    """With one bit per session a second session would get the frame when the first of the pages is freed."""
    first, second = BankSession(MODEL, FRAME, 64), BankSession(MODEL, FRAME, 63)
    ((address,), (again,)) = fill(first, [7]), first.adopt([key(7)])
    assert address == again
    first.release(np.array([address]))
    claimed = second.claim(63)
    second.release(claimed[:1])
    got = [view(second, each).__setitem__(slice(None), 255) for each in second.claim(1)]
    assert len(got) == 1
    assert view(first, address)[0] == 7
    assert first.find([key(7)]) == 1
    first.release(np.array([address]))
    second.claim(0)
    for session in (first, second):
        session.close()


def test_least_recently_used_pages_go_first_and_those_in_use_never(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 128)
    addresses = fill(session, list(range(128)))
    session.touch(addresses[:3])
    session.release(addresses[3:])
    session.claim(60)
    assert session.find([key(number) for number in range(3)]) == 3
    kept = [number for number in range(3, 128) if session.find([key(number)])]
    assert len(kept) == 65
    session.release(addresses[:3])
    session.close()


def test_other_identities_share_nothing_and_frames_of_another_size_are_refused(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 8)
    fill(session, [1])
    with pytest.raises(Unavailable) as caught:
        BankSession(MODEL, 2 * FRAME, 8)
    assert f"{2 * FRAME}" in sentence(caught.value)
    # The first model uses the whole bank; the second one's engine gets an error with the fix.
    with pytest.raises(Unavailable, match="the bank has 0.00 GB") as caught:
        BankSession(OTHER, FRAME, 8)
    assert "--share" in sentence(caught.value)
    session.close()
    other = BankSession(OTHER, FRAME, 8)  # all sessions have ended: the pages are evicted
    assert other.find([key(1)]) == 0
    other.close()


def test_a_share_leaves_memory_for_other_models(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = start_daemon("--bank", f"host:{8 * MIB}", "--share", "50")
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    first, second = BankSession(MODEL, FRAME, 8), BankSession(OTHER, FRAME, 8)
    fill(first, [1])
    assert second.find([key(1)]) == 0
    assert [space["frames"] for space in daemon.status()["spaces"]] == [64, 64]
    first.close()
    second.close()


def test_what_is_free_is_reported_for_whom_it_is(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that one model's engines were not promised are free for engines of that model alone."""
    daemon = start_daemon("--bank", f"host:{8 * MIB}", "--metrics", "0")
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    session = BankSession(MODEL, FRAME, 28, "one")
    left = 100 * FRAME
    assert bank_info(client.HOST)[:5:2] == (1, left, 0)
    assert (bank_info(client.HOST, "one").available, bank_info(client.HOST, "another").available) == (left, 0)
    tiers = {name: BankTier(BankSettings(), BankRankPlan(left), None) for name in ("one", "another")}
    for name, tier in tiers.items():
        tier.share_as((), name)
    assert tiers["one"].capacity_bytes() == left
    with pytest.raises(Unavailable, match=r"0.00 GB for another, and 0.01 GB more for engines of another model") as no:
        tiers["another"].capacity_bytes()
    assert "--share" in sentence(no.value)
    status = daemon.status()
    assert status["open"] == [{"bank": 0, "bytes": 0}]
    assert status["spaces"][0]["promised"] == 28
    words = status_text(status)
    assert re.search(r"^ +0 +host +0.01 +0.01 +0.00 +0.00 ", words, re.MULTILINE)
    assert re.search(r"^one +0.01 +0.00 +0.01 +0.00 +0.00 +0.01$", words, re.MULTILINE)
    lines = metrics(daemon)
    assert 'mtierd_bank_open_bytes{bank="0"} 0' in lines
    assert f'mtierd_pages_capacity_bytes{{bank="0",model="one"}} {8 * MIB}' in lines
    assert f'mtierd_pages_promised_bytes{{bank="0",model="one"}} {28 * FRAME}' in lines
    # Unused pages are evicted for those of any model.
    fill(session, [1, 2])
    session.close()
    for label in ("", "one", "another"):
        assert bank_info(client.HOST, label)[:5:2] == (1, 8 * MIB, 8 * MIB)
    lines = metrics(daemon)
    assert f'mtierd_bank_open_bytes{{bank="0"}} {8 * MIB}' in lines
    assert 'mtierd_pages_findable{bank="0",model="one"} 2' in lines
    assert 'mtierd_pages_published_total{bank="0",model="one"} 2' in lines


def test_a_space_of_one_session_is_free_for_nobody_else(daemon: Daemon) -> None:
    session = BankSession(None, FRAME, 64, "one")
    assert bank_info(client.HOST, "one").available == bank_info(client.HOST).for_new == 4 * MIB
    session.close()
    assert bank_info(client.HOST).available == 8 * MIB


def metrics(daemon: Daemon) -> list[str]:
    port = int(daemon.log().split("http://127.0.0.1:")[1].split("/")[0])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode()).splitlines()


def test_addresses_that_are_no_frames_of_the_bank_are_nobodys(daemon: Daemon) -> None:
    """0 is what a page without a frame has. In a process of its own, which such an address once ended."""
    other = Other(8)
    try:
        beside = "np.array([0, session.slab.address - FRAME, session.slab.address + session.slab.nbytes], np.int64)"
        assert other.ask(f"session.owned({beside}).tolist()") == [False] * 3
        assert other.ask(f"[session.touch({beside}), session.release({beside}), session.held()]") == [None, None, 0]
        assert other.ask(f"session.publish([key(1)] * 3, {beside})") == [STALE] * 3
        assert other.ask(f"[session.damaged({beside}), session.reported(20)]") == [None, True]
        assert other.ask("session.claim(8).size") == 8
    finally:
        other.kill()


def test_evicted_pages_are_counted(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 128)
    session.release(fill(session, list(range(100))))
    session.claim(68)
    session.claim(20)
    session.close()
    (space,) = daemon.status()["spaces"]
    assert (space["evicted"], space["pages"]) == (60, 40)


def test_a_report_of_more_than_a_message_holds_is_whole_json(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon("--bank", f"host:{512 * MIB}", "--lazy")
    for number in range(1, 201):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(daemon.socket_path))
            asked = join_request(1, FRAME, 8, bytes(32), label=b"x" * 63, session=number)
            assert exchange(connection, request(33) + asked) == 0
    spaces = daemon.status()["spaces"]
    assert 50 < len(spaces) < 200
    assert all(len(space["sessions"]) == 1 for space in spaces)


def test_promises_are_kept_and_no_more_are_made(daemon: Daemon) -> None:
    first, second = BankSession(MODEL, FRAME, 100), BankSession(MODEL, FRAME, 28)
    with pytest.raises(Unavailable) as caught:
        BankSession(MODEL, FRAME, 1)
    assert "0.00 GB of the 0.01 GB" in sentence(caught.value)
    fill(first, list(range(100)))
    assert second.claim(28).size == 28
    with pytest.raises(RuntimeError, match="no 1 free frames"):
        second.claim(1)
    second.close()
    third = BankSession(MODEL, FRAME, 28)
    assert third.find([key(0)]) == 1
    first.close()
    third.close()


def test_a_service_that_is_killed_or_stopped_is_a_miss_in_time(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DEADLINE_S", 3.0)
    monkeypatch.setattr(client, "PAUSE_S", 0.2)
    session = BankSession(MODEL, FRAME, 8)
    addresses = fill(session, [1, 2])
    daemon.send(19)  # SIGSTOP
    begun = time.monotonic()
    assert session.find([key(1)]) == 0
    assert session.find([key(1)]) == 0  # not asked
    assert session.publish([key(3)], session.claim(1)) == [STALE]
    assert time.monotonic() - begun < 60
    daemon.send(18)  # SIGCONT
    wait_until(lambda: session.find([key(1)]) == 1, 5)  # the late answers are thrown away
    assert session.alive
    daemon.stop(9)
    assert session.find([key(1)]) == 0
    session.release(addresses)
    assert session.claim(5).size == 5
    session.close()
    with pytest.raises(Unavailable, match="no mtierd responds"):
        BankSession(MODEL, FRAME, 8)


@pytest.mark.parametrize("how", ["nobody", "a dead socket", "one that hangs"])
def test_an_engine_that_starts_without_a_service_says_so_or_takes_another_tier(
    how: str, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pools stay where they were put: a service that comes later serves engines that start later."""
    monkeypatch.setattr(client, "DEADLINE_S", 1.0)
    path = str(daemon.socket_path)
    if how == "nobody":
        path += " of nobody"
        monkeypatch.setenv("MTIER_SOCKET", path)
    elif how == "a dead socket":
        daemon.stop(signal.SIGKILL)
    else:
        daemon.send(signal.SIGSTOP)
    with pytest.raises(ConfigError) as caught:
        make_plan(parse_options(tier="bank"), Ranks((None,)), None, lambda nbytes: nbytes)
    why = "did not respond within 1 s" if how == "one that hangs" else f"no mtierd responds at {path}"
    assert why in str(caught.value)
    assert str(caught.value).startswith("--hicache-xmem-tier bank is unavailable: ")
    assert str(caught.value).endswith("Start `sglang-xmem mtierd --bank host:SIZE`.")
    assert str(caught.value).count(". ") == 1
    plan = make_plan(parse_options(), Ranks((None,)), None, lambda nbytes: nbytes)
    assert plan.candidates[0].tier == "dram"
    assert ("bank", True) in [(skipped.tier, why in skipped.reason) for skipped in plan.skipped]
    if how == "one that hangs":
        daemon.send(signal.SIGCONT)


def test_a_flush_hides_all_pages_and_takes_none(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 8)
    addresses = fill(session, [1])
    assert subprocess.run([daemon._program, "--flush", "--socket", str(daemon.socket_path)], check=True).returncode == 0
    assert session.find([key(1)]) == 0
    assert view(session, addresses[0])[5] == 1
    assert session.publish([key(1)], addresses) == [STALE]
    assert session.publish([key(1)], session.claim(1)) == [NEW]
    session.close()


def join_request(
    is_private: int, frame: int, frames: int, identity: bytes, *, label: bytes = b"x", session: int = 1, again: int = 0
) -> bytes:
    return JOIN_REQUEST.pack(PAGES_VERSION, is_private, frame, frames, identity, label, session, client.HOST, again, 0)


def exchange(connection: socket.socket, message: bytes) -> int:
    connection.send(message)
    reply, descriptors, _, _ = socket.recv_fds(connection, 70000, 4)
    for descriptor in descriptors:
        os.close(descriptor)
    assert len(reply) >= REPLY_BYTES
    return int(REPLY_HEAD.unpack_from(reply)[4])


def joined(connection: socket.socket, daemon: Daemon, asked: bytes) -> tuple[int, tuple[int, int, int, int]]:
    """A kJoin's code, and of a good one the epoch, number, frames and bytes."""
    connection.connect(str(daemon.socket_path))
    connection.send(request(33) + asked)
    reply, descriptors, _, _ = socket.recv_fds(connection, 70000, 4)
    for descriptor in descriptors:
        os.close(descriptor)
    number, _, frames, _, nbytes, _, epoch = struct.unpack_from("=iIQQQQQ", reply, REPLY_HEAD.size)
    return int(REPLY_HEAD.unpack_from(reply)[4]), (epoch, number, frames, nbytes)


def test_a_session_goes_on_over_another_connection(daemon: Daemon) -> None:
    asked, again = (join_request(0, FRAME, 8, MODEL, session=77, again=n) for n in (0, 1))
    unknown = join_request(0, FRAME, 8, MODEL, session=78, again=1)
    with ExitStack() as stack:
        first, other, second, third, fourth = (
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for _ in range(5)
        )
        code, what = joined(first, daemon, asked)
        assert code == 0
        assert what[0] != 0
        assert exchange(first, request(34)) == 0
        assert joined(other, daemon, unknown)[0] == INVALID_ARGUMENT
        first.close()
        # The same over a new connection, with or without `again`; the last one that asks has it.
        assert joined(second, daemon, again) == (0, what)
        assert exchange(second, request(35, size=1) + key(1)) == 0
        assert joined(third, daemon, asked) == (0, what)
        assert exchange(second, request(35, size=1) + key(1)) == NOT_INITIALIZED
        (space,) = daemon.status()["spaces"]
        assert [each["frames"] for each in space["sessions"]] == [8]
        # Another process with that number is refused.
        elsewhere = Other(1)
        try:
            elsewhere.ask("session.close()")
            assert elsewhere.ask(f"say_join({again!r}, {str(daemon.socket_path)!r})") == INVALID_ARGUMENT
            assert elsewhere.ask(f"say_join({asked!r}, {str(daemon.socket_path)!r})") == INVALID_ARGUMENT
        finally:
            elsewhere.kill()
        # What left is not there any more.
        assert exchange(third, request(37)) == 0
        assert joined(fourth, daemon, again)[0] == INVALID_ARGUMENT


def test_connections_that_were_given_up_take_no_session_away(daemon: Daemon) -> None:
    """The service, stopped or started again, finds them next to the one that the client waits on."""
    asked, again = (join_request(0, FRAME, 8, MODEL, session=77, again=n) for n in (0, 1))
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for _ in range(8)]
        first, *given_up, last = sockets
        assert joined(first, daemon, asked)[0] == 0
        before = sockets_of(daemon)
        daemon.send(signal.SIGSTOP)
        for each in (*given_up, last):
            each.connect(str(daemon.socket_path))
            each.send(request(33) + again)
            if each is not last:
                each.close()
        daemon.send(signal.SIGCONT)
        _, descriptors, _, _ = socket.recv_fds(last, 70000, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        wait_until(lambda: sockets_of(daemon) == before + 1, 10)
        assert exchange(last, request(35, size=1) + key(1)) == 0
        assert exchange(first, request(33) + again) == INVALID_ARGUMENT
        assert exchange(first, request(35, size=1) + key(1)) == NOT_INITIALIZED


def test_a_session_whose_connection_another_has_taken_joins_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_xmem.bank_link.RETRY_S", 0.1)
    session = BankSession(MODEL, FRAME, 8)
    fill(session, [1])
    again = join_request(0, FRAME, 8, MODEL, session=session._link._name, again=1)
    assert say_join(again, str(daemon.socket_path)) == 0
    assert session.find([key(1)]) == 1
    assert say_join(again, str(daemon.socket_path)) == 0
    session.close()
    wait_until(lambda: promised(daemon) == [], 10)


def sockets_of(daemon: Daemon) -> int:
    folder = Path(f"/proc/{daemon.serving}/fd")
    return sum(os.readlink(each).startswith("socket:") for each in folder.iterdir())


def say_join(asked: bytes, path: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        return exchange(connection, request(33) + asked)


def test_messages_that_are_not_so_are_refused(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 8)
    fill(session, [1])
    join, find, publish = 33, 35, 36
    good = join_request(0, FRAME, 8, MODEL)
    cases: list[Callable[[], bytes]] = [
        lambda: request(join) + good[:-1],
        lambda: request(join) + good + b"\0",
        lambda: request(join) + join_request(0, 0, 8, MODEL),
        lambda: request(join) + join_request(0, 255, 8, MODEL),  # its ledger would be as large as the bank
        lambda: request(join) + join_request(0, FRAME, 2**63, MODEL),
        lambda: request(join) + join_request(2, FRAME, 8, MODEL),
        lambda: request(join) + join_request(0, FRAME, 8, MODEL, label=b"x" * 64),
        lambda: request(join) + join_request(0, FRAME, 8, MODEL, session=0),
        lambda: request(join) + join_request(0, FRAME, 8, MODEL, session=5, again=2),
        lambda: request(1) + b"\0",
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(daemon.socket_path))
        assert exchange(connection, request(find)) == NOT_INITIALIZED
        for case in cases:
            assert exchange(connection, case()) == INVALID_ARGUMENT
        assert exchange(connection, request(join) + good) == 0
        for message in (
            request(99),
            request(join) + good,
            request(find, size=2) + key(1),
            request(find, size=2**60) + key(1),
            request(find, size=257) + key(1) * 257,
            request(publish, size=1) + key(1),
        ):
            assert exchange(connection, message) == INVALID_ARGUMENT
        # Frames that are not the session's, or are none: stale, and nothing happens.
        for frame in (0, 127, 128, 2**64 - 1):
            assert exchange(connection, request(publish, size=1) + key(5) + frame.to_bytes(8, "little") + bytes(8)) == 0
        generator = random.Random(1)
        for _ in range(2000):
            op, count = generator.choice((find, publish, 32, 34)), generator.randrange(0, 300)
            message = request(op, size=count) + generator.randbytes(generator.choice((0, 1, 32 * count, 48 * count)))
            if len(message) <= 40 + 256 * 48:
                exchange(connection, message)
    assert session.find([key(1)]) == 1
    assert session.find([key(5)]) == 0
    session.close()
    wait_until(lambda: len(daemon.status()["spaces"][0]["sessions"]) == 1, 5)  # this process's other one


def test_pages_behind_a_gap_can_be_looked_for(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 8)
    fill(session, [1, 4])
    assert session.publish([key(300)], session.claim(1)) == [NEW]
    assert session.look([key(number) for number in range(1, 320)]).nonzero()[0].tolist() == [0, 3, 299]
    assert session.look([]).size == 0
    session.close()
    assert not session.look([key(1)]).any()


def test_spaces_of_one_pool_take_their_parts_of_a_bank(daemon: Daemon) -> None:
    whole = 8 * MIB
    first = BankSession(MODEL, FRAME, 8, pool_bytes=16 * FRAME)
    second = BankSession(OTHER, FRAME, 8, pool_bytes=16 * FRAME)
    assert [space["frames"] for space in daemon.status()["spaces"]] == [whole // FRAME // 2] * 2
    first.close()
    second.close()


def test_a_session_finds_nothing_until_its_damaged_pages_are_known(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "DEADLINE_S", 3.0)
    monkeypatch.setattr(client, "PAUSE_S", 0.1)
    session, other = BankSession(MODEL, FRAME, 8), BankSession(MODEL, FRAME, 8)
    addresses = fill(session, [1, 2])
    daemon.send(19)  # SIGSTOP
    session.damaged(addresses[1:])
    assert not session.reported(0.5)
    daemon.send(18)  # SIGCONT
    assert not session.look([key(1)]).any()
    assert session.reported(20)
    wait_until(lambda: session.find([key(1), key(2)]) == 1, 10)
    assert other.find([key(1), key(2)]) == 1
    assert daemon.status()["spaces"][0]["damaged"] == 1
    # Those who hold the page keep it, and a new page of that key is another one.
    assert view(session, addresses[1])[0] == 2
    session.damaged(addresses[1:])
    assert session.reported(20)
    assert daemon.status()["spaces"][0]["damaged"] == 1
    for each in (session, other):
        each.close()


def test_a_service_without_the_memory_leaves_a_session_its_own_frames(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, start_daemon: StartDaemon
) -> None:
    monkeypatch.setattr("sglang_xmem.bank_link.RETRY_S", 0.1)
    session = BankSession(MODEL, FRAME, 8)
    addresses = fill(session, [1, 2])
    daemon.stop(9)
    assert session.find([key(1)]) == 0
    another = start_daemon("--bank", f"host:{4 * MIB}")  # too small for the space
    monkeypatch.setenv("MTIER_SOCKET", str(another.socket_path))
    time.sleep(0.2)
    assert session.find([key(1)]) == 0
    assert session.lost
    assert session.counts["bank_sessions:lost"] == 1
    assert session.publish([key(3)], session.claim(1)) == [STALE]
    assert view(session, addresses[0])[0] == 1
    assert another.status()["spaces"] == []
    session.close()


def test_a_session_goes_on_with_a_service_that_was_started_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_xmem.bank_link.RETRY_S", 0.1)
    session, other = BankSession(MODEL, FRAME, 40), Other(40)
    try:
        fill(session, [1, 2])
        own = session.claim(1)
        view(session, own[0])[:] = 3
        before = daemon.status()["pid"]
        daemon.send(9)
        addresses = session.claim(2)  # without a request
        assert session.find([key(1), key(2)]) == 2  # the same question, over a new connection
        assert daemon.status()["pid"] != before
        assert session.counts["bank_sessions:rejoined"] == 1
        assert session.publish([key(3)], own) == [NEW]
        wait_until(lambda: other.ask("len(session.adopt([key(1), key(2), key(3)]))") == 3, 20)
        assert other.ask("int(view(session, session.adopt([key(3)])[0])[9])") == 3
        assert session.owned(addresses).all()
        (space,) = daemon.status()["spaces"]
        assert {each["pid"]: each["held"] for each in space["sessions"]} == {os.getpid(): 5, other.process.pid: 3}
        # Unused memory is dropped with its process only.
        other.kill()
        wait_until(lambda: len(daemon.status()["spaces"][0]["sessions"]) == 1, 10)
    finally:
        other.kill()
        session.close()


def promised(daemon: Daemon) -> list[int]:
    """Frames of each session."""
    return [session["frames"] for space in daemon.status()["spaces"] for session in space["sessions"]]


def test_a_closed_session_has_no_promise_though_the_service_was_started_again(daemon: Daemon) -> None:
    session = BankSession(MODEL, FRAME, 100)
    fill(session, [1])
    daemon.restart()
    assert promised(daemon) == [100]
    session.close()
    assert promised(daemon) == []
    assert session.find([key(1)]) == 0
    assert promised(daemon) == []
    again = BankSession(MODEL, FRAME, 100)
    assert again.find([key(1)]) == 1
    again.close()


def test_a_session_that_is_closed_while_the_service_hangs_leaves_later(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_xmem.bank_link.RETRY_S", 0.1)
    monkeypatch.setattr(client, "DEADLINE_S", 1.0)
    monkeypatch.setattr(client, "PAUSE_S", 0.1)
    session = BankSession(MODEL, FRAME, 100)
    daemon.restart()
    daemon.send(signal.SIGSTOP)
    session.close()
    session.close()
    daemon.send(signal.SIGCONT)
    wait_until(lambda: promised(daemon) == [], 10)


def test_a_session_that_cannot_map_its_ledger_leaves_no_promise(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process continues with another tier."""
    monkeypatch.setattr(bank, "_library", lambda: SimpleNamespace(pages_open=lambda *_: None))
    with pytest.raises(Unavailable, match="cannot be mapped"):
        BankSession(MODEL, FRAME, 100)
    assert promised(daemon) == []


def test_a_session_whose_answer_came_too_late_leaves_no_promise(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_xmem.bank_link.RETRY_S", 0.1)
    monkeypatch.setattr(client, "PAUSE_S", 0.1)
    with monkeypatch.context() as short:
        short.setattr(client, "DEADLINE_S", 0.2)
        daemon.send(signal.SIGSTOP)
        with pytest.raises(Unavailable, match="did not respond within"):
            BankSession(MODEL, FRAME, 100)
    daemon.send(signal.SIGCONT)
    wait_until(lambda: re.search(r"process \d+ left ", daemon.log()) is not None, 10)
    assert promised(daemon) == []

"""The accounts of a host bank: what is mapped, or can be, is counted, whatever becomes of connections and processes."""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import (
    FAILURE,
    FREE,
    GRANULE,
    HELLO,
    INVALID_ARGUMENT,
    KEEP,
    MALLOC,
    MALLOC_ERROR,
    MIB,
    OUT_OF_MEMORY,
    REPLY_HEAD,
    RESET_ALL,
    SERVER_ERROR,
    SUCCESS,
    ClientProcess,
    Daemon,
    open_to_others,
    request,
    service_of,
    wait_until,
)

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run as another user or in another namespace")

KEEP_40 = f"[setattr(lib, 'p', lib.malloc(0, {40 * MIB})), lib.p[0]][1]"


class Raw:
    """A client that speaks the protocol by itself."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        self.socket.connect(str(path))

    def ask(self, op: int, size: int = 0, allocation: int = 0) -> tuple[int, int, list[int]]:
        """Code, allocation and descriptors of the answer."""
        self.socket.send(request(op, size=size, allocation=allocation))
        reply, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 17, 4)
        return REPLY_HEAD.unpack_from(reply)[4], int.from_bytes(reply[64:72], "little"), descriptors

    def malloc(self, size: int) -> tuple[int, int]:
        """Allocation and descriptor."""
        code, allocation, descriptors = self.ask(MALLOC, size)
        assert code == SUCCESS
        return allocation, descriptors[0]


@pytest.fixture
def raw(start_daemon: StartDaemon) -> Iterator[tuple[Daemon, Raw]]:
    daemon = start_daemon()
    client = Raw(daemon.socket_path)
    yield daemon, client
    client.socket.close()


# ---- memory that a client gave back and has ----


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_kept_after_free_stays_counted(raw: tuple[Daemon, Raw], mapped: bool) -> None:
    daemon, client = raw
    allocation, descriptor = client.malloc(8 * MIB)
    kept = mmap.mmap(descriptor, 8 * MIB) if mapped else None
    if kept is not None:
        os.close(descriptor)
    assert client.ask(FREE, allocation=allocation)[0] == SUCCESS
    assert client.ask(FREE, allocation=allocation)[0] == INVALID_ARGUMENT
    time.sleep(0.1)
    assert daemon.available() == 56 * MIB
    if kept is None:
        os.close(descriptor)
    else:
        kept.close()
    wait_until(lambda: daemon.available() == 64 * MIB, 2)


def test_what_a_dead_client_passed_on_stays_counted(start_daemon: StartDaemon) -> None:
    """And the connection that it passed on is none: a process could have the quotas of all of its children."""
    daemon = start_daemon()
    mine, child_s = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        client = Raw(daemon.socket_path)
        _, descriptor = client.malloc(8 * MIB)
        socket.send_fds(child_s, [b"."], [client.socket.fileno(), descriptor])
        os._exit(0)
    _, (connection, descriptor), _, _ = socket.recv_fds(mine, 1, 2)
    os.waitpid(pid, 0)
    with socket.socket(fileno=connection) as inherited:
        inherited.settimeout(5)
        assert inherited.recv(100) == b"", "the service has hung up"
    (client,) = daemon.status()["clients"]
    assert (client["pid"], client["bytes"], client["ended"]) == (pid, 8 * MIB, True)
    os.close(descriptor)
    wait_until(lambda: daemon.available() == 64 * MIB, 2)
    for end in (mine, child_s):
        end.close()


# ---- connections that end while their process lives ----


def test_a_stall_leaves_the_account(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with ClientProcess(build, daemon.socket_path, {"MTIER_TIMEOUT_MS": "500"}) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask(KEEP_40) == SUCCESS
        daemon.send(signal.SIGSTOP)
        assert client.ask("lib.bank(0)[0]") == SERVER_ERROR
        daemon.send(signal.SIGCONT)
        wait_until(lambda: daemon.status()["clients"][0]["connected"] is False, 2)
        assert daemon.available() == 24 * MIB
        with ClientProcess(build, daemon.socket_path) as other:
            assert other.ask("lib.init()") == SUCCESS
            assert other.ask(f"lib.malloc(0, {30 * MIB})[0]") == OUT_OF_MEMORY
        # It is the same client when it comes back, and can free what it has.
        wait_until(lambda: client.ask("lib.bank(0)[1].available_memory") == 24 * MIB, 10)
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        assert daemon.available() == 64 * MIB


def test_a_free_that_the_service_missed_is_made_up_for(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with ClientProcess(build, daemon.socket_path, {"MTIER_TIMEOUT_MS": "500"}) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask(KEEP_40) == SUCCESS
        daemon.send(signal.SIGSTOP)
        assert client.ask("lib.free(lib.p[1])") == SERVER_ERROR
        daemon.send(signal.SIGCONT)
        wait_until(lambda: client.ask("lib.bank(0)[1].available_memory") == 64 * MIB, 10)
        assert daemon.available() == 64 * MIB


def test_a_lease_is_its_process_s_alone(raw: tuple[Daemon, Raw]) -> None:
    daemon, client = raw
    _, lease, _ = client.ask(HELLO)
    allocation, descriptor = client.malloc(8 * MIB)
    assert client.ask(KEEP, allocation=allocation)[0] == SUCCESS
    pid = os.fork()
    if pid == 0:  # another process that knows the number
        thief = Raw(daemon.socket_path)
        given = thief.ask(HELLO, allocation=lease)[1]
        os._exit(0 if given != lease and thief.ask(FREE, allocation=allocation)[0] == INVALID_ARGUMENT else 1)
    assert os.waitpid(pid, 0)[1] == 0
    again = Raw(daemon.socket_path)
    assert again.ask(HELLO, allocation=lease)[1] == lease
    os.close(descriptor)
    assert again.ask(FREE, allocation=allocation)[0] == SUCCESS
    assert daemon.available() == 64 * MIB
    again.socket.close()


def test_reset_all_is_refused_unless_allowed(raw: tuple[Daemon, Raw]) -> None:
    daemon, client = raw
    _, descriptor = client.malloc(8 * MIB)
    client.socket.send(request(RESET_ALL))
    reply = client.socket.recv(1 << 17)
    assert REPLY_HEAD.unpack_from(reply)[4] == FAILURE
    assert b"--allow-reset" in reply
    assert daemon.available() == 56 * MIB
    os.close(descriptor)


# ---- services that end ----


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_leaves_the_accounts_of_those_who_live(
    build: Path, start_daemon: StartDaemon, number: signal.Signals
) -> None:
    daemon = start_daemon()
    with ClientProcess(build, daemon.socket_path) as one, ClientProcess(build, daemon.socket_path) as two:
        for client in (one, two):
            assert client.ask("lib.init()") == SUCCESS
            assert client.ask(f"[setattr(lib, 'p', lib.malloc(0, {16 * MIB})), lib.p[0]][1]") == SUCCESS
        daemon.stop(number)
        two.kill()
        with open(f"{daemon.socket_path}.ledger", "a", encoding="ascii") as ledger:
            ledger.write("+ 99 12 0 ho")  # a line that a kill cut off
        daemon = start_daemon()
        assert daemon.available() == 48 * MIB
        assert one.ask("lib.malloc(0, 1)[0]") == SUCCESS  # under its old lease
        (client,) = daemon.status()["clients"]
        assert (client["pid"], client["allocations"]) == (one.process.pid, 2)
        one.kill()
        wait_until(lambda: daemon.available() == 64 * MIB, 2)
    assert daemon.stop() == 0
    assert not Path(f"{daemon.socket_path}.ledger").exists()


# ---- clients that do not read ----


def test_a_client_has_one_unread_grant_at_a_time(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    deaf = [Raw(daemon.socket_path) for _ in range(3)]
    for client in deaf:
        for _ in range(20):
            client.socket.send(request(MALLOC, size=1))
    time.sleep(0.2)
    assert daemon.available() == 64 * MIB - 3 * GRANULE
    # Who reads gets the rest.
    for _ in range(20):
        reply, descriptors, _, _ = socket.recv_fds(deaf[0].socket, 1 << 17, 1)
        assert REPLY_HEAD.unpack_from(reply)[4] == SUCCESS
        os.close(descriptors[0])
    for client in deaf:
        client.socket.close()
    wait_until(lambda: daemon.available() == 64 * MIB, 2)


#: What a process imports while it may read where Python is installed.
BECOME_NOBODY = f"""
import os, socket, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.mtier.service import Library
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
"""
ASKING = """
lib = Library(sys.argv[1])
sys.stdin.readline()
print(lib.init(), lib.malloc(0, 1)[0], flush=True)
sys.stdin.readline()
print(lib.malloc(0, 1)[0], lib.error(), flush=True)
sys.stdin.readline()
print(lib.malloc(0, 1)[0], lib.bank(0)[1].available_memory, flush=True)
sys.stdin.read()
"""
UNREAD = """
sys.stdin.readline()
ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)]
with open(os.devnull) as file:
    for one, _ in ends:
        one.setblocking(False)
        try:
            for _ in range(100):
                socket.send_fds(one, [b"."], [file.fileno()] * 100)
        except OSError as error:
            print(error.errno, flush=True)
sys.stdin.read()
"""


@needs_root
def test_descriptors_that_others_leave_unread_cost_nobody_its_account(build: Path, tmp_path: Path) -> None:
    """The kernel counts them by the user. Root may have more, so all of this is another user's."""
    binaries = tmp_path / "bin"
    shutil.copytree(build, binaries)
    open_to_others(binaries)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    path = home / "mtierd.sock"
    started: list[subprocess.Popen[str]] = []
    try:

        def start(*command: str, uid: int | None = None) -> subprocess.Popen[str]:
            command = ("prlimit", "--nofile=900:900", *command)
            variables = {**os.environ, "MTIER_SOCKET": str(path)}
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, user=uid, env=variables))
            return started[-1]

        def next_line(process: subprocess.Popen[str]) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            print(file=process.stdin, flush=True)
            return process.stdout.readline()

        start(str(binaries / "mtierd"), "--bank", f"host:{64 * MIB}", uid=NOBODY)
        wait_until(path.exists, 10)
        client = start(sys.executable, "-c", BECOME_NOBODY + ASKING, str(binaries / "libmtier.so"))
        assert next_line(client) == "0 0\n"
        hoarder = start(sys.executable, "-c", BECOME_NOBODY + UNREAD)
        assert next_line(hoarder)
        answer = next_line(client)
        assert answer.startswith(f"{MALLOC_ERROR} "), answer
        assert "cannot be sent now" in answer
        hoarder.kill()
        hoarder.wait()
        assert next_line(client) == f"0 {60 * MIB}\n", "the account is unchanged, and still works"
    finally:
        for process in started:
            process.kill()
            process.wait()


# ---- who a client is ----


@needs_root
def test_clients_of_another_pid_namespace_have_quotas_of_their_own(build: Path, tmp_path: Path) -> None:
    path = tmp_path / "mtierd.sock"
    command = [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        str(build / "mtierd"),
        "--socket",
        str(path),
    ]
    service = subprocess.Popen([*command, "--bank", f"host:{64 * MIB}", "--quota", str(16 * MIB)])
    try:
        wait_until(path.exists, 10)
        with ClientProcess(build, path) as one, ClientProcess(build, path) as two:
            for client in (one, two):
                assert client.ask("lib.init()") == SUCCESS
                assert client.ask(f"lib.malloc(0, {16 * MIB})[0]") == SUCCESS
                assert client.ask("lib.malloc(0, 1)[0]") == OUT_OF_MEMORY
            one.kill()  # its end is seen too
            wait_until(lambda: two.ask("lib.bank(0)[1].total_memory") == 64 * MIB, 2)
            with ClientProcess(build, path) as three:
                assert three.ask("lib.init()") == SUCCESS
                wait_until(lambda: three.ask("lib.malloc(0, 1 << 20)[0]") == SUCCESS, 2)
                assert three.ask(f"lib.malloc(0, {14 * MIB})[0]") == SUCCESS
    finally:
        service.kill()
        service.wait(10)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are x86-64's")
@pytest.mark.parametrize("refused", ["55:77", "55:77,434"], ids=["no SO_PEERPIDFD", "nor pidfd_open"])
def test_kernels_without_pidfds(build: Path, tmp_path: Path, refused: str) -> None:
    """The process is found by its id, or not at all: a dead client's memory comes back by the file's lease then."""
    path = tmp_path / "mtierd.sock"
    command = [sys.executable, str(Path(__file__).with_name("old_kernel.py")), refused, str(build / "mtierd")]
    service = subprocess.Popen([*command, "--socket", str(path), "--bank", f"host:{64 * MIB}"])
    try:
        wait_until(path.exists, 10)
        with ClientProcess(build, path, {"MTIER_TIMEOUT_MS": "500"}) as one, ClientProcess(build, path) as two:
            for client in (one, two):
                assert client.ask("lib.init()") == SUCCESS
                assert client.ask(f"[setattr(lib, 'p', lib.malloc(0, {16 * MIB})), lib.p[0]][1]") == SUCCESS
            os.kill(service_of(service.pid), signal.SIGSTOP)
            assert one.ask("lib.bank(0)[0]") == SERVER_ERROR
            os.kill(service_of(service.pid), signal.SIGCONT)
            time.sleep(0.2)
            assert two.ask("lib.bank(0)[1].available_memory") == 32 * MIB
            wait_until(lambda: one.ask("lib.bank(0)[1].available_memory") == 32 * MIB, 10)
            one.kill()
            wait_until(lambda: two.ask("lib.bank(0)[1].available_memory") == 48 * MIB, 3)
    finally:
        service.kill()
        service.wait(10)


@pytest.mark.parametrize(("size", "words"), [(4096, "may shrink"), (64, "smaller than the grant")])
def test_an_impostor_s_file_is_not_mapped(build: Path, tmp_path: Path, size: int, words: str) -> None:
    """Who touched it would get SIGBUS: now, or once the impostor has cut it."""
    path = tmp_path / "impostor.sock"
    file = os.memfd_create("plain")
    os.ftruncate(file, size)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with ClientProcess(build, path) as client:
            assert client.process.stdin is not None
            client.process.stdin.write("[lib.init(), lib.malloc(0, 1)[0], lib.error()]\n")
            client.process.stdin.flush()
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                for op in (HELLO, MALLOC):
                    if op == MALLOC:
                        connection, _ = listener.accept()
                        _answer(connection, HELLO, file)
                    _answer(connection, op, file)
                connection.recv(1000)  # it gives the grant back
            assert client.process.stdout is not None
            answer = client.process.stdout.readline()
            assert answer.startswith(f"[0, {SERVER_ERROR}, "), answer
            assert words in answer
    os.close(file)


def _answer(connection: socket.socket, expected: int, file: int) -> None:
    _, version, op, number = REPLY_HEAD.unpack_from(connection.recv(1000).ljust(REPLY_HEAD.size, b"\0"))[:4]
    assert op == expected
    values = (0).to_bytes(4, "little") + (1).to_bytes(4, "little")  # banks, host file
    values += b"".join(value.to_bytes(8, "little") for value in (0, 0, 4096, 4096, 7))
    head = REPLY_HEAD.pack(0x5249544D, version, op, number, 0, 0)
    socket.send_fds(connection, [head + values], [file] if op == MALLOC else [])

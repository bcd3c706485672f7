"""mtierd and libmtier.so: every function and code, several clients, and every way to die."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mtier.conftest import StartDaemon
from tests.mtier.service import (
    BANK_STATUS,
    FREE,
    GRANULE,
    INVALID_ARGUMENT,
    MALLOC,
    MIB,
    NOT_INITIALIZED,
    OUT_OF_MEMORY,
    REPLY_HEAD,
    SERVER_ERROR,
    SERVICE_UNAVAILABLE,
    SUCCESS,
    ClientProcess,
    Daemon,
    Library,
    open_to_others,
    request,
    wait_until,
)

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run as another user")


@pytest.fixture
def lib(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library in this process, pointed at the test's socket."""
    monkeypatch.setenv("MTIER_SOCKET", str(tmp_path / "mtierd.sock"))
    return Library(str(build / "libmtier.so"))


def filled(byte: int, nbytes: int) -> str:
    """Expression that fills an allocation of a client process and says whether all of it reads back."""
    return f"(ctypes.memset(p, {byte}, {nbytes}), ctypes.string_at(p, {nbytes}) == bytes([{byte}]) * {nbytes})[1]"


def keep(bank: int, nbytes: int) -> str:
    """Expression that allocates in a client process and keeps the address as `lib.p`."""
    return f"[setattr(lib, 'p', lib.malloc({bank}, {nbytes})), lib.p[0]][1]"


# ---- functions and codes ----


def test_nothing_works_before_init(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with ClientProcess(build, daemon.socket_path) as client:
        for call in ("lib.status()[0]", "lib.bank(0)[0]", "lib.malloc(0, 1)[0]", "lib.free(1)", "lib.logs()[0]"):
            assert client.ask(call) == NOT_INITIALIZED
        assert client.ask("lib.reset_all()") == NOT_INITIALIZED
        assert "mTierInit" in client.ask("lib.error()")
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask("lib.status()[0]") == SUCCESS


def test_every_function(lib: Library, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--bank", f"host:{32 * MIB + 5}")
    assert lib.init() == SUCCESS
    assert lib.init() == SUCCESS
    code, status = lib.status()
    assert (code, status.status, status.num_banks, status.bank_size) == (SUCCESS, 0, 2, 32 * MIB)
    code, bank = lib.bank(1)
    assert (code, bank.bank_id, bank.total_memory, bank.available_memory) == (SUCCESS, 1, 32 * MIB, 32 * MIB)
    code, address = lib.malloc(1, 3 * MIB)
    assert code == SUCCESS
    assert address % GRANULE == 0

    assert ctypes.string_at(address, 3 * MIB) == bytes(3 * MIB)
    ctypes.memset(address, 7, 4 * MIB)  # whole granules are the client's
    assert lib.bank(1)[1].available_memory == 28 * MIB
    code, text = lib.logs()
    assert code == SUCCESS
    assert f"process {os.getpid()} has 4.19 MB of bank 1" in text
    assert daemon.log() == text
    code, text = lib.logs(100)
    assert code == SUCCESS
    assert text == "" or daemon.log().endswith(text)
    assert lib.free(address) == SUCCESS
    assert lib.bank(1)[1].available_memory == 32 * MIB
    assert lib.free(address) == INVALID_ARGUMENT
    assert "mTierFree" in lib.error()


@pytest.mark.parametrize(
    ("bank", "nbytes", "code", "words"),
    [
        (-1, 1, INVALID_ARGUMENT, "no bank -1"),
        (1, 1, INVALID_ARGUMENT, "no bank 1"),
        (1 << 30, 1, INVALID_ARGUMENT, "no bank"),
        (0, 0, INVALID_ARGUMENT, "0 bytes"),
        (0, 64 * MIB + 1, OUT_OF_MEMORY, "available"),
        (0, (1 << 64) - 1, OUT_OF_MEMORY, "available"),
        (0, 1 << 63, OUT_OF_MEMORY, "available"),
    ],
)
def test_malloc_refuses(lib: Library, start_daemon: StartDaemon, bank: int, nbytes: int, code: int, words: str) -> None:
    start_daemon()
    assert lib.init() == SUCCESS
    assert lib.malloc(bank, nbytes) == (code, 0)
    assert words in lib.error()
    assert lib.bank(0)[1].available_memory == 64 * MIB


def test_null_results_are_refused(lib: Library, start_daemon: StartDaemon) -> None:
    start_daemon()
    assert lib.init() == SUCCESS
    assert lib.c.mTierGetStatus(None) == INVALID_ARGUMENT
    assert lib.c.mTierGetBankStatus(0, None) == INVALID_ARGUMENT
    assert lib.c.mTierMalloc(0, 1, None) == INVALID_ARGUMENT
    assert lib.c.mTierGetLogs(None, 5, None) == INVALID_ARGUMENT
    assert lib.free(0) == INVALID_ARGUMENT
    assert lib.bank(3)[0] == INVALID_ARGUMENT


def test_reset_all_empties_the_banks_and_nobody_crashes(lib: Library, build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--allow-reset")
    assert lib.init() == SUCCESS
    _, mine = lib.malloc(0, 4 * MIB)
    with ClientProcess(build, daemon.socket_path) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask(keep(0, 4 * MIB)) == SUCCESS
        assert lib.reset_all() == SUCCESS
        assert daemon.available() == 64 * MIB
        # The client is not notified, and its mapping is still there.
        assert client.ask(filled(1, 4 * MIB).replace("(p,", "(lib.p[1],")) is True
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        assert lib.free(mine) == SUCCESS
    assert daemon.available() == 64 * MIB


def test_granularity(lib: Library, start_daemon: StartDaemon) -> None:
    start_daemon("--bank", f"host:{8 * MIB}", "--granularity", str(4 * MIB))
    assert lib.init() == SUCCESS
    code, address = lib.malloc(0, 1)
    assert code == SUCCESS
    assert address % (4 * MIB) == 0
    assert lib.bank(0)[1].available_memory == 4 * MIB
    assert lib.malloc(0, 4 * MIB + 1)[0] == OUT_OF_MEMORY
    assert lib.free(address) == SUCCESS


def test_no_fragmentation(lib: Library, start_daemon: StartDaemon) -> None:
    """Every second of many allocations is freed, and then one allocation uses all of the freed memory."""
    start_daemon()
    assert lib.init() == SUCCESS
    addresses = [lib.malloc(0, GRANULE)[1] for _ in range(32)]
    assert all(addresses)
    assert lib.malloc(0, 1)[0] == OUT_OF_MEMORY
    for address in addresses[::2]:
        assert lib.free(address) == SUCCESS
    code, large = lib.malloc(0, 32 * MIB)
    assert code == SUCCESS
    for address in [*addresses[1::2], large]:
        assert lib.free(address) == SUCCESS
    assert lib.bank(0)[1].available_memory == 64 * MIB


def test_quota_is_a_process_s_own_over_all_its_connections(
    lib: Library, build: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--quota", str(9 * MIB))
    assert lib.init() == SUCCESS
    assert lib.bank(0)[1].available_memory == 8 * MIB
    assert lib.malloc(0, 10 * MIB)[0] == OUT_OF_MEMORY
    assert "--quota" in lib.error()
    code, address = lib.malloc(0, 8 * MIB)
    assert code == SUCCESS
    assert lib.malloc(0, 1)[0] == OUT_OF_MEMORY
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(str(daemon.socket_path))
        other.send(request(MALLOC, size=1))
        assert REPLY_HEAD.unpack_from(other.recv(1 << 17))[4] == OUT_OF_MEMORY
    with ClientProcess(build, daemon.socket_path) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask("lib.malloc(0, 8 << 20)[0]") == SUCCESS
    assert lib.free(address) == SUCCESS


def test_threads_of_one_process(lib: Library, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert lib.init() == SUCCESS

    def churn(seed: int) -> int:
        for _ in range(50):
            code, address = lib.malloc(0, GRANULE)
            assert code == SUCCESS
            assert lib.bank(0)[0] == SUCCESS
            assert lib.free(address) == SUCCESS
        assert lib.malloc(seed + 1, 1)[0] == INVALID_ARGUMENT
        return f"no bank {seed + 1};" in lib.error()  # each thread has its own

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(churn, range(8)))
    assert daemon.available() == 64 * MIB


def test_two_clients_at_once(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with ClientProcess(build, daemon.socket_path) as one, ClientProcess(build, daemon.socket_path) as two:
        for client in (one, two):
            assert client.ask("lib.init()") == SUCCESS
            assert client.ask(keep(0, 16 * MIB)) == SUCCESS
        for byte, client in enumerate((one, two)):
            client.ask(f"ctypes.memset(lib.p[1], {byte + 1}, {16 * MIB})")
        for byte, client in enumerate((one, two)):
            assert client.ask(f"ctypes.string_at(lib.p[1], {16 * MIB}) == bytes([{byte + 1}]) * {16 * MIB}") is True
        found = {client["pid"]: client["bytes"] for client in daemon.status()["clients"]}
        assert found[one.process.pid] == found[two.process.pid] == 16 * MIB
        assert daemon.available() == 32 * MIB


def test_a_forked_child_has_nothing_of_its_parent(build: Path, start_daemon: StartDaemon) -> None:
    """Neither calls nor memory; else a child that lives on would keep a dead parent's memory."""
    daemon = start_daemon()
    fork_and_stay = "[pid := os.fork(), (os.dup2(2, 0), os.dup2(2, 1), time.sleep(60)) if pid == 0 else 0][0]"
    check = "[pid := os.fork(), os._exit(-lib.status()[0]) if pid == 0 else os.waitpid(pid, 0)[1] >> 8][1]"
    with ClientProcess(build, daemon.socket_path) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask(keep(0, 4 * MIB)) == SUCCESS
        assert client.ask(check) == -NOT_INITIALIZED
        assert client.ask("lib.status()[0]") == SUCCESS
        child = client.ask(fork_and_stay)
        try:
            client.kill()
            wait_until(lambda: daemon.available() == 64 * MIB, 1)
            # The pages themselves are gone from the child too.
            assert "memfd:mtier" not in Path(f"/proc/{child}/maps").read_text()
        finally:
            os.kill(child, signal.SIGKILL)


# ---- death ----


def test_a_killed_client_s_memory_is_back_within_a_second(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with ClientProcess(build, daemon.socket_path) as one, ClientProcess(build, daemon.socket_path) as two:
        for client in (one, two):
            assert client.ask("lib.init()") == SUCCESS
            assert client.ask(keep(0, 16 * MIB)) == SUCCESS
        one.kill()
        wait_until(lambda: daemon.available() == 48 * MIB, 1)
        assert two.ask("lib.malloc(0, 48 << 20)[0]") == SUCCESS
        assert two.ask("lib.status()[0]") == SUCCESS
    assert "are reclaimed" in daemon.log()


def test_a_killed_service_gives_errors_and_its_restart_is_clean(lib: Library, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert lib.init() == SUCCESS
    _, address = lib.malloc(0, 4 * MIB)
    _, second = lib.malloc(0, 4 * MIB)
    ctypes.memset(address, 9, 4 * MIB)
    daemon.stop(signal.SIGKILL)
    start = time.monotonic()
    assert lib.status()[0] == SERVICE_UNAVAILABLE
    assert lib.malloc(0, 1) == (SERVICE_UNAVAILABLE, 0)
    assert "sglang-xmem mtierd" in lib.error()
    assert lib.logs()[0] == lib.reset_all() == lib.init() == SERVICE_UNAVAILABLE
    assert time.monotonic() - start < 60
    assert ctypes.string_at(address, 4 * MIB) == bytes([9]) * (4 * MIB)  # what is mapped stays
    assert lib.free(address) == NOT_INITIALIZED  # the failed mTierInit above
    daemon = start_daemon()  # over the dead one's socket
    assert lib.init() == SUCCESS
    assert daemon.available() == 56 * MIB, "mapped memory is not granted again"
    assert lib.malloc(0, 57 * MIB)[0] == OUT_OF_MEMORY
    assert lib.free(address) == SUCCESS
    assert daemon.available() == 60 * MIB
    assert lib.free(second) == SUCCESS
    assert lib.free(second) == INVALID_ARGUMENT
    assert lib.malloc(0, 64 * MIB)[0] == SUCCESS


def test_calls_find_a_restarted_service_by_themselves(lib: Library, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert lib.init() == SUCCESS
    _, address = lib.malloc(0, 4 * MIB)
    assert daemon.stop() == 0
    start_daemon("--bank", f"host:{8 * MIB}")
    assert lib.bank(0)[1].total_memory == 8 * MIB
    assert lib.malloc(0, 8 * MIB)[0] == OUT_OF_MEMORY  # the old service's memory is still here
    code, other = lib.malloc(0, 4 * MIB)
    assert code == SUCCESS
    assert lib.free(address) == SUCCESS
    assert lib.bank(0)[1].available_memory == 4 * MIB
    assert lib.free(other) == SUCCESS


def test_a_stopped_service_is_an_error_in_time(
    lib: Library, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon()
    assert lib.init() == SUCCESS
    monkeypatch.setenv("MTIER_TIMEOUT_MS", "300")
    daemon.send(signal.SIGSTOP)
    start = time.monotonic()
    assert lib.status()[0] == SERVER_ERROR
    assert "in time" in lib.error()
    assert lib.malloc(0, 1)[0] == SERVER_ERROR
    assert time.monotonic() - start < 60
    daemon.send(signal.SIGCONT)
    wait_until(lambda: lib.status()[0] == SUCCESS, 5)
    assert lib.bank(0)[1].available_memory == 64 * MIB  # the abandoned malloc has been undone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_graceful_stop_leaves_nothing(start_daemon: StartDaemon, tmp_path: Path, number: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, which processes inherit
    daemon = start_daemon()
    signal.signal(signal.SIGHUP, before)
    assert daemon.socket_path.exists()
    assert daemon.stop(number) == 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".log"] == []


def test_a_stderr_that_nobody_reads_holds_up_nobody(lib: Library, build: Path, tmp_path: Path) -> None:
    """A line of the log would wait for ever in a pipe that is full."""
    socket_path = tmp_path / "mtierd.sock"
    unread, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, b"." * 4096)
    os.set_blocking(full, True)
    command = [str(build / "mtierd"), "--socket", str(socket_path), "--bank", f"host:{64 * MIB}"]
    process = subprocess.Popen(command, stderr=full)
    try:
        wait_until(socket_path.exists, 20)
        assert lib.init() == SUCCESS
        code, address = lib.malloc(0, GRANULE)
        assert code == SUCCESS
        assert lib.free(address) == SUCCESS
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(unread)
        os.close(full)


# ---- who may connect, and where ----


def test_one_service_a_socket(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with Daemon(build, daemon.socket_path, ["--bank", f"host:{8 * MIB}"]) as second:
        assert second.process.wait(10) == 1
        assert second.log().strip() == (
            f"mtierd: another mtierd serves {daemon.socket_path}; stop it, or give another --socket."
        )
    assert daemon.available() == 64 * MIB


def test_something_else_at_the_socket_s_path_stays(build: Path, tmp_path: Path) -> None:
    path = tmp_path / "mtierd.sock"
    path.write_text("precious")
    with Daemon(build, path, ["--bank", f"host:{8 * MIB}"]) as daemon:
        assert daemon.process.wait(10) == 1
        assert "is not a socket" in daemon.log()
    assert path.read_text() == "precious"


def test_the_socket_is_its_owner_s_alone(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert stat.S_IMODE(daemon.socket_path.stat().st_mode) == 0o600


@needs_root
def test_another_user_is_refused(build: Path, start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    open_to_others(tmp_path)
    connect = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "try:\n"
        "    s.connect(sys.argv[1]); print(s.recv(9))\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
    )

    def answer() -> str:
        command = [sys.executable, "-I", "-c", connect, str(daemon.socket_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert answer() == "PermissionError\n"
    daemon.socket_path.chmod(0o666)
    assert answer() in ("b''\n", "ConnectionResetError\n")
    assert "refused process" in daemon.log()
    assert daemon.available() == 64 * MIB


@needs_root
def test_a_stranger_s_service_is_refused(lib: Library, build: Path, start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Root may open every user's socket; the library checks its owner."""
    tmp_path.chmod(0o777)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        path = str(tmp_path / "mtierd.sock")
        pid = os.fork()
        if pid == 0:
            os.setuid(NOBODY)
            listener.bind(path)
            listener.listen()
            time.sleep(60)
            os._exit(0)
        try:
            wait_until(lambda: lib.init() == SERVICE_UNAVAILABLE and f"user {NOBODY}" in lib.error(), 10)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


# ---- hostile clients; see test_fuzz for random ones ----


def test_a_client_that_never_reads_holds_up_nobody(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf:
        deaf.connect(str(daemon.socket_path))
        deaf.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 100_000:
                deaf.send(request(MALLOC, size=1))
                sent += 1
        assert 0 < sent < 100_000
        start = time.monotonic()
        daemon.status()
        assert time.monotonic() - start < 60
        descriptors = len(os.listdir(f"/proc/{daemon.serving}/fd"))
        assert descriptors < 40
    wait_until(lambda: daemon.available() == 64 * MIB, 1)


def test_descriptors_that_a_client_sends_are_not_kept(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client, open(os.devnull, "rb") as file:
        client.connect(str(daemon.socket_path))
        counts = []
        for _ in range(50):
            socket.send_fds(client, [request(BANK_STATUS)], [file.fileno()] * 4)
            assert REPLY_HEAD.unpack_from(client.recv(1 << 17))[4] == SUCCESS
            counts.append(len(os.listdir(f"/proc/{daemon.serving}/fd")))
        # A few come and go: those of the last message, and an earlier connection's. 200 were sent.
        assert counts[-1] < counts[0] + 8


def test_a_client_cannot_touch_another_s_memory(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as two,
    ):
        for client in (one, two):
            client.connect(str(daemon.socket_path))
        one.send(request(MALLOC, size=GRANULE))
        reply, descriptors, _, _ = socket.recv_fds(one, 1 << 17, 1)
        allocation = int.from_bytes(reply[-8:], "little")
        # Sealed: it neither grows past what was granted nor shrinks under who maps it.
        for size in (0, 2 * GRANULE):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptors[0], size)
        os.close(descriptors[0])
        two.send(request(FREE, allocation=allocation))
        assert REPLY_HEAD.unpack_from(two.recv(1 << 17))[4] == INVALID_ARGUMENT
        assert daemon.available() == 64 * MIB - GRANULE
        one.send(request(FREE, allocation=allocation))
        assert REPLY_HEAD.unpack_from(one.recv(1 << 17))[4] == SUCCESS


def test_one_process_s_connections_are_few_and_leave_the_others_theirs(lib: Library, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    script = (
        "import socket, sys\n"
        "clients = []\n"
        "for _ in range(300):\n"
        "    clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))\n"
        "    clients[-1].connect(sys.argv[1])\n"
        "print(clients[-1].recv(1000)[72:].decode(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(daemon.socket_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        assert crowd.stdout is not None
        answer = crowd.stdout.readline()
        assert f"mtierd accepts no more connections: process {crowd.pid} has 16 connections" in answer
        assert lib.init() == SUCCESS
        assert lib.malloc(0, GRANULE)[0] == SUCCESS
        assert daemon.available() == 62 * MIB
        # 284 refusals are fewer lines, and do not flood the log.
        assert daemon.log().count("refused a connection") <= 51
        crowd.communicate("")

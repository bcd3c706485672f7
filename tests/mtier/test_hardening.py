"""mtierd against its surroundings: full pipes, limits, containers, cleaned folders, systemd, and its metrics."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import (
    GRANULE,
    MALLOC_ERROR,
    MIB,
    OUT_OF_MEMORY,
    SUCCESS,
    ClientProcess,
    Daemon,
    open_to_others,
    service_of,
    wait_until,
)

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def serve(build: Path, path: Path, *arguments: str, **more: object) -> subprocess.Popen[bytes]:
    command = [str(build / "mtierd"), "--socket", str(path), *(arguments or ("--bank", f"host:{64 * MIB}"))]
    process: subprocess.Popen[bytes] = subprocess.Popen(command, **more)  # type: ignore[call-overload]
    wait_until(lambda: path.exists() or process.poll() is not None, 10)
    return process


# ---- what ends a process ----


def test_a_log_that_nobody_reads_any_more_ends_nothing(build: Path, tmp_path: Path) -> None:
    path = tmp_path / "mtierd.sock"
    # Python leaves SIGPIPE ignored in what it starts, unless it is asked not to.
    process = serve(build, path, stderr=subprocess.PIPE, restore_signals=True)
    assert process.stderr is not None
    process.stderr.close()
    try:
        with ClientProcess(build, path) as client:
            assert client.ask("lib.init()") == SUCCESS
            assert client.ask("[lib.malloc(0, 1)[0] for _ in range(3)]") == [SUCCESS] * 3
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_a_limit_of_file_sizes_is_an_allocation_s_error(build: Path, tmp_path: Path) -> None:
    path = tmp_path / "mtierd.sock"
    process = serve(build, path, stderr=subprocess.DEVNULL, restore_signals=True)
    resource.prlimit(service_of(process.pid), resource.RLIMIT_FSIZE, (MIB, MIB))
    try:
        with ClientProcess(build, path) as client:
            assert client.ask("lib.init()") == SUCCESS
            assert client.ask("lib.malloc(0, 1)[0]") == MALLOC_ERROR
            assert "File too large" in client.ask("lib.error()")
            assert client.ask("lib.bank(0)[1].available_memory") == 64 * MIB
    finally:
        process.terminate()
        assert process.wait(10) == 0


# ---- memory that is not there ----


@pytest.fixture
def small_container() -> Iterator[Path]:
    """A memory cgroup (v1) of 96 MiB."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
    folder = Path(f"/sys/fs/cgroup/memory{own[0] if own else ''}") / f"mtier-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(96 * MIB))
    except OSError:
        pytest.skip("needs a memory cgroup of version 1 that can be changed")
    yield folder
    with contextlib.suppress(OSError):
        folder.rmdir()


def test_memory_that_a_container_lacks_is_an_error_and_not_a_kill(
    build: Path, start_daemon: StartDaemon, small_container: Path
) -> None:
    daemon = start_daemon("--bank", f"host:{512 * MIB}")
    with ClientProcess(build, daemon.socket_path) as client:
        (small_container / "cgroup.procs").write_text(str(client.process.pid))
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask(f"lib.malloc(0, {256 * MIB})[0]") == MALLOC_ERROR
        assert "raise the container's limit" in client.ask("lib.error()")
        assert daemon.available() == 512 * MIB
        assert client.ask(f"lib.malloc(0, {32 * MIB})[0]") == SUCCESS
    wait_until(lambda: daemon.available() == 512 * MIB, 2)


def test_a_bank_larger_than_its_container_is_refused(build: Path, tmp_path: Path, small_container: Path) -> None:
    enter = f"echo $$ > {small_container}/cgroup.procs; exec {build}/mtierd --socket {tmp_path}/s --bank host:{{}}"
    for size in (97 * MIB, 1 << 59):
        done = subprocess.run(["sh", "-c", enter.format(size)], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 1
        assert "do not fit into the 100.66 MB of memory" in done.stderr


# ---- sockets, locks and folders ----


def test_a_lock_that_was_cleaned_away_lets_no_second_service_in(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    os.unlink(f"{daemon.socket_path}.lock")
    with Daemon(build, daemon.socket_path, ["--bank", f"host:{8 * MIB}"]) as second:
        assert second.process.wait(10) == 1
        assert "another mtierd serves" in second.log()
    assert daemon.available() == 64 * MIB


def test_a_service_removes_no_other_s_socket(build: Path, start_daemon: StartDaemon) -> None:
    first = start_daemon()
    os.unlink(f"{first.socket_path}.lock")
    os.unlink(first.socket_path)
    second = start_daemon("--bank", f"host:{8 * MIB}")
    assert first.stop() == 0
    assert second.available() == 8 * MIB
    assert Path(f"{second.socket_path}.lock").exists()


def default_socket(build: Path, **environment: str) -> str:
    """Where a client looks for the service without MTIER_SOCKET."""
    variables = {key: value for key, value in os.environ.items() if key not in ("MTIER_SOCKET", "XDG_RUNTIME_DIR")}
    command = [str(build / "mtierd"), "--status"]
    done = subprocess.run(command, capture_output=True, text=True, env={**variables, **environment}, check=False)
    return done.stderr.split("responds at ")[1].split(" (")[0]


def test_the_default_socket_is_in_a_folder_of_the_user_s_alone(build: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert default_socket(build, XDG_RUNTIME_DIR=str(tmp_path)) == f"{tmp_path}/mtierd.sock"
    tmp_path.chmod(0o777)
    uid = os.geteuid()
    fallbacks = (f"/run/user/{uid}/mtierd.sock", f"/tmp/mtierd-{uid}/mtierd.sock")
    assert default_socket(build, XDG_RUNTIME_DIR=str(tmp_path)) in fallbacks
    assert default_socket(build) in fallbacks


@needs_root
def test_another_user_s_folder_in_its_place_is_refused(build: Path, tmp_path: Path) -> None:
    folder = Path(f"/tmp/mtierd-{NOBODY}")
    binaries = tmp_path / "bin"
    shutil.copytree(build, binaries)
    open_to_others(binaries)
    folder.mkdir()  # root's
    try:
        command = [str(binaries / "mtierd"), "--bank", f"host:{8 * MIB}", "--socket", f"{folder}/mtierd.sock"]
        done = subprocess.run(command, capture_output=True, text=True, user=NOBODY, timeout=20, check=False)
    finally:
        folder.rmdir()
    assert done.returncode == 1
    assert "belongs to another user" in done.stderr


# ---- connections and log ----


def test_who_holds_nothing_keeps_no_connection(build: Path, start_daemon: StartDaemon) -> None:
    """A launcher asks what there is, and lives as long as its server."""
    daemon = start_daemon()

    def n_connections() -> int:
        folder = Path(f"/proc/{daemon.serving}/fd")
        return sum("socket:" in os.readlink(each) for each in folder.iterdir())

    before = n_connections()
    with ClientProcess(build, daemon.socket_path) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask("lib.bank(0)[1].available_memory") == 64 * MIB
        wait_until(lambda: n_connections() == before, 2)
        assert client.ask("[setattr(lib, 'p', lib.malloc(0, 1)), lib.p[0]][1]") == SUCCESS
        assert n_connections() == before + 1
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        wait_until(lambda: n_connections() == before, 2)


def test_log_lines_of_one_kind_are_limited(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with ClientProcess(build, daemon.socket_path) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask("[lib.free(lib.malloc(0, 1)[1]) for _ in range(500)] == [0] * 500") is True
        assert client.ask("lib.malloc(0, 1 << 40)[0]") == OUT_OF_MEMORY
    lines = daemon.log().splitlines()
    assert 50 <= sum("MB of bank 0" in line for line in lines) < 200
    assert "refused process" in lines[-1]


# ---- who watches ----


def test_systemd_hears_when_it_is_ready_and_that_it_lives(
    build: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(10)
        daemon = start_daemon(environment={"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "200000"})
        assert systemd.recv(100) == b"READY=1"
        assert daemon.socket_path.exists()
        assert [systemd.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        daemon.process.send_signal(signal.SIGTERM)
        said = [systemd.recv(100)]
        while said[-1] == b"WATCHDOG=1":
            said.append(systemd.recv(100))
        assert said[-1] == b"STOPPING=1"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "mtierd.service").read_text().replace("%h/venv/bin/sglang-xmem", sys.executable)
    unit = tmp_path / "mtierd.service"
    unit.write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "mtierd.service" not in done.stderr, done.stderr


def fetch(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_metrics(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--bank", f"host:{32 * MIB}", "--metrics", "0")
    port = int(daemon.log().split("http://127.0.0.1:")[1].split("/")[0])
    with ClientProcess(build, daemon.socket_path) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask("lib.malloc(1, 1)[0]") == SUCCESS
        assert client.ask(f"lib.malloc(1, {32 * MIB})[0]") == OUT_OF_MEMORY
        with socket.create_connection(("127.0.0.1", port)) as slow:  # a silent client blocks no other
            lines = fetch(port).splitlines()
            slow.send(b"GET /met")
            assert fetch(port).splitlines() == lines
    for name, value in (
        ("bank_capacity_bytes", 32 * MIB),
        ("bank_used_bytes", GRANULE),
        ("bank_allocations", 1),
        ("grants_total", 1),
        ("refusals_total", 1),
        ("failures_total", 0),
    ):
        assert f'mtierd_{name}{{bank="1",kind="host"}} {value}' in lines
    assert "mtierd_clients 1" in lines
    assert "# TYPE mtierd_grants_total counter" in lines
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(port, "/")
    # Another that wants the port has to take another.
    with Daemon(
        build, daemon.socket_path.with_name("other"), ["--bank", "host:9999999", "--metrics", str(port)]
    ) as other:
        assert other.process.wait(10) == 1
        assert "give another port" in other.log()


def test_a_release_takes_no_other_library_for_the_driver(build: Path) -> None:
    from sglang_xmem.mtier.build import built

    released = built()
    for name in ("mtierd", "libmtier.so"):
        assert b"MTIER_CUDA_LIBRARY" in (build / name).read_bytes()
        assert b"MTIER_CUDA_LIBRARY" not in (released / name).read_bytes()

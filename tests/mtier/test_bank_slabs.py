"""Memory of the page bank: GPU memory over a fake driver, and host memory that is present before an engine comes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem.bank import BankSession
from sglang_xmem.mtier.client import HOST, bank_info
from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, AskedProcess, ClientProcess, Daemon, wait_until
from tests.mtier.test_bank_sessions import FRAME, MODEL
from tests.mtier.test_gpu_banks import Machine, machine
from tests.mtier.test_hardening import small_container
from tests.mtier.test_restart import Raw

__all__ = ["machine", "small_container"]  # fixtures

ENGINE = """
import ctypes, json, sys
import numpy as np
from sglang_xmem.bank import BankSession, NEW
from sglang_xmem.errors import sentence
from sglang_xmem.mtier.client import GPU, HOST, bank_info
cuda = ctypes.CDLL({driver!r})
MODEL, FRAME = b"m" * 32, {frame}
def key(number): return number.to_bytes(32, "big")
def write(address, byte): ctypes.memset(int(address), byte, FRAME)
def read(address): return sorted(set(ctypes.string_at(int(address), FRAME)))
def store(session, numbers):
    addresses = session.claim(len(numbers))
    for number, address in zip(numbers, addresses): write(address, number)
    return session.publish([key(number) for number in numbers], addresses)
def join(kind=GPU, frames=8, identity=MODEL):
    global session
    try:
        session = BankSession(identity, FRAME, frames, kind=kind)
    except Exception as error:
        return str(error)
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Engine(AskedProcess):
    """A process with a session of its own, over the fake driver."""

    def __init__(self, machine: Machine, gpu: str = "0", **more: str) -> None:
        script = ENGINE.format(driver=str(machine.driver["MTIER_CUDA_LIBRARY"]), frame=FRAME)
        environment = {
            **os.environ,
            **machine.driver,
            "FAKE_CUDA_CONTEXT": gpu,
            "FAKE_CUDA_FAULT": str(machine._faults["client"]),
            "MTIER_SOCKET": str(machine.daemon.socket_path),
            "SGLANG_XMEM_MTIER_DIR": str(machine.build),
            "PYTHONPATH": str(REPOSITORY),
            **more,
        }
        super().__init__(["-c", script], environment)


def test_pages_in_a_gpu_are_shared_and_outlast_engine_and_service(machine: Machine) -> None:
    daemon = machine.start(f"host:{8 * MIB}", f"gpu:1:{16 * MIB}")
    with Engine(machine) as one, Engine(machine) as two:
        assert one.ask("bank_info(GPU)") == [1, 16 * MIB, 16 * MIB, 2 * MIB, 16 * MIB]
        assert one.ask("join()") is None
        assert one.ask("read(session.claim(1)[0])") == [0]  # no data of the previous owner
        assert one.ask("store(session, [1, 2, 3])") == [0, 0, 0]
        assert two.ask("join()") is None
        assert two.ask("[read(address) for address in session.adopt([key(n) for n in (1, 2, 3, 4)])]") == [
            [1],
            [2],
            [3],
        ]
        (space,) = daemon.status()["spaces"]
        assert (space["bank"], space["shared"]) == (1, 3)
        one.process.kill()
        one.process.wait(20)
        before = machine.contexts(1)
        for _ in range(2):
            daemon.restart()
            wait_until(lambda: two.ask("session.find([key(2)])") == 1, 20)  # it has joined again
            assert two.ask("read(session.adopt([key(2)])[0])") == [2]
            with Engine(machine) as three:
                assert three.ask("join()") is None
                assert three.ask("[read(address) for address in session.adopt([key(1), key(3)])]") == [[1], [3]]
        # The GPU does not rest while engines use its memory. A killed service's context went with it.
        wait_until(lambda: machine.contexts(1) == before + 2, 20)
        assert daemon.available(1) == 0
    # The pages stay even without sessions.
    with Engine(machine) as last:
        assert last.ask("join(frames=8)") is None
        assert last.ask("session.find([key(1)])") == 1


def test_a_gpu_s_memory_comes_back_from_an_engine(machine: Machine) -> None:
    """The keeper ended too: the driver's memory is where a process has it mapped, or a descriptor of it."""
    banks = (f"host:{8 * MIB}", f"gpu:1:{16 * MIB}")
    daemon = machine.start(*banks)
    with Engine(machine) as one:
        assert one.ask("join()") is None
        assert one.ask("store(session, [1, 2])") == [0, 0]
        daemon.stop(signal.SIGKILL)
        daemon = machine.start(*banks)
        wait_until(lambda: bool(daemon.status()["spaces"]), 20)
        assert daemon.available(1) == 0
        with Engine(machine) as two:
            assert two.ask("join()") is None
            assert two.ask("[read(address) for address in session.adopt([key(1), key(2)])]") == [[1], [2]]


def test_a_bank_of_the_other_kind_and_no_context_are_one_sentence(machine: Machine) -> None:
    machine.start(f"host:{8 * MIB}", f"gpu:1:{16 * MIB}")
    with Engine(machine, "") as without:
        assert "no CUDA context" in without.ask("join(GPU)")
    with Engine(machine) as one, Engine(machine) as two:
        assert one.ask("join(GPU)") is None
        assert "another kind of the service's memory" in two.ask("join(HOST)")


@pytest.mark.parametrize(
    "call", ["cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]
)
def test_a_call_that_fails_in_the_engine_leaves_nothing(machine: Machine, call: str) -> None:
    daemon = machine.start(f"gpu:1:{16 * MIB}")
    with Engine(machine) as one:
        machine.fail("client", call, 999)
        assert call in one.ask("join()")
        assert one.ask("[cuda.fake_cuda_live(i) for i in range(3)]") == [0, 0, 0]
        assert daemon.status()["spaces"][0]["sessions"] == []
        machine.heal()
        assert one.ask("join()") is None
        assert one.ask("session.close()") is None
        assert one.ask("[cuda.fake_cuda_live(i) for i in range(3)]") == [0, 0, 0]


@pytest.mark.parametrize(
    "call", ["cuDevicePrimaryCtxRetain", "cuMemCreate", "cuMemsetD8", "cuMemExportToShareableHandle"]
)
def test_a_call_that_fails_in_the_service_is_said_and_leaves_nothing(machine: Machine, call: str) -> None:
    daemon = machine.start(f"gpu:1:{16 * MIB}")
    with Engine(machine) as one:
        machine.fail("service", call, 999)
        assert call in one.ask("join()")
        assert (daemon.available(), machine.handles(), daemon.status()["spaces"]) == (16 * MIB, 0, [])
        machine.heal()
        assert one.ask("join()") is None


# ---- host memory, ahead ----


def ahead(daemon: Daemon) -> Any:
    return daemon.status()["ahead"]


def test_a_slab_is_present_before_an_engine_asks(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--share", "50")
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    wait_until(lambda: ahead(daemon)[0]["ended"], 60)
    assert ahead(daemon) == [{"bank": "0 host", "bytes": 32 * MIB, "present": 32 * MIB, "ended": True, "why": ""}]
    with Raw(daemon) as raw:
        assert raw.slab_blocks() * 512 == 32 * MIB
    assert bank_info(HOST).for_new == 32 * MIB  # the other half is as free as before


def test_who_wants_the_bytes_gets_them(build: Path, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}")
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    wait_until(lambda: ahead(daemon)[0]["ended"], 60)
    assert daemon.available() == 64 * MIB
    with ClientProcess(build, daemon.socket_path) as client:
        client.ask("lib.init()")
        assert client.ask(f"lib.malloc(0, {2 * MIB})[0]") == 0
        assert ahead(daemon) == []
        session = BankSession(MODEL, FRAME, 8)
        assert daemon.status()["spaces"][0]["frames"] * FRAME == 62 * MIB
        session.close()
    wait_until(lambda: daemon.available() == 2 * MIB, 20)


def test_nothing_ahead_where_the_service_is_lazy(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--lazy")
    assert ahead(daemon) == []


def test_it_stops_before_the_container_s_limit_and_says_so(build: Path, tmp_path: Path, small_container: Path) -> None:
    path = tmp_path / "mtierd.sock"
    enter = f"echo $$ > {small_container}/cgroup.procs; exec {build}/mtierd --socket {path} --bank host:{94 * MIB}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(["sh", "-c", enter], stderr=log)
    try:
        wait_until(lambda: "populated and stops" in (tmp_path / "log").read_text() or process.poll() is not None, 60)
        words = (tmp_path / "log").read_text()
        assert "this machine, or the container's limit, has" in words
        assert "engines wait for the rest, make the bank smaller" in words
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)

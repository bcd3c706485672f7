"""Banks of GPU memory over a driver without a GPU (fake_cuda.cpp): every call, every failure, and every way to die.

What only a GPU can show, its copies and that its memory is really free again, is in tests/gpu.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mtier.conftest import StartDaemon
from tests.mtier.service import (
    EMPTY_CUDA_CONTEXT,
    GRANULE,
    INVALID_ARGUMENT,
    MALLOC_ERROR,
    MIB,
    OUT_OF_MEMORY,
    SERVER_ERROR,
    SERVICE_UNAVAILABLE,
    SUCCESS,
    ClientProcess,
    Daemon,
    wait_until,
)

KEEP = "[setattr(lib, 'p', lib.malloc({bank}, {nbytes})), lib.p[0]][1]"
FILL = "[ctypes.memset(lib.p[1], {byte}, {nbytes}), True][1]"
HOLDS = "ctypes.string_at(lib.p[1], {nbytes}) == bytes([{byte}]) * {nbytes}"
#: Handles, reservations and mappings that the driver has for a client, and how often it waited for a context.
LIVE = "[cuda.fake_cuda_live(what) for what in range(3)]"
SYNCHRONIZED = "cuda.fake_cuda_live(3)"


class Machine:
    """A service over GPU banks, its clients, and a driver that can be made to fail."""

    def __init__(self, build: Path, fake_cuda: Path, start_daemon: StartDaemon, directory: Path) -> None:
        self.build = build
        self.driver = {"MTIER_CUDA_LIBRARY": str(fake_cuda)}
        self._start_daemon = start_daemon
        self._faults = {"client": directory / "client.fault", "service": directory / "service.fault"}
        self._calls = directory / "service.calls"

    def start(
        self, *banks: str, rest_after_ms: int = 0, more: Sequence[str] = (), variables: Mapping[str, str] | None = None
    ) -> Daemon:
        arguments = [word for bank in banks or (f"gpu:1:{64 * MIB}",) for word in ("--bank", bank)]
        arguments += ["--rest-after", str(rest_after_ms), *more]
        environment = {**self.driver, "FAKE_CUDA_FAULT": str(self._faults["service"]), **(variables or {})}
        environment["FAKE_CUDA_CALLS"] = str(self._calls)
        self.daemon = self._start_daemon(*arguments, environment=environment)
        return self.daemon

    def client(self, context: str = "0", **more: str) -> ClientProcess:
        environment = {**self.driver, "FAKE_CUDA_FAULT": str(self._faults["client"]), "FAKE_CUDA_CONTEXT": context}
        client = ClientProcess(self.build, self.daemon.socket_path, {**environment, **more})
        assert client.ask("lib.init()") == SUCCESS
        return client

    def fail(self, whose: str, call: str, code: int) -> None:
        self._faults[whose].write_text(f"{call} {code}")

    def heal(self) -> None:
        for path in self._faults.values():
            path.unlink(missing_ok=True)

    def calls(self) -> list[str]:
        """What the service has had of the driver, in order: contexts and memory, each with its GPU."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def contexts(self, gpu: int) -> int:
        """How often the service holds a GPU's primary context; all services of the test together."""
        calls = self.calls()
        return calls.count(f"retain {gpu}") - calls.count(f"release {gpu}")

    def handles(self) -> int:
        """Pieces of GPU memory that the service holds: each is a file of the fake driver's."""
        return sum("fake-gpu" in link for link in self.descriptors())

    def descriptors(self) -> list[str]:
        folder = f"/proc/{self.daemon.serving}/fd"
        return [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]


@pytest.fixture
def machine(build: Path, fake_cuda: Path, start_daemon: StartDaemon, tmp_path: Path) -> Machine:
    return Machine(build, fake_cuda, start_daemon, tmp_path)


def test_memory_of_a_gpu(machine: Machine) -> None:
    daemon = machine.start(f"host:{32 * MIB}", f"gpu:1:{64 * MIB + 5}")
    bank = daemon.status()["banks"][1]
    assert (bank["kind"], bank["gpu"], bank["pci"]) == ("gpu", 1, "0000:02:00.0")
    assert bank["total"] == bank["available"] == 64 * MIB
    assert "bank 1: memory of GPU 1 (0000:02:00.0), 67.11 MB in granules of 2048 KiB" in daemon.log()
    with machine.client() as client:
        assert client.ask(KEEP.format(bank=1, nbytes=3 * MIB)) == SUCCESS
        assert client.ask(f"lib.p[1] % {GRANULE}") == 0
        assert client.ask(HOLDS.format(byte=0, nbytes=4 * MIB)) is True  # nothing of a client before
        assert client.ask(FILL.format(byte=7, nbytes=4 * MIB)) is True  # whole granules are the client's
        assert client.ask(HOLDS.format(byte=7, nbytes=4 * MIB)) is True
        assert client.ask(LIVE) == [0, 1, 1]  # the mapping alone keeps the memory here
        assert client.ask("lib.bank(1)[1].available_memory") == daemon.available(1) == 60 * MIB
        assert machine.handles() == 1
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        assert client.ask(SYNCHRONIZED) == 1  # as cudaFree: after what the GPU still does with it
        assert client.ask("lib.free(lib.p[1])") == INVALID_ARGUMENT
        assert client.ask(LIVE) == [0, 0, 0]
        # A bank of host memory is not affected.
        assert client.ask(KEEP.format(bank=0, nbytes=3 * MIB)) == SUCCESS
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
    assert machine.handles() == 0
    assert daemon.available(1) == 64 * MIB


def test_an_empty_context_is_an_error_of_its_own(machine: Machine) -> None:
    """X-Mem's SDK makes a context then and asks again."""
    daemon = machine.start()
    with machine.client(context="") as client:
        assert client.ask("lib.malloc(0, 1)") == [EMPTY_CUDA_CONTEXT, 0]  # the driver has not even started
        assert "no CUDA context" in client.ask("lib.error()")
        client.ask("cuda.fake_cuda_select(-1)")
        assert client.ask("lib.malloc(0, 1)") == [EMPTY_CUDA_CONTEXT, 0]
        assert (daemon.available(), machine.handles()) == (64 * MIB, 0)
        client.ask("cuda.fake_cuda_select(1)")
        assert client.ask(KEEP.format(bank=0, nbytes=1)) == SUCCESS
        # Freed from a thread that has no context: the allocation's own is waited for.
        client.ask("cuda.fake_cuda_select(-1)")
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        assert client.ask(SYNCHRONIZED) == 1
    with machine.client(MTIER_CUDA_LIBRARY="/nowhere/libcuda.so.1") as client:
        assert client.ask("lib.malloc(0, 1)") == [EMPTY_CUDA_CONTEXT, 0]
        assert "no NVIDIA driver" in client.ask("lib.error()")
    assert (daemon.available(), machine.handles()) == (64 * MIB, 0)


@pytest.mark.parametrize(
    ("banks", "environment", "words"),
    [
        (["gpu:2:99999744"], {}, "--bank gpu:2:99999744 cannot be served: GPU 2 does not exist; this process sees 2"),
        ([f"gpu:0:{1 << 40}"], {}, "give a size in between"),
        (["gpu:0:4096"], {}, "smaller than the granularity"),
        (["gpu:0"], {}, "give host:BYTES, gpu:ORDINAL:BYTES or dax:PATH:BYTES"),
        (["gpu:-1:99999744"], {}, "give host:BYTES, gpu:ORDINAL:BYTES or dax:PATH:BYTES"),
        (["gpu:0:1GB"], {}, "give host:BYTES, gpu:ORDINAL:BYTES or dax:PATH:BYTES"),
        (["gpu:0:99999744"], {"MTIER_CUDA_LIBRARY": "/nowhere/libcuda.so"}, "this machine has no NVIDIA driver"),
        (["gpu:0:99999744"], {"MTIER_CUDA_LIBRARY": "libm.so.6"}, "has no cu"),
        (["gpu:0:99999744"], {"FAKE_CUDA_ATTRIBUTES": "0"}, "cannot share memory as file descriptors"),
        (["gpu:0:99999744"], {"FAKE_CUDA_GRANULE": "3"}, "not a power of two"),
    ],
)
def test_banks_that_cannot_be_served(
    machine: Machine, banks: list[str], environment: dict[str, str], words: str
) -> None:
    daemon = machine.start(*banks, variables=environment)
    assert daemon.process.wait(10) in (1, 2)
    log = daemon.log()
    assert words in log
    assert log.startswith("mtierd: ")
    assert log.count("\n") == 1
    assert not daemon.socket_path.exists()


STARTING = ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetPCIBusId")


@pytest.mark.parametrize("call", [*STARTING, "cuDeviceTotalMem", "cuMemGetAllocationGranularity"])
def test_a_driver_that_fails_at_start(machine: Machine, call: str) -> None:
    machine.fail("service", call, 999)
    daemon = machine.start()
    assert daemon.process.wait(10) == 1
    assert f"cannot be served: {call} failed with CUDA error 999: a failure; check the driver" in daemon.log()


@pytest.mark.parametrize(
    ("whose", "call"),
    [
        ("service", "cuMemCreate"),
        ("service", "cuMemExportToShareableHandle"),
        ("client", "cuCtxGetCurrent"),
        ("client", "cuCtxGetDevice"),
        ("client", "cuMemImportFromShareableHandle"),
        ("client", "cuMemAddressReserve"),
        ("client", "cuMemMap"),
        ("client", "cuMemSetAccess"),
        ("client", "cuMemRelease"),
    ],
)
def test_a_call_that_fails_leaves_nothing(machine: Machine, whose: str, call: str) -> None:
    daemon = machine.start()
    with machine.client() as client:
        before = sorted(machine.descriptors())
        open_in_client = "len(os.listdir('/proc/self/fd'))"
        n_open = client.ask(open_in_client)
        machine.fail(whose, call, 999)
        start = time.monotonic()
        for _ in range(5):
            assert client.ask(f"lib.malloc(0, {4 * MIB})") == [MALLOC_ERROR, 0]
            assert "CUDA error 999" in client.ask("lib.error()")
        assert time.monotonic() - start < 8, "only a lack of memory is worth another try"
        assert client.ask(LIVE) == [0, 0, 0]
        assert client.ask(open_in_client) == n_open
        assert machine.handles() == 0
        # A client without memory has no connection either, once its end is seen.
        wait_until(lambda: len(machine.descriptors()) <= len(before), 2)
        assert daemon.available() == 64 * MIB
        machine.heal()
        assert client.ask(KEEP.format(bank=0, nbytes=64 * MIB)) == SUCCESS
        assert client.ask("lib.free(lib.p[1])") == SUCCESS


def test_memory_that_the_driver_has_a_moment_later(machine: Machine) -> None:
    """As after a client's death, whose process the driver still takes apart."""
    machine.start()
    with machine.client() as client, ThreadPoolExecutor(1) as threads:
        machine.fail("service", "cuMemCreate", 2)
        start = time.monotonic()
        waiting = threads.submit(client.ask, KEEP.format(bank=0, nbytes=MIB))
        time.sleep(0.4)
        machine.heal()
        assert waiting.result(60) == SUCCESS
        assert time.monotonic() - start > 0.4
        # And one that never comes is an error in time.
        machine.fail("service", "cuMemCreate", 2)
        start = time.monotonic()
        assert client.ask("lib.malloc(0, 1)") == [MALLOC_ERROR, 0]
        assert 1.5 < time.monotonic() - start < 60
        assert "out of memory" in client.ask("lib.error()")


def test_a_slow_driver_holds_up_its_own_bank_alone(machine: Machine) -> None:
    daemon = machine.start(f"gpu:1:{64 * MIB}", f"host:{64 * MIB}")
    with machine.client(MTIER_TIMEOUT_MS="1000") as slow, machine.client(MTIER_TIMEOUT_MS="1000") as other:
        machine.fail("service", "cuMemCreate", -3000)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(slow.ask, "lib.malloc(0, 1)[0]")
            wait_until(lambda: daemon.available(0) < 64 * MIB, 2)  # counted while it is made
            assert other.ask("lib.malloc(1, 1)[0]") == SUCCESS
            assert waiting.result(10) == SERVER_ERROR
        # An abandoned allocation is not accounted to any client.
        machine.heal()
        wait_until(lambda: daemon.available(0) == 64 * MIB and machine.handles() == 0, 5)
        assert slow.ask("lib.malloc(0, 1)[0]") == SUCCESS


def test_a_stall_leaves_the_account(machine: Machine) -> None:
    daemon = machine.start()
    with machine.client(MTIER_TIMEOUT_MS="3000") as client:
        assert client.ask(KEEP.format(bank=0, nbytes=40 * MIB)) == SUCCESS
        daemon.send(signal.SIGSTOP)
        assert client.ask("lib.status()[0]") == SERVER_ERROR
        daemon.send(signal.SIGCONT)
        wait_until(lambda: daemon.status()["clients"][0]["connected"] is False, 2)
        assert daemon.available() == 24 * MIB
        wait_until(lambda: client.ask(f"lib.malloc(0, {30 * MIB})[0]") == OUT_OF_MEMORY, 10)
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        wait_until(lambda: (daemon.available(), machine.handles()) == (64 * MIB, 0), 10)


def test_a_restart_leaves_the_account(machine: Machine) -> None:
    daemon = machine.start()
    with machine.client() as one, machine.client() as two:
        for client in (one, two):
            assert client.ask(KEEP.format(bank=0, nbytes=16 * MIB)) == SUCCESS
        daemon.stop(signal.SIGKILL)
        two.kill()
        daemon = machine.start()
        assert daemon.available() == 48 * MIB
        assert "16.78 MB are still held by 1 clients" in daemon.log()
        assert one.ask("lib.free(lib.p[1])") == SUCCESS
        assert daemon.available() == 64 * MIB


def test_exhaustion_quota_and_no_fragmentation(machine: Machine) -> None:
    daemon = machine.start(f"gpu:0:{32 * MIB}", f"gpu:1:{64 * MIB}")
    with machine.client() as client:
        client.ask(f"setattr(lib, 'all', [lib.malloc(1, {GRANULE})[1] for _ in range(32)])")
        assert client.ask("all(lib.all)") is True
        assert client.ask("lib.malloc(1, 1)[0]") == OUT_OF_MEMORY
        assert client.ask("[lib.free(p) for p in lib.all[::2]]") == [SUCCESS] * 16
        assert client.ask(KEEP.format(bank=1, nbytes=32 * MIB)) == SUCCESS
        assert machine.handles() == 17
        assert client.ask("[lib.free(p) for p in (lib.p[1], *lib.all[1::2])]") == [SUCCESS] * 17
        assert (daemon.available(0), daemon.available(1), machine.handles()) == (32 * MIB, 64 * MIB, 0)
        client.close()
    daemon.stop()
    daemon = machine._start_daemon(
        *("--bank", f"gpu:0:{32 * MIB}", "--bank", f"host:{32 * MIB}", "--quota", str(20 * MIB)),
        environment=machine.driver,
    )
    machine.daemon = daemon
    with machine.client() as client:
        assert client.ask("lib.bank(0)[1].available_memory") == 20 * MIB
        assert client.ask(f"lib.malloc(0, {16 * MIB})[0]") == SUCCESS
        assert client.ask(f"lib.malloc(1, {6 * MIB})[0]") == OUT_OF_MEMORY  # one quota over all banks
        assert client.ask(f"lib.malloc(1, {4 * MIB})[0]") == SUCCESS


def test_a_killed_client_s_memory_is_back_within_a_second(machine: Machine) -> None:
    daemon = machine.start()
    with machine.client() as one, machine.client(context="1") as two:
        for byte, client in ((1, one), (2, two)):
            assert client.ask(KEEP.format(bank=0, nbytes=16 * MIB)) == SUCCESS
            assert client.ask(FILL.format(byte=byte, nbytes=16 * MIB)) is True
        assert machine.handles() == 2
        one.kill()
        wait_until(lambda: daemon.available() == 48 * MIB and machine.handles() == 1, 1)
        assert two.ask(HOLDS.format(byte=2, nbytes=16 * MIB)) is True
        assert two.ask(f"lib.malloc(0, {48 * MIB})[0]") == SUCCESS
    wait_until(lambda: daemon.available() == 64 * MIB and machine.handles() == 0, 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_service_that_ends_gives_errors_and_no_hang(machine: Machine, number: int) -> None:
    daemon = machine.start()
    with machine.client() as client:
        assert client.ask(KEEP.format(bank=0, nbytes=4 * MIB)) == SUCCESS
        assert client.ask(FILL.format(byte=9, nbytes=4 * MIB)) is True
        daemon.stop(number)
        start = time.monotonic()
        assert client.ask("lib.malloc(0, 1)") == [SERVICE_UNAVAILABLE, 0]
        assert client.ask("lib.status()[0]") == SERVICE_UNAVAILABLE
        assert client.ask(HOLDS.format(byte=9, nbytes=4 * MIB)) is True  # what is mapped stays
        assert client.ask("lib.free(lib.p[1])") == SERVICE_UNAVAILABLE
        assert time.monotonic() - start < 60
        assert client.ask(LIVE) == [0, 0, 0]  # and is freed anyway
        machine.start()
        assert client.ask(KEEP.format(bank=0, nbytes=64 * MIB)) == SUCCESS


# ---- the context that keeps a bank's GPU at full clocks ----


def test_a_context_is_held_while_memory_is_out(machine: Machine) -> None:
    daemon = machine.start(f"gpu:0:{64 * MIB}", f"gpu:1:{64 * MIB}", more=("--allow-reset",))
    with machine.client() as one, machine.client() as two:
        for client in (one, two):
            assert client.ask("lib.bank(1)[1].available_memory") == 64 * MIB
        assert machine.calls() == [], "a bank that is not used leaves its GPU alone"
        assert one.ask(KEEP.format(bank=1, nbytes=MIB)) == SUCCESS
        assert machine.calls() == ["retain 1", "create 1"]
        assert one.ask("lib.malloc(1, 1)[0]") == two.ask(KEEP.format(bank=1, nbytes=MIB)) == SUCCESS
        assert machine.calls() == ["retain 1", *["create 1"] * 3]
        assert one.ask("lib.free(lib.p[1])") == SUCCESS
        assert one.close() == 0
        wait_until(lambda: daemon.available(1) == 62 * MIB, 1)
        assert machine.contexts(1) == 1
        assert two.ask("lib.free(lib.p[1])") == SUCCESS
        assert machine.calls() == ["retain 1", *["create 1"] * 3, *["destroy 1"] * 3, "release 1"]
        # And again, on each GPU by itself.
        assert two.ask(KEEP.format(bank=0, nbytes=MIB)) == SUCCESS
        assert (machine.contexts(0), machine.contexts(1)) == (1, 0)
        assert two.ask(f"lib.malloc(1, {MIB})[0]") == SUCCESS
        assert (machine.contexts(0), machine.contexts(1)) == (1, 1)
        assert two.ask("lib.reset_all()") == SUCCESS
        assert (machine.contexts(0), machine.contexts(1)) == (0, 0)
        # An allocation that fails leaves none, and what is refused has not even asked for one.
        before = machine.calls()
        assert two.ask(f"lib.malloc(1, {65 * MIB})[0]") == OUT_OF_MEMORY
        assert machine.calls() == before
        machine.fail("service", "cuMemCreate", 999)
        assert two.ask("lib.malloc(1, 1)[0]") == MALLOC_ERROR
        machine.fail("service", "cuMemExportToShareableHandle", 999)
        assert two.ask("lib.malloc(1, 1)[0]") == MALLOC_ERROR
        assert machine.calls()[len(before) :] == [
            "retain 1",
            "release 1",
            "retain 1",
            "create 1",
            "destroy 1",
            "release 1",
        ]


def test_a_context_outlasts_the_memory_for_a_moment(machine: Machine) -> None:
    """So that a client that allocates and frees over and over does not pay for one each time."""
    machine.start(f"gpu:0:{64 * MIB}", f"gpu:1:{64 * MIB}", rest_after_ms=700)
    with machine.client() as client:
        for _ in range(5):
            assert client.ask(KEEP.format(bank=1, nbytes=MIB)) == SUCCESS
            assert client.ask("lib.free(lib.p[1])") == SUCCESS
        freed = time.monotonic()
        assert machine.calls() == ["retain 1", *["create 1", "destroy 1"] * 5]
        wait_until(lambda: machine.contexts(1) == 0, 3)
        assert time.monotonic() - freed > 0.5, "not at once"
        # Another bank's rest is its own, and one that is used again in time has none.
        assert client.ask(KEEP.format(bank=0, nbytes=MIB)) == SUCCESS
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        assert client.ask(KEEP.format(bank=0, nbytes=MIB)) == SUCCESS
        time.sleep(1.2)
        assert (machine.contexts(0), machine.contexts(1)) == (1, 0)
        # Nor does the service keep it when it stops.
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        assert machine.contexts(0) == 1
        assert machine.daemon.stop(signal.SIGTERM) == 0
        assert machine.contexts(0) == 0


def test_banks_of_one_gpu_hold_its_context_until_the_last_is_empty(machine: Machine) -> None:
    machine.start(f"gpu:1:{32 * MIB}", f"gpu:1:{32 * MIB}")
    with machine.client() as client:
        client.ask("setattr(lib, 'all', [lib.malloc(bank, 1)[1] for bank in (0, 1, 0)])")
        assert machine.contexts(1) == 2, "one a bank; the driver counts"
        assert client.ask("[lib.free(p) for p in lib.all[::2]]") == [SUCCESS] * 2
        assert machine.contexts(1) == 1
        assert client.ask("lib.free(lib.all[1])") == SUCCESS
        assert machine.contexts(1) == 0


def test_no_context_stays_after_a_killed_client_or_the_service(machine: Machine) -> None:
    daemon = machine.start()
    with machine.client() as one, machine.client() as two:
        for client in (one, two):
            assert client.ask(KEEP.format(bank=0, nbytes=MIB)) == SUCCESS
        one.kill()
        wait_until(lambda: machine.handles() == 1, 1)
        assert machine.contexts(1) == 1
        two.kill()
        wait_until(lambda: machine.contexts(1) == 0, 1)
    with machine.client() as client:
        for _ in range(3):
            assert client.ask("lib.malloc(0, 1)[0]") == SUCCESS
        assert machine.contexts(1) == 1
        assert daemon.stop(signal.SIGTERM) == 0
        assert machine.calls()[-4:] == [*["destroy 1"] * 3, "release 1"]
        assert machine.contexts(1) == 0


def test_no_memory_without_a_context(machine: Machine) -> None:
    """It could not be cleared of what the client before left there."""
    machine.start()
    with machine.client() as client:
        machine.fail("service", "cuDevicePrimaryCtxRetain", 999)
        assert client.ask("lib.malloc(0, 1)[0]") == MALLOC_ERROR
        assert "cuDevicePrimaryCtxRetain failed with CUDA error 999" in client.ask("lib.error()")
        assert machine.calls() == []
        machine.heal()
        assert client.ask(KEEP.format(bank=0, nbytes=1 * MIB)) == SUCCESS
        assert machine.contexts(1) == 1
        # One that cannot be let go of is no error of the client's.
        machine.fail("service", "cuDevicePrimaryCtxRelease", 999)
        assert client.ask("lib.free(lib.p[1])") == SUCCESS
        assert machine.contexts(1) == 0


def test_reset_all_and_forks(machine: Machine) -> None:
    daemon = machine.start(more=("--allow-reset",))
    check = "[pid := os.fork(), os._exit(-lib.status()[0]) if pid == 0 else os.waitpid(pid, 0)[1] >> 8][1]"
    with machine.client() as one, machine.client() as two:
        for byte, client in ((1, one), (2, two)):
            assert client.ask(KEEP.format(bank=0, nbytes=4 * MIB)) == SUCCESS
            assert client.ask(FILL.format(byte=byte, nbytes=4 * MIB)) is True
        assert one.ask(check) == 2  # not initialized: a child has nothing of its parent
        assert one.ask("lib.reset_all()") == SUCCESS
        assert (daemon.available(), machine.handles()) == (64 * MIB, 0)
        assert two.ask(HOLDS.format(byte=2, nbytes=4 * MIB)) is True
        assert two.ask("lib.free(lib.p[1])") == SUCCESS
        assert two.ask(LIVE) == [0, 0, 0]


def test_nothing_leaks_over_many_allocations(machine: Machine) -> None:
    machine.start()
    churn = "[lib.free(lib.malloc(0, 5 << 20)[1]) for _ in range(200)] == [0] * 200"
    n_open = "len(os.listdir('/proc/self/fd'))"
    with machine.client() as client:
        assert client.ask("lib.free(lib.malloc(0, 5 << 20)[1])") == 0  # the connection stays
        before, of_service = client.ask(n_open), len(machine.descriptors())
        assert client.ask(churn) is True
        assert client.ask(n_open) == before
        assert len(machine.descriptors()) <= of_service  # older connections may have ended
        assert client.ask(LIVE) == [0, 0, 0]

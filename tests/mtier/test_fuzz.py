"""Random and mutated messages: the service answers or hangs up, and serves on; so does the library with a liar.

SGLANG_XMEM_FUZZ_MESSAGES sets how many messages the service gets (default 20000, on a build with AddressSanitizer and
UndefinedBehaviorSanitizer).
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sglang_xmem.bank import NEW, BankSession
from sglang_xmem.bank_link import JOIN_REQUEST, PAGES_VERSION
from sglang_xmem.mtier.build import BuildError, built
from sglang_xmem.mtier.client import HOST
from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import (
    HELLO,
    KEEP,
    MAGIC,
    MIB,
    REPLY_BYTES,
    REPLY_HEAD,
    REQUEST,
    RESET_ALL,
    SERVER_ERROR,
    SUCCESS,
    ClientProcess,
    client_environment,
    request,
    wait_until,
)
from tests.mtier.test_bank_sessions import fill, key, view

MESSAGES = int(os.environ.get("SGLANG_XMEM_FUZZ_MESSAGES", "20000"))
SEED = int(os.environ.get("SGLANG_XMEM_FUZZ_SEED", "1"))
#: Values at which arithmetic goes wrong.
EDGES = (0, 1, 2, 3, 4095, 4096, 2 * MIB - 1, 2 * MIB, 64 * MIB, 64 * MIB + 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1)
LARGEST = (2**63, 2**64 - 2 * MIB, 2**64 - 1)


@pytest.fixture(scope="session")
def sanitized() -> Path:
    try:
        return built(sanitize="address")
    except BuildError as error:
        pytest.skip(f"the compiler has no sanitizers: {error}")


class Fuzzer:
    """A client with no manners: keeps a few connections, of which some read and some do not."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._random = random.Random(seed)
        self._clients: list[socket.socket] = []
        self.answered = self.hung_up = 0

    def message(self) -> bytes:
        """A whole request with odd values, or one with bytes changed, cut off or added, or noise."""
        r = self._random
        whole = REQUEST.pack(
            MAGIC if r.random() < 0.95 else r.getrandbits(32),
            2 if r.random() < 0.95 else r.getrandbits(16),
            r.randint(HELLO, KEEP + 1) if r.random() < 0.95 else r.getrandbits(16),
            r.getrandbits(64),
            r.choice((0, 0, 1, 2, -1, 2**31 - 1, -(2**31))),
            0 if r.random() < 0.95 else r.getrandbits(32),
            r.choice(EDGES + LARGEST) if r.random() < 0.7 else r.randrange(1, 8 * MIB),
            r.choice(EDGES + LARGEST) if r.random() < 0.3 else r.randrange(0, 2000),
        )
        kind = r.random()
        if kind < 0.6:
            return whole
        if kind < 0.75:
            changed = bytearray(whole)
            for _ in range(r.randint(1, 4)):
                changed[r.randrange(len(changed))] = r.getrandbits(8)
            return bytes(changed)
        if kind < 0.85:
            return whole[: r.randrange(0, len(whole))]
        if kind < 0.95:
            return whole + r.randbytes(r.choice((1, 8, 216, 217, 4096, 100_000)))
        return r.randbytes(r.randrange(0, 300))

    def step(self) -> None:
        r = self._random
        if not self._clients or (len(self._clients) < 8 and r.random() < 0.02):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            client.connect(str(self._path))
            client.setblocking(False)
            self._clients.append(client)
        client = r.choice(self._clients)
        try:
            if r.random() < 0.02:
                with open(os.devnull, "rb") as file:
                    socket.send_fds(client, [self.message()], [file.fileno()] * r.randint(1, 20))
            else:
                client.send(self.message())
            if r.random() < 0.9:
                self.read(client)
            if r.random() < 0.005:
                self._hang_up(client)
        except BlockingIOError:  # unread answers have filled the connection
            self._hang_up(client)
        except OSError:
            self.hung_up += 1
            self._hang_up(client)

    def read(self, client: socket.socket) -> None:
        assert select.select([client], [], [], 60)[0], "the service neither answers nor hangs up"
        answer, descriptors, _, _ = socket.recv_fds(client, 1 << 17, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        if not answer:
            raise OSError("hung up")
        magic, version, _, _, code, text_bytes = REPLY_HEAD.unpack_from(answer)
        assert (magic, version) == (MAGIC, 2)
        assert -8 <= code <= 0
        assert len(answer) == REPLY_BYTES + text_bytes
        self.answered += 1

    def _hang_up(self, client: socket.socket) -> None:
        self._clients.remove(client)
        client.close()

    def close(self) -> None:
        for client in list(self._clients):
            self._hang_up(client)


class PagesFuzzer(Fuzzer):
    """The same with messages of the page bank, most of them of the right size.

    Args:
        kind: of the memory that most sessions ask for.
    """

    def __init__(self, path: Path, seed: int, kind: int = HOST) -> None:
        super().__init__(path, seed)
        self._kind = kind

    def message(self) -> bytes:
        r = self._random
        op = r.choice((32, 33, 33, 34, 35, 35, 35, 36, 36, 36, 37, 38, 39, 40, 41))
        count = r.choice((0, 1, 2, 3, 255, 256, 257)) if r.random() < 0.9 else r.choice(EDGES + LARGEST)
        each = {33: 0, 35: 32, 36: 48, 39: 32, 40: 16}.get(op, 0)
        behind = b"".join(self._item(each) for _ in range(min(count, 257))) if each else b""
        if op == 32:
            behind = r.choice((b"", r.choice((b"x", b'"\\\n', b"y")).ljust(64, r.choice((b"\0", b"z")))))
        if op == 33:
            behind = JOIN_REQUEST.pack(
                PAGES_VERSION if r.random() < 0.95 else r.getrandbits(32),
                r.choice((0, 0, 0, 1, 1, 2)),
                r.choice((65536, 65536, 131072, 256, 4096, *EDGES, *LARGEST)),
                r.choice((1, 2, 5, 100, *EDGES, *LARGEST)),
                bytes([r.randrange(3)]) * 32,
                r.choice((b"x", b'"\\\n', b"y" * 64)),
                r.choice((0, 1, 2, 3, r.getrandbits(64))),
                r.choice((*[self._kind] * 3, 0, 1, 2, 3)),
                r.choice((0, 0, 1, 2)),
                r.choice((0, 1, 1 << 20, *LARGEST)),
            )
        if r.random() < 0.1:
            behind = behind[: r.randrange(len(behind) + 1)] + r.randbytes(r.choice((0, 1, 16)))
        if r.random() < 0.05:
            return super().message()
        return REQUEST.pack(MAGIC, 2, op, r.getrandbits(64), r.choice((0, 1, 1, 2, 3, -1)), 0, count, 0) + behind

    def _item(self, nbytes: int) -> bytes:
        """A key, a page or a place: of few keys and frames, so that some are there."""
        r = self._random
        place = struct.pack(
            "=QQ", r.choice((r.randrange(130), *LARGEST)), r.choice((0, 1, r.randrange(50), r.getrandbits(48)))
        )
        return place if nbytes == 16 else bytes([r.randrange(20)]) * 32 + (place if nbytes == 48 else b"")


def test_page_bank_survives_hostile_messages_kills_and_restarts(
    sanitized: Path, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight processes with eight connections each, some killed; what an honest engine has stays what it is."""
    daemon = start_daemon("--bank", f"host:{16 * MIB}", "--bank", f"host:{8 * MIB}", "--lazy", binaries=sanitized)
    monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))
    honest = BankSession(b"h" * 32, 65536, 20, "honest")
    addresses = fill(honest, list(range(1, 11)))
    count, others = MESSAGES // 8, 8
    command = [sys.executable, __file__, str(daemon.socket_path), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    clients = [
        subprocess.Popen([*command, str(SEED * 100 + n), str(HOST)], stdout=subprocess.PIPE, text=True, env=environment)
        for n in range(others)
    ]
    try:
        for client in clients[:3]:
            assert client.stdout is not None
            assert client.stdout.readline() == "half\n"
            client.kill()
            daemon.restart()
        for client in clients[3:]:
            assert client.stdout is not None
            assert client.stdout.read().split() == ["half", "done"]
            assert client.wait(60) == 0
    finally:
        for client in clients:
            client.kill()
            client.wait(60)
    assert [view(honest, address)[0] for address in addresses] == list(range(1, 11))
    mine = [os.getpid()]
    wait_until(lambda: [s["pid"] for space in daemon.status()["spaces"] for s in space["sessions"]] == mine, 60)
    wait_until(lambda: honest.find([key(99)]) == 0 and honest.alive, 60)
    assert honest.publish([key(50)], honest.claim(1)) == [NEW]
    assert honest.find([key(50)]) == 1
    # All of both banks except the honest client's memory is available.
    last = BankSession(b"l" * 32, 65536, 8 * MIB // 65536)
    for session in (last, honest):
        session.close()
    assert daemon.stop() == 0, daemon.log()[-4000:]
    assert "ERROR" not in daemon.log()
    assert daemon.log().count("is restarted") == 3


#: Calls of the driver that come while the service runs.
SERVING_CALLS = ("cuMemCreate", "cuMemExportToShareableHandle", "cuMemRelease", "cuDevicePrimaryCtxRetain")


@pytest.mark.parametrize("kinds", [("host", "host"), ("gpu:0", "gpu:1")])
def test_service_survives_hostile_messages(
    sanitized: Path, fake_cuda: Path, start_daemon: StartDaemon, build: Path, tmp_path: Path, kinds: tuple[str, str]
) -> None:
    """Over GPU banks the driver fails now and then too."""
    banks = [
        "--bank",
        f"{kinds[0]}:{64 * MIB}",
        "--bank",
        f"{kinds[1]}:{32 * MIB}",
        "--quota",
        str(80 * MIB),
        "--allow-reset",
    ]
    fault = tmp_path / "fault"
    driver = {"MTIER_CUDA_LIBRARY": str(fake_cuda), "FAKE_CUDA_FAULT": str(fault), "FAKE_CUDA_CONTEXT": "0"}
    calls = tmp_path / "calls"
    daemon = start_daemon(*banks, binaries=sanitized, environment={**driver, "FAKE_CUDA_CALLS": str(calls)})
    daemon.status()  # answered once the memory of the next slab is there
    descriptors = len(os.listdir(f"/proc/{daemon.serving}/fd"))
    fuzzer = Fuzzer(daemon.socket_path, SEED)
    r = random.Random(SEED)
    for number in range(MESSAGES):
        if number % 200 == 0:
            fault.write_text(f"{r.choice(SERVING_CALLS)} {r.choice((1, 2, 999))}")
        elif number % 200 == 50:
            fault.unlink()
        fuzzer.step()
    fault.unlink(missing_ok=True)
    fuzzer.close()
    assert fuzzer.answered > MESSAGES // 2
    wait_until(lambda: daemon.available(0) == 64 * MIB and daemon.available(1) == 32 * MIB, 5)
    wait_until(lambda: len(os.listdir(f"/proc/{daemon.serving}/fd")) <= descriptors, 5)
    with ClientProcess(build, daemon.socket_path, driver) as client:
        assert client.ask("lib.init()") == SUCCESS
        assert client.ask("lib.malloc(0, 64 << 20)[0]") == SUCCESS
    # What the sanitizers find, leaks included, ends the process with another status.
    assert daemon.stop() == 0, daemon.log()[-4000:]
    assert "ERROR" not in daemon.log()
    lines = calls.read_text().splitlines() if calls.exists() else []
    assert bool(lines) == kinds[0].startswith("gpu")
    for gpu in (0, 1):
        assert lines.count(f"retain {gpu}") == lines.count(f"release {gpu}")
        assert lines.count(f"create {gpu}") == lines.count(f"destroy {gpu}")


LIBRARY_CALLS = """
import ctypes, os, sys
from tests.mtier.service import *
lib = Library(os.environ["MTIER_LIB_PATH"])
assert lib.status()[0] == NOT_INITIALIZED
assert lib.init() == SUCCESS
assert lib.status()[0] == lib.bank(0)[0] == SUCCESS
assert lib.bank(9)[0] == INVALID_ARGUMENT
addresses = [lib.malloc(0, size)[1] for size in (1, 2 << 20, (2 << 20) + 1, 9 << 20)]
assert all(addresses)
for address in addresses:
    ctypes.memset(address, 1, 1)
assert lib.malloc(0, 1 << 40)[0] == OUT_OF_MEMORY
assert lib.free(addresses[0]) == SUCCESS
assert lib.free(addresses[0]) == INVALID_ARGUMENT
for size in (1, 2, 100, 1 << 20):
    assert lib.logs(size)[0] == SUCCESS
pid = os.fork()
if pid == 0:
    code = lib.status()[0] == NOT_INITIALIZED and lib.init() == SUCCESS and lib.malloc(0, 5)[0] == SUCCESS
    os._exit(0 if code else 1)
assert os.waitpid(pid, 0)[1] == 0
assert lib.reset_all() == SUCCESS
assert lib.free(addresses[1]) == SUCCESS
print("done")
"""


#: With each of the driver's calls failing, one per case, and then none.
FAULTY_CALLS = """
import os, sys
from tests.mtier.service import *
lib = Library(os.environ["MTIER_LIB_PATH"])
fault = os.environ["FAKE_CUDA_FAULT"]
assert lib.init() == SUCCESS
calls = "cuCtxGetCurrent cuCtxGetDevice cuMemImportFromShareableHandle cuMemAddressReserve cuMemMap cuMemSetAccess"
for call in [*calls.split(), "cuMemRelease"]:
    for code in (1, 201, 999):
        with open(fault, "w") as file:
            file.write(f"{call} {code}")
        assert lib.malloc(0, 3 << 20)[0] in (MALLOC_ERROR, EMPTY_CUDA_CONTEXT)
for call in ("cuCtxPushCurrent", "cuCtxSynchronize", "cuMemUnmap", "cuMemAddressFree"):
    os.unlink(fault)
    code, address = lib.malloc(0, 3 << 20)
    assert code == SUCCESS
    with open(fault, "w") as file:
        file.write(f"{call} 999")
    assert lib.free(address) == SUCCESS
os.unlink(fault)
assert lib.bank(0)[1].available_memory == 64 * MIB
print("done")
"""


@pytest.mark.parametrize(
    ("bank", "script"), [("host", LIBRARY_CALLS), ("gpu:1", LIBRARY_CALLS), ("gpu:1", FAULTY_CALLS)]
)
def test_library_under_sanitizers(
    sanitized: Path, fake_cuda: Path, start_daemon: StartDaemon, tmp_path: Path, bank: str, script: str
) -> None:
    driver = {"MTIER_CUDA_LIBRARY": str(fake_cuda), "FAKE_CUDA_CONTEXT": "0"}
    arguments = ("--bank", f"{bank}:{64 * MIB}", "--allow-reset")
    daemon = start_daemon(*arguments, binaries=sanitized, environment=driver)
    environment = {**driver, "FAKE_CUDA_FAULT": str(tmp_path / "fault")}
    done = run_sanitized(sanitized, daemon.socket_path, script, environment)
    assert done.stdout == "done\n", done.stderr[-4000:]
    assert daemon.stop() == 0, daemon.log()[-4000:]


def run_sanitized(
    sanitized: Path, socket_path: Path, script: str, more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitized library, whose runtime has to be the process's first."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    path = runtime.stdout.strip()
    if not os.path.isabs(path):
        pytest.skip("the compiler does not say where AddressSanitizer's runtime is")
    environment = {
        **os.environ,
        **client_environment(sanitized, socket_path),
        "LD_PRELOAD": path,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "MTIER_TIMEOUT_MS": "200",
        **(more or {}),
    }
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


LIED_TO = """
import os, sys
from tests.mtier.service import *
lib = Library(os.environ["MTIER_LIB_PATH"])
codes = set()
for _ in range(150):
    codes.add(lib.init())
    for code in (lib.status()[0], lib.bank(0)[0], lib.malloc(0, 1 << 20)[0], lib.logs(500)[0], lib.reset_all()):
        codes.add(code)
        assert -8 <= code <= 0
print(sorted(codes))
"""


def test_library_survives_a_lying_service(sanitized: Path, fake_cuda: Path, tmp_path: Path) -> None:
    """Replies with random values, of wrong sizes, with files that are too small, twice or not at all.

    Some say that they are GPU memory, with the driver's descriptors and with others.
    """
    r = random.Random(SEED)
    path = tmp_path / "liar.sock"
    small = os.memfd_create("small")
    os.ftruncate(small, 4096)
    gpu_memory = os.memfd_create("fake-gpu")
    os.ftruncate(gpu_memory, 2 * MIB)

    def lie(op: int, number: int) -> bytes:
        text = r.randbytes(r.choice((0, 0, 5, 3000)))
        claimed = len(text) if r.random() < 0.8 else r.getrandbits(32)
        code = 0 if r.random() < 0.8 else r.randint(-20, 20)
        head = REPLY_HEAD.pack(MAGIC, 2, op, number if r.random() < 0.9 else r.getrandbits(64), code, claimed)
        values = struct.pack(
            "=iI5Q", r.randint(-2, 2), r.choice((0, 1, 1, 2, 2, 3)), *(r.choice(EDGES + LARGEST) for _ in range(5))
        )
        message = head + values + text
        return message if r.random() < 0.9 else message[: r.randrange(len(message))]

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while message := client.recv(1000):
                op, number = REQUEST.unpack(message)[2:4]
                if op == HELLO and r.random() < 0.9:
                    client.send(REPLY_HEAD.pack(MAGIC, 2, op, number, 0, 0) + bytes(REPLY_BYTES - REPLY_HEAD.size))
                    continue
                if r.random() < 0.02:
                    return
                descriptors = [r.choice((small, gpu_memory))] * r.choice((0, 1, 1, 3))
                for _ in range(r.choice((1, 1, 1, 1, 2))):
                    socket.send_fds(client, [lie(op, number)], descriptors)

    def listen(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=listen, args=(listener,), daemon=True).start()
        driver = {"MTIER_CUDA_LIBRARY": str(fake_cuda), "FAKE_CUDA_CONTEXT": "0"}
        done = run_sanitized(sanitized, path, LIED_TO, driver)
        listener.shutdown(socket.SHUT_RDWR)
    for descriptor in (small, gpu_memory):
        os.close(descriptor)
    assert done.returncode == 0, done.stderr[-4000:]
    assert str(SERVER_ERROR) in done.stdout


def test_reset_by_one_client_between_another_s_calls(sanitized: Path, start_daemon: StartDaemon, build: Path) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--allow-reset", binaries=sanitized)
    with (
        ClientProcess(build, daemon.socket_path) as client,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other,
    ):
        other.connect(str(daemon.socket_path))
        assert client.ask("lib.init()") == SUCCESS
        for _ in range(20):
            assert client.ask("[setattr(lib, 'p', lib.malloc(0, 1)), lib.p[0]][1]") == SUCCESS
            other.send(request(RESET_ALL))
            other.recv(1 << 17)
            assert client.ask("lib.free(lib.p[1])") == SUCCESS
    assert daemon.available() == 64 * MIB
    assert daemon.stop() == 0, daemon.log()[-4000:]


def _fuzz_pages(path: str, messages: int, seed: int, kind: int) -> None:
    fuzzer = PagesFuzzer(Path(path), seed, kind)
    for number in range(messages):
        fuzzer.step()
        if number == messages // 2:
            print("half", flush=True)
    fuzzer.close()
    assert fuzzer.answered > messages // 2
    print("done", flush=True)


if __name__ == "__main__":
    _fuzz_pages(sys.argv[1], *map(int, sys.argv[2:]))

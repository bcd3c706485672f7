"""Helpers of the tests here: a running mtierd, a client of the library by ctypes, and clients in processes of their
own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

MIB = 1 << 20
#: Seconds after which something hangs, on any machine.
PATIENCE_S = 60.0
GRANULE = 2 * MIB

SUCCESS, FAILURE, NOT_INITIALIZED, OUT_OF_MEMORY, INVALID_ARGUMENT = 0, -1, -2, -3, -4
SERVICE_UNAVAILABLE, EMPTY_CUDA_CONTEXT, SERVER_ERROR, MALLOC_ERROR = -5, -6, -7, -8

#: struct Request of native/protocol.h: magic, version, op, id, bank, reserved, size, allocation.
REQUEST = struct.Struct("=IHHQiIQQ")
#: The head of struct Reply: magic, version, op, id, code, text_bytes; the rest of its 72 bytes are values.
REPLY_HEAD = struct.Struct("=IHHQiI")
REPLY_BYTES = 72
MAGIC = 0x5249544D
HELLO, STATUS, BANK_STATUS, MALLOC, FREE, LOGS, RESET_ALL, REPORT, KEEP = range(1, 10)


class Daemon:
    """A running mtierd; a context manager that leaves no process behind.

    Args:
        build: directory with the binaries.
        socket_path: where it serves.
        arguments: mtierd's own, such as --bank host:BYTES.
        uid: user to run as; needs root.
        environment: added to this process's.
    """

    def __init__(
        self,
        build: Path,
        socket_path: Path,
        arguments: Sequence[str],
        uid: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.socket_path = socket_path
        #: Whether a test gave the service a reason to end; without one its keeper must not have started it again.
        self.may_end = False
        self.log_path = socket_path.with_suffix(f".{time.monotonic_ns()}.log")
        self._program = str(build / "mtierd")
        command = [self._program, "--socket", str(socket_path), *arguments]
        variables = {**os.environ, **(environment or {})}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, user=uid, env=variables)
        wait_until(lambda: "serving" in self.log() or self.process.poll() is not None, 20)

    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def serving(self) -> int:
        """Process id of the service itself; `process` is its keeper. 0 while there is none."""
        return service_of(self.process.pid)

    def send(self, number: int) -> None:
        """Send the service itself a signal."""
        self.may_end = self.may_end or number != signal.SIGCONT
        os.kill(self.serving, number)

    def restart(self) -> int:
        """Kill the service, and wait until its keeper has started it again. Returns its process id."""
        before = self.serving
        self.send(signal.SIGKILL)
        wait_until(lambda: self.serving not in (0, before), 20)
        assert self.status()["pid"] == self.serving
        return self.serving

    def status(self) -> dict[str, Any]:
        command = [self._program, "--status", "--socket", str(self.socket_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        return dict(json.loads(done.stdout))

    def available(self, bank: int = 0) -> int:
        return int(self.status()["banks"][bank]["available"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the keeper, and wait until both have ended. Returns its status."""
        if self.process.poll() is None:
            serving = self.serving
            self.process.send_signal(number)
            status = self.process.wait(PATIENCE_S)
            wait_until(lambda: serving == 0 or has_ended(serving), 20)
            return status
        return self.process.wait(PATIENCE_S)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)


def has_ended(pid: int) -> bool:
    """Whether all threads of a process have ended, also where its new parent has not looked yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        threads = os.listdir(f"/proc/{pid}/task")  # the first one is a zombie until the others have closed everything
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX" and len(threads) <= 1


def service_of(keeper: int) -> int:
    """Process id of the service that a keeper runs; 0 while there is none."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    return int(children[0]) if children else 0


class Status(ctypes.Structure):
    _fields_ = [("status", ctypes.c_int), ("num_banks", ctypes.c_int), ("bank_size", ctypes.c_uint64)]


class BankStatus(ctypes.Structure):
    _fields_ = [("bank_id", ctypes.c_int), ("total_memory", ctypes.c_uint64), ("available_memory", ctypes.c_uint64)]


class Library:
    """The eight functions of libmtier.so, as C gives them."""

    def __init__(self, path: str) -> None:
        self.c = ctypes.CDLL(path)
        self.c.mTierGetLastError.restype = ctypes.c_char_p
        self.c.mTierFree.argtypes = [ctypes.c_void_p]
        self.c.mTierMalloc.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p]
        self.c.mTierGetLogs.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

    def init(self) -> int:
        return int(self.c.mTierInit())

    def error(self) -> str:
        return str(self.c.mTierGetLastError().decode(errors="replace"))

    def status(self) -> tuple[int, Status]:
        out = Status()
        return int(self.c.mTierGetStatus(ctypes.byref(out))), out

    def bank(self, bank: int) -> tuple[int, BankStatus]:
        out = BankStatus()
        return int(self.c.mTierGetBankStatus(bank, ctypes.byref(out))), out

    def malloc(self, bank: int, nbytes: int) -> tuple[int, int]:
        """Code and address; 0 where there is none."""
        out = ctypes.c_void_p(0xDEAD)
        code = int(self.c.mTierMalloc(bank, nbytes, ctypes.byref(out)))
        return code, out.value or 0

    def free(self, address: int) -> int:
        return int(self.c.mTierFree(address))

    def logs(self, nbytes: int = 1 << 16) -> tuple[int, str]:
        buffer, used = ctypes.create_string_buffer(nbytes), ctypes.c_size_t()
        code = int(self.c.mTierGetLogs(buffer, nbytes, ctypes.byref(used)))
        assert used.value < nbytes
        return code, buffer.value.decode(errors="replace")

    def reset_all(self) -> int:
        return int(self.c.mTierResetAll())


class AskedProcess:
    """A process that evaluates lines of Python and prints each value as JSON; ended when its context is left.

    Args:
        arguments: of the interpreter.
        environment: all variables.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, expression: str) -> Any:
        """The value of a Python expression."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        line = self.read_line()
        assert line, f"the process ended at {expression!r} with status {self.process.wait(PATIENCE_S)}"
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class ClientProcess(AskedProcess):
    """A process with the library loaded: what it is asked may name `lib`, a Library.

    Args:
        environment: added to this process's.
    """

    def __init__(self, build: Path, socket_path: Path, environment: dict[str, str] | None = None) -> None:
        variables = {**os.environ, **client_environment(build, socket_path), **(environment or {})}
        super().__init__([__file__], variables)

    def close(self) -> int:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.process.wait(PATIENCE_S)


def open_to_others(directory: Path) -> None:
    """Let other users into a temporary folder: into every folder above it, however many pytest made."""
    for each in (directory, *directory.parents):
        if each == Path(tempfile.gettempdir()).resolve():
            return
        each.chmod(0o755)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds that it took until `condition` held.

    Args:
        timeout_s: that it may take on an idle machine; a busy one gets PATIENCE_S.
    """
    start, limit = time.monotonic(), max(timeout_s, PATIENCE_S)
    while not condition():
        assert time.monotonic() - start < limit, f"this took longer than {limit:g} s"
        time.sleep(0.01)
    return time.monotonic() - start


def build_fake_cuda(directory: Path) -> Path:
    """A libcuda.so.1 for machines without a GPU, compiled into `directory`."""
    library = directory / "libfakecuda.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    source = Path(__file__).with_name("fake_cuda.cpp")
    subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(library)], check=True)
    return library


def request(op: int, bank: int = 0, size: int = 0, allocation: int = 0, *, number: int = 1, version: int = 2) -> bytes:
    return REQUEST.pack(MAGIC, version, op, number, bank, 0, size, allocation)


def client_environment(build: Path, socket_path: Path) -> dict[str, str]:
    """What a client's environment has to hold."""
    return {"MTIER_LIB_PATH": str(build / "libmtier.so"), "MTIER_SOCKET": str(socket_path)}


def _answer_lines() -> None:
    names: dict[str, Any] = {"lib": Library(os.environ["MTIER_LIB_PATH"]), "ctypes": ctypes, "os": os, "time": time}
    if "MTIER_CUDA_LIBRARY" in os.environ:
        with contextlib.suppress(OSError):
            names["cuda"] = ctypes.CDLL(os.environ["MTIER_CUDA_LIBRARY"])
    for line in sys.stdin:
        print(json.dumps(eval(line, names)), flush=True)


if __name__ == "__main__":
    _answer_lines()

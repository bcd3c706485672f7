"""X-Mem's own SDK, the wheel as it is on the index, against this library and service.

Its thin calls (`xmem.mtier_sdk`) work without a GPU; `offload` and `prefetch` copy from and to CUDA tensors. The SDK
connects on import and never unloads its library, so each test is a process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, client_environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xmem") is None or importlib.util.find_spec("torch") is None,
    reason="needs the packages xmem-mtier and torch",
)

THIN_CALLS = """
import ctypes, xmem
from xmem import mtier_sdk as sdk

MIB = 1 << 20
status = sdk.get_status()
assert (status.status, status.num_banks, status.bank_size) == (0, 2, 32 * MIB)
assert xmem.is_available() and xmem.mbank_count() == 2
bank = sdk.get_bank_status(1)
assert (bank.bank_id, bank.total_memory, bank.available_memory) == (1, 32 * MIB, 32 * MIB)
address = sdk.malloc(1, 5 * MIB)
data = bytes(range(256)) * (5 * MIB // 256)
ctypes.memmove(address, data, len(data))
assert ctypes.string_at(address, len(data)) == data
assert (xmem.memory_available(1), xmem.memory_allocated(1)) == (26 * MIB, 6 * MIB)
assert "MB of bank 1" in sdk.get_logs()

def raised(function, *arguments):
    try:
        function(*arguments)
    except sdk.MTierError as error:
        return type(error).__name__, str(error)

name, words = raised(sdk.malloc, 0, 1 << 40)
assert name == "MTierOutOfMemoryError" and "available" in words, words
name, words = raised(sdk.malloc, 2, 1)
assert name == "MTierInvalidArgumentError" and "no bank 2" in words, words
name, words = raised(sdk.free, 12345)
assert name == "MTierInvalidArgumentError" and "mTierFree" in words, words
sdk.free(address)
assert xmem.memory_allocated(1) == 0
sdk.malloc(0, MIB)
sdk.reset_all()
assert xmem.memory_allocated(0) == 0
print("done")
"""

KILLED_SERVICE = """
import os, signal, sys, xmem
from xmem import mtier_sdk as sdk

sdk.malloc(0, 1)
for process in sys.argv[1:]:
    os.kill(int(process), signal.SIGKILL)
for call in (sdk.get_status, lambda: sdk.get_bank_status(0), lambda: sdk.malloc(0, 1), sdk.get_logs, sdk.init):
    try:
        call()
    except sdk.MTierServiceUnavailableError as error:
        assert "mtierd" in str(error)
    else:
        raise AssertionError("no error")
assert not xmem.is_available()
print("done")
"""


def run_sdk(script: str, build: Path, socket_path: Path, *arguments: str) -> str:
    """What a script with the SDK printed; it has to end well."""
    environment = {**os.environ, **client_environment(build, socket_path)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_thin_calls(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--bank", f"host:{32 * MIB}", "--allow-reset")
    assert run_sdk(THIN_CALLS, build, daemon.socket_path) == "done\n"
    assert daemon.available() == 64 * MIB


def test_errors_of_a_killed_service(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert run_sdk(KILLED_SERVICE, build, daemon.socket_path, str(daemon.process.pid), str(daemon.serving)) == "done\n"

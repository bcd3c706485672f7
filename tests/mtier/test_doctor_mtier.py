"""The doctor with X-Mem's own SDK over mtierd: banks and verdict, and a service that does not answer."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, client_environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xmem") is None or importlib.util.find_spec("torch") is None,
    reason="needs the packages xmem-mtier and torch",
)


def doctor(build: Path, socket_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "sglang_xmem.cli", "doctor", "--json", "--no-bandwidth", *arguments]
    environment = {**os.environ, **client_environment(build, socket_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


@pytest.mark.cpu_engine
def test_banks_and_verdict(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--bank", f"host:{32 * MIB}")
    status, found = doctor(build, daemon.socket_path, "--hicache-size", "0.06")
    assert status == 0
    assert found["xmem"]["library_exists"] is True
    assert found["xmem"]["banks"] == [{"total_bytes": n * MIB, "available_bytes": n * MIB} for n in (64, 32)]
    assert found["tiers"]["takes"] == "mtier"
    assert found["tiers"]["found"][0]["room_bytes"] == 96 * MIB  # a pool is striped over both
    _, found = doctor(build, daemon.socket_path, "--hicache-size", "0.11")
    assert "0.10 GB are free" in found["tiers"]["found"][0]["reason"]
    assert daemon.status()["clients"] == [], "the doctor's child has left"


def test_a_service_that_does_not_answer(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    daemon.send(signal.SIGSTOP)
    _, found = doctor(build, daemon.socket_path)
    assert found["xmem"]["banks"] is None
    reason = found["tiers"]["found"][0]["reason"]
    assert "mtierd" in reason
    assert "\n" not in reason

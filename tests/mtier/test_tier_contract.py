"""Tier mtier keeps the contract of tiers; in a process of its own, since the SDK connects once in a process's life."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, client_environment


@pytest.mark.skipif(importlib.util.find_spec("xmem") is None, reason="needs the package xmem-mtier")
def test_contract(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--bank", f"host:{16 * MIB}", "--bank", f"host:{64 * MIB}")
    suite = REPOSITORY / "tests" / "contracts" / "mtier_in_process.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    variables = {**os.environ, **client_environment(build, daemon.socket_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

"""What the tests' own configuration promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import REPOSITORY

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]

ENDLESS = """
import time
from pathlib import Path

def test_endless():
    here = Path(__file__).parent
    try:
        (here / "begun").touch()
        time.sleep(60)
    finally:
        (here / "cleaned_up").touch()
"""


#: Its first test takes an interrupt for its own; the second is never to run.
SWALLOWS = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def test_that_handles_interrupts():
    try:
        (HERE / "begun").touch()
        time.sleep(60)
    except KeyboardInterrupt:
        (HERE / "cleaned_up").touch()

def test_that_comes_next():
    (HERE / "went_on").touch()
"""


@pytest.mark.parametrize("tests", [ENDLESS, SWALLOWS])
def test_tests_that_are_terminated_clean_up(tmp_path: Path, tests: str) -> None:
    (tmp_path / "test_endless.py").write_text(tests)
    process = subprocess.Popen(
        [*PYTEST, "--rootdir", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 2, "interrupted"
    finally:
        process.kill()
    assert (tmp_path / "cleaned_up").exists()
    assert not (tmp_path / "went_on").exists()


IMPORTS_SGLANG = """
import os

def test_imports():
    assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    from transformers import Qwen3ForCausalLM
"""


@pytest.mark.cpu_engine
def test_plain_pytest_has_the_cpu_engine(tmp_path: Path) -> None:
    """Where the variable was not set when the interpreter started, and its .pth files were run."""
    pytest.importorskip("sglang_cpu")
    (tmp_path / "test_imports.py").write_text(IMPORTS_SGLANG)
    environment = {name: value for name, value in os.environ.items() if name != "SGLANG_USE_CPU_ENGINE"}
    done = subprocess.run(
        [*PYTEST, "--rootdir", str(tmp_path)],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

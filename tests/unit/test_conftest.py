"""What the tests' own configuration promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

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


def test_tests_that_are_terminated_clean_up(tmp_path: Path) -> None:
    (tmp_path / "test_endless.py").write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
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

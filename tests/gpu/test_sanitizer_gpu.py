"""compute-sanitizer finds nothing in the kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).with_name("sanitize_kernels.py")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizer(tool: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on PATH")
    # API errors: cuda-bindings asks the driver for functions newer than it, and takes no for an answer.
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "99"]
    found = subprocess.run(
        ["compute-sanitizer", *options, sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300
    )
    output = found.stdout + found.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this machine")
    assert found.returncode == 0, output[-3000:]
    assert "wrong 0" in output

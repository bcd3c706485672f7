"""The ledger and index of page frames against a model, with the sanitizers (pages_model.cpp)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("pages_model.cpp")
OPERATIONS = os.environ.get("SGLANG_XMEM_MODEL_OPERATIONS", "1000000")


def model(directory: Path, *flags: str) -> Path:
    """`pages_model`, compiled; skips where the compiler has no such sanitizer."""
    program = directory / "pages_model"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    probe = subprocess.run(
        [*command, *flags, "-x", "c++", "-", "-o", "/dev/null"], input="int main() {}", text=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip(f"the compiler has no {flags[0]}")
    subprocess.run([*command, *flags, str(SOURCE), "-o", str(program)], check=True)
    return program


def test_a_million_operations_of_64_sessions_and_kills(tmp_path: Path) -> None:
    program = model(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    done = subprocess.run([program, OPERATIONS, "1"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_pinned_does_not_change_under_64_threads(tmp_path: Path) -> None:
    program = model(tmp_path, "-fsanitize=thread")
    # ThreadSanitizer wants the addresses that it knows.
    done = subprocess.run(
        ["setarch", "-R", str(program), "threads", "2", "1"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]

"""The commands over a real engine: SGLang's CPU engine with tier dram."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu_engine


def run(output: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "sglang_xmem.cli", "bench", *arguments, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "dram" in done.stdout
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_ttft(tmp_path: Path) -> None:
    arguments = ["--shape", "tiny", "--backends", "dram", "--sizes", "256", "--rounds", "2", "--quick"]
    rows = run(tmp_path / "ttft.jsonl", "ttft", *arguments)
    assert {row["backend"]: row["hits"] for row in rows} == {
        "recompute": {"device": 0, "host": 0},
        "hbm": {"device": 240, "host": 0},
        "dram": {"device": 0, "host": 240},
    }
    for row in rows:
        assert row["outputs_equal"]
        assert row["complete"]
        assert row["samples_unproven"] == 0
    assert (tmp_path / "ttft.png").exists()


def test_multiturn_concurrently(tmp_path: Path) -> None:
    """Streams of several agents at once, whose contexts together exceed the device pool."""
    sizes = ["--system-tokens", "64", "--context-tokens", "192", "--turn-tokens", "32", "--output-tokens", "4"]
    arguments = ["--shape", "tiny", "--backends", "dram", "--quick", "--turns", "2", "--no-plots"]
    rows = run(tmp_path / "multiturn.jsonl", "multiturn", *arguments, *sizes)
    turns = {row["turn"]: row for row in rows}
    assert set(turns) == {0, 1, None}
    assert turns[1]["hit_ratio"]["total"] > 0.8
    assert turns[None]["samples"] == 6

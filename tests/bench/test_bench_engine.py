"""The commands over a real engine: SGLang's CPU engine with tier dram. Nothing here is about speed."""

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
    # The engine's own limit is --timeout, 30 minutes, which ends it on the busiest machine.
    done = subprocess.run(
        [*command, "--shape", "tiny", "--backends", "dram"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "dram" in done.stdout
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_ttft(tmp_path: Path) -> None:
    rows = run(tmp_path / "r.jsonl", "ttft", "--sizes", "256", "--rounds", "2", "--quick")
    assert {row["backend"]: row["hits"] for row in rows} == {
        "recompute": {"device": 0, "host": 0},
        "hbm": {"device": 240, "host": 0},
        "dram": {"device": 0, "host": 240},
    }
    for row in rows:
        assert row["outputs_equal"]
        assert row["complete"]
        assert row["samples_unproven"] == 0
        assert row["forward_ms"] > 0, "SGLang says when the forward pass began and ended"


def test_multiturn_concurrently(tmp_path: Path) -> None:
    """Streams of several agents at once, whose contexts together exceed the device pool."""
    sizes = ["--system-tokens", "64", "--context-tokens", "192", "--turn-tokens", "32", "--output-tokens", "4"]
    rows = run(tmp_path / "multiturn.jsonl", "multiturn", "--quick", "--turns", "2", *sizes)
    turns = {row["turn"]: row for row in rows}
    assert set(turns) == {0, 1, None}
    assert turns[1]["hit_ratio"]["total"] > 0.8
    assert turns[None]["samples"] == 6


def test_throughput(tmp_path: Path) -> None:
    """Full hits come from the tier."""
    rows = run(tmp_path / "throughput.jsonl", "throughput", "--quick")
    by_ratio = {row["hit_ratio"]: row for row in rows}
    assert set(by_ratio) == {0.0, 0.5, 1.0}
    assert all(row["samples_unproven"] == 0 and row["complete"] for row in rows)
    assert by_ratio[1.0]["hits"] == {"device": 0, "host": 240}


def test_trace(tmp_path: Path) -> None:
    """By bench_serving: three conversations of four turns, round-robin; the device pool holds one of them."""
    trace = tmp_path / "trace.jsonl"
    turns = [
        {
            "timestamp": 50 * (3 * turn + who),
            "input_length": 512 * (2 + turn),
            "output_length": 4,
            "hash_ids": [0, *(100 * who + block for block in range(1, turn + 2))],
        }
        for turn in range(4)
        for who in range(3)
    ]
    trace.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    sizes = ["--max-tokens", "2560", "--device-tokens", "3K"]
    (row,) = run(tmp_path / "rows.jsonl", "trace", str(trace), *sizes, "--speed", "max", "--concurrency", "1")
    assert row["samples"] == 12
    assert row["hit_ratio"]["host"] > 0.2
    assert row["hit_ratio"]["total"] > 0.9 * row["ideal_hit_ratio"]
    assert row["prompt_tokens"] == sum(int(str(turn["input_length"])) for turn in turns), "the recorded lengths"

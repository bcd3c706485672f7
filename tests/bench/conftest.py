"""Benchmarks with the fake worker in place of SGLang."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_worker import FAKE_WORKER, Bench

from sglang_xmem import cli
from sglang_xmem.bench import engine, runs


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Run `sglang-xmem bench ...` with the fake worker: exit status and all rows of its output file."""
    monkeypatch.setattr(engine, "WORKER", (sys.executable, str(FAKE_WORKER)))
    monkeypatch.setattr(runs, "has_gpu", lambda: False)
    monkeypatch.setattr(runs.gpus, "visible_gpus", lambda: range(0))
    monkeypatch.setenv("PYTHONPATH", str(Path(engine.__file__).resolve().parents[2]))

    def run(*arguments: str, how: dict[str, Any] | None = None) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setenv("FAKE_ENGINE", json.dumps(how or {}))
        output = tmp_path / "rows.jsonl"
        status = cli.main(["bench", *arguments, "--shape", "tiny", "--output", str(output)])
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return status, rows

    return run

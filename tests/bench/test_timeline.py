"""Traces of SGLang's profiler: what of them counts, and what it adds up to."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem.bench import timeline


def event(name: str, start_us: float, us: float, category: str = "kernel", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start_us, "dur": us, "pid": 0, "args": args}


def test_traces_are_read(tmp_path: Path) -> None:
    kernel: dict[str, Any] = {
        "device": 1,
        "grid": [8, 1, 1],
        "block": [96, 1, 1],
        "registers per thread": 40,
        "shared memory": 1024,
    }
    traces = {
        "a-TP-0": [
            event("x" * 300, 2000.0, 10.0, **kernel),
            event("Memcpy HtoD", 1000.0, 5.0, "gpu_memcpy", device=0, bytes=64),
            event("cudaLaunchKernel", 1.0, 1.0, "cuda_runtime"),
            {"ph": "M", "cat": "kernel", "name": "process_name"},
        ],
        "a-TP-1": [event("Memset", 1500.0, 1.0, "gpu_memset", device=2)],
    }
    for name, events in traces.items():
        with gzip.open(tmp_path / f"{name}.trace.json.gz", "wt") as file:
            json.dump({"traceEvents": events, "baseTimeNanoseconds": 5_000_000_000}, file)
    (tmp_path / "other.json").write_text("no trace")
    copy, memset, long = timeline.read_traces(tmp_path)
    assert copy == {"gpu": 0, "kernel": "Memcpy HtoD", "start_ms": 5001.0, "ms": 0.005, "bytes": 64}
    assert memset["gpu"] == 2
    assert long["kernel"] == "x" * timeline.NAME_LENGTH
    assert (long["gpu"], long["start_ms"], long["registers"], long["shared_bytes"]) == (1, 5002.0, 40, 1024)


def test_rows_by_kernel() -> None:
    events = [
        {"gpu": 0, "kernel": "a", "start_ms": 10.0, "ms": 2.0, "grid": [1, 1, 1]},
        {"gpu": 0, "kernel": "a", "start_ms": 11.0, "ms": 4.0, "grid": [2, 1, 1]},
        {"gpu": 0, "kernel": "copy", "start_ms": 14.0, "ms": 3.0, "bytes": 10},
        {"gpu": 0, "kernel": "copy", "start_ms": 20.0, "ms": 1.0, "bytes": 20},
    ]
    whole, a, copy = timeline.by_kernel(events, asked_ms=8.0)
    assert (whole["kernel"], whole["count"], whole["total_ms"]) == ("all", 4, 8.0), "10 to 17 and 20 to 21"
    assert (whole["first_ms"], whole["last_ms"]) == (2.0, 13.0)
    assert (a["total_ms"], a["median_us"], a["max_us"], a["grid"]) == (6.0, 3000.0, 4000.0, [2, 1, 1])
    assert (copy["bytes"], copy["first_ms"], copy["last_ms"]) == (30, 6.0, 13.0)
    assert timeline.by_kernel([], asked_ms=0.0) == []


def test_table_has_the_differences_first() -> None:
    rows = [
        {"backend": "peer", "prompt_tokens": 64, "hit": hit, "gpu": 0, "kernel": kernel, "total_ms": ms}
        | {"first_ms": 0.0, "last_ms": ms}
        for hit, kernel, ms in (
            ("tier", "all", 9.0),
            ("tier", "same", 8.0),
            ("tier", "slower", 3.0),
            ("tier", "page_copy", 4.0),
            ("hbm", "all", 8.5),
            ("hbm", "same", 8.0),
            ("hbm", "slower", 2.0),
        )
    ]
    title, header, lines = timeline.table(rows, count=3)
    assert "peer, 64 tokens" in title
    assert header[2:4] == ["tier ms", "hbm ms"]
    assert [line[0] for line in lines] == ["all", "page_copy", "slower"]
    assert lines[1][2:4] == ["4.00", "-"]


@pytest.mark.parametrize("name", ["", "x.trace.json"])
def test_a_folder_without_traces(tmp_path: Path, name: str) -> None:
    if name:
        (tmp_path / name).write_text("{}")
    assert timeline.read_traces(tmp_path) == []

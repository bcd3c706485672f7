"""What GPUs do during one request: kernels and copies by name, for `bench ttft --timeline`.

SGLang's own profiler (PyTorch's, CUDA activities alone) records one request; its trace is read here. The recording
slows the request down, so its wall time is no measurement: kernels' times and the order of things are.
"""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

#: Categories of a trace's events that occupy a GPU.
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
#: Characters of a kernel's name that are kept: template arguments go on for pages.
NAME_LENGTH = 100

Row = dict[str, Any]


def read_traces(folder: Path) -> list[Row]:
    """Events of all traces in a folder that occupied a GPU, by start.

    Returns:
        Rows of `gpu` (CUDA ordinal), `kernel` (its name), `start_ms` (Unix time), `ms`, and for kernels `grid`,
        `block`, `registers`, `shared_bytes`; for copies `bytes`.
    """
    events = []
    for path in sorted(folder.glob("*.trace.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            trace = json.load(file)
        base_ms = trace.get("baseTimeNanoseconds", 0) / 1e6
        for event in trace["traceEvents"]:
            if event.get("ph") == "X" and event.get("cat") in ON_GPU:
                about = event.get("args", {})
                row = {
                    "gpu": int(about.get("device", event.get("pid", 0))),
                    "kernel": event["name"][:NAME_LENGTH],
                    "start_ms": base_ms + event["ts"] / 1e3,
                    "ms": event["dur"] / 1e3,
                    "grid": about.get("grid"),
                    "block": about.get("block"),
                    "registers": about.get("registers per thread"),
                    "shared_bytes": about.get("shared memory"),
                    "bytes": about.get("bytes"),
                }
                events.append({key: value for key, value in row.items() if value is not None})
    return sorted(events, key=lambda row: row["start_ms"])


def by_kernel(events: Iterable[Row], asked_ms: float) -> list[Row]:
    """A row for each GPU and kernel, and one for each GPU as a whole, the longest first.

    Args:
        events: of `read_traces`.
        asked_ms: Unix time of the request; `first_ms` and `last_ms` count from there.
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    gpus: dict[int, list[Row]] = {}
    for event in events:
        groups.setdefault((event["gpu"], event["kernel"]), []).append(event)
        gpus.setdefault(event["gpu"], []).append(event)
    rows = []
    for (gpu, kernel), group in groups.items():
        times = [event["ms"] for event in group]
        row: Row = {"gpu": gpu, "kernel": kernel, "count": len(group), "total_ms": round(sum(times), 3)}
        row.update(median_us=round(1e3 * statistics.median(times), 1), max_us=round(1e3 * max(times), 1))
        row.update(_span(group, asked_ms))
        # Of launches of several shapes the longest speaks for all.
        longest = max(group, key=lambda event: event["ms"])
        row.update({key: longest[key] for key in ("grid", "block", "registers", "shared_bytes") if key in longest})
        if "bytes" in longest:
            row["bytes"] = sum(event["bytes"] for event in group)
        rows.append(row)
    for gpu, group in gpus.items():
        whole: Row = {"gpu": gpu, "kernel": "all", "count": len(group), "total_ms": round(busy_ms(group), 3)}
        rows.append({**whole, **_span(group, asked_ms)})
    return sorted(rows, key=lambda row: (row["gpu"], -row["total_ms"]))


def busy_ms(events: Iterable[Row]) -> float:
    """Time during which at least one of the events was under way."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda row: row["start_ms"]):
        end = event["start_ms"] + event["ms"]
        total += max(0.0, end - max(until, event["start_ms"]))
        until = max(until, end)
    return total


def _span(events: Sequence[Row], asked_ms: float) -> Row:
    first = min(event["start_ms"] for event in events)
    last = max(event["start_ms"] + event["ms"] for event in events)
    return {"first_ms": round(first - asked_ms, 3), "last_ms": round(last - asked_ms, 3)}


def table(rows: Sequence[Row], count: int = 12) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and lines: the kernels of an engine whose time differs most between a tier's hit and HBM's."""
    hits = list(dict.fromkeys(row["hit"] for row in rows))
    cells: dict[tuple[int, str], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["gpu"], row["kernel"]), {})[row["hit"]] = row

    def spread(cell: dict[str, Row]) -> float:
        times = [cell[hit]["total_ms"] if hit in cell else 0.0 for hit in hits]
        return max(times) - min(times) if len(times) > 1 else times[0]

    chosen = sorted(cells, key=lambda key: (key[1] != "all", -spread(cells[key])))[:count]
    lines = []
    for gpu, kernel in chosen:
        cell = cells[gpu, kernel]
        times = [f"{cell[hit]['total_ms']:.2f}" if hit in cell else "-" for hit in hits]
        spans = [f"{cell[hit]['first_ms']:.1f} to {cell[hit]['last_ms']:.1f}" if hit in cell else "-" for hit in hits]
        lines.append([kernel[:60], str(gpu), *times, *spans])
    title = f"Where the GPUs' time goes: {rows[0]['backend']}, {rows[0]['prompt_tokens']} tokens (recorded, so slower)"
    header = ["kernel", "GPU", *(f"{hit} ms" for hit in hits), *(f"{hit}: from - to, ms" for hit in hits)]
    return title, header, lines

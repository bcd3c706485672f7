"""Compares two results, and separates changes from noise.

A and B are JSON Lines files, or ids of runs in the files under --results. A file means its last run; FILE#RUN names
another. A difference smaller than the spread of either side is noise. With one sample on a side there is no verdict.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_xmem.bench import report, stats
from sglang_xmem.errors import ConfigError

FASTER, SLOWER, NOISE, UNKNOWN, MISSING = "faster", "slower", "noise", "one sample", "not measured"

#: What is compared of each benchmark's rows: a rate, of which more is better, or the median of ttft_ms.
METRICS = {
    "ttft": "TTFT p50 ms",
    "throughput": "tokens_per_s",
    "multiturn": "TTFT p50 ms",
    "trace": "TTFT p50 ms",
    "copy": "gbps",
}


class Change(NamedTuple):
    """One row of A and the same of B.

    Attributes:
        what: values that name the row.
        a, b: the metric.
        spread: of the wider side, in the metric's unit; None with one sample.
        verdict: faster, slower, noise, "one sample", or "not measured" where B has the row and no number, such as a hit
            that no sample has proof of.
    """

    what: tuple[Any, ...]
    a: float
    b: float
    spread: float | None
    verdict: str

    @property
    def change(self) -> float:
        """Relative to A."""
        return self.b / self.a - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="FILE, FILE#RUN or RUN")
    parser.add_argument("b", help="the same")
    results = "folder where runs are looked for; default docs/results"
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help=results)
    fail = "exit with 1 if anything is slower or not measured"
    parser.add_argument("--fail-on-slower", action="store_true", help=fail)


def run(args: argparse.Namespace) -> int:
    a, b = load(args.a, args.results), load(args.b, args.results)
    benches = {row.get("bench") for row in [*a, *b]}
    if len(benches) != 1 or (bench := str(next(iter(benches)))) not in METRICS:
        raise ConfigError(
            f"{args.a} and {args.b} are not two results of one benchmark. Compare {', '.join(METRICS)} with its like."
        )
    changes = compare(a, b)
    if not changes:
        raise ConfigError(f"{args.a} and {args.b} have no row in common. Name other runs.")
    lines = []
    for change in changes:
        b_cells = ["-", "-"] if change.verdict == MISSING else [f"{change.b:.2f}", f"{change.change:+.1%}"]
        spread = "-" if change.spread is None else f"{change.spread:.2f}"
        lines.append([_words(change.what), f"{change.a:.2f}", *b_cells, spread, change.verdict])
    title = f"{bench}, {METRICS[bench]}: A = {a[0].get('run')}, B = {b[0].get('run')}"
    report.show_table(title, [" ".join(report.IDENTITY[bench]), "A", "B", "change", "spread", "B is"], lines)
    for side, rows, other in (("A", a, b), ("B", b, a)):
        alone = {report.identity(row) for row in rows} - {report.identity(row) for row in other}
        if alone:
            print(f"only in {side}: " + "; ".join(sorted(_words(what[1:]) for what in alone)))
    for name in ("shape", "page_size", "tp_size", "machine"):
        values = [{str(row[name]) for row in rows if name in row} for rows in (a, b)]
        if all(values) and values[0] != values[1]:
            print(f"not the same {name}: A {', '.join(sorted(values[0]))}, B {', '.join(sorted(values[1]))}")
    return 1 if args.fail_on_slower and any(change.verdict in (SLOWER, MISSING) for change in changes) else 0


def _words(what: Sequence[Any]) -> str:
    return " ".join("all" if value is None else str(value) for value in what)


def load(name: str, results: Path) -> list[dict[str, Any]]:
    """Rows of one run: of a file, a file's run, or a run's id.

    Raises:
        ConfigError: there is none.
    """
    file, _, run_id = name.partition("#")
    path = Path(file)
    if path.is_file():
        rows = report.read_rows(path)
        run_id = run_id or next((str(row["run"]) for row in reversed(rows) if "run" in row), "")
        found = report.rows_of_run(rows, run_id)
    else:
        candidates = [p for p in sorted(results.glob("*.jsonl")) if not p.name.endswith(".runs.jsonl")]
        found = [row for p in candidates for row in report.rows_of_run(report.read_rows(p), name)]
        # Timelines have the id of the run that they were recorded in.
        found = [row for row in found if row.get("bench") in METRICS] or found
    if not found:
        raise ConfigError(f"{name} is neither a file with results nor a run in {results}/*.jsonl. Name one of these.")
    for row in found:
        report.check_row(row, path)
    return found


def _value(row: dict[str, Any], metric: str) -> float | None:
    found = row["ttft_ms"]["p50"] if metric == "TTFT p50 ms" else row.get(metric)
    return None if found is None else float(found)


def compare(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> list[Change]:
    """Rows that both sides have, in A's order."""
    other = {report.identity(row): row for row in report.merged(b)}
    changes = []
    for row in report.merged(a):
        match, what = other.get(report.identity(row)), report.identity(row)[1:]
        metric = METRICS[str(row["bench"])]
        first, second = _value(row, metric), None if match is None else _value(match, metric)
        if match is None or not first:
            continue
        if not second:
            changes.append(Change(what, first, math.nan, None, MISSING))
            continue
        mine, theirs = report.interval(row), report.interval(match)
        spread, verdict = None, UNKNOWN
        if mine is not None and theirs is not None:
            spread = max(mine[1] - mine[0], theirs[1] - theirs[0])
            better = (second > first) == (metric != "TTFT p50 ms")
            verdict = (FASTER if better else SLOWER) if stats.differs(mine, theirs, second - first) else NOISE
        changes.append(Change(what, first, second, spread, verdict))
    return changes

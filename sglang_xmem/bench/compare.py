"""`sglang-xmem bench compare A B`: what changed between two results, with the spread in view.

A and B are JSON Lines files, or ids of runs in the files under --results. Of a file the last run counts, or with
FILE#RUN the one that is named. A difference smaller than the spread of either side is called noise, and where a side
has one sample, nothing is said.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_xmem.bench import report, stats
from sglang_xmem.errors import ConfigError

FASTER, SLOWER, NOISE, UNKNOWN, MISSING = "faster", "slower", "noise", "one sample", "not measured"


@dataclass(frozen=True)
class Metric:
    """The number of a row that is compared: its name, and whether more of it is better."""

    name: str
    more_is_better: bool

    def value(self, row: dict[str, Any]) -> float | None:
        """In the metric's unit; None where nothing was measured."""
        found = row["ttft_ms"]["p50"] if self.name == "TTFT p50 ms" else row.get(self.name)
        return None if found is None else float(found)


METRICS = {
    "ttft": Metric("TTFT p50 ms", False),
    "throughput": Metric("tokens_per_s", True),
    "multiturn": Metric("TTFT p50 ms", False),
    "trace": Metric("TTFT p50 ms", False),
    "copy": Metric("gbps", True),
}


@dataclass(frozen=True)
class Change:
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
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder where runs are looked for")
    parser.add_argument(
        "--fail-on-slower", action="store_true", help="exit with 1 if anything is slower or not measured"
    )


def run(args: argparse.Namespace) -> int:
    a, b = load(args.a, args.results), load(args.b, args.results)
    benches = {row.get("bench") for row in [*a, *b]}
    if len(benches) != 1 or (bench := str(next(iter(benches)))) not in METRICS:
        raise ConfigError(
            f"{args.a} and {args.b} are not two results of one benchmark; compare {', '.join(METRICS)} with its like."
        )
    changes = compare(a, b)
    if not changes:
        raise ConfigError(f"{args.a} and {args.b} have no row in common.")
    lines = [
        [
            " ".join(_label(value) for value in change.what),
            f"{change.a:.2f}",
            "-" if change.verdict == MISSING else f"{change.b:.2f}",
            "-" if change.verdict == MISSING else f"{change.change:+.1%}",
            "-" if change.spread is None else f"{change.spread:.2f}",
            change.verdict,
        ]
        for change in changes
    ]
    title = f"{bench}, {METRICS[bench].name}: A = {a[0].get('run')}, B = {b[0].get('run')}"
    report.show_table(title, [" ".join(report.IDENTITY[bench]), "A", "B", "change", "spread", "B is"], lines)
    for side, rows, other in (("A", a, b), ("B", b, a)):
        alone = {report.identity(row) for row in rows} - {report.identity(row) for row in other}
        if alone:
            print(f"only in {side}: " + "; ".join(sorted(" ".join(_label(v) for v in what[1:]) for what in alone)))
    for name in ("shape", "page_size", "tp_size"):
        values = [{str(row.get(name)) for row in rows} for rows in (a, b)]
        if values[0] != values[1]:
            print(f"not the same {name}: A {', '.join(sorted(values[0]))}, B {', '.join(sorted(values[1]))}")
    return 1 if args.fail_on_slower and any(change.verdict in (SLOWER, MISSING) for change in changes) else 0


def _label(value: Any) -> str:
    return "all" if value is None else str(value)


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
        raise ConfigError(f"{name} is neither a file with results nor a run in {results}/*.jsonl.")
    return found


def compare(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> list[Change]:
    """Rows that both sides have, in A's order."""
    other = {report.identity(row): row for row in report.merged(b)}
    changes = []
    for row in report.merged(a):
        match = other.get(report.identity(row))
        if match is None:
            continue
        metric = METRICS[str(row["bench"])]
        first, second = metric.value(row), metric.value(match)
        if not first:
            continue
        if not second:
            changes.append(Change(report.identity(row)[1:], first, math.nan, None, MISSING))
            continue
        spreads = report.interval(row), report.interval(match)
        spread, verdict = None, UNKNOWN
        if spreads[0] is not None and spreads[1] is not None:
            spread = max(high - low for high, low in ((s[1], s[0]) for s in spreads if s is not None))
            if metric.name == "gbps":  # the spread is of times; as a share it is the same
                spread = max((s[1] - s[0]) / s[1] for s in spreads if s is not None) * max(first, second)
                noise = abs(second - first) <= spread
            else:
                noise = not stats.differs(spreads[0], spreads[1], second - first)
            verdict = NOISE if noise else FASTER if (second > first) == metric.more_is_better else SLOWER
        changes.append(Change(report.identity(row)[1:], first, second, spread, verdict))
    return changes

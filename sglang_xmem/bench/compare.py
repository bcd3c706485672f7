"""Compares two results, and separates changes from noise.

A and B are JSON Lines files, or ids of runs in the files under --results. A file means its last run; FILE#RUN names
another. A difference smaller than the spread of either side is noise. With one sample on a side there is no verdict.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_xmem.bench import report, stats
from sglang_xmem.bench.report import KINDS, Row
from sglang_xmem.errors import ConfigError

FASTER, SLOWER, NOISE, UNKNOWN, MISSING = "faster", "slower", "noise", "one sample", "not measured"
COMPARED = [name for name, kind in KINDS.items() if kind.metric]


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
        """Of B to A, as a share of A."""
        return self.b / self.a - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="FILE, FILE#RUN or RUN")
    parser.add_argument("b", help="the same")
    results = "folder where runs are looked for; default docs/results"
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help=results)
    fail = "exit with 1 if anything is slower or not measured"
    parser.add_argument("--fail-on-slower", action="store_true", help=fail)


def run(args: argparse.Namespace) -> int:
    a, b = find(args.a, args.results), find(args.b, args.results)
    benches = {row["bench"] for row in [*a, *b]}
    bench = next(iter(benches))
    if len(benches) != 1 or bench not in COMPARED:
        raise ConfigError(
            f"{args.a} and {args.b} are not two results of one benchmark. Compare {', '.join(COMPARED)} with its like."
        )
    changes = compare(a, b)
    if not changes:
        raise ConfigError(f"{args.a} and {args.b} have no row in common. Name other runs.")
    lines = []
    for change in changes:
        b_cells = ["-", "-"] if change.verdict == MISSING else [f"{change.b:.2f}", f"{change.change:+.1%}"]
        spread = "-" if change.spread is None else f"{change.spread:.2f}"
        lines.append([_words(change.what), f"{change.a:.2f}", *b_cells, spread, change.verdict])
    title = f"{bench}, {KINDS[bench].metric}: A = {a[0]['run']}, B = {b[0]['run']}"
    report.show_table(title, [" ".join(KINDS[bench].identity), "A", "B", "change", "spread", "B is"], lines)
    for side, rows, other in (("A", a, b), ("B", b, a)):
        alone = {report.identity(row)[1:] for row in rows} - {report.identity(row)[1:] for row in other}
        if alone:
            print(f"only in {side}: " + "; ".join(sorted(map(_words, alone))))
    for name in ("shape", "page_size", "tp_size", "machine"):
        values = [{str(row[name]) for row in rows if name in row} for rows in (a, b)]
        if all(values) and values[0] != values[1]:
            print(f"not the same {name}: A {', '.join(sorted(values[0]))}, B {', '.join(sorted(values[1]))}")
    return 1 if args.fail_on_slower and any(change.verdict in (SLOWER, MISSING) for change in changes) else 0


def _words(what: Sequence[Any]) -> str:
    return " ".join("all" if value is None else str(value) for value in what)


def find(name: str, results: Path) -> list[Row]:
    """Flat rows of one run: of a file, a file's run, or a run's id.

    Raises:
        ConfigError: there is none.
    """
    file, _, run_id = name.partition("#")
    if Path(file).is_file():
        rows = report.load(Path(file))
        found = [row for row in rows if row["run"] == (run_id or rows[-1]["run"])]
    else:
        # Other files have a run's id too, such as those of timelines.
        rows = [report.flat(row) for path in sorted(results.glob("*.jsonl")) for row in report.read_rows(path)]
        mine = [row for row in rows if row.get("run") == name and row.get("bench") in COMPARED]
        found = [row for row in mine if report.problem(row) is None]
    if not found:
        raise ConfigError(f"{name} is neither a file with results nor a run in {results}/*.jsonl. Name one of these.")
    return [row for row in found if "skipped" not in row and "error" not in row] or found


def compare(a: Iterable[Row], b: Iterable[Row]) -> list[Change]:
    """Rows that both sides have, in A's order."""
    other = {report.identity(row): row for row in report.merged(b)}
    changes = []
    for row in report.merged(a):
        match, what = other.get(report.identity(row)), report.identity(row)[1:]
        metric = str(KINDS[row["bench"]].metric)
        if match is None or not row.get(metric):
            continue
        first, second = row[metric], match.get(metric)
        if not second:
            changes.append(Change(what, first, math.nan, None, MISSING))
            continue
        mine, theirs = report.interval(row), report.interval(match)
        spread, verdict = None, UNKNOWN
        if mine is not None and theirs is not None:
            spread = max(mine[1] - mine[0], theirs[1] - theirs[0])
            better = (second > first) == ("_ms" not in metric)
            verdict = (FASTER if better else SLOWER) if stats.differs(mine, theirs, second - first) else NOISE
        changes.append(Change(what, first, second, spread, verdict))
    return changes

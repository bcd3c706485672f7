"""Compares two results, and separates changes from noise.

A and B are JSON Lines files. A file means its last run; FILE#RUN names another. A difference smaller than the spread of
either side is noise. With one sample on a side there is no verdict.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sglang_xmem.bench import report, stats
from sglang_xmem.bench.report import KINDS, Row
from sglang_xmem.errors import ConfigError

FASTER, SLOWER, NOISE, UNKNOWN, MISSING = "faster", "slower", "noise", "one sample", "not measured"
COMPARED = [name for name, kind in KINDS.items() if kind.metric]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="FILE or FILE#RUN")
    parser.add_argument("b", help="the same")
    fail = "exit with 1 if anything is slower or not measured"
    parser.add_argument("--fail-on-slower", action="store_true", help=fail)


def run(args: argparse.Namespace) -> int:
    a, b = find(args.a), find(args.b)
    bench = a[0]["bench"]
    if {row["bench"] for row in [*a, *b]} != {bench}:
        raise ConfigError(f"{args.a} and {args.b} are not of one benchmark. Compare a result with its like.")
    other, lines, verdicts = {report.identity(row): row for row in b}, [], set()
    for row in a:
        match, metric = other.get(report.identity(row)), KINDS[bench].metric
        if match is None or not row[metric]:
            continue
        verdict, spread = judged(row, match)
        verdicts.add(verdict)
        first, second = row[metric], match[metric]
        b_cells = [f"{second:.2f}", f"{second / first - 1:+.1%}"] if second else ["-", "-"]
        lines.append([_words(row), f"{first:.2f}", *b_cells, "-" if spread is None else f"{spread:.2f}", verdict])
    if not lines:
        raise ConfigError(f"{args.a} and {args.b} have no row in common. Name other runs.")
    title = f"{bench}, {KINDS[bench].metric}: A = {a[0]['run']}, B = {b[0]['run']}"
    report.show_table(title, [f"{KINDS[bench].what} shape", "A", "B", "change", "spread", "B is"], lines)
    for side, rows, others in (("A", a, b), ("B", b, a)):
        alone = {report.identity(row): row for row in rows}.keys() - set(map(report.identity, others))
        if alone:
            print(f"only in {side}: " + "; ".join(_words(row) for row in rows if report.identity(row) in alone))
    for name in ("shape", "page_size", "tp_size", "machine"):
        values = [{str(row[name]) for row in rows if name in row} for rows in (a, b)]
        if all(values) and values[0] != values[1]:
            print(f"not the same {name}: A {', '.join(sorted(values[0]))}, B {', '.join(sorted(values[1]))}")
    return int(args.fail_on_slower and bool(verdicts & {SLOWER, MISSING}))


def _words(row: Row) -> str:
    return " ".join("all" if value is None else str(value) for value in report.identity(row))


def find(name: str) -> list[Row]:
    """Flat rows of one run of a file, of those that are measurements, one for each identity.

    Raises:
        ConfigError: there is none.
    """
    file, _, run_id = name.partition("#")
    rows = report.load(Path(file))
    found = [row for row in rows if row["run"] == (run_id or rows[-1]["run"]) and report.is_measured(row)]
    if not found or any(row["bench"] not in COMPARED for row in found):
        raise ConfigError(
            f"{name} has no measurements of {', '.join(COMPARED)}. Name another run; `report {file} --list` lists them."
        )
    return report.merged(found)


def judged(a: Row, b: Row) -> tuple[str, float | None]:
    """What B is, and the spread of the wider side in the metric's unit, None with one sample.

    B is "not measured" where it has the row and no number, such as a hit that no sample has proof of.
    """
    metric = KINDS[a["bench"]].metric
    mine, theirs = report.interval(a), report.interval(b)
    if not b[metric]:
        return MISSING, None
    if mine is None or theirs is None:
        return UNKNOWN, None
    better = (b[metric] > a[metric]) == ("_ms" not in metric)
    differs = stats.differs(mine, theirs, b[metric] - a[metric])
    return (FASTER if better else SLOWER) if differs else NOISE, max(mine[1] - mine[0], theirs[1] - theirs[0])

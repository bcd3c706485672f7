"""Tables and plots of written results.

The other benchmarks print their run with it. Plots need matplotlib (pip install matplotlib), no display and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_xmem.bench import environment, stats
from sglang_xmem.errors import ConfigError

#: A line of a file of results. Here rows are flat: what was nested has a name such as "ttft_ms.p50".
Row = dict[str, Any]

#: Backends in the order of tables and legends.
ORDER = ("hbm", "peer", "mtier", "dax", "auto", "dram", "bank", "stock", "server", "recompute")
FLOOR_AND_CEILING = ("hbm", "recompute")


# ---- what rows are ----


def short(value: float) -> str:
    """Three digits: 2.23M, 96.1k, 9610, 40.3, 0.00412."""
    for unit, name, least in ((1e6, "M", 1e6), (1e3, "k", 1e4)):
        if value >= least:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def tokens_label(tokens: float) -> str:
    """81920 is 80K."""
    whole = round(tokens)
    return f"{whole // 1024}K" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def turn_label(turn: float | None) -> str:
    """Turns are counted from 0; None is all of them."""
    return "all" if turn is None else f"{turn + 1:.0f}{' cold' if turn == 0 else ' warm' if turn == 1 else ''}"


count, percent, times = "{:,.0f}".format, "{:.0%}".format, "{:.2f}x".format

_TEXTS = ("backend", "tier", "case", "direction", "policy", "n", "vs_no_hit", "vs_stock", "outputs", "copier")
#: Heading of each key that tables show, and how it is written. What is written by another function than `str` is a
#: number, or None, which is shown as a dash.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    **{key: (key.replace("_", " "), str) for key in _TEXTS},
    "prompt_tokens": ("tokens", tokens_label),
    "hit_ratio": ("hits", percent),
    "concurrency": ("at once", count),
    "turn": ("turn", turn_label),
    "ttft_ms.p50": ("TTFT ms", short),
    "ttft_ms.p90": ("p90", short),
    "ttft_ms.p99": ("p99", short),
    "tokens_per_s": ("tokens/s", short),
    "gbps": ("GB/s", short),
    "range": ("min-max", str),
    "of_hbm": ("of HBM", str),
    "floor_ms": ("floor ms", short),
    "over_floor": ("of floor", times),
    "measured_hit_ratio": ("proven hits", percent),
    "inter_token_ms.p50": ("token gap ms", short),
    "e2e_ms.p50": ("e2e ms", short),
    "e2e_ms.p99": ("p99", short),
    "hit_ratio.device": ("hits device", percent),
    "hit_ratio.host": ("hits host", percent),
    "hit_ratio.total": ("hits", percent),
    "ideal_hit_ratio": ("possible hits", percent),
    "samples": ("n", count),
    "seconds": ("seconds", short),
    "contiguous_gbps": ("contiguous GB/s", short),
    "share": ("share", percent),
    "pages": ("pages", count),
    "page_copies": ("page copies", count),
    "wrong": ("wrong pages", count),
    "gpu": ("GPU", str),
}


class Kind(NamedTuple):
    """Rows of one benchmark.

    Attributes:
        what: keys that say what a row is a measurement of, with its shape; the first names the backend or tier.
        columns: further keys that a table shows.
        metric: what is compared: a time in ms, or a rate, of which more is better; "" where nothing is.
        ends: of its spread, in tables and plots.
        panel: key of a plot's panels, whose x axis is the last key of `what`; "" where there is no plot.
    """

    what: str
    columns: str
    metric: str = "ttft_ms.p50"
    ends: tuple[str, str] = ("ttft_ms.min", "ttft_ms.max")
    panel: str = ""

    @property
    def samples(self) -> str:
        """Key of the list of all values of the metric."""
        return "all_ms" if self.metric == "ttft_ms.p50" else f"{self.metric}_all"


KINDS = {
    "ttft": Kind(
        "backend prompt_tokens",
        "ttft_ms.p50 range n of_hbm vs_no_hit vs_stock floor_ms over_floor outputs",
        panel="shape",
    ),
    "throughput": Kind(
        "backend concurrency hit_ratio",
        "tokens_per_s range vs_no_hit vs_stock measured_hit_ratio ttft_ms.p50 inter_token_ms.p50 n",
        "tokens_per_s",
        ("min", "max"),
        "concurrency",
    ),
    "multiturn": Kind(
        "backend turn",
        "prompt_tokens ttft_ms.p50 ttft_ms.p90 ttft_ms.p99 vs_stock hit_ratio.device hit_ratio.host hit_ratio.total "
        "samples seconds",
        ends=("ttft_ms.p50", "ttft_ms.p90"),
        panel="shape",
    ),
    "trace": Kind(
        "backend",
        "samples ttft_ms.p50 ttft_ms.p99 vs_stock e2e_ms.p50 e2e_ms.p99 hit_ratio.device hit_ratio.host "
        "ideal_hit_ratio tokens_per_s seconds",
    ),
    "copy": Kind("tier case direction", "pages gbps contiguous_gbps share wrong copier", "gbps"),
    "soak": Kind("tier", "policy page_copies wrong seconds gpu", ""),
}
#: Keys of a row that a table's title has.
TITLE = ("shape", "page_size", "tp_size", "trace", "speed", "share", "agents", "engines")
LEGEND = "Medians. ~: spreads overlap. n: samples, proven+unproven. vs: times as fast. no hit: computed again."
_INTERVAL = "ttft_ms.p50_interval"
_NUMBERS = {key for key, (_, style) in COLUMNS.items() if style is not str} | {"samples_unproven"}
_NUMBERS |= {end for kind in KINDS.values() for end in kind.ends}


def flat(row: Row) -> Row:
    """What is nested under names such as "ttft_ms.p50"."""
    found: Row = {}
    for key, value in row.items():
        found.update({f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value})
    return found


def is_number(value: Any) -> bool:
    """Whether it is finite, and so small that floats hold it."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def is_measured(row: Row) -> bool:
    """Whether a row is a measurement, and not the reason why there is none."""
    return "skipped" not in row and "error" not in row


def problem(row: Row) -> str | None:
    """What keeps a flat row from being shown, such as "no number for ttft_ms.p50"; None if nothing does."""
    kind = KINDS.get(str(row.get("bench")))
    what = kind.what.split() if kind else []
    for key in ("bench", "run", *what[:1]):
        if not isinstance(row.get(key), str):
            return f"no text for {key}"
    if kind is None or not is_measured(row):
        return None
    for key in (*what, "shape"):
        if (key not in row and key != "shape") or isinstance(row.get(key), (dict, list)):
            return f"no value for {key}"
    for key in sorted(_NUMBERS & row.keys() | {kind.metric} - {""}):
        if key not in row or not (row[key] is None or is_number(row[key])):
            return f"no number for {key}"
    for key in {kind.samples, _INTERVAL} & row.keys():
        if row[key] is not None and not (isinstance(row[key], list) and all(map(is_number, row[key]))):
            return f"no list of numbers for {key}"
    return None


# ---- files ----


def _numbered(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows with the numbers of their lines; a last line that an ended process left unfinished is skipped.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Name another file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a file of JSON Lines. Name one.") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            if 1 < number == len(lines):
                return
            row = line
        if not isinstance(row, dict):
            raise ConfigError(f"Line {number} of {path} is not a JSON object. Name a file of rows.")
        if row:
            yield number, row


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSON Lines file, as they were written.

    Raises:
        ConfigError: it cannot be read.
    """
    return [row for _, row in _numbered(path)]


def load(path: Path) -> list[Row]:
    """Rows of a file of results that can be shown, flat; a warning counts the others.

    Raises:
        ConfigError: it cannot be read, or has no such row.
    """
    rows, bad = [], list[str]()
    for number, nested in _numbered(path):
        row = flat(nested)
        if wrong := problem(row):
            bad.append(f"line {number} has {wrong}")
        else:
            rows.append(row)
    if not rows:
        raise ConfigError(f"{path} has no rows of sglang-xmem bench{f': {bad[0]}' if bad else ''}. Name another file.")
    if bad:
        print(f"{path}: {len(bad)} of {len(bad) + len(rows)} rows are left out; {bad[0]}.", file=sys.stderr)
    return rows


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a JSON Lines file; a last line that an ended process left unfinished is removed."""
    with path.open("a+b") as file:
        file.seek(0)
        whole, newline, last = file.read().rpartition(b"\n")
        try:
            if last:
                json.loads(last)
                file.write(b"\n")
        except ValueError:
            file.truncate(len(whole + newline))
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


# ---- rows ----


def identity(row: Row) -> tuple[Any, ...]:
    """What a row of a benchmark is a measurement of: backend, other keys, shape."""
    return tuple(row.get(key) for key in (*KINDS[row["bench"]].what.split(), "shape"))


def interval(row: Row) -> stats.Interval | None:
    """Where the median of a row's metric lies, about 95 %; None with less than two samples."""
    samples = row.get(KINDS[row["bench"]].samples)
    if samples is not None:
        return stats.median_interval(samples) if len(samples) > 1 else None
    stated = row.get(_INTERVAL)
    return (stated[0], stated[-1]) if stated else None


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row for each identity: samples of several engines (hbm, recompute) put together."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[identity(row)].append(row)
    result = []
    for group in groups.values():
        row = dict(group[0])
        if len(group) > 1 and all(other.get("all_ms") is not None for other in group):
            row["all_ms"] = [ms for other in group for ms in other["all_ms"]]
            row |= flat({"ttft_ms": stats.summary(row["all_ms"])})
            for name in ("samples", "samples_unproven"):
                row[name] = sum(other.get(name) or 0 for other in group)
            row["outputs_equal"] = all(other.get("outputs_equal", True) for other in group)
        result.append(row)
    return result


def factor(row: Row, other: Row | None, *, plain: bool = False) -> str | None:
    """How much faster a row is than another; `~` where the spreads overlap. None where one has no number.

    Args:
        plain: this row's number by the other's, whatever is better.
    """
    metric = KINDS[row["bench"]].metric
    if not metric or other is None or other is row or not row[metric] or not other[metric]:
        return None
    mine, theirs = row[metric], other[metric]
    found = mine / theirs if plain or "_ms" not in metric else theirs / mine
    apart = stats.apart(interval(row) or (mine, mine), interval(other) or (theirs, theirs))
    return f"{'' if apart else '~'}{found:.2f}x"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By what was measured, numbers before text and None, which is all of something, last; then by backend."""

    def key(row: Row) -> Any:
        backend, *what = identity(row)
        values = [(value is None, value if is_number(value) else 0, str(value)) for value in what]
        first = backend.partition("+")[0]
        return values, ORDER.index(first) if first in ORDER else len(ORDER), backend

    return sorted(rows, key=key)


def _with_factors(rows: Sequence[Row]) -> list[Row]:
    """Rows in order, with what they are of others, and with their ends and counts in words."""
    known, found = {identity(row): row for row in rows}, []
    for row in in_order(rows):
        backend, *what = identity(row)
        no_hit = known.get(("recompute", *what))
        if row["bench"] == "throughput":
            nothing = (what[0], 0.0, what[2])
            no_hit = known.get(("recompute", *nothing)) or known.get((backend, *nothing))
        stock = None if backend in FLOOR_AND_CEILING else known.get(("stock", *what))
        low, high = (row.get(end) for end in KINDS[row["bench"]].ends)
        more = {
            "of_hbm": factor(row, known.get(("hbm", *what)), plain=True),
            "vs_no_hit": factor(row, no_hit),
            "vs_stock": factor(row, stock),
            "range": None if low is None or high is None else f"{short(low)}-{short(high)}",
            "n": f"{row.get('samples')}+{row.get('samples_unproven')}",
            "outputs": "DIFFER" if row.get("outputs_equal") is False else None,
        }
        found.append({**row, **more})
    return found


# ---- tables ----


def print_table(rows: Iterable[Row]) -> None:
    """The tables of one run on stdout: one for each benchmark and shape; rows of others as they are."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in map(flat, rows):
        groups[row["bench"], str(row.get("shape"))].append(row)
    for (bench, _), group in groups.items():
        kind = KINDS.get(bench)
        if kind is None:
            print("\n".join(map(json.dumps, group)))
            continue
        whole = _with_factors(merged(filter(is_measured, group)))
        keys = f"{kind.what} {kind.columns}".split()
        lines = [[_cell(row.get(key), COLUMNS[key][1]) for key in keys] for row in whole]
        show_table(title(group[0]), [COLUMNS[key][0] for key in keys], lines)
        for note in [*_notes(group), *([LEGEND] if kind.metric else [])]:
            print(note)


def _cell(value: Any, style: Callable[[Any], str]) -> str:
    return "-" if value is None and style is not turn_label else style(value)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """What a table does not say: why tiers have no row, how long all turns took, and when outputs prove nothing."""
    if any(row.get("outputs_tell_prompts_apart") is False for row in rows):
        yield "Outputs: all prompts have the same with this model, so they say nothing of the KV."
    wholes = [row for row in rows if row["bench"] == "multiturn" and row.get("turn", 0) is None and row.get("seconds")]
    seconds = {row["backend"]: row["seconds"] for row in wholes if row.get("complete", True)}
    for name in seconds.keys() - {"stock", *FLOOR_AND_CEILING}:
        others = [f"{seconds[o] / seconds[name]:.2f}x as fast as {o}" for o in ("recompute", "stock") if o in seconds]
        if others:
            yield f"{name}: all turns {' and '.join(others)}."
    for row in rows:
        for key in {"skipped", "error", "too_few"} & row.keys():
            yield f"{identity(row)[0]}: {key.replace('_', ' ')}: {row[key]}"


def title(row: Row) -> str:
    """What all rows of a table have in common; rows of before do not name the machine."""
    found = ", ".join([row["bench"], *(f"{key} {row[key]}" for key in TITLE if row.get(key) is not None)])
    machine = row.get("machine", "")
    return f"{found} ({'CPU engine: says nothing about speed' if machine == 'CPU' else machine})" if machine else found


def show_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on stdout, its first column to the left and the others to the right.

    Columns are as wide as their content, headings break at spaces, and a column that says nothing is left out, so that
    tables fit 80 columns.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    said = [index for index in range(len(header)) if any(line[index] != "-" for line in lines)]
    widths = {i: max(map(len, [*header[i].split(), *(line[i] for line in lines)])) for i in said}
    roomy = sum(widths.values()) + 2 * len(said) <= 80
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, int(roomy), 0, 0))
    for index, width in widths.items():
        heading = "\n".join(textwrap.wrap(header[index], width))
        table.add_column(heading, justify="right" if index else "left", no_wrap=True, min_width=width)
    for line in lines:
        table.add_row(*(line[index] for index in said))
    console = Console(highlight=False, markup=False)
    console.print(title, style="bold", soft_wrap=True)
    # A file or a pipe gets a table as wide as it comes.
    console.print(table, width=console.width if sys.stdout.isatty() else 1000)


# ---- command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="JSON Lines file of a benchmark")
    parser.add_argument("--run", default=None, dest="run_id", help="id of a run in it, see --list; default: the last")
    parser.add_argument("--list", action="store_true", help="list the file's runs and exit")
    parser.add_argument("--json", action="store_true", help="print one flat JSON object per row, for pandas")
    parser.add_argument("--plot", type=Path, default=None, metavar="NAME.png", help="also plot; .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    runs: dict[str, list[Row]] = defaultdict(list)
    for row in load(args.file):
        runs[row["run"]].append(row)
    if args.list:
        _list(args.file, runs)
        return 0
    chosen = args.run_id or list(runs)[-1]
    if chosen not in runs:
        raise ConfigError(f"{args.file} has no rows of run {chosen}. Its runs: {', '.join(runs)}.")
    if args.json:
        for row in runs[chosen]:
            print(json.dumps({key: value for key, value in row.items() if not isinstance(value, (list, dict))}))
    else:
        print_table(runs[chosen])
        if len(runs) > 1 and args.run_id is None:
            print(f"The last of {len(runs)} runs; --list names them, --run ID shows another.")
    if args.plot is not None:
        from sglang_xmem.bench import plots

        plots.write(runs[chosen], args.plot)
    return 0


def _list(path: Path, runs: dict[str, list[Row]]) -> None:
    """A line for each run: id, benchmark, rows, backends, lengths of prompts, machine."""
    # Rows of before have their machine in a file of their own.
    about = path.with_name(f"{path.stem}.runs.jsonl")
    old = {row.get("run"): row.get("gpus") for row in (read_rows(about) if about.is_file() else [])}
    for name, rows in runs.items():
        backends = dict.fromkeys(str(row.get("backend", row.get("tier", "-"))) for row in rows)
        lengths = [row["prompt_tokens"] for row in rows if is_number(row.get("prompt_tokens"))]
        prompts = [f"{','.join(dict.fromkeys(map(tokens_label, lengths)))} tokens"] if lengths else []
        machine = rows[0].get("machine") or (environment.machine(g) if isinstance(g := old.get(name), list) else "-")
        print("; ".join([f"{name}  {rows[0]['bench']}  {len(rows)} rows", ", ".join(backends), *prompts, str(machine)]))

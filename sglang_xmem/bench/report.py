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


# ---- cells ----


def ms(value: float) -> str:
    """Four digits."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}" if value >= 10 else f"{value:.2f}"


def short(value: float) -> str:
    """Three digits: 2.23M, 960k, 40.3, 0.00412."""
    for unit, name, least in ((1e6, "M", 1e6), (1e3, "k", 1e4)):
        if value >= least:
            return f"{value / unit:.3g}{name}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float) -> str:
    return f"{value:.0%}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def span(low: float, high: float) -> str:
    return f"{short(low)}-{short(high)}"


def tokens_label(tokens: float) -> str:
    """81920 is 80K."""
    whole = round(tokens)
    return f"{whole // 1024}K" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def turn_label(turn: int | None) -> str:
    """Turns are counted from 0; None is all of them."""
    return {None: "all", 0: "1 cold", 1: "2 warm"}.get(turn) or str(int(turn or 0) + 1)


def counts(proven: float, unproven: float) -> str:
    return f"{proven:.0f}+{unproven:.0f}"


# ---- what rows are ----


class Kind(NamedTuple):
    """Rows of one benchmark.

    Attributes:
        identity: keys that say what a row is a measurement of; the first names the backend or tier.
        columns: heading, how a cell is written, and the keys that it is written of: numbers, unless that is `str`.
        title: above a table, with keys of its first row in braces.
        legend: below it.
        metric: what is compared: a time in ms, or a rate, of which more is better; None where nothing is.
        samples: the list of all values of that.
    """

    identity: tuple[str, ...]
    title: str
    columns: tuple[tuple[Any, ...], ...]
    legend: str = ""
    metric: str | None = "ttft_ms.p50"
    samples: str = "all_ms"


_LATENCY = (("TTFT p50 ms", ms, "ttft_ms.p50"), ("p90", ms, "ttft_ms.p90"), ("p99", ms, "ttft_ms.p99"))
_HITS = (("hits device", percent, "hit_ratio.device"), ("hits host", percent, "hit_ratio.host"))
_N = ("n", counts, "samples", "samples_unproven")
_INTERVAL = "ttft_ms.p50_interval"
_BACKEND, _VS_STOCK = ("backend", str, "backend"), ("vs stock", str, "vs_stock")

KINDS = {
    "ttft": Kind(
        ("backend", "prompt_tokens", "shape"),
        "TTFT of a hit, {shape}, page {page_size}",
        (
            _BACKEND,
            ("tokens", tokens_label, "prompt_tokens"),
            ("TTFT ms", ms, "ttft_ms.p50"),
            ("min-max", span, "ttft_ms.min", "ttft_ms.max"),
            _N,
            ("of HBM", str, "of_hbm"),
            ("vs no hit", str, "vs_no_hit"),
            _VS_STOCK,
            ("floor ms", ms, "floor_ms"),
            ("of floor", times, "over_floor"),
            ("outputs", str, "outputs"),
        ),
        "TTFT: median. ~: spreads overlap. n: samples, proven+unproven. no hit: computed again.",
    ),
    "throughput": Kind(
        ("backend", "concurrency", "hit_ratio"),
        "Throughput, {shape}, prompts of {prompt_tokens} tokens",
        (
            _BACKEND,
            ("hits", percent, "hit_ratio"),
            ("at once", "{:.0f}".format, "concurrency"),
            ("tokens/s", short, "tokens_per_s"),
            ("min-max", span, "min", "max"),
            ("vs no hits", str, "vs_no_hit"),
            _VS_STOCK,
            ("proven hits", percent, "measured_hit_ratio"),
            ("TTFT ms", ms, "ttft_ms.p50"),
            ("token gap ms", ms, "inter_token_ms.p50"),
            _N,
        ),
        "tokens/s: of prompts and outputs, median of rounds. ~: spreads overlap. n: samples, proven+unproven.",
        "tokens_per_s",
        "tokens_per_s_all",
    ),
    "multiturn": Kind(
        ("backend", "turn"),
        "TTFT by turn, agents: {agents}, engines: {engines}, {shape}",
        (
            _BACKEND,
            ("turn", turn_label, "turn"),
            ("tokens", tokens_label, "prompt_tokens"),
            *_LATENCY,
            _VS_STOCK,
            *_HITS,
            ("hits", percent, "hit_ratio.total"),
            ("n", str, "samples"),
            ("seconds", ms, "seconds"),
        ),
        "hits: share of prompt tokens, by where they were. seconds: of all turns. ~: spreads overlap.",
    ),
    "trace": Kind(
        ("backend",),
        "Trace {trace} at speed {speed}, {shape}",
        (
            _BACKEND,
            ("n", str, "samples"),
            *_LATENCY[::2],
            _VS_STOCK,
            ("e2e p50 ms", ms, "e2e_ms.p50"),
            ("p99", ms, "e2e_ms.p99"),
            *_HITS,
            ("possible hits", percent, "ideal_hit_ratio"),
            ("tokens/s", short, "tokens_per_s"),
            ("s", short, "seconds"),
        ),
        "n: requests. ~: spreads overlap. e2e: to the last token. possible hits: of a cache without limits.",
    ),
    "copy": Kind(
        ("tier", "case", "direction"),
        "Page copies",
        (
            ("tier", str, "tier"),
            ("case", str, "case"),
            ("direction", str, "direction"),
            ("pages", str, "pages"),
            ("GB/s", short, "gbps"),
            ("contiguous GB/s", short, "contiguous_gbps"),
            ("share", percent, "share"),
            ("wrong pages", str, "wrong"),
            ("copier", str, "copier"),
        ),
        metric="gbps",
        samples="gbps_all",
    ),
    "soak": Kind(
        ("tier",),
        "Verified page copies under load",
        (
            ("tier", str, "tier"),
            ("policy", str, "policy"),  # of scripts/bench/serving_soak.py: a server per write policy
            ("page copies", "{:,}".format, "page_copies"),
            ("wrong", str, "wrong"),
            ("seconds", short, "seconds"),
            ("GPU", str, "gpu"),
        ),
        metric=None,
    ),
}


def flat(row: Row) -> Row:
    """What is nested under names such as "ttft_ms.p50"."""
    found: Row = {}
    for key, value in row.items():
        found.update({f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value})
    return found


def is_number(value: Any) -> bool:
    """Whether it is finite, and so small that floats hold it."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def problem(row: Row) -> str | None:
    """What keeps a flat row from being shown, such as "no number for ttft_ms.p50"; None if nothing does."""
    missing = [key for key in ("bench", "run") if not isinstance(row.get(key), str)]
    kind = KINDS.get(str(row.get("bench")))
    if missing or kind is None:
        return f"no text for {missing[0]}" if missing else None
    whole = "skipped" not in row and "error" not in row
    for key in kind.identity if whole else kind.identity[:1]:
        if key not in row or isinstance(row[key], (dict, list)):
            return f"no value for {key}"
    if not isinstance(row[kind.identity[0]], str):
        return f"no text for {kind.identity[0]}"
    wanted = [kind.metric] if kind.metric and whole else []
    numbers = {key for _, style, *keys in kind.columns if style is not str for key in keys} & row.keys()
    for key in sorted({*wanted, *numbers, *({"samples", "samples_unproven"} & row.keys())}):
        if key not in row or not (row[key] is None or is_number(row[key])):
            return f"no number for {key}"
    for key in ({kind.samples, _INTERVAL} & row.keys()) if whole else ():
        found = row[key]
        if found is not None and not (isinstance(found, list) and all(map(is_number, found))):
            return f"no list of numbers for {key}"
        if key == _INTERVAL and found is not None and len(found) != 2:
            return f"no two numbers for {key}"
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
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            if 1 < number == len(lines):
                return
            row = line
        if row is not None and not isinstance(row, dict):
            raise ConfigError(f"Line {number} of {path} is not a JSON object. Name a file of rows.")
        if row is not None:
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
    rows, bad, first = [], 0, ""
    for number, nested in _numbered(path):
        row = flat(nested)
        wrong = problem(row)
        if wrong is None:
            rows.append(row)
        else:
            bad, first = bad + 1, first or f"line {number} has {wrong}"
    if not rows:
        why = f": {first}" if first else ""
        raise ConfigError(f"{path} has no rows of sglang-xmem bench{why}. Name another file.")
    if bad:
        print(f"{path}: {bad} of {bad + len(rows)} rows are left out; {first}.", file=sys.stderr)
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
    """What a row is a measurement of."""
    kind = KINDS.get(row["bench"])
    return (row["bench"], *(row.get(key) for key in kind.identity)) if kind else (row["bench"], id(row))


def interval(row: Row) -> stats.Interval | None:
    """Where the median of a row's metric lies, about 95 %; None with less than two samples."""
    samples = row.get(KINDS[row["bench"]].samples)
    if samples is not None:
        return stats.median_interval(samples) if len(samples) > 1 else None
    stated = row.get(_INTERVAL)
    return (stated[0], stated[1]) if stated else None


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
            p50 = row["ttft_ms.p50"]
            if p50 and row.get("kv_bytes"):
                row["gbps"] = round(row["kv_bytes"] / p50 / 1e6, 3)
            if p50 and row.get("floor_ms"):
                row["over_floor"] = round(p50 / row["floor_ms"], 4)
        result.append(row)
    return result


def factor(row: Row, other: Row | None, *, plain: bool = False) -> str | None:
    """How much faster a row is than another; `~` where the spreads overlap. None where one has no number.

    Args:
        plain: this row's number by the other's, whatever is better.
    """
    metric = KINDS[row["bench"]].metric
    if metric is None or other is None or other is row or not row[metric] or not other[metric]:
        return None
    mine, theirs = row[metric], other[metric]
    found = mine / theirs if plain or "_ms" not in metric else theirs / mine
    apart = stats.apart(interval(row) or (mine, mine), interval(other) or (theirs, theirs))
    return f"{'' if apart else '~'}{found:.2f}x"


def _with_factors(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows and what they are of others, in the order of a table."""
    kind = KINDS[rows[0]["bench"]]
    known = {tuple(row.get(key) for key in kind.identity): row for row in rows}
    for row in sorted(rows, key=lambda row: ([_order(row.get(key)) for key in kind.identity[1:]], backend_order(row))):
        backend, *what = (row.get(key) for key in kind.identity)
        no_hit = known.get(("recompute", *what))
        if row["bench"] == "throughput":
            nothing = what[0], 0.0
            no_hit = known.get(("recompute", *nothing)) or known.get((backend, *nothing))
        stock = known.get(("stock", *what)) if backend not in FLOOR_AND_CEILING else None
        found = {"of_hbm": factor(row, known.get(("hbm", *what)), plain=True), "vs_no_hit": factor(row, no_hit)}
        found |= {"vs_stock": factor(row, stock), "outputs": "DIFFER" if row.get("outputs_equal") is False else None}
        yield {**row, **found}


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers, then text; None, which is all of something, last."""
    return value is None, float(value) if is_number(value) else 0.0, str(value)


def backend_order(row: Row) -> tuple[int, str]:
    name = row[KINDS[row["bench"]].identity[0]]
    first = name.partition("+")[0]
    return ORDER.index(first) if first in ORDER else len(ORDER), name


# ---- tables ----


def print_table(rows: Iterable[Row]) -> None:
    """The tables of one run on stdout: one for each benchmark and shape; rows of others as they are."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    rows = [flat(row) for row in rows]
    for row in rows:
        groups[row["bench"], str(row.get("shape"))].append(row)
    for of_shape in groups.values():
        kind = KINDS.get(of_shape[0]["bench"])
        if kind is None:
            for row in of_shape:
                print(json.dumps(row))
            continue
        shown = [row for row in of_shape if "skipped" not in row and "error" not in row]
        whole = list(_with_factors(merged(shown))) if shown else []
        title = kind.title.format_map(defaultdict(lambda: "-", {"engines": 1, **of_shape[0]}))
        lines = [[_cell(row, *column[1:]) for column in kind.columns] for row in whole]
        show_table(f"{title}{where(of_shape[0])}", [column[0] for column in kind.columns], lines)
        for note in [*_notes(whole), *_outputs(of_shape), *_left_out(of_shape), kind.legend]:
            if note:
                print(note)


def _cell(row: Row, style: Callable[..., str], *keys: str) -> str:
    values = [row.get(key) for key in keys]
    return "-" if None in values and style is not turn_label else style(*values)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Where a tier brings no gain, and how long all turns of agents took with it."""
    seconds = {row["backend"]: row["seconds"] for row in rows if row["bench"] == "multiturn" and row.get("seconds")}
    for row in rows:
        name, gain = row.get("backend"), row["vs_no_hit"]
        if name in (None, *FLOOR_AND_CEILING):
            continue
        ats = {"ttft": f"{_cell(row, tokens_label, 'prompt_tokens')} tokens"}
        if row.get("hit_ratio"):
            ats["throughput"] = f"{row['hit_ratio']:.0%} hits, {row['concurrency']} at once"
        if gain and row["bench"] in ats and (gain.startswith("~") or float(gain.rstrip("x")) <= 1):
            yield f"{name} at {ats[row['bench']]}: no gain over computing again beyond the spread."
        others = [other for other in ("recompute", "stock") if other in seconds and other != name]
        if others and row.get("seconds") and row["bench"] == "multiturn" and row.get("complete", True):
            factors = " and ".join(f"{seconds[other] / seconds[name]:.2f}x as fast as {other}" for other in others)
            yield f"{name}: all turns {factors}."


def _outputs(rows: Sequence[Row]) -> Iterator[str]:
    """What the outputs of a run of `ttft` say of the KV."""
    if rows[0]["bench"] != "ttft":
        return
    for row in rows:
        if row.get("outputs_equal_across") is False and row["backend"] not in FLOOR_AND_CEILING:
            at = f"{row['backend']} at {tokens_label(row['prompt_tokens'])} tokens"
            yield f"{at}: the uncached outputs differ from those of engine {row.get('outputs_compared_with')}."
    if any(row.get("outputs_tell_prompts_apart") is False for row in rows):
        yield "Outputs: all prompts have the same with this model, so they say nothing of the KV."
    elif all(row.get("outputs_equal", True) for row in rows):
        yield "Outputs: each hit's are those of its engine's first hit in HBM."


def _left_out(rows: Sequence[Row]) -> Iterator[str]:
    """Why tiers have no row, or one that fails."""
    for row in rows:
        for key in ("skipped", "error", "too_few"):
            if key in row:
                yield f"{row[KINDS[row['bench']].identity[0]]}: {key.replace('_', ' ')}: {row[key]}"


def where(row: Row) -> str:
    """The machine for a title; rows of before do not say it."""
    machine = row.get("machine")
    if machine is None:
        return ""
    return " (CPU engine: says nothing about speed)" if machine == "CPU" else f" ({machine})"


def show_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], *, wrap: bool = False) -> None:
    """A table on stdout, its first column to the left and the others to the right.

    Columns are as wide as their content, headings break at spaces, and a column that says nothing is left out, so that
    tables fit 80 columns.

    Args:
        wrap: the last column is words, which break where a terminal ends.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    said = [index for index in range(len(header)) if any(line[index] != "-" for line in lines)]
    widths = {i: max([max(map(len, header[i].split())), *(len(line[i]) for line in lines)]) for i in said}
    roomy = sum(widths.values()) + 2 * len(said) <= 80
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, int(roomy), 0, 0))
    for index, width in widths.items():
        words = wrap and index == said[-1]
        heading = "\n".join(textwrap.wrap(header[index], width))
        justify: Any = "left" if words or index == 0 else "right"
        table.add_column(heading, justify=justify, no_wrap=not words, min_width=None if words else width)
    for line in lines:
        table.add_row(*(line[index] for index in said))
    console = Console(highlight=False, markup=False)
    console.print(title, style="bold", soft_wrap=True)
    # A file or a pipe gets a table as wide as it comes.
    console.print(table, width=console.width if sys.stdout.isatty() or wrap else 1000)


# ---- command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="JSON Lines file of a benchmark")
    parser.add_argument("--run", default=None, dest="run_id", help="id of a run in it, see --list; default: the last")
    parser.add_argument("--list", action="store_true", help="list the file's runs and exit")
    parser.add_argument("--json", action="store_true", help="print one flat JSON object per row, for pandas")
    parser.add_argument("--plot", type=Path, default=None, metavar="NAME.png", help="also plot; .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    rows = load(args.file)
    runs: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["run"]].append(row)
    if args.list:
        header = ["run", "bench", "rows", "backends; prompts; machine"]
        # Rows of before have their machine in a file of their own.
        about = args.file.with_name(f"{args.file.stem}.runs.jsonl")
        old = {row.get("run"): row.get("gpus") for row in (read_rows(about) if about.is_file() else [])}
        lines = [_listed(name, runs[name], old.get(name)) for name in runs]
        show_table(f"Runs in {args.file}", header, lines, wrap=True)
        return 0
    chosen = args.run_id or list(runs)[-1]
    if chosen not in runs:
        raise ConfigError(f"{args.file} has no rows of run {chosen}. Its runs: {', '.join(runs)}.")
    if args.json:
        for row in merged(runs[chosen]):
            print(json.dumps({key: value for key, value in row.items() if not isinstance(value, list)}))
    else:
        print_table(runs[chosen])
        if len(runs) > 1 and args.run_id is None:
            print(f"The last of {len(runs)} runs; --list names them, --run ID shows another.")
    if args.plot is not None:
        from sglang_xmem.bench import plots

        plots.write(runs[chosen], args.plot)
    return 0


def _listed(name: str, rows: Sequence[Row], gpus: Any) -> list[str]:
    """A run's line of --list."""
    names = dict.fromkeys(str(row.get("backend", row.get("tier", "-"))) for row in rows)
    lengths = [row["prompt_tokens"] for row in rows if is_number(row.get("prompt_tokens"))]
    prompts = f"; {','.join(dict.fromkeys(map(tokens_label, lengths)))} tokens" if lengths else ""
    machine = rows[0].get("machine") or (environment.machine(gpus) if isinstance(gpus, list) else "-")
    return [name, rows[0]["bench"], str(len(rows)), f"{', '.join(names)}{prompts}; {machine}"]

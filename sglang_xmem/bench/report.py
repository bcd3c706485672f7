"""Tables and plots of written results.

The other benchmarks print their run with it. Plots need matplotlib (pip install matplotlib), no display and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sglang_xmem.bench import stats
from sglang_xmem.errors import ConfigError

Row = dict[str, Any]

#: Order, colours (Okabe and Ito's, which colour-blind readers can distinguish) and markers of backends.
STYLES = {
    "hbm": ("#000000", None),
    "peer": ("#009e73", "^"),
    "mtier": ("#cc79a7", "D"),
    "dax": ("#f0e442", "o"),
    "auto": ("#56b4e9", "o"),
    "dram": ("#0072b2", "o"),
    "stock": ("#d55e00", "s"),
    "server": ("#e69f00", "v"),
    "recompute": ("#888888", None),
}
FLOOR_AND_CEILING = ("hbm", "recompute")

#: What a row of a benchmark is a measurement of, and what its rows have at least.
IDENTITY = {
    "ttft": ("backend", "prompt_tokens", "shape"),
    "throughput": ("backend", "hit_ratio", "concurrency"),
    "multiturn": ("backend", "turn"),
    "trace": ("backend",),
    "copy": ("tier", "case", "direction"),
    "soak": ("tier",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="JSON Lines file of a benchmark")
    parser.add_argument("--run", default=None, dest="run_id", help="id of a run in it, see --list; default: the last")
    parser.add_argument("--list", action="store_true", help="list the file's runs and exit")
    parser.add_argument("--json", action="store_true", help="print one flat JSON object per row, for pandas")
    parser.add_argument("--plot", type=Path, default=None, metavar="NAME.png", help="also plot; .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    rows = read_rows(args.file)
    for row in rows:
        check_row(row, args.file)
    runs = list(dict.fromkeys(str(row["run"]) for row in rows))
    if args.list:
        show_table(f"Runs in {args.file}", *_runs_table(args.file, rows, runs), wrap=True)
        return 0
    chosen = args.run_id or (runs[-1] if runs else None)
    rows = rows_of_run(rows, chosen)
    if not rows:
        known = f" Its runs: {', '.join(runs)}." if runs else " Name another file."
        raise ConfigError(f"{args.file} has no rows{f' of run {chosen}' if chosen else ''}.{known}")
    if args.json:
        for row in merged(rows):
            print(json.dumps(_flat(row)))
    else:
        print_table(rows)
        if len(runs) > 1 and args.run_id is None:
            print(f"The last of {len(runs)} runs; --list names them, --run ID shows another.")
    if args.plot is not None:
        write_plot(rows, args.plot)
    return 0


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSON Lines file; a last line that an ended process left unfinished is skipped.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Name another file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a file of JSON Lines. Name one.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError
                rows.append(row)
            except (ValueError, RecursionError):
                if number != len(lines) or not rows:
                    raise ConfigError(f"Line {number} of {path} is not a JSON object. Name a file of rows.") from None
    return rows


def check_row(row: Row, path: Path) -> None:
    """Raises ConfigError for a row that no benchmark of ours wrote."""
    missing = {"bench", "run"} - row.keys()
    known = IDENTITY.get(str(row.get("bench")), ())
    missing = missing or set(known) - row.keys() if "error" not in row else missing
    if missing:
        name = f" of bench {row['bench']}" if "bench" in row else ""
        raise ConfigError(
            f"{path} has a row{name} without {', '.join(sorted(missing))}, so it is not a file of sglang-xmem bench. "
            "Name one of those."
        )


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


def rows_of_run(rows: Iterable[Row], run_id: str | None) -> list[Row]:
    """A run's rows."""
    return [row for row in rows if row.get("run") == run_id]


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is a measurement of."""
    return (row.get("bench"), *(row.get(key) for key in IDENTITY.get(str(row.get("bench")), ())))


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row for each identity: samples of several engines (hbm, recompute) put together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(identity(row), []).append(row)
    result = []
    for group in groups.values():
        row = dict(group[0])
        if len(group) > 1 and all("all_ms" in other for other in group):
            row["all_ms"] = [ms for other in group for ms in other["all_ms"]]
            row["ttft_ms"] = stats.summary(row["all_ms"])
            for name in ("samples", "samples_unproven"):
                row[name] = sum(other[name] for other in group)
            row["outputs_equal"] = all(other.get("outputs_equal", True) for other in group)
            if row["ttft_ms"]["p50"] and "kv_bytes" in row:
                row["gbps"] = round(row["kv_bytes"] / row["ttft_ms"]["p50"] / 1e6, 3)
            if row["ttft_ms"]["p50"] and "floor_ms" in row:
                row["over_floor"] = round(row["ttft_ms"]["p50"] / row["floor_ms"], 4)
        result.append(row)
    return result


def _flat(row: Row) -> Row:
    """Without lists; nested values as `outer.inner`."""
    flat: Row = {}
    for key, value in row.items():
        inner = {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        flat.update({name: v for name, v in inner.items() if not isinstance(v, list)})
    return flat


# ---- tables ----

#: Title, header, lines, and sentences below.
Table = tuple[str, list[str], list[list[str]], list[str]]


def print_table(rows: Sequence[Row]) -> None:
    """The tables of one run on stdout: one for each shape."""
    makers = {
        "ttft": _ttft_table,
        "throughput": _throughput_table,
        "multiturn": _multiturn_table,
        "trace": _trace_table,
        "copy": _copy_table,
        "soak": _soak_table,
    }
    maker = makers.get(str(rows[0].get("bench")))
    if maker is None:
        for row in rows:
            print(json.dumps(row))
        return
    for of_shape in _by_shape(merged(rows)):
        title, header, lines, notes = maker(of_shape)
        show_table(f"{title}{_where(of_shape[0])}", header, lines)
        for note in notes:
            print(note)


def _by_shape(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("shape"), []).append(row)
    return list(groups.values())


def _where(row: Row) -> str:
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
    from rich.table import Table as RichTable

    said = [index for index in range(len(header)) if any(line[index] != "-" for line in lines)]
    widths = {i: max([max(map(len, header[i].split())), *(len(line[i]) for line in lines)]) for i in said}
    roomy = sum(widths.values()) + 2 * len(said) <= 80
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, int(roomy), 0, 0))
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


def _order(row: Row) -> tuple[int, str]:
    names, backend = list(STYLES), row["backend"].partition("+")[0]
    return (names.index(backend) if backend in names else len(names) - 1, row["backend"])


def _ms(value: float | None) -> str:
    """Four digits."""
    return "-" if value is None else f"{value:.{max(0, 3 - len(str(int(value))))}f}" if value >= 10 else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _spread(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_short(low)}-{_short(high)}"


def _short(value: float) -> str:
    """Three digits: 2.23M, 960k, 40.3."""
    for unit, name in ((1e6, "M"), (1e4, "k")):
        if value >= unit:
            return f"{value / {'M': 1e6, 'k': 1e3}[name]:.3g}{name}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def interval(row: Row) -> tuple[float, float] | None:
    """Where the median of a row lies, about 95 %; None with less than two samples."""
    samples = row.get("all_ms") or row.get("tokens_per_s_all") or row.get("gbps_all")
    if samples is not None:
        return stats.median_interval(samples) if len(samples) > 1 else None
    stated = (row.get("ttft_ms") or {}).get("p50_interval")
    return (stated[0], stated[1]) if stated else None


def _factor(row: Row, other: Row | None, key: str = "ttft", *, plain: bool = False) -> str:
    """How much faster than another, or plainly that it is slower; `~` where the spreads overlap.

    Args:
        key: "ttft" for rows with ttft_ms, else the name of a rate.
        plain: this row's number by the other's: above 1 is slower.
    """
    if other is None or other is row:
        return "-"
    mine, theirs = (r["ttft_ms"]["p50"] if key == "ttft" else r[key] for r in (row, other))
    if not mine or not theirs:
        return "-"
    factor = mine / theirs if plain or key != "ttft" else theirs / mine
    if not stats.apart(interval(row) or (mine, mine), interval(other) or (theirs, theirs)):
        return f"~{factor:.2f}x"
    return f"{factor:.2f}x"


def _no_gain(row: Row, factor: str, at: str) -> list[str]:
    """A sentence where a tier brings no gain beyond the spread."""
    if row["backend"] in FLOOR_AND_CEILING or factor == "-":
        return []
    if factor.startswith("~") or float(factor.rstrip("x")) <= 1:
        return [f"{row['backend']} {at}: no gain over computing again beyond the spread."]
    return []


def tokens_label(tokens: float) -> str:
    """81920 is 80K."""
    whole = round(tokens)
    return f"{whole // 1024}K" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def _ttft_table(rows: list[Row]) -> Table:
    lines, notes = [], []
    by_key = {(row["backend"], row["prompt_tokens"]): row for row in rows}
    for row in sorted(rows, key=lambda row: (row["prompt_tokens"], _order(row))):
        size = row["prompt_tokens"]
        hbm, recompute, stock = (by_key.get((name, size)) for name in ("hbm", "recompute", "stock"))
        gain = _factor(row, recompute)
        lines.append(
            [
                row["backend"],
                tokens_label(size),
                _ms(row["ttft_ms"]["p50"]),
                _spread(row["ttft_ms"]["min"], row["ttft_ms"]["max"]),
                f"{row['samples']}+{row['samples_unproven']}",
                _factor(row, hbm, plain=True),
                gain,
                _factor(row, stock) if row["backend"] not in FLOOR_AND_CEILING else "-",
                _ms(row.get("floor_ms")),
                f"{row['over_floor']:.2f}x" if row.get("over_floor") else "-",
                "DIFFER" if not row["outputs_equal"] else "-",
            ]
        )
        notes += _no_gain(row, gain, f"at {tokens_label(size)} tokens")
        if row.get("outputs_equal_across") is False and row["backend"] not in FLOOR_AND_CEILING:
            notes.append(
                f"{row['backend']} at {tokens_label(size)} tokens: the uncached outputs differ from those of engine "
                f"{row['outputs_compared_with']}."
            )
    header = ["backend", "tokens", "TTFT ms", "min-max", "n", "of HBM", "vs no hit", "vs stock", "floor ms", "of floor"]
    header.append("outputs")
    if any(row.get("outputs_tell_prompts_apart") is False for row in rows):
        notes.append("Outputs: all prompts have the same with this model, so they say nothing of the KV.")
    elif all(row["outputs_equal"] for row in rows):
        notes.append("Outputs: each hit's are those of its engine's first hit in HBM.")
    notes.append("TTFT: median. ~: spreads overlap. n: samples, proven+unproven. no hit: computed again.")
    return f"TTFT of a hit, {rows[0].get('shape')}, page {rows[0].get('page_size')}", header, lines, notes


def _throughput_table(rows: list[Row]) -> Table:
    lines, notes = [], []
    by_key = {(row["backend"], row["hit_ratio"], row["concurrency"]): row for row in rows}
    for row in sorted(rows, key=lambda row: (row["concurrency"], row["hit_ratio"], _order(row))):
        ratio, level = row["hit_ratio"], row["concurrency"]
        computed = by_key.get(("recompute", 0.0, level)) or by_key.get((row["backend"], 0.0, level))
        gain = _factor(row, computed, "tokens_per_s")
        lines.append(
            [
                row["backend"],
                f"{ratio:.0%}",
                str(level),
                "-" if row["tokens_per_s"] is None else _short(row["tokens_per_s"]),
                _spread(row["min"], row["max"]),
                gain,
                _factor(row, by_key.get(("stock", ratio, level)), "tokens_per_s"),
                _percent(row["measured_hit_ratio"]),
                _ms(row["ttft_ms"]["p50"]),
                _ms((row.get("inter_token_ms") or {}).get("p50")),
                f"{row['samples']}+{row['samples_unproven']}",
            ]
        )
        if ratio > 0:
            notes += _no_gain(row, gain, f"at {ratio:.0%} hits, {level} at once")
    header = ["backend", "hits", "at once", "tokens/s", "min-max", "vs no hits", "vs stock", "proven hits"]
    header += ["TTFT ms", "token gap ms", "n"]
    notes.append("tokens/s: of prompts and outputs, median of rounds. ~: spreads overlap. n: samples, proven+unproven.")
    return f"Throughput, {rows[0].get('shape')}, prompts of {rows[0]['prompt_tokens']} tokens", header, lines, notes


def _latency_cells(row: Row) -> list[str]:
    return [
        *(_ms(row["ttft_ms"][name]) for name in ("p50", "p90", "p99")),
        *(_percent(row["hit_ratio"][name]) for name in ("device", "host", "total")),
    ]


_LATENCY = ["TTFT p50 ms", "p90", "p99", "hits device", "hits host", "hits"]


def _multiturn_table(rows: list[Row]) -> Table:
    lines = [
        [
            row["backend"],
            {None: "all", 0: "1 cold", 1: "2 warm"}.get(row["turn"]) or str(row["turn"] + 1),
            tokens_label(row["prompt_tokens"]),
            *_latency_cells(row),
            str(row["samples"]),
            "-" if row["turn"] is not None else f"{row['seconds']:.1f}",
        ]
        for row in sorted(rows, key=lambda r: (_order(r), 1e9 if r["turn"] is None else r["turn"]))
    ]
    engines = rows[0].get("engines", 1)
    several = f" on {engines} engines" if engines > 1 else ""
    title = f"{rows[0]['agents']} agents{several}, TTFT by turn, {rows[0].get('shape')}"
    notes = ["hits: share of prompt tokens, by where they were. seconds: of all turns."]
    walls = {row["backend"]: row["seconds"] for row in rows if row["turn"] is None and row.get("complete", True)}
    for backend in walls if walls.keys() & {"stock", "recompute"} else ():
        others = [name for name in ("recompute", "stock") if name in walls and name != backend]
        factors = " and ".join(f"{walls[name] / walls[backend]:.2f}x as fast as {name}" for name in others)
        if factors and backend not in FLOOR_AND_CEILING:
            notes.append(f"{backend}: all turns {factors}.")
    return title, ["backend", "turn", "tokens", *_LATENCY, "n", "seconds"], lines, notes


def _trace_table(rows: list[Row]) -> Table:
    lines, notes = [], ["n: requests. e2e: to the last token. possible hits: of a cache without limits."]
    stock = next((row for row in rows if row["backend"] == "stock"), None)
    for row in sorted(rows, key=_order):
        e2e = row.get("e2e_ms") or {}
        lines.append(
            [
                row["backend"],
                str(row["samples"]),
                *(_ms(times.get(name)) for times in (row["ttft_ms"], e2e) for name in ("p50", "p99")),
                *(_percent(row["hit_ratio"][name]) for name in ("device", "host")),
                _percent(row["ideal_hit_ratio"]),
                _short(row["tokens_per_s"]),
                f"{row['seconds']:.0f}",
            ]
        )
        if row["backend"] not in (*FLOOR_AND_CEILING, "stock") and _factor(row, stock).startswith("~"):
            notes.append(f"{row['backend']}: TTFT does not differ from stock's beyond the spread.")
    title = f"Trace {rows[0]['trace']} at speed {rows[0]['speed']}, {rows[0].get('shape')}"
    header = ["backend", "n", "TTFT p50 ms", "p99", "e2e p50 ms", "p99", "hits device", "hits host", "possible hits"]
    return title, [*header, "tokens/s", "seconds"], lines, notes


def _copy_table(rows: list[Row]) -> Table:
    lines, notes = [], []
    for row in rows:
        if "skipped" in row or "error" in row:
            why = f"skipped: {row['skipped']}" if "skipped" in row else f"ERROR: {row['error']}"
            notes.append(f"{row['tier']}: {why}")
            continue
        share = f"{row['gbps'] / row['contiguous_gbps']:.0%}" if row.get("contiguous_gbps") else "-"
        bytes_are = "right" if row["verified"] else "WRONG"
        rates = [_rate(row["gbps"]), _rate(row.get("contiguous_gbps")), share]
        lines.append([row["tier"], row["case"], row["direction"], str(row["pages"]), *rates, bytes_are, row["copier"]])
    header = ["tier", "case", "direction", "pages", "GB/s", "contiguous GB/s", "share", "bytes", "copier"]
    return "Page copies", header, lines, notes


def _rate(gbps: float | None) -> str:
    return "-" if gbps is None else f"{gbps:.3g}"


def _soak_table(rows: list[Row]) -> Table:
    done = [row for row in rows if "page_copies" in row]
    lines = [
        [
            # Rows of scripts/bench/serving_soak.py: a server per write policy.
            r["tier"] + (f", {r['policy']}" if "policy" in r else ""),
            f"{r['page_copies']:,}",
            str(r["wrong"]),
            f"{r['seconds']:.0f}",
            str(r["gpu"]),
        ]
        for r in done
    ]
    notes = [f"{row['tier']}: skipped: {row['skipped']}" for row in rows if "skipped" in row]
    notes += [f"{row['tier']}: {row['too_few']}" for row in done if "too_few" in row]
    return "Verified page copies under load", ["tier", "page copies", "wrong", "seconds", "GPU"], lines, notes


def _runs_table(path: Path, rows: Sequence[Row], runs: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of --list."""
    about = path.with_name(f"{path.stem}.runs.jsonl")
    heads = {row.get("run"): row for row in (read_rows(about) if about.is_file() else [])}
    lines = []
    for run_id in runs:
        mine = rows_of_run(rows, run_id)
        names = dict.fromkeys(str(row.get("backend", row.get("tier", "-"))) for row in mine)
        sizes = dict.fromkeys(tokens_label(row["prompt_tokens"]) for row in mine if row.get("prompt_tokens"))
        gpus = heads.get(run_id, {}).get("gpus") or []
        where = mine[0].get("machine") or (f"{len(gpus)} x {gpus[0]}" if gpus else "-")
        about_it = f"{', '.join(names)}{f'; {chr(44).join(sizes)} tokens' if sizes else ''}; {where}"
        lines.append([run_id, mine[0]["bench"], str(len(mine)), about_it])
    return ["run", "bench", "rows", "backends; prompts; machine"], lines


# ---- plots ----


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """A picture of one run, in the format of the file's ending.

    Raises:
        ConfigError: the benchmark has no plot, the ending is of no picture, or matplotlib is missing.
    """
    bench = str(rows[0]["bench"])
    plot = {"ttft": _plot_ttft, "throughput": _plot_throughput, "multiturn": _plot_multiturn}.get(bench)
    if plot is None:
        raise ConfigError(f"bench {bench} has no plot. Leave --plot out.")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path} is not the name of a picture. Give one that ends in .png, .svg or .pdf.")
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib. Run pip install matplotlib.") from None
    matplotlib.use("Agg")
    # Text in an SVG stays text; equal rows give an equal file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sglang_xmem", "font.size": 10}):
        figure = plot(merged(rows))
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=metadata, facecolor="white")
        except OSError as error:
            raise ConfigError(f"--plot {path} cannot be written: {error.strerror}. Name another file.") from None
    print(path, file=sys.stderr)


def _figure(width: float, title: str, rows: Sequence[Row], panels: int = 1) -> tuple[Any, list[Any]]:
    # Figure and not pyplot: no global state, no display.
    from matplotlib.figure import Figure

    counts = sorted({row["samples"] for row in rows})
    samples = f"{counts[0]} to {counts[-1]} samples" if len(counts) > 1 else f"{counts[0]} samples"
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])
    for axis in axes:
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    shape = ", ".join(dict.fromkeys(str(row.get("shape", "")) for row in rows))
    figure.suptitle(f"{title}, {shape}, {samples}\n{_where(rows[0]).strip(' ()')}", fontsize=10)
    return figure, axes


def _style(backend: str) -> dict[str, Any]:
    dashed = backend in FLOOR_AND_CEILING
    colour, marker = STYLES.get(backend, ("#666666", "o"))
    label = {"hbm": "HBM hit", "recompute": "computed again", "stock": "stock HiCache"}
    return {
        "color": colour,
        "linestyle": "--" if dashed else "-",
        "marker": marker,
        "markersize": 7 if backend == "stock" else 5,
        "markerfacecolor": "none" if backend == "stock" else colour,  # where lines lie on each other, both show
        "label": label.get(backend, backend),
        # The floor goes on top of what reaches it.
        "zorder": 4 if backend == "hbm" else 3,
    }


def _backends(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["backend"] for row in sorted(rows, key=_order)))


def _log_ms(axis: Any) -> None:
    """TTFT on a logarithmic scale with plain numbers, also over less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylabel("time to first token, ms")


def _lines(axis: Any, rows: Sequence[Row], x: str, scale: float, low: Any, middle: Any, high: Any) -> None:
    """A line with whiskers for each backend."""
    for backend in _backends(rows):
        mine = sorted((row for row in rows if row["backend"] == backend), key=lambda row: row[x])
        y = [middle(row) for row in mine]
        errors = [[middle(row) - low(row) for row in mine], [high(row) - middle(row) for row in mine]]
        style = _style(backend)
        if len(mine) == 1 and style["marker"] is None:
            style["marker"] = "_"
        axis.errorbar([scale * row[x] for row in mine], y, yerr=errors, capsize=2, elinewidth=1, **style)


def _headline(axis: Any, rows: Sequence[Row], row: Row | None, key: str, x: float) -> None:
    """How much faster than stock the fastest tier is, next to its point."""
    best = [r for r in rows if r["backend"] not in (*FLOOR_AND_CEILING, "stock")]
    if row is None or not best:
        return
    other = (min if key == "ttft" else max)(best, key=lambda r: r["ttft_ms"]["p50"] if key == "ttft" else r[key])
    text = f"{other['backend']}: {_factor(other, row, key)} stock"
    y = other["ttft_ms"]["p50"] if key == "ttft" else other[key]
    axis.annotate(text, (x, y), xytext=(-6, -14), textcoords="offset points", ha="right", va="top", fontsize=9)


def _plot_ttft(rows: list[Row]) -> Any:
    shapes = _by_shape(row for row in rows if row["ttft_ms"]["p50"] is not None)
    rows = [row for of_shape in shapes for row in of_shape]
    width = 7 if len(shapes) == 1 else 4 * len(shapes)
    figure, axes = _figure(width, "TTFT of a hit: median, min to max", rows, len(shapes))
    parts = [lambda row, name=name: row["ttft_ms"][name] for name in ("min", "p50", "max")]
    for axis, of_shape in zip(axes, shapes, strict=True):
        _lines(axis, of_shape, "prompt_tokens", 1, *parts)
        axis.set_xscale("log", base=2)
        sizes = sorted({row["prompt_tokens"] for row in of_shape})
        axis.set_xticks(sizes, [tokens_label(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("prompt tokens")
        if len(shapes) > 1:
            axis.set_title(str(of_shape[0].get("shape")), fontsize=10)
        largest = [row for row in of_shape if row["prompt_tokens"] == sizes[-1]]
        _headline(axis, largest, next((r for r in largest if r["backend"] == "stock"), None), "ttft", sizes[-1])
    _log_ms(axes[0])
    axes[0].legend(frameon=False, loc="upper left")
    return figure


def _plot_throughput(rows: list[Row]) -> Any:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    rows = [row for row in rows if row["tokens_per_s"] is not None]
    levels = sorted({row["concurrency"] for row in rows})
    title = f"Throughput, prompts of {tokens_label(rows[0]['prompt_tokens'])} tokens: median, min to max"
    figure, axes = _figure(max(7.0, 3.6 * len(levels)), title, rows, len(levels))
    for axis, concurrency in zip(axes, levels, strict=True):
        here = [row for row in rows if row["concurrency"] == concurrency]
        for row in here:
            if row["backend"] == "recompute":
                axis.axhline(row["tokens_per_s"], color=STYLES["recompute"][0], linestyle="--", label="computed again")
        parts = [lambda row, name=name: row[name] for name in ("min", "tokens_per_s", "max")]
        _lines(axis, [row for row in here if row["backend"] != "recompute"], "hit_ratio", 100, *parts)
        axis.set_title(f"{concurrency} at once", fontsize=10)
        axis.set_xlabel("share of the prompt that hits, %")
        axis.set_xticks(sorted({100 * row["hit_ratio"] for row in here}))
        axis.set_yscale("log")  # all but the last few percent of hits are nearly the same to the eye otherwise
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        axis.yaxis.set_minor_formatter(NullFormatter())
        most = max(row["hit_ratio"] for row in here)
        full = [row for row in here if row["hit_ratio"] == most]
        stock = next((row for row in full if row["backend"] == "stock"), None)
        _headline(axis, full, stock, "tokens_per_s", 100 * most)
    axes[0].set_ylabel("tokens/s, prompt and output")
    axes[0].legend(frameon=False)
    return figure


def _plot_multiturn(rows: list[Row]) -> Any:
    from matplotlib.ticker import MaxNLocator

    turns = [row for row in rows if row["turn"] is not None and row["ttft_ms"]["p50"] is not None]
    figure, (axis,) = _figure(7, f"{rows[0]['agents']} agents, TTFT by turn: median and p90", turns)
    for backend in _backends(turns):
        mine = sorted((row for row in turns if row["backend"] == backend), key=lambda row: row["turn"])
        x, style = [row["turn"] + 1 for row in mine], _style(backend)
        axis.plot(x, [row["ttft_ms"]["p50"] for row in mine], **style)
        tail = {**style, "linestyle": ":", "marker": None, "label": f"{style['label']}, p90"}
        axis.plot(x, [row["ttft_ms"]["p90"] for row in mine], **tail)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _log_ms(axis)
    axis.set_xlabel("turn")
    axis.legend(frameon=False)
    return figure

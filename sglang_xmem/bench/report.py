"""`sglang-xmem bench report FILE`: tables, CSV and plots of results that were written before.

The other benchmarks use it for the run that they have just made. Plots need matplotlib (`pip install
'.[bench]' in a clone`), no display and no GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sglang_xmem.bench import stats
from sglang_xmem.errors import ConfigError

Row = dict[str, Any]

#: Order and colours (Okabe and Ito's, which colour-blind readers can tell apart) of backends.
COLOURS = {
    "hbm": "#000000",
    "peer": "#009e73",
    "mtier": "#cc79a7",
    "cxl": "#f0e442",
    "auto": "#56b4e9",
    "dram": "#0072b2",
    "stock": "#d55e00",
    "server": "#e69f00",
    "recompute": "#888888",
}
FLOOR_AND_CEILING = ("hbm", "recompute")
#: Where lines lie on each other, another marker shows both.
MARKERS = {"stock": "s", "peer": "^", "mtier": "D", "server": "v"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="JSON Lines file of a benchmark")
    parser.add_argument("--run", default=None, dest="run_id", help="id of a run in it; default: the last")
    parser.add_argument(
        "--output", type=Path, default=None, help="where files go, without ending; default: beside FILE"
    )
    parser.add_argument("--no-plots", action="store_true", help="the table alone")


def run(args: argparse.Namespace) -> int:
    rows = read_rows(args.file)
    chosen = args.run_id or next((row["run"] for row in reversed(rows) if "run" in row), None)
    rows = rows_of_run(rows, chosen)
    if not rows:
        raise ConfigError(f"{args.file} has no rows{f' of run {chosen}' if chosen else ''}; name another file or run.")
    print_table(rows)
    if not args.no_plots:
        for path in write_files(rows, args.output or args.file):
            print(path, file=sys.stderr)
    return 0


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSON Lines file; a last line that an ended process left unfinished is passed over.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a file of JSON Lines; name one.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError
                rows.append(row)
            except (ValueError, RecursionError):
                if number != len(lines):
                    raise ConfigError(f"line {number} of {path} is not a JSON object.") from None
    return rows


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a JSON Lines file, in place of a last line that an ended process left unfinished."""
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
            _mend_end(file)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def _mend_end(file: BinaryIO) -> None:
    """End a file's last line if it is whole, else take it out."""
    file.seek(0)
    whole, newline, last = file.read().rpartition(b"\n")
    try:
        json.loads(last)
        file.write(b"\n")
    except ValueError:
        file.truncate(len(whole + newline))


def rows_of_run(rows: Iterable[Row], run_id: str | None) -> list[Row]:
    """A run's rows; where an engine was run again after it had failed, only the later ones."""
    latest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.get("run") == run_id:
            latest[(row.get("engine"), row.get("pass"), *identity(row))] = row
    done = {(row.get("engine"), row.get("pass")) for row in latest.values() if row.get("complete")}
    return [row for row in latest.values() if "error" not in row or (row.get("engine"), row.get("pass")) not in done]


#: What tells rows of a benchmark apart, beside the engine.
IDENTITY = {
    "ttft": ("backend", "prompt_tokens"),
    "throughput": ("backend", "hit_ratio", "concurrency"),
    "multiturn": ("backend", "turn"),
    "trace": ("backend",),
    "timeline": ("backend", "hit", "gpu", "kernel"),
    "roundtrip": ("tier", "bytes", "kernel"),
}


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is a measurement of; unknown benchmarks by all that is text."""
    keys = IDENTITY.get(str(row.get("bench")))
    if keys is None:
        keys = tuple(key for key, value in row.items() if isinstance(value, str) and key not in ("run", "time"))
    return (row.get("bench"), *(row.get(key) for key in keys))


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row for each identity: samples of several engines and passes (hbm, recompute) put together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(identity(row), []).append(row)
    result = []
    for group in groups.values():
        row = dict(group[0])
        if len(group) > 1 and all("all_ms" in other and "ttft_ms" in other for other in group):
            row["all_ms"] = [ms for other in group for ms in other["all_ms"]]
            row["ttft_ms"] = stats.summary(row["all_ms"])
            row["samples"] = sum(other["samples"] for other in group)
            row["samples_unproven"] = sum(other["samples_unproven"] for other in group)
            _derive_again(row)
            if "outputs_equal" in row:
                row["outputs_equal"] = all(other["outputs_equal"] for other in group)
        result.append(row)
    return result


def _derive_again(row: Row) -> None:
    """What follows from a row's TTFT, after that has become another."""
    p50 = row["ttft_ms"]["p50"]
    row.pop("transfer_hidden", None)  # that takes the HBM hit's as well
    if p50 and "kv_bytes" in row:
        row.update(stats.transfer_rates(row["kv_bytes"], p50, row.get("link_gbps")))


# ---- tables ----


def print_table(rows: Sequence[Row]) -> None:
    """The table of one run on stdout."""
    makers = {
        "ttft": _ttft_table,
        "throughput": _throughput_table,
        "multiturn": _multiturn_table,
        "trace": _trace_table,
    }
    maker = makers.get(str(rows[0].get("bench")))
    if maker is None:
        for row in rows:
            print(json.dumps(row))
        return
    title, header, lines, notes = maker(merged(rows))
    show_table(title, header, lines)
    for note in notes:
        print(note)


def show_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on stdout, its first column to the left and the others to the right."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=SIMPLE, title_justify="left", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # Into a file or a pipe as wide as it comes; a terminal's width is the reader's choice.
    Console(width=None if sys.stdout.isatty() else 250, highlight=False).print(table)


Table = tuple[str, list[str], list[list[str]], list[str]]


def _order(backend: str) -> tuple[int, str]:
    names, tier = list(COLOURS), tier_of(backend)
    return (names.index(tier) if tier in names else len(names) - 1, backend)


def tier_of(backend: str) -> str:
    """A backend without its variant."""
    return backend.partition("+")[0]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _spread(ttft: Row) -> str:
    return "-" if ttft.get("min") is None else f"{_ms(ttft['min'])} to {_ms(ttft['max'])}"


def interval(row: Row) -> tuple[float, float] | None:
    """Where the median of a row lies, about 95 %; None with less than two samples."""
    samples = row.get("all_ms") or row.get("tokens_per_s_all") or row.get("times_ms")
    if samples is not None:
        return stats.median_interval(samples) if len(samples) > 1 else None
    stated = (row.get("ttft_ms") or {}).get("p50_interval")
    return (stated[0], stated[1]) if stated else None


def _factor(gain: float, a: tuple[float, float], b: tuple[float, float]) -> str:
    """A gain whose two sides have these spreads."""
    if not stats.apart(a, b):
        return f"~{gain:.2f}x"
    return f"{gain:.2f}x" if gain > 1 else f"slower, {gain:.2f}x"


def _gain(row: Row, other: Row | None) -> str:
    """How much faster than another, or plainly that it is not; `~` where the spreads overlap."""
    mine, theirs = row["ttft_ms"]["p50"], other["ttft_ms"]["p50"] if other else None
    if other is None or other is row or not mine or not theirs:
        return "-"
    return _factor(theirs / mine, interval(row) or (mine, mine), interval(other) or (theirs, theirs))


def alike(row: Row) -> bool:
    """Whether all prompts of the row's engine had the same output."""
    return row.get("outputs_tell_prompts_apart") is False


def _ttft_table(rows: list[Row]) -> Table:
    lines, notes = [], []
    by_key = {(row["backend"], row["prompt_tokens"]): row for row in rows}
    for row in sorted(rows, key=lambda row: (row["prompt_tokens"], _order(row["backend"]))):
        size = row["prompt_tokens"]
        recompute, stock = (by_key.get((name, size)) for name in ("recompute", "stock"))
        hbm = by_key.get(("hbm", size))
        p50 = row["ttft_ms"]["p50"]
        across = row.get("outputs_equal_across")
        over_hbm = p50 / hbm["ttft_ms"]["p50"] if hbm and p50 and hbm["ttft_ms"]["p50"] else None
        gain = _gain(row, recompute)
        lines.append(
            [
                row["backend"],
                tokens_label(size),
                _ms(p50),
                _spread(row["ttft_ms"]),
                "-" if over_hbm is None else f"{over_hbm:.2f}x",
                gain,
                _gain(row, stock) if row["backend"] not in FLOOR_AND_CEILING else "-",
                f"{row['hits']['device']}/{row['hits']['host']}",
                f"{row['kv_bytes'] / 1e6:.4g}" if "kv_bytes" in row else "-",
                f"{row['gbps']:.3g}" if "gbps" in row else "-",
                _percent(row.get("link_share")),
                _percent(row.get("transfer_hidden")),
                "DIFFER" if not row["outputs_equal"] else "alike" if alike(row) else "equal",
                f"{row['samples']}+{row['samples_unproven']}",
            ]
        )
        if row["backend"] not in FLOOR_AND_CEILING and gain[:1] in ("~", "s"):
            notes.append(
                f"{row['backend']} at {tokens_label(size)} tokens: no gain over computing again beyond the spread."
            )
        if across is False and row["backend"] not in FLOOR_AND_CEILING:
            notes.append(
                f"{row['backend']} at {tokens_label(size)} tokens: the uncached outputs differ from those of engine "
                f"{row['outputs_compared_with']}."
            )
    header = ["backend", "tokens", "TTFT ms", "min to max", "of HBM's", "vs recompute", "vs stock", "hits dev/host"]
    header += ["MB", "GB/s", "of link", "hidden", "outputs", "samples"]
    if any(alike(row) for row in rows):
        notes.append("alike: all prompts have the same output with this model, so it says nothing of the KV.")
    notes.append(
        "TTFT: median. ~: spreads overlap. MB, GB/s: KV bytes of the hit, by its TTFT. samples: proven+unproven."
    )
    return f"TTFT of a hit, {rows[0].get('shape')}, page {rows[0].get('page_size')}", header, lines, notes


def _throughput_table(rows: list[Row]) -> Table:
    lines, notes = [], []
    by_key = {(row["backend"], row["hit_ratio"], row["concurrency"]): row for row in rows}
    for row in sorted(rows, key=lambda row: (row["concurrency"], row["hit_ratio"], _order(row["backend"]))):
        computed = by_key.get(("recompute", 0.0, row["concurrency"])) or by_key.get(
            (row["backend"], 0.0, row["concurrency"])
        )
        gain = _rate_gain(row, computed)
        lines.append(
            [
                row["backend"],
                f"{row['hit_ratio']:.0%}",
                str(row["concurrency"]),
                _ms(row["tokens_per_s"]),
                "-" if row["tokens_per_s"] is None else f"{row['min']:.0f} to {row['max']:.0f}",
                gain,
                _rate_gain(row, by_key.get(("stock", row["hit_ratio"], row["concurrency"]))),
                _percent(row["measured_hit_ratio"]),
                _ms(row["ttft_ms"]["p50"]),
                _ms(row["ttft_ms"]["p99"]),
                f"{row['samples']}+{row['samples_unproven']}",
            ]
        )
        if row["hit_ratio"] > 0 and row["backend"] not in FLOOR_AND_CEILING and gain[:1] in ("~", "s"):
            notes.append(
                f"{row['backend']} at {row['hit_ratio']:.0%} hits, {row['concurrency']} at once: "
                "no gain beyond the spread."
            )
    header = ["backend", "hits", "at once", "tokens/s", "min to max", "vs no hits", "vs stock", "proven hits"]
    header += ["TTFT p50 ms", "TTFT p99 ms", "samples"]
    notes.append("tokens/s: prompt and output tokens, median of rounds. ~: spreads overlap.")
    return f"Throughput, {rows[0].get('shape')}, prompts of {rows[0]['prompt_tokens']} tokens", header, lines, notes


def _rate_gain(row: Row, other: Row | None) -> str:
    mine, theirs = row["tokens_per_s"], other["tokens_per_s"] if other else None
    if other is None or other is row or not mine or not theirs:
        return "-"
    return _factor(mine / theirs, interval(row) or (mine, mine), interval(other) or (theirs, theirs))


def _multiturn_table(rows: list[Row]) -> Table:
    lines = [
        [
            row["backend"],
            "all" if row["turn"] is None else str(row["turn"] + 1),
            tokens_label(row["prompt_tokens"]),
            *(_ms(row["ttft_ms"][name]) for name in ("p50", "p90", "p99", "max")),
            *(_percent(row["hit_ratio"][name]) for name in ("device", "host", "total")),
            str(row["samples"]),
        ]
        for row in sorted(rows, key=lambda r: (_order(r["backend"]), 1e9 if r["turn"] is None else r["turn"]))
    ]
    header = ["backend", "turn", "tokens", "TTFT p50 ms", "p90", "p99", "max", "hits device", "hits host", "hits", "n"]
    title = f"{rows[0]['agents']} agents, TTFT by turn, {rows[0].get('shape')}"
    return title, header, lines, ["hits: share of prompt tokens, by where they were."]


def _trace_table(rows: list[Row]) -> Table:
    lines = [
        [
            row["backend"],
            str(row["samples"]),
            *(_ms(row["ttft_ms"][name]) for name in ("p50", "p90", "p99", "max")),
            *(_percent(row["hit_ratio"][name]) for name in ("device", "host", "total")),
            _percent(row["ideal_hit_ratio"]),
            f"{row['tokens_per_s']:.0f}",
            f"{row['seconds']:.1f}",
            _ms(row["late_ms"]["p99"]),
        ]
        for row in sorted(rows, key=lambda row: _order(row["backend"]))
    ]
    header = ["backend", "requests", "TTFT p50 ms", "p90", "p99", "max", "hits device", "hits host", "hits", "possible"]
    header += ["tokens/s", "seconds", "late p99 ms"]
    notes = ["possible: hits of a cache without limits. late: how long after its time a request was sent."]
    return f"Trace {rows[0]['trace']} at speed {rows[0]['speed']}, {rows[0].get('shape')}", header, lines, notes


def tokens_label(tokens: float) -> str:
    """81920 is 80K."""
    whole = round(tokens)
    return f"{whole // 1024}K" if whole >= 1024 and whole % 1024 == 0 else str(whole)


# ---- files ----


def write_files(rows: Sequence[Row], path: Path) -> list[Path]:
    """CSV, and PNG and SVG where the benchmark has a plot, beside `path`; returns what was written."""
    written = [path.with_suffix(".csv")]
    write_csv(rows, written[0])
    plot = {
        "ttft": _plot_ttft,
        "throughput": _plot_throughput,
        "multiturn": _plot_multiturn,
    }.get(str(rows[0]["bench"]))
    if plot is None:
        return written
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is missing; run pip install matplotlib", file=sys.stderr)
        return written
    matplotlib.use("Agg")
    # Text in an SVG stays text; equal rows give an equal file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sglang_xmem", "font.size": 10}):
        figure = plot(merged(rows))
        for suffix in (".png", ".svg"):
            metadata = {"Date": None} if suffix == ".svg" else {}
            figure.savefig(path.with_suffix(suffix), dpi=150, metadata=metadata, facecolor="white")
            written.append(path.with_suffix(suffix))
    return written


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row; nested values as `outer.inner`, lists left out."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Row) -> Row:
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": v for inner, v in value.items() if not isinstance(v, list)})
        elif not isinstance(value, list):
            flat[key] = value
    return flat


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    # Figure and not pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])
    for axis in axes:
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _style(backend: str) -> dict[str, Any]:
    dashed = backend in FLOOR_AND_CEILING
    tier = tier_of(backend)
    colour = COLOURS.get(tier, "#666666")
    hollow = backend == "stock" or backend != tier
    label = {"hbm": "HBM hit (floor)", "recompute": "computed again (ceiling)", "stock": "stock HiCache"}
    return {
        "color": colour,
        "linestyle": "--" if dashed else "-" if backend == tier else ":",
        "marker": None if dashed else MARKERS.get(tier, "o"),
        "markersize": 6 if hollow else 5,
        "markerfacecolor": "none" if hollow else colour,
        "label": label.get(backend, backend),
    }


def _backends(rows: Sequence[Row]) -> list[str]:
    return sorted({row["backend"] for row in rows}, key=_order)


def _log_ms(axis: Any) -> None:
    """TTFT on a logarithmic scale with plain numbers, also over less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylabel("time to first token, ms")


def _plot_ttft(rows: list[Row]) -> Any:
    rows = [row for row in rows if row["ttft_ms"]["p50"] is not None]
    figure, (axis,) = _figure(7, 4.5)
    for backend in _backends(rows):
        mine = sorted((row for row in rows if row["backend"] == backend), key=lambda row: row["prompt_tokens"])
        x, y = [row["prompt_tokens"] for row in mine], [row["ttft_ms"]["p50"] for row in mine]
        style = _style(backend)
        if len(x) == 1 and style["marker"] is None:
            style["marker"] = "_"
        errors = [[p50 - row["ttft_ms"]["min"] for p50, row in zip(y, mine, strict=True)]]
        errors += [[row["ttft_ms"]["max"] - p50 for p50, row in zip(y, mine, strict=True)]]
        axis.errorbar(x, y, yerr=errors, capsize=2, elinewidth=1, **style)
    axis.set_xscale("log", base=2)
    sizes = sorted({row["prompt_tokens"] for row in rows})
    axis.set_xticks(sizes, [tokens_label(size) for size in sizes])
    axis.minorticks_off()
    _log_ms(axis)
    axis.set_xlabel("prompt tokens")
    axis.set_title(f"TTFT of a hit, {rows[0].get('shape', '')}: median, min to max", fontsize=11)
    axis.legend(frameon=False, loc="upper left")
    return figure


def _plot_throughput(rows: list[Row]) -> Any:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    rows = [row for row in rows if row["tokens_per_s"] is not None]
    levels = sorted({row["concurrency"] for row in rows})
    figure, axes = _figure(max(5.0, 3.6 * len(levels)), 4.2, len(levels))
    for axis, concurrency in zip(axes, levels, strict=True):
        here = [row for row in rows if row["concurrency"] == concurrency]
        for backend in _backends(here):
            mine = sorted((row for row in here if row["backend"] == backend), key=lambda row: row["hit_ratio"])
            style = _style(backend)
            style["label"] = str(style["label"]).partition(" (")[0]  # floor and ceiling are those of TTFT
            if backend == "recompute":
                axis.axhline(mine[0]["tokens_per_s"], color=style["color"], linestyle="--", label=style["label"])
                continue
            x, y = [100 * row["hit_ratio"] for row in mine], [row["tokens_per_s"] for row in mine]
            errors = [[rate - row["min"] for rate, row in zip(y, mine, strict=True)]]
            errors += [[row["max"] - rate for rate, row in zip(y, mine, strict=True)]]
            axis.errorbar(x, y, yerr=errors, capsize=2, elinewidth=1, **style)
        axis.set_title(f"{concurrency} at once", fontsize=11)
        axis.set_xlabel("share of the prompt that hits, %")
        axis.set_xticks(sorted({100 * row["hit_ratio"] for row in here}))
        axis.set_yscale("log")  # all but the last few percent of hits are nearly the same to the eye otherwise
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("tokens/s, prompt and output")
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"Throughput, {rows[0].get('shape', '')}, prompts of {rows[0]['prompt_tokens']} tokens", fontsize=11
    )
    return figure


def _plot_multiturn(rows: list[Row]) -> Any:
    from matplotlib.ticker import MaxNLocator

    turns = [row for row in rows if row["turn"] is not None and row["ttft_ms"]["p50"] is not None]
    figure, (axis,) = _figure(7, 4.5)
    for backend in _backends(turns):
        mine = sorted((row for row in turns if row["backend"] == backend), key=lambda row: row["turn"])
        x = [row["turn"] + 1 for row in mine]
        style = _style(backend)
        axis.plot(x, [row["ttft_ms"]["p50"] for row in mine], **style)
        tail = {**style, "linestyle": ":", "marker": None, "label": f"{style['label']}, p90"}
        axis.plot(x, [row["ttft_ms"]["p90"] for row in mine], **tail)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _log_ms(axis)
    axis.set_xlabel("turn")
    axis.set_title(f"{rows[0]['agents']} agents, TTFT by turn, {rows[0].get('shape', '')}: median and p90", fontsize=11)
    axis.legend(frameon=False)
    return figure

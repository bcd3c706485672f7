"""Plots of one run's rows, as `sglang-xmem bench report --plot` writes them; matplotlib without a display.

A panel for each value of a key (shape, concurrency), in it a line with whiskers for each backend.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_xmem.bench.report import COLUMNS, FLOOR_AND_CEILING, KINDS, Row, factor, in_order, merged, short, title
from sglang_xmem.errors import ConfigError

#: Colours (Okabe and Ito's, which colour-blind readers can distinguish) and markers of backends.
STYLES = {
    "hbm": ("#000000", "_"),
    "peer": ("#009e73", "^"),
    "mtier": ("#cc79a7", "D"),
    "dax": ("#f0e442", "o"),
    "auto": ("#56b4e9", "o"),
    "dram": ("#0072b2", "o"),
    "stock": ("#d55e00", "s"),
    "server": ("#e69f00", "v"),
    "recompute": ("#888888", "_"),
}
LABELS = {"hbm": "HBM hit", "recompute": "computed again", "stock": "stock HiCache"}


def write(rows: Sequence[Row], path: Path) -> None:
    """A picture of one run, in the format of the file's ending.

    Raises:
        ConfigError: the run has no plot, the ending is of no picture, or matplotlib is missing.
    """
    bench = rows[0]["bench"]
    kind = KINDS.get(bench)
    if kind is None or not kind.panel:
        raise ConfigError(f"bench {bench} has no plot. Leave --plot out.")
    x = kind.what.split()[-1]
    needed = [kind.panel, x, kind.metric, *kind.ends]
    mine = merged(row for row in rows if row["bench"] == bench)
    whole = [row for row in mine if not any(row.get(key) is None for key in needed)]
    if not whole:
        raise ConfigError("The run has nothing to plot. Leave --plot out.")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path} is not the name of a picture. Give one that ends in .png, .svg or .pdf.")
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib. Run pip install matplotlib.") from None
    matplotlib.use("Agg")
    # Text in an SVG stays text; equal rows give an equal file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sglang_xmem", "font.size": 10}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        try:
            _figure(whole, kind.panel, x).savefig(path, dpi=150, metadata=metadata, facecolor="white")
        except OSError as error:
            raise ConfigError(f"--plot {path} cannot be written: {error.strerror}. Name another file.") from None
    print(path, file=sys.stderr)


def _figure(rows: Sequence[Row], panel: str, x: str) -> Any:
    # Figure and not pyplot: no global state, no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    kind = KINDS[rows[0]["bench"]]
    panels: dict[Any, list[Row]] = defaultdict(list)
    for row in in_order(rows):
        panels[row[panel]].append(row)
    figure = Figure(figsize=(max(7.0, 3.8 * len(panels)), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (value, mine) in zip(axes, panels.items(), strict=True):
        _panel(axis, mine, x)
        axis.set_title(f"{panel} {value}" if len(panels) > 1 else "", fontsize=9, loc="left")
    first = axes[0]
    first.set_yscale("log")
    first.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    first.yaxis.set_minor_locator(NullLocator())
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    first.set_ylabel(COLUMNS[kind.metric][0])
    first.legend(frameon=False)
    samples = sorted({row["samples"] for row in rows if row.get("samples")}) or [0]
    counted = "-".join(map(str, dict.fromkeys((samples[0], samples[-1]))))
    ends = " to ".join(end.partition(".")[2] or end for end in kind.ends)
    figure.suptitle(f"{title(rows[0])}\nmedian, {ends}; {counted} samples", fontsize=10)
    return figure


def _panel(axis: Any, rows: Sequence[Row], x: str) -> None:
    """Lines, axis of x and headline of a panel."""
    kind, (heading, written) = KINDS[rows[0]["bench"]], COLUMNS[x]
    y, (low, high) = kind.metric, kind.ends
    values = sorted({row[x] for row in rows})
    for name in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == name]
        colour, marker = STYLES.get(name, ("#666666", "o"))
        style: dict[str, Any] = {"color": colour, "label": LABELS.get(name, name)}
        style["linestyle"] = "--" if name in FLOOR_AND_CEILING else "-"
        if len(mine) == 1 < len(values):  # a ceiling that was measured once
            axis.axhline(mine[0][y], **style)
            continue
        # Where lines lie on each other, both show.
        style |= {"marker": marker, "markerfacecolor": "none" if name == "stock" else colour}
        errors = [[max(0, row[y] - row[low]) for row in mine], [max(0, row[high] - row[y]) for row in mine]]
        places = [values.index(row[x]) for row in mine]
        axis.errorbar(places, [row[y] for row in mine], yerr=errors, capsize=2, elinewidth=1, **style)
    axis.set_xticks(range(len(values)), [written(value) for value in values])
    axis.set_xlabel(heading)
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    last = {row["backend"]: row for row in rows if row[x] == values[-1]}
    tiers = [row for name, row in last.items() if name not in (*FLOOR_AND_CEILING, "stock")]
    if tiers and "stock" in last:
        best = (min if "_ms" in y else max)(tiers, key=lambda row: row[y])
        axis.set_title(f"{best['backend']}: {factor(best, last['stock'])} stock", fontsize=9, loc="right")

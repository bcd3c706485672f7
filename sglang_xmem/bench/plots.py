"""Plots of one run's rows, as `sglang-xmem bench report --plot` writes them; matplotlib without a display."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_xmem.bench.report import FLOOR_AND_CEILING, Row, backend_order, factor, merged, short, tokens_label, where
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


class Plot(NamedTuple):
    """A picture of a benchmark: a line with whiskers for each backend, and a panel for each value of a key.

    Attributes:
        title: with keys of the first row in braces.
        panel: the key, and how its values are written over a panel.
        x: the key, how its values are written, and what they are.
        y: keys of the lower end, the middle and the upper end.
        y_label: what they are.
    """

    title: str
    panel: tuple[str, str]
    x: tuple[str, Callable[[float], str], str]
    y: tuple[str, str, str]
    y_label: str


_TTFT = "time to first token, ms"
PLOTS = {
    "ttft": Plot(
        "TTFT of a hit: median, min to max",
        ("shape", "{}"),
        ("prompt_tokens", tokens_label, "prompt tokens"),
        ("ttft_ms.min", "ttft_ms.p50", "ttft_ms.max"),
        _TTFT,
    ),
    "throughput": Plot(
        "Throughput, prompts of {prompt_tokens} tokens: median, min to max",
        ("concurrency", "{} at once"),
        ("hit_ratio", "{:.0%}".format, "share of the prompt that hits"),
        ("min", "tokens_per_s", "max"),
        "tokens/s, prompt and output",
    ),
    "multiturn": Plot(
        "{agents} agents, TTFT by turn: median, to the 90th percentile",
        ("shape", "{}"),
        ("turn", lambda turn: f"{turn + 1:.0f}", "turn"),
        ("ttft_ms.p50", "ttft_ms.p50", "ttft_ms.p90"),
        _TTFT,
    ),
}


def write(rows: Sequence[Row], path: Path) -> None:
    """A picture of one run, in the format of the file's ending.

    Raises:
        ConfigError: the benchmark has no plot, the ending is of no picture, or matplotlib is missing.
    """
    bench = rows[0]["bench"]
    if bench not in PLOTS:
        raise ConfigError(f"bench {bench} has no plot. Leave --plot out.")
    plot = PLOTS[bench]
    needed = [plot.panel[0], plot.x[0], *plot.y]
    whole = [row for row in merged(rows) if row["bench"] == bench and not any(row.get(key) is None for key in needed)]
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
            _figure(plot, whole).savefig(path, dpi=150, metadata=metadata, facecolor="white")
        except OSError as error:
            raise ConfigError(f"--plot {path} cannot be written: {error.strerror}. Name another file.") from None
    print(path, file=sys.stderr)


def _figure(plot: Plot, rows: Sequence[Row]) -> Any:
    # Figure and not pyplot: no global state, no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = list(dict.fromkeys(row[plot.panel[0]] for row in rows))
    figure = Figure(figsize=(max(7.0, 3.8 * len(panels)), 4.6), layout="constrained")
    axes = list(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0])
    for axis, panel in zip(axes, panels, strict=True):
        _panel(plot, axis, [row for row in rows if row[plot.panel[0]] == panel])
        if len(panels) > 1:
            axis.set_title(plot.panel[1].format(panel), fontsize=10)
    first = axes[0]
    first.set_yscale("log")
    first.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    first.yaxis.set_minor_locator(NullLocator())
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    first.set_ylabel(plot.y_label)
    first.legend(frameon=False)
    n = sorted({row["samples"] for row in rows if "samples" in row}) or [0]
    samples = f"{n[0]} to {n[-1]} samples" if len(n) > 1 else f"{n[0]} samples"
    shapes = ", ".join(dict.fromkeys(str(row.get("shape", "")) for row in rows))
    title = plot.title.format_map({"agents": "-", "prompt_tokens": "-", **rows[0]})
    figure.suptitle(f"{title}, {shapes}, {samples}\n{where(rows[0]).strip(' ()')}", fontsize=10)
    return figure


def _panel(plot: Plot, axis: Any, rows: Sequence[Row]) -> None:
    """Lines, axis of x and headline of a panel."""
    (x, written, x_label), (low, middle, high) = plot.x, plot.y
    values = sorted({row[x] for row in rows})
    place = {value: index for index, value in enumerate(values)}
    for name in dict.fromkeys(row["backend"] for row in sorted(rows, key=backend_order)):
        mine = sorted((row for row in rows if row["backend"] == name), key=lambda row: row[x])
        y = [row[middle] for row in mine]
        style = _style(name)
        if len(mine) == 1 < len(values):  # a ceiling that was measured once
            axis.axhline(y[0], color=style["color"], linestyle=style["linestyle"], label=style["label"])
            continue
        errors = [[row[middle] - row[low] for row in mine], [row[high] - row[middle] for row in mine]]
        axis.errorbar([place[row[x]] for row in mine], y, yerr=errors, capsize=2, elinewidth=1, **style)
    axis.set_xticks(range(len(values)), [written(value) for value in values])
    axis.set_xlabel(x_label)
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    last = {row["backend"]: row for row in rows if row[x] == values[-1]}
    tiers = [row for name, row in last.items() if name not in (*FLOOR_AND_CEILING, "stock")]
    if tiers and "stock" in last:
        best = (min if "_ms" in middle else max)(tiers, key=lambda row: row[middle])
        text = f"{best['backend']}: {factor(best, last['stock'])} stock"
        at = (place[values[-1]], best[middle])
        axis.annotate(text, at, xytext=(-6, -14), textcoords="offset points", ha="right", va="top", fontsize=9)


def _style(backend: str) -> dict[str, Any]:
    colour, marker = STYLES.get(backend, ("#666666", "o"))
    return {
        "color": colour,
        "linestyle": "--" if backend in FLOOR_AND_CEILING else "-",
        "marker": marker,
        "markersize": 7 if backend == "stock" else 5,
        "markerfacecolor": "none" if backend == "stock" else colour,  # where lines lie on each other, both show
        "label": LABELS.get(backend, backend),
        # The floor goes on top of what reaches it.
        "zorder": 4 if backend == "hbm" else 3,
    }

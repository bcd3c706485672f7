"""A server's tier, live: sources of hits, speed of copies, use of the tier, and its health.

Reads /metrics of a server with --enable-metrics; needs neither a GPU nor SGLang. Rates are of the last interval, totals
since the server's start.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sglang_xmem import scrape
from sglang_xmem.errors import ConfigError

Json = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sglang-xmem top`."""
    parser.add_argument(
        "--url", default="http://127.0.0.1:30000", help="the server's address (default http://127.0.0.1:30000)"
    )
    parser.add_argument("--interval", type=_seconds, default=2.0, help="seconds between samples (default 2)")
    parser.add_argument("--once", action="store_true", help="take two samples, print the screen and exit")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per sample instead of a screen")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="with --once: write the screen to FILE as a picture")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return value


def run(args: argparse.Namespace) -> int:
    """Sample until interrupted, or once; returns the exit status.

    Raises:
        ConfigError: no server responds, or it has no metrics of a tier.
    """
    if args.svg is not None and (args.json or not args.once):
        raise ConfigError("--svg writes one screen. Add --once, and remove --json.")
    before = _look(args.url)
    if args.once:
        time.sleep(args.interval)
        _print_once(args, before, _look(args.url))
        return 0
    _live(args, before)
    return 0


def _look(url: str) -> Json:
    return {"time": time.time(), **scrape.numbers(scrape.parse(scrape.fetch(url)), url)}


def _as_line(before: Json, now: Json) -> str:
    return json.dumps({**now, "interval": scrape.since(now, before)})


def _print_once(args: argparse.Namespace, before: Json, now: Json) -> None:
    if args.json:
        print(_as_line(before, now))
        return
    console = _console(record=args.svg is not None)
    console.print(screen(before, now))
    if args.svg is not None:
        args.svg.write_text(console.export_svg(title="sglang-xmem top", unique_id="top"))


def _live(args: argparse.Namespace, before: Json) -> None:
    from rich.live import Live

    console = _console()
    on_screen = console.is_terminal and not args.json
    shown = (
        Live(screen(before, before), console=console, auto_refresh=False, screen=True) if on_screen else nullcontext()
    )
    with shown as live:
        while True:
            time.sleep(args.interval)
            now = _look(args.url)
            if live is not None:
                live.update(screen(before, now), refresh=True)
            else:
                _print_once(args, before, now)
                sys.stdout.flush()
            before = now


def _console(record: bool = False) -> Any:
    from rich.console import Console

    # Do not wrap lines in a file or a pipe; a picture has a fixed width.
    width = 100 if record else None if sys.stdout.isatty() else 120
    return Console(record=record, width=width, highlight=False, markup=False, emoji=False)


def screen(before: Json, now: Json) -> Any:
    """Build the four sections of the screen."""
    from rich.console import Group

    change = scrape.since(now, before)
    seconds = max(now["time"] - before["time"], 1e-9)
    return Group(
        _title(now), "", *_hits(now, change), "", *_speed(now, change, seconds), "", *_room(now), "", *_health(now)
    )


def _title(now: Json) -> Any:
    from rich.text import Text

    tiers = ", ".join(dict.fromkeys(f"{rank['tier']} ({rank['copier']})" for rank in now["ranks"]))
    sick = [_rank(rank) for rank in now["ranks"] if not rank["healthy"]]
    text = Text(f"{now['url']}  {now['model']}  tier {tiers}  ")
    return text.append(f"UNHEALTHY: rank {', '.join(sick)}" if sick else "healthy", "bold red" if sick else "green")


def _hits(now: Json, change: Json) -> list[Any]:
    table = _table("of prompts", "device", "tier", "storage", "computed", "all")
    for what, each in (("tokens", lambda look: look["tokens"]), ("pages", scrape.lookups)):
        for when, look in (("now", change), ("since start", now)):
            found = each(look)
            asked = sum(found.values())
            shares = (f"{count / asked:.0%}" if asked else "-" for count in found.values())
            table.add_row(f"{what}, {when}", *shares, f"{asked:,}")
    return [_heading("Where do hits come from?"), table]


def _speed(now: Json, change: Json, seconds: float) -> list[Any]:
    table = _table("copies", "per s", "GB/s", "median", "p99", "pages", "GB", "since start")
    for direction, words in (("load", "loads"), ("store", "stores")):
        last, whole = (scrape.total(each["ranks"], direction) for each in (change, now))
        shown = last if last["count"] else whole
        table.add_row(
            words,
            f"{last['count'] / seconds:.1f}",
            f"{shown['bytes'] / shown['seconds'] / 1e9:.2f}" if shown["seconds"] else "-",
            _time(scrape.quantile(shown["buckets"], 0.5)),
            _time(scrape.quantile(shown["buckets"], 0.99)),
            f"{whole['pages']:,}",
            f"{whole['bytes'] / 1e9:.2f}",
            f"{whole['count']:,}",
        )
    return [_heading("How fast are copies? (while they run, per rank)"), table]


def _room(now: Json) -> list[Any]:
    table = _table("rank (dp.pp.tp)", "tier", "used", "pinned", "capacity", "full")
    for rank in now["ranks"]:
        used, capacity = rank["used_bytes"], rank["capacity_bytes"]
        gigabytes = (f"{nbytes / 1e9:.3f} GB" for nbytes in (used, rank["pinned_bytes"], capacity))
        table.add_row(_rank(rank), rank["tier"], *gigabytes, f"{used / capacity:.0%}" if capacity else "-")
    return [_heading("How full is the tier?"), table]


def _health(now: Json) -> list[Any]:
    table = _table("events since start", "count")
    for key, words in (("failures", "failed"), ("integrity", "check"), ("fallbacks", "slower way"), ("storage", "L3")):
        events: dict[str, int] = {}
        for rank in now["ranks"]:
            for label, count in rank[key].items():
                events[label] = events.get(label, 0) + count
        for label, count in events.items():
            table.add_row(f"{words}: {label}", f"{count:,}")
    return [_heading("Is it healthy?"), table]


def _rank(rank: Json) -> str:
    return ".".join(str(number) for number in rank["rank"].values())


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds * 1e6:.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
    )


def _heading(words: str) -> Any:
    from rich.text import Text

    return Text(words, "bold")


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table

"""The doctor's results on one screen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sglang_xmem.config import AUTO

Json = dict[str, Any]


def show(found: Json) -> None:
    """Print `found`, the doctor's JSON, on stdout."""
    # Follow the terminal's width, or COLUMNS.
    console = Console(highlight=False, markup=False, emoji=False)
    for part in (_versions, _gpus, _peers, _memory, _devices, _tiers):
        for block in part(found):
            # Do not wrap text in a file or a pipe.
            console.print(block, soft_wrap=not sys.stdout.isatty() and not isinstance(block, Table))
    console.print(verdict(found["tiers"]), soft_wrap=not sys.stdout.isatty())


def _versions(found: Json) -> list[Any]:
    v, driver = found["versions"], found["driver"]
    names = [f"{name} {v[name]}" for name in ("sglang_xmem", "sglang", "torch", "triton", "python") if v[name]]
    missing = [name for name in ("torch", "triton") if v[name] is None]
    if driver["version"] is not None:
        names.append(f"NVIDIA driver {driver['version']} (CUDA {driver['cuda']})")
    else:
        # The GPUs' section shows the reason, unless it lists GPUs.
        missing.append("NVIDIA driver" + (f" ({driver['reason']})" if found["gpus"]["list"] else ""))
    lines: list[Any] = [", ".join(names) + (f"; without {', '.join(missing)}" if missing else "")]
    problem = found["plugin"]["reason"]
    if problem is not None:
        lines.append(Text(f"--hicache-use-xmem is unavailable: {problem}.", style="bold red"))
    return lines


def _gpus(found: Json) -> list[Any]:
    if not found["gpus"]["list"]:
        return [_heading("GPUs: ", f"none; {found['gpus']['reason']}")]
    title, table = _heading("GPUs (GB = 1e9 bytes; copies with pinned host memory in GB/s)"), _table()
    _columns(table, "GPU", "<name", "free", "total", "NUMA", "from host", "to host", "<used by (GB)")
    notes = []
    for gpu in found["gpus"]["list"]:
        rates = [_rate(gpu[key]) for key in ("read_gbps", "write_gbps")]
        users = ", ".join(
            f"{p['pid']}"
            + (f" {p['name']}" if p["name"] else "")
            + (f" {_gb(p['used_bytes'])}" if p["used_bytes"] else "")
            for p in gpu["processes"]
        )
        # Without a visible process, the clause is about memory of invisible processes.
        users = users or gpu["in_use"] or ("?" if gpu["reason"] else "none")
        table.add_row(
            str(gpu["gpu"]), gpu["name"] or "?", _gb(gpu["free_bytes"]), _gb(gpu["total_bytes"]),
            _or(gpu["numa_node"]), *rates, users,
        )  # fmt: skip
        if gpu["reason"] is not None:
            notes.append(f"GPU {gpu['gpu']}: {gpu['reason']}")
    return [title, table, *notes, *_not_measured(found["gpus"]["list"])]


def _not_measured(gpus: Sequence[Json]) -> list[str]:
    """Return one line per reason, with its GPUs."""
    by_reason: dict[str, list[str]] = {}
    for gpu in gpus:
        if gpu["not_measured"] is not None:
            by_reason.setdefault(gpu["not_measured"], []).append(str(gpu["gpu"]))
    return [f"?: GPU {', '.join(numbers)} not measured: {reason}" for reason, numbers in by_reason.items()]


def _peers(found: Json) -> list[Any]:
    numbers = [gpu["gpu"] for gpu in found["gpus"]["list"]]
    if len(numbers) < 2:
        return []
    pairs = {(row["gpu"], row["peer"]): row for row in found["peers"]}
    title, table = _heading("Peer access (GB/s at which the row's GPU reads the column's memory)"), _table()
    _columns(table, "reads", *(f"of {number}" for number in numbers))
    notes = []
    for gpu in numbers:
        cells = []
        for peer in numbers:
            row = pairs.get((gpu, peer))
            if row is None:
                cells.append("-")
            elif row["access"] is False:
                cells.append("no")
            else:
                cells.append(_rate(row["read_gbps"]))
                why = row["reason"] or row["not_measured"]
                if why is not None:
                    notes.append(f"?: {why}")
        table.add_row(f"GPU {gpu}", *cells)
    return [title, table, *dict.fromkeys(notes)]


def _memory(found: Json) -> list[Any]:
    host = found["host"]
    limit = host["locked_limit_bytes"]
    line = (
        f"{_gb(host['available_bytes'])} of {_gb(host['total_bytes'])} GB available; locked-memory limit "
        f"{'none' if limit is None else _size(limit)}"
    )
    blocks: list[Any] = [_heading("Host memory: ", line)]
    if found["numa_nodes"]:
        title, table = _heading("NUMA nodes (GB = 1e9 bytes)"), _table()
        _columns(table, "node", "free", "total", "<GPUs", "<hugepages, free of reserved")
        for node in found["numa_nodes"]:
            reserved = [size for size in node["hugepages"] if size["total"]]
            pages = ", ".join(f"{s['free']} of {s['total']} x {_page(s['page_bytes'])}" for s in reserved)
            table.add_row(
                f"{node['node']}{' (CXL)' if node['cxl'] else ''}",
                _gb(node["free_bytes"]),
                _gb(node["total_bytes"]),
                ", ".join(map(str, node["gpus"])) or "-",
                pages or "none reserved",
            )
        blocks += [title, table]
    return blocks


def _devices(found: Json) -> list[Any]:
    lines = []
    for device in found["devdax"]:
        size = "" if device["size_bytes"] is None else f" {_gb(device['size_bytes'])} GB"
        node = "" if device["target_node"] is None else f" near NUMA node {device['target_node']}"
        lines.append(f"{device['device']}{size}{node}" + (f" ({device['reason']})" if device["reason"] else ""))
    xmem = found["xmem"]
    banks = xmem["banks"]
    if banks is None:
        # If tier mtier is in the table below, its line there has the reason.
        asked = {line["tier"]: line["reason"] for line in found["tiers"]["found"]}
        status = "no banks" if xmem["reason"] == asked.get("mtier") else xmem["reason"]
    else:
        free = (f"bank {i}: {_gb(b['available_bytes'])} of {_gb(b['total_bytes'])}" for i, b in enumerate(banks))
        status = f"{xmem['library']}; GB available: {', '.join(free) or 'no bank'}"
    return [_heading("Devdax: ", "; ".join(lines) or "no device"), _heading("X-Mem: ", str(status))]


def _tiers(found: Json) -> list[Any]:
    tiers = found["tiers"]
    ranks = "the CPU" if None in tiers["gpus"] else f"GPU {', '.join(map(str, tiers['gpus']))}"
    size = "any size" if tiers["pool_bytes"] is None else f"{tiers['pool_bytes'] / 1e9:g} GB per rank"
    title, table = _heading(f"Tiers for a pool of {size}, ranks on {ranks}, fastest first"), _table()
    _columns(table, "<tier", "<", "GB per rank", "<why not")
    for line in tiers["found"]:
        state = "no" if line["reason"] is not None else "chosen" if line["tier"] == tiers["takes"] else "possible"
        table.add_row(line["tier"], state, _gb(line["room_bytes"]), line["reason"] or "")
    blocks: list[Any] = [title, table]
    if tiers["host_budget"] == "fallback":
        blocks.append(
            "SGLang is not installed: host tiers are limited to the available memory less 10 GiB, as in SGLang."
        )
    return blocks


def verdict(tiers: Json) -> Text:
    """Format the last line: the chosen tier; the table above has the reasons against the others."""
    size = "" if tiers["pool_bytes"] is None else f" for --hicache-size {tiers['pool_bytes'] / 1e9:g}"
    auto = tiers["asked"] == AUTO
    able = _able(tiers)
    chosen = next((line for line in tiers["found"] if line["tier"] == tiers["takes"]), None)
    if chosen is not None:
        free = f"{_gb(chosen['room_bytes'])} GB free for each rank"
        why = "the only tier that can hold it" if len(able) == 1 else "the fastest tier that can hold it"
        name = chosen["tier"]
        text = f"auto uses {name}{size}: {why}, {free}" if auto else f"{name} can be used{size}: {free}"
        skipped = [line["tier"] for line in tiers["found"] if line["reason"] is not None]
        text += f"; skipped: {', '.join(skipped)} (reasons above)." if skipped else "."
    elif auto:
        text = f"auto finds no tier{size}: see the reasons above."
    else:
        text = f"{tiers['asked']} is unavailable{size}: {tiers['found'][0]['reason']}."
    if tiers["stuck"] and auto:
        names = " or ".join(able) or "another"
        text += f" A server queries {', '.join(tiers['stuck'])} too, and may hang. Set --hicache-xmem-tier {names}."
    return Text(text, style="bold green" if chosen is not None else "bold red")


def _able(tiers: Json) -> list[str]:
    return [line["tier"] for line in tiers["found"] if line["reason"] is None]


def _heading(name: str, words: str = "") -> Text:
    return Text.assemble((name, "bold"), words)


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _columns(table: Table, *names: str) -> None:
    """Add right-aligned columns; those marked `<` are left-aligned, and wrapped if long."""
    for name in names:
        left = name.startswith("<")
        table.add_column(name.removeprefix("<"), justify="left" if left else "right", no_wrap=not left)


def _gb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.2f}"


def _size(nbytes: int) -> str:
    """Format bytes in decimal units, as everywhere on this screen except for memory pages."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"


def _rate(gbps: float | None) -> str:
    return "?" if gbps is None else f"{gbps:.1f}"


def _or(value: object) -> str:
    return "-" if value is None else str(value)


def _page(nbytes: int) -> str:
    return (
        f"{nbytes >> 30} GiB"
        if nbytes >= 1 << 30
        else f"{nbytes >> 20} MiB"
        if nbytes >= 1 << 20
        else f"{nbytes >> 10} KiB"
    )

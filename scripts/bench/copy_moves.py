"""Measure the CUDA copier on moves as models have them, and verify every byte: one JSON line per measurement.

    python scripts/bench/copy_moves.py --out copy_moves.jsonl

`--source` takes the kernel from another file, such as an earlier commit's, for before and after on one machine. Needs
one GPU for host memory, two for a peer's. A failed case is a line with "error"; the other cases run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_xmem.copies import CopyPolicy, cuda, make_program
from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.geometry import Plane, Slab

KIB, MIB = 1 << 10, 1 << 20
#: Units on the device, and frames, that no move names: they have to stay as they are.
SPARE = 16
POISON = 0x5A5A5A5A5A5A5A5A
#: Bytes that are checked at a time.
CHUNK = 256 * MIB


@dataclass(frozen=True)
class Space:
    """One index space of a case: pages of a move, and the bytes of a page's units with the layer of each."""

    pages: int
    units: tuple[tuple[int, int], ...]
    divisor: int = 64

    @property
    def frame_bytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.units)


def layers(count: int, *units: int, first: int = 0, step: int = 1) -> tuple[tuple[int, int], ...]:
    """`count` layers with units of these bytes each."""
    return tuple((nbytes, first + number * step) for number in range(count) for nbytes in units)


#: A case is its spaces; page-first frames, pages in random order on both sides.
CASES: dict[str, list[Space]] = {
    "plain": [Space(1280, layers(48, 64 * KIB, 64 * KIB))],
    "plain_16": [Space(16, layers(48, 64 * KIB, 64 * KIB))],
    "mla": [Space(1280, layers(61, 72 * KIB))],
    "mla_indexer": [Space(1280, layers(61, 72 * KIB, 8448))],
    "gdn": [
        Space(1280, layers(12, 64 * KIB, 64 * KIB, first=3, step=4)),
        Space(1, layers(36, 2 * MIB, 48 * KIB), divisor=1),
    ],
    "swa": [
        Space(1280, layers(24, 64 * KIB, 64 * KIB, step=2)),
        Space(4, layers(24, 64 * KIB, 64 * KIB, first=1, step=2)),
    ],
    "page_size_1": [Space(20480, layers(48, KIB, KIB), divisor=1)],
    "many_planes": [Space(64, layers(61, 8 * KIB)) for _ in range(12)],
}
PATHS = ("peer_by_peer", "peer_by_rank", "pinned")


def pattern(rows: torch.Tensor, first: int, words: int, salt: int) -> torch.Tensor:
    """What words first .. first + words of each row hold: int64, shape (rows, words), different everywhere."""
    columns = torch.arange(first, first + words, device=rows.device)
    other = salt * 0x632BE59BD9B4E01 % (1 << 62)
    return (rows[:, None] * 0x9E3779B97F4A7C1 + columns * 0x1F123BB5 + other) ^ (columns << 40)


class Case:
    """A case's memory, program and move.

    Args:
        tier: int64 memory that the frames are put in.
        device: of the rank.
    """

    def __init__(self, spaces: list[Space], tier: torch.Tensor, path: str, rank: int, peer: int, settings: Any) -> None:
        self.spaces, self.rank = spaces, torch.device("cuda", rank)
        self.tiers: list[torch.Tensor] = []  # shape (frames, words of a frame)
        self.pools: list[list[torch.Tensor]] = []  # of each plane, shape (units, words of a unit)
        self.frames: list[torch.Tensor] = []
        self.units: list[torch.Tensor] = []
        slabs, steps, begin = [], [], 0
        for vector, space in enumerate(spaces):
            count, words = space.pages + SPARE, space.frame_bytes // 8
            self.tiers.append(tier[begin : begin + count * words].view(count, words))
            begin += count * words
            slabs.append(Slab(self.tiers[-1].data_ptr(), count, space.frame_bytes))
            offset = 0
            self.pools.append([])
            for nbytes, layer in space.units:
                pool = torch.full((count, nbytes // 8), POISON, dtype=torch.int64, device=self.rank)
                self.pools[-1].append(pool)
                steps.append(Step(Plane(pool.data_ptr(), nbytes, count, offset, nbytes, space.divisor), vector, layer))
                offset += nbytes
            self.frames.append(torch.randperm(count, device=self.rank)[: space.pages])
            self.units.append(torch.randperm(count, device=self.rank)[: space.pages])
        steps.sort(key=lambda step: step.part)
        self.num_parts = 1 + max(step.part for step in steps)
        policy = CopyPolicy(runner=peer, required=True) if path == "peer_by_peer" else CopyPolicy()
        self.copier: PageCopier
        self.program: Program
        self.copier, self.program, _ = make_program(
            "cuda", slabs, self.rank, steps, self.num_parts, link="pcie" if path == "pinned" else "nvlink",
            policy=policy, **settings,
        )  # fmt: skip
        self.counters = self.copier.make_counters(self.num_parts)
        self.pages = [
            Pages(slab.address + frames * slab.frame_bytes, units * space.divisor)
            for slab, frames, units, space in zip(slabs, self.frames, self.units, spaces, strict=True)
        ]
        self.nbytes = sum(space.pages * space.frame_bytes for space in spaces)
        self.words = begin

    def chunks(self, space: int) -> Iterator[range]:
        """Frames of a space, some at a time."""
        count = len(self.tiers[space])
        size = max(1, CHUNK // self.spaces[space].frame_bytes)
        return (range(begin, min(begin + size, count)) for begin in range(0, count, size))

    def fill_tier(self) -> None:
        for space, tier in enumerate(self.tiers):
            for some in self.chunks(space):
                rows = torch.arange(some.start, some.stop, device=self.rank)
                tier[some.start : some.stop].copy_(pattern(rows, 0, tier.shape[1], space))

    def move(self, *, load: bool) -> None:
        if load:
            self.copier.load(self.program, self.pages, self.counters)
        else:
            self.copier.store(self.program, self.pages)

    def check_load(self) -> bool:
        """All units that were named have their frames' words, and the others what they had."""
        right = True
        for space, (pools, frames, units) in enumerate(zip(self.pools, self.frames, self.units, strict=True)):
            first = 0
            others = torch.ones(len(pools[0]), dtype=torch.bool, device=self.rank)
            others[units] = False
            for pool in pools:
                words = pool.shape[1]
                right &= torch.equal(pool[units], pattern(frames, first, words, space))
                right &= bool((pool[others] == POISON).all())
                first += words
        return right

    def fill_pools(self) -> None:
        for space, pools in enumerate(self.pools):
            for number, pool in enumerate(pools):
                pool.copy_(pattern(torch.arange(len(pool), device=self.rank), 0, pool.shape[1], 100 + space + number))

    def check_store(self) -> bool:
        """All frames that were named have their units' words, and the others what they had."""
        right = True
        for space, (tier, pools) in enumerate(zip(self.tiers, self.pools, strict=True)):
            unit_of = torch.full((len(tier),), -1, device=self.rank)
            unit_of[self.frames[space]] = self.units[space]
            for some in self.chunks(space):
                rows = torch.arange(some.start, some.stop, device=self.rank)
                found, stored = tier[some.start : some.stop].to(self.rank), unit_of[rows] >= 0
                right &= torch.equal(found[~stored], pattern(rows[~stored], 0, tier.shape[1], space))
                first = 0
                for number, pool in enumerate(pools):
                    words = pool.shape[1]
                    expected = pattern(unit_of[rows[stored]], 0, words, 100 + space + number)
                    right &= torch.equal(found[stored, first : first + words], expected)
                    first += words
        return right

    def time(self, repeat: int, *, load: bool) -> dict[str, Any]:
        """Medians of moves, one at a time."""
        milliseconds, enqueued = [], []
        for _ in range(repeat + 1):  # the first one loads the kernel
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            before = time.perf_counter()
            self.move(load=load)
            enqueued.append((time.perf_counter() - before) * 1e6)
            end.record()
            torch.cuda.synchronize()
            milliseconds.append(start.elapsed_time(end))
        rates = sorted(self.nbytes / one / 1e6 for one in milliseconds[1:])
        return {
            "gbps": round(statistics.median(rates), 2),
            "gbps_min": round(rates[0], 2),
            "gbps_max": round(rates[-1], 2),
            "ms": round(statistics.median(milliseconds[1:]), 4),
            "enqueue_us": round(statistics.median(enqueued[1:]), 1),
        }


def contiguous(tier: torch.Tensor, nbytes: int, rank: torch.device, repeat: int, *, load: bool) -> float:
    """GB/s of one copy of as many bytes by the copy engine."""
    there = tier[: nbytes // 8]
    here = torch.empty(nbytes // 8, dtype=torch.int64, device=rank)
    rates = []
    for _ in range(repeat + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if load:
            here.copy_(there, non_blocking=True)
        else:
            there.copy_(here, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        rates.append(nbytes / start.elapsed_time(end) / 1e6)
    return statistics.median(rates[1:])


def enable_access(gpu: int, to: int) -> None:
    """Let kernels on `gpu` reach memory of `to`, whose context exists from now on."""
    from cuda.bindings import driver

    torch.ones(1, device=f"cuda:{to}")
    with torch.cuda.device(gpu):
        torch.cuda.synchronize()
        status, context = driver.cuDevicePrimaryCtxRetain(to)
        if not status.value:
            (status,) = driver.cuCtxEnablePeerAccess(context, 0)
        if status.value and status.name != "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED":
            raise RuntimeError(f"GPU {gpu} cannot reach GPU {to}: {status.name}")


def run(name: str, path: str, arguments: argparse.Namespace, tier: torch.Tensor) -> Iterator[dict[str, Any]]:
    """The measurements of one case over one path."""
    rank = torch.device("cuda", arguments.rank)
    spaces = CASES[name]
    nbytes = sum(space.pages * space.frame_bytes for space in spaces)
    baseline = {load: contiguous(tier, nbytes, rank, arguments.repeat, load=load) for load in (True, False)}
    settings = json.loads(arguments.copy)
    case = Case(spaces, tier, path, arguments.rank, arguments.peer, settings)
    for load in (True, False):
        if load:
            case.fill_tier()
        else:
            case.fill_pools()
        torch.cuda.synchronize()
        measured = case.time(arguments.repeat, load=load)
        right = case.check_load() if load else case.check_store()
        yield {
            "direction": "load" if load else "store",
            "bytes": nbytes,
            "planes": sum(len(space.units) for space in spaces),
            "pages": [space.pages for space in spaces],
            "right": right,
            **measured,
            "contiguous_gbps": round(baseline[load], 2),
            "percent": round(100 * measured["gbps"] / baseline[load], 1),
            "copier": case.copier.describe(),
            "counters": case.counters is not None,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file that lines are appended to")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--repeat", type=int, default=5, help="moves measured each, after one that warms up")
    parser.add_argument("--rank", type=int, default=0, help="GPU with the pools")
    parser.add_argument("--peer", type=int, default=1, help="GPU whose memory is the tier")
    parser.add_argument("--copy", default="{}", help='JSON, settings such as {"load": {"ctas": 16}}')
    parser.add_argument("--label", default="", help="kept in each line")
    parser.add_argument("--source", type=Path, default=None, help="page_copy.cu to run; default: the package's")
    arguments = parser.parse_args()
    if arguments.source is not None:
        text = arguments.source.read_text(encoding="utf-8")
        cuda.source = lambda name: text
    torch.cuda.set_device(arguments.rank)
    most = max(sum((space.pages + SPARE) * space.frame_bytes for space in CASES[name]) for name in arguments.cases)
    failures = 0
    with arguments.out.open("a", encoding="utf-8") as out:
        for group in (["pinned"], ["peer_by_peer", "peer_by_rank"]):
            paths = [path for path in arguments.paths if path in group]
            if not paths:
                continue
            try:
                if "pinned" in group:
                    tier = torch.empty(most // 8, dtype=torch.int64, pin_memory=True)
                else:
                    enable_access(arguments.rank, arguments.peer)
                    tier = torch.empty(most // 8, dtype=torch.int64, device=f"cuda:{arguments.peer}")
            except Exception as error:
                out.write(json.dumps({"path": paths, "error": f"{type(error).__name__}: {error}"}) + "\n")
                failures += 1
                continue
            for path in paths:
                for name in arguments.cases:
                    about = {
                        "case": name,
                        "path": path,
                        "gpu": torch.cuda.get_device_name(arguments.rank),
                        "label": arguments.label,
                    }
                    started = time.perf_counter()
                    try:
                        for row in run(name, path, arguments, tier):
                            failures += not row["right"]
                            line = json.dumps({**about, **row, "seconds": round(time.perf_counter() - started, 1)})
                            out.write(line + "\n")
                            print(line, flush=True)
                    except Exception as error:
                        failures += 1
                        line = json.dumps({**about, "error": f"{type(error).__name__}: {error}"})
                        out.write(line + "\n")
                        print(line, flush=True)
                        traceback.print_exc()
                    out.flush()
                    torch.cuda.empty_cache()
            del tier
            torch.cuda.empty_cache()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

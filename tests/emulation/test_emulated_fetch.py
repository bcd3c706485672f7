"""page_fetch.cu on the CPU: ranks that load the same pages find them in each other's pools, or load them themselves."""

from __future__ import annotations

import ctypes
import random
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sglang_xmem.copies import siblings
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.ipc import Group
from sglang_xmem.copies.shared import deal
from sglang_xmem.copies.siblings import ENTRY_HEAD, MAX_RANKS, RING, SOURCE_FILE, THREADS, Tables
from sglang_xmem.copies.table import ParameterBuffer
from sglang_xmem.copies.tuning import CudaTuning
from sglang_xmem.kernels import source
from tests.emulation.emulated import _RAISED, EmulatedCopier, EmulatedProgram, library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")

PAGES, FRAMES, DIVISOR = 23, 29, 16
TUNING = CudaTuning(ctas=2, threads=64, unroll=4)
POISON = 0x5A
#: Bytes that divide all sizes of a shape; each is a build of the kernel.
ALIGNMENTS = [1, 16, 16]


class Shape:
    """Planes of some index spaces, alike on all ranks.

    Attributes:
        units: of each plane, (vector, part, offset in the frame, bytes, stride on the device), by part.
        frame_bytes: of each vector's frames.
    """

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)
        self.alignment = choose.choice(ALIGNMENTS)
        self.num_parts = choose.randint(1, 5)
        self.frame_bytes: list[int] = []
        self.units: list[tuple[int, int, int, int, int]] = []
        for vector in range(choose.randint(1, 3)):
            end = 0
            for part in range(self.num_parts):
                for _ in range(choose.choice([0, 1, 2])):
                    nbytes = self.alignment * choose.choice([1, 9, 64, 300])
                    stride = nbytes + self.alignment * choose.choice([0, 3])
                    self.units.append((vector, part, end, nbytes, stride))
                    end += nbytes
            self.frame_bytes.append(-(-max(end, 1) // 16) * 16)
        self.units.sort(key=lambda unit: unit[1])


class EmulatedTables(Tables):
    """Tables whose kernels run on the CPU."""

    text: str
    rank: Rank
    seed = 0

    def _load_kernels(self) -> dict[str, Any]:
        macros = {"VEC_BYTES": self._vector_bytes, "THREADS": THREADS}
        return {name: library(self.text, macros, name) for name in ("page_announce", "page_fetch")}

    def _upload(self, content: bytes) -> int:
        self.content = ctypes.create_string_buffer(content, len(content))
        return ctypes.addressof(self.content)

    def _launch(self, name: str, grid: int, parameters: ParameterBuffer, stream: int | None = None) -> None:
        rank = self.rank
        written = [(rank.ring.ctypes.data, rank.ring.nbytes)] if name == "page_announce" else []
        if name == "page_fetch":
            written = [rank.extent(rank.device), rank.extent(rank.missed)]
        read = [(self.table_address, len(self.content))]
        read += [rank.extent(side) for other in rank.all for side in (other.ring, other.device)]
        read += [rank.extent(rank.tier), *((each.data_ptr(), 8 * each.numel()) for each in rank.vectors)]
        flat = [number for place in (*written, *read) for number in place]
        EmulatedTables.seed += 1
        wrong = self._functions[name](
            grid, THREADS, 0, parameters.address, self.seed, _RAISED(rank.on_raise),
            (ctypes.c_uint64 * len(flat))(*flat), len(written), len(flat) // 2,
        )  # fmt: skip
        assert wrong is None, f"{name}: {wrong.decode()}"

    @property
    def table_address(self) -> int:
        return ctypes.addressof(self.content)


class Rank:
    """One rank's memory: its pool, its tier, its ring."""

    def __init__(self, shape: Shape, seed: int, number: int, group: list[Rank]) -> None:
        self.shape, self.number, self.all = shape, number, group
        noise = np.random.default_rng(seed)  # the same on all ranks
        self.tier = noise.integers(0, 256, FRAMES * sum(shape.frame_bytes), dtype=np.uint8)
        shuffle = random.Random(seed * 100 + number)  # frames are a rank's own
        self.order = [shuffle.sample(range(FRAMES), FRAMES) for _ in shape.frame_bytes]
        self.device = np.full(
            sum(stride * PAGES for *_, stride in shape.units) + 64 * len(shape.units), POISON, np.uint8
        )
        self.ring = np.zeros(RING * siblings.entry_bytes(shape.num_parts), np.uint8)
        self.missed = np.zeros(MAX_RANKS, np.int64)
        self.counters = np.zeros(shape.num_parts, np.uint32)
        self.planes: list[Plane] = []
        at = self.device.ctypes.data + -self.device.ctypes.data % 16
        for _, _, offset, nbytes, stride in shape.units:
            self.planes.append(Plane(at, stride, PAGES, offset, nbytes, DIVISOR))
            at += -(-stride * PAGES // 16) * 16
        self.slabs, begin = [], self.tier.ctypes.data
        for nbytes in shape.frame_bytes:
            self.slabs.append(Slab(begin, FRAMES, nbytes))
            begin += FRAMES * nbytes
        self.on_time: Callable[[], None] = lambda: None
        self.final = 0
        self.vectors: list[torch.Tensor] = []
        self.loaded: list[list[int]] = []

    @staticmethod
    def extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
        return array.ctypes.data, array.nbytes

    def prepare(self, text: str, number: int, wanted: Sequence[Sequence[int]], patience_us: int) -> None:
        """Have everything for load `number` of these pages of each vector; page i lies in slot i, in any frame."""
        shape = self.shape
        group = Group(
            self.number,
            torch.empty(0),
            tuple(rank.ring.ctypes.data for rank in self.all),
            {plane: tuple(rank.planes[i].device_address for rank in self.all) for i, plane in enumerate(self.planes)},
        )
        steps = [Step(plane, unit[0], unit[1]) for plane, unit in zip(self.planes, shape.units, strict=True)]
        self.steps, self.load_number, self.loaded = steps, number, [list(pages) for pages in wanted]
        EmulatedTables.text, EmulatedTables.rank = text, self
        self.tables = EmulatedTables(self.slabs, steps, shape.num_parts, group, torch.device("cpu"))
        self.tables.rank = self
        self.pages = []
        for vector, pages in enumerate(wanted):
            slab = self.slabs[vector]
            frames = [slab.address + self.order[vector][page] * slab.frame_bytes for page in pages]
            slots = torch.full((len(pages), 2), -1, dtype=torch.int64)
            slots[:, 0] = torch.tensor(pages, dtype=torch.int64) * DIVISOR
            self.pages.append(Pages(torch.tensor(frames, dtype=torch.int64), slots[:, 0]))
            self.vectors += [self.pages[-1].frames, slots.reshape(-1)]
        self.copier = EmulatedCopier(self.slabs, torch.device("cpu"), TUNING)
        self.program = self.copier.compile(steps, shape.num_parts)
        self.entry = self.ring.ctypes.data + number % RING * siblings.entry_bytes(shape.num_parts)
        self.own = deal(self.pages, len(self.all))[self.number]
        self.patience_us = patience_us

    def announce(self) -> None:
        warps = -(-self.program.work.tiles([one.frames.numel() for one in self.own]) // TUNING.warps)
        self.tables.announce(self.entry, self.load_number, min(TUNING.ctas, warps) * TUNING.warps, self.pages)

    def copy_share(self, parts: int | None = None) -> None:
        """Load this rank's share; all of it, or so many parts."""
        steps = [step for step in self.steps if parts is None or step.part < parts]
        program = self.program if parts is None else EmulatedProgram(self.copier, steps, self.shape.num_parts)
        end = self.entry + ENTRY_HEAD + 4 * (self.shape.num_parts if parts is None else parts)

        def count(address: int) -> None:
            if address < end:
                ctypes.c_uint32.from_address(address).value += 1

        self.copier.on_raise = count
        self.copier.start(program, self.own, load=True, counters=self.entry + ENTRY_HEAD)

    def fetch(self) -> None:
        """Run the fetch; each part has to be whole when its counter is."""
        entries = [self.entry - self.ring.ctypes.data + rank.ring.ctypes.data for rank in self.all]
        self.final = siblings._CTAS_PER_SIBLING * len(self.all) * THREADS // 32
        before = self.counters.copy()
        self.goal = before + np.uint32(self.final)
        patience = siblings.PATIENCE_NS
        siblings.PATIENCE_NS = 1000 * self.patience_us  # type: ignore[misc]
        try:
            raises = self.tables.fetch(
                self.counters.ctypes.data, entries, self.missed.ctypes.data, self.load_number, self.pages, 0
            )
        finally:
            siblings.PATIENCE_NS = patience  # type: ignore[misc]
        assert raises == self.final
        assert (self.counters == self.goal).all()

    def on_raise(self, address: int | None) -> None:
        if not address:
            self.on_time()
            return
        part = (address - self.counters.ctypes.data) // 4
        self.counters[part] += 1
        if self.counters[part] == self.goal[part] and (wrong := self.wrong(part)):
            self.early.append(f"part {part}: {wrong}")

    early: list[str]

    def wrong(self, part: int | None = None) -> str:
        """Report a page of the parts up to one that has wrong bytes; empty if all are right."""
        for plane, (vector, of, offset, nbytes, _) in zip(self.planes, self.shape.units, strict=True):
            if part is not None and of > part:
                continue
            slab = self.slabs[vector]
            for page in self.loaded[vector]:
                frame = slab.address - self.tier.ctypes.data + self.order[vector][page] * slab.frame_bytes
                right = self.truth[frame + offset : frame + offset + nbytes]
                begin = plane.device_address - self.device.ctypes.data + page * plane.device_stride
                if not np.array_equal(self.device[begin : begin + nbytes], right):
                    return f"page {page} of vector {vector}"
        return ""

    truth: np.ndarray[Any, Any]


def ranks_of(seed: int, text: str, *, count: int | None = None, patience_us: int = 1 << 30) -> list[Rank]:
    """Ranks that are about to load the same pages, all of which have the same bytes."""
    shape = Shape(seed)
    choose = random.Random(seed)
    group: list[Rank] = []
    for number in range(count or choose.choice([2, 2, 3, 4])):
        group.append(Rank(shape, seed, number, group))
    # The same page has the same bytes, in whatever frame.
    for rank in group[1:]:
        for vector, slab in enumerate(rank.slabs):
            nbytes, begin = slab.frame_bytes, slab.address - rank.tier.ctypes.data
            here = rank.tier[begin : begin + FRAMES * nbytes].reshape(FRAMES, nbytes)
            first = group[0].tier[begin : begin + FRAMES * nbytes].reshape(FRAMES, nbytes)
            here[rank.order[vector]] = first[group[0].order[vector]]
    wanted = [choose.sample(range(PAGES), choose.randint(0, PAGES)) for _ in shape.frame_bytes]
    number = choose.randint(1, 2 * RING)
    for rank in group:
        rank.truth, rank.early = rank.tier.copy(), []
        rank.prepare(text, number, wanted, patience_us)
    return group


def check(rank: Rank) -> None:
    assert rank.early == []
    assert rank.wrong() == ""
    # What lies between units and behind them is as it was.
    touched = np.zeros(len(rank.device), bool)
    for plane, (vector, _, _, nbytes, _) in zip(rank.planes, rank.shape.units, strict=True):
        for page in rank.loaded[vector]:
            begin = plane.device_address - rank.device.ctypes.data + page * plane.device_stride
            touched[begin : begin + nbytes] = True
    assert (rank.device[~touched] == POISON).all()


def together(seed: int, text: str) -> None:
    """All ranks are in time: nobody reads a page of another's share out of the tier."""
    group = ranks_of(seed, text)
    for rank in group:
        rank.announce()
        rank.copy_share()
        rank.tier[:] ^= 0xFF
    for rank in group:
        rank.fetch()
        check(rank)
        assert not rank.missed.any()


def late(seed: int, text: str) -> None:
    """Every rank's share comes while this rank already waits, its own last."""
    group = ranks_of(seed, text)
    me, *others = group
    me.announce()
    do_in_time(me, [step for rank in others for step in (rank.announce, rank.copy_share)] + [me.copy_share])
    me.fetch()
    check(me)
    assert not me.missed.any()


def do_in_time(rank: Rank, to_do: list[Callable[[], None]]) -> None:
    """Have something done every now and then while a rank waits."""
    moment = 0

    def pass_time() -> None:
        nonlocal moment
        moment += 1
        if moment % 40 == 0 and to_do:
            to_do.pop(0)()

    rank.on_time = pass_time


def absent(seed: int, text: str) -> None:
    """Siblings never announce this load; one has announced another of the same slots. Their pools have other bytes."""
    group = ranks_of(seed, text, patience_us=30)
    me, *others = group
    me.announce()
    me.copy_share()
    others[0].load_number += RING
    others[0].announce()
    others[0].copy_share()
    for other in others:
        other.device[:] = 0xEE
    me.fetch()
    check(me)
    needed = any(
        len(pages) > 2 * len(group) and any(u[0] == v for u in me.shape.units) for v, pages in enumerate(me.loaded)
    )
    assert bool((me.missed == me.load_number).any()) >= needed


def different(seed: int, text: str) -> None:
    """A sibling announces the same number, and loads into other slots."""
    group = ranks_of(seed, text, count=2, patience_us=1 << 30)
    me, other = group
    pages = max(other.pages, key=lambda one: one.slots.numel())
    if pages.slots.numel() > 1:
        pages.slots[:2] = pages.slots[:2].flip(0).clone()
    me.announce()
    me.copy_share()
    other.announce()
    other.copy_share()
    other.device[:] = 0xEE
    if pages.slots.numel() > 1:
        me.fetch()
        check(me)


def stuck(seed: int, text: str) -> None:
    """A sibling stops in the middle of its share."""
    group = ranks_of(seed, text, count=2, patience_us=30)
    me, other = group
    me.announce()
    me.copy_share()
    other.announce()
    other.copy_share(random.Random(seed).randrange(me.shape.num_parts))
    me.fetch()
    check(me)


CASES = (together, late, absent, different, stuck)
SEEDS = range(6)


@pytest.mark.parametrize("case", CASES)
def test_all_pages_are_in_place(case: Callable[[int, str], None]) -> None:
    for seed in SEEDS:
        try:
            case(seed, source(SOURCE_FILE))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize(
    ("right", "instead"),
    [
        pytest.param("gate.open(siblings.me, part - 1);", "", id="does not wait for its own share"),
        pytest.param("met = load_index(&entry->digest) == load_index(&own->digest);", "met = true;", id="trusts slots"),
        pytest.param("read_flag(&entry->number) == siblings.number", "read_flag(&entry->number)", id="trusts numbers"),
        pytest.param("read_counter(entry->counters + seen) == raises", "true", id="does not wait for parts"),
        pytest.param("const bool there = gate.open(q, part);", "const bool there = true;", id="does not wait at all"),
        pytest.param("page = nth < own ? nth : nth + owned;", "page = nth;", id="fetches its own share"),
        pytest.param("raise(num_parts);", "raise(num_parts - 1);", id="forgets the last part"),
        pytest.param("reset_counter(entry->counters + part);", "{}", id="keeps old counters"),
        pytest.param("+ load_index(&plane->offset);", ";", id="ignores the offset"),
        pytest.param("8 * page * pages.slots_stride", "8 * page", id="ignores the stride of slots"),
        pytest.param("(u64)v << 48 | i", "0", id="takes order for nothing"),
    ],
)
def test_a_wrong_kernel_is_noticed(right: str, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ALIGNMENTS", [16])
    text = source(SOURCE_FILE)
    assert right in text
    text = text.replace(right, instead)
    for case in (*CASES, again):
        for seed in SEEDS:
            try:
                case(seed, text)
            except AssertionError:
                return
    pytest.fail("no case noticed")


def again(seed: int, text: str) -> None:
    """A load in an entry that was used before."""
    group = ranks_of(seed, text, count=2)
    for rank in group:
        rank.announce()
        rank.copy_share()
    for rank in group:
        rank.load_number += RING
        rank.device[:] = POISON
    me, other = group
    me.announce()
    me.copy_share()
    do_in_time(me, [other.announce, other.copy_share])
    me.fetch()
    check(me)


def test_an_entry_is_used_again() -> None:
    for seed in SEEDS:
        again(seed, source(SOURCE_FILE))

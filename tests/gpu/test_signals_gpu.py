"""A load in one launch tells layer by layer what is in place: whoever waits for a layer sees its bytes, no later."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from sglang_xmem.copies import PageCopier, make_copier
from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.signals import LoadSignals
from sglang_xmem.copies.staged import SLOTS, staged
from sglang_xmem.copies.tuning import DEFAULT_TUNING, CudaTuning
from sglang_xmem.errors import CopyError

pytestmark = pytest.mark.gpu

GPU = "cuda:0"
PARTS, PLANES_PER_PART = 12, 2
PLANES = PARTS * PLANES_PER_PART

TUNINGS = {
    "default": DEFAULT_TUNING["load", "device"],
    "register": CudaTuning(ctas=4, unroll=8),
    "bulk_one_ring": CudaTuning(variant="bulk", ctas=3),
    "bulk_waits": CudaTuning(variant="bulk", ctas=2, stages=2, stage_bytes=2048, pending_stores=0),
}
#: The last ones go through a staging ring, run on another GPU, and on both.
VARIANTS = [*TUNINGS, "staged", *(pytest.param(name, marks=pytest.mark.gpus(2)) for name in ("remote", "shared"))]
#: (row_bytes, page_size, pages). The last ones leave warps without a tile, in some parts or in all.
SHAPES = [(1024, 64, 200), (1024, 1, 10_000), (24, 1, 30_001), (656, 64, 200), (1024, 64, 3), (16, 1, 1)]


@pytest.fixture(scope="module", autouse=True)
def free_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MIN_LAYER_BYTES", "MIN_RUN_BYTES"):
            patch.setattr(f"sglang_xmem.copies.staged.{name}", 1)  # else small loads go directly
        yield
    gc.collect()
    torch.cuda.empty_cache()


class Scene:
    """A tier in host memory, where a load takes long enough to be watched, and a poisoned GPU pool."""

    def __init__(self, variant: str, row_bytes: int, page_size: int, pages: int) -> None:
        shape = (PLANES, pages * page_size, row_bytes)
        self.tier = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self.expected, self.device = (torch.empty(shape, dtype=torch.uint8, device=GPU) for _ in range(2))
        planes = (list(self.tier), list(self.device), page_size)
        self.copier: PageCopier
        if variant == "staged":
            # Slots of 7 pages where they are large.
            self.copier = staged(CudaPageCopier(*planes), SLOTS * 2 * max(7, pages // 7) * page_size * row_bytes)
        elif variant == "shared":
            self.copier = make_copier("cuda", *planes, tier_locality="host", relays=(1,))
        else:
            runs_on = 1 if variant == "remote" else None
            self.copier = CudaPageCopier(*planes, load=TUNINGS.get(variant, {}), runs_on=runs_on)
        self.rows_on_cpu = torch.arange(pages) * page_size
        self.rows = self.rows_on_cpu.to(GPU)
        made = self.copier.make_signals(PARTS)
        assert made is not None
        self.signals: LoadSignals = made
        self.loading, self.reading = torch.cuda.Stream(GPU, priority=-1), torch.cuda.Stream(GPU)
        self.fill()

    def fill(self) -> None:
        self.expected.random_(0, 256)
        self.tier.copy_(self.expected)
        self.device.copy_(~self.expected)  # nothing is right by chance
        self.seen = torch.empty_like(self.device)
        torch.cuda.synchronize()

    def load(self) -> None:
        self.copier.load_signalling(self.rows, self.rows, range(PLANES), self.signals, self.rows_on_cpu)

    def load_and_read(self, *, wait: bool, ahead: int = 0) -> list[bool]:
        """For each part, whether a reader on another stream saw its bytes.

        Args:
            wait: for the part before reading it, or for one that comes `ahead` parts later.
        """
        with torch.cuda.stream(self.loading):
            torch.cuda._sleep(20_000_000)  # about 10 ms: the readers are enqueued first
            self.load()
        with torch.cuda.stream(self.reading):
            for part in range(PARTS):
                planes = slice(part * PLANES_PER_PART, (part + 1) * PLANES_PER_PART)
                if wait:
                    self.signals.wait(min(part + ahead, PARTS - 1))
                self.seen[planes].copy_(self.device[planes])
        torch.cuda.synchronize()
        return [
            torch.equal(seen, expected)
            for seen, expected in zip(self.seen.chunk(PARTS), self.expected.chunk(PARTS), strict=True)
        ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tuning", VARIANTS)
def test_whoever_waits_sees_the_part(tuning: str, shape: tuple[int, int, int]) -> None:
    scene = Scene(tuning, *shape)
    for _ in range(4):  # the same signals, load after load
        scene.fill()
        assert scene.load_and_read(wait=True) == [True] * PARTS
        assert torch.equal(scene.device, scene.expected)


@pytest.mark.parametrize("tuning", VARIANTS)
def test_whoever_waits_for_a_part_sees_those_before_it(tuning: str) -> None:
    """So that one wait serves K and V of a layer, and all layers before it."""
    scene = Scene(tuning, *SHAPES[0])
    for ahead in (1, PARTS):
        scene.fill()
        assert scene.load_and_read(wait=True, ahead=ahead) == [True] * PARTS


@pytest.mark.parametrize("tuning", VARIANTS)
def test_whoever_does_not_wait_sees_old_bytes(tuning: str) -> None:
    """Else the test above could not fail."""
    scene = Scene(tuning, *SHAPES[0])
    assert scene.load_and_read(wait=False) == [False] * PARTS


@pytest.mark.parametrize("tuning", VARIANTS)
def test_parts_are_there_one_after_the_other(tuning: str) -> None:
    """Not all at the end: the first part can be used while most of the load is still to come."""
    scene = Scene(tuning, 1024, 64, 300)
    for _ in range(2):  # the first launch may load the kernel
        start, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ready = [torch.cuda.Event(enable_timing=True) for _ in range(PARTS)]
        with torch.cuda.stream(scene.loading):
            torch.cuda._sleep(20_000_000)
            start.record()
            scene.load()
            done.record()
        with torch.cuda.stream(scene.reading):
            for part in range(PARTS):
                scene.signals.wait(part)
                ready[part].record()
        torch.cuda.synchronize()
        whole = start.elapsed_time(done)
        shares = [start.elapsed_time(event) / whole for event in ready]
    assert shares == sorted(shares)
    for part, share in enumerate(shares):
        assert (part + 0.5) / PARTS < share < (part + 2.5) / PARTS, shares


def test_counters_wrap_around() -> None:
    scene = Scene("default", *SHAPES[0])
    scene.signals._counters.fill_(-10)
    scene.signals._target = 2**32 - 10
    for _ in range(3):
        scene.fill()
        assert scene.load_and_read(wait=True) == [True] * PARTS
    assert 0 < scene.signals._target < 2**20


def test_a_load_of_nothing_keeps_nobody_waiting() -> None:
    scene = Scene("default", *SHAPES[0])
    scene.copier.load_signalling(scene.rows[:0], scene.rows[:0], range(PLANES), scene.signals)
    scene.signals.wait(PARTS - 1)
    torch.cuda.synchronize()


def test_planes_that_do_not_make_equal_parts_are_refused() -> None:
    scene = Scene("default", *SHAPES[0])
    with pytest.raises(ValueError, match="23 planes do not make 12 equal parts"):
        scene.copier.load_signalling(scene.rows, scene.rows, range(PLANES - 1), scene.signals)


@pytest.mark.parametrize(
    ("row_bytes", "page_size", "slot_pages"), [(1024, 64, 5), (656, 16, 33), (24, 1, 1000), (7, 3, 64)]
)
def test_staged_loads_of_scattered_runs(row_bytes: int, page_size: int, slot_pages: int) -> None:
    """Several loads right after each other through the same slots, each behind a store to the pages that it loads."""
    pages, loads = 6 * slot_pages, 3
    shape = (PLANES, pages * page_size, row_bytes)
    tier = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
    stored = torch.randint(0, 256, shape, dtype=torch.uint8, device=GPU)
    device = torch.full((loads, *shape), 0xA5, dtype=torch.uint8, device=GPU)
    storing = CudaPageCopier(list(tier), list(stored), page_size)
    stream = torch.cuda.Stream(GPU)
    made = []
    for number in range(loads):
        direct = CudaPageCopier(list(tier), list(device[number]), page_size)
        copier = staged(direct, SLOTS * 2 * slot_pages * page_size * row_bytes)
        signals = copier.make_signals(PARTS)
        assert signals is not None
        made.append((copier, signals))
    expected, everything = device.clone(), torch.arange(pages, device=GPU) * page_size
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(5_000_000)
        for number, (copier, signals) in enumerate(made):
            storing.store(everything, everything, range(PLANES))
            firsts = torch.randperm(pages // 8) * 8  # runs of eight pages
            on_cpu = (firsts[:, None] + torch.arange(8)).flatten()[: pages - 9] * page_size
            to = torch.randperm(pages, device=GPU)[: on_cpu.numel()] * page_size
            rows = on_cpu.to(GPU)
            copier.load_signalling(rows, to, range(PLANES), signals, on_cpu)
            paged = expected[number].view(PLANES, pages, -1)
            paged[:, to // page_size] = stored.view(PLANES, pages, -1)[:, rows // page_size]
            stored.add_(1)  # what the next store brings
    torch.cuda.synchronize()
    assert torch.equal(device, expected)


def test_a_ring_larger_than_the_gpu_is_refused() -> None:
    planes = [torch.zeros(64, 16, dtype=torch.uint8, device=GPU) for _ in range(2)]
    with pytest.raises(
        CopyError, match="cuda:0 has no room left for a staging ring of 4194304 MiB; lower copy.staging_mib"
    ):
        staged(CudaPageCopier(planes, planes, 1), 1 << 42)

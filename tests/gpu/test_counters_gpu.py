"""A load in one launch reports each part when it is in place: a stream that waits for a part sees its bytes."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from sglang_xmem.copies import CopyPolicy, make_copier
from sglang_xmem.copies.base import PageCopier, Pages, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.tuning import DEFAULT_TUNING, CudaTuning

pytestmark = pytest.mark.gpu

GPU = "cuda:0"
DEVICE = torch.device(GPU)
PARTS, PLANES_PER_PART = 12, 2
PLANES = PARTS * PLANES_PER_PART

TUNINGS = {
    "default": DEFAULT_TUNING["load", "nvlink"],
    "register": CudaTuning(ctas=4, unroll=8),
    "bulk_one_ring": CudaTuning(variant="bulk", ctas=3),
    "bulk_waits": CudaTuning(variant="bulk", ctas=2, stages=2, stage_bytes=2048, pending_stores=0),
}
#: The last ones run on another GPU, and on both.
VARIANTS = [*TUNINGS, "engines", *(pytest.param(name, marks=pytest.mark.gpus(2)) for name in ("remote", "shared"))]
#: (unit_bytes, pages). The last ones leave warps without a tile, in some parts or in all.
SHAPES = [(65536, 200), (1024, 10_000), (24, 30_001), (41984, 200), (65536, 3), (16, 1)]


@pytest.fixture(scope="module", autouse=True)
def free_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


class Scene:
    """A tier in host memory, where a load takes long enough to be watched, and a poisoned GPU pool.

    Args:
        empty_parts: as many parts before each part have no planes, as layers that are not the pool's.
    """

    def __init__(self, variant: str, unit_bytes: int, pages: int, empty_parts: int = 0) -> None:
        frame_bytes = PLANES * unit_bytes
        self.tier = torch.empty((pages, PLANES, unit_bytes), dtype=torch.uint8, pin_memory=True)
        shape = (PLANES, pages, unit_bytes)
        self.expected, self.device = (torch.empty(shape, dtype=torch.uint8, device=GPU) for _ in range(2))
        slabs = [Slab(self.tier.data_ptr(), pages, frame_bytes)]
        self.copier: PageCopier
        if variant == "shared":
            self.copier, _ = make_copier("cuda", slabs, DEVICE, link="pcie", policy=CopyPolicy(relays=(1,)))
        elif variant == "engines":
            self.copier, _ = make_copier("cuda", slabs, DEVICE, link="pcie", staging_bytes=32 << 20)
        else:
            runs_on = 1 if variant == "remote" else None
            self.copier = CudaPageCopier(slabs, DEVICE, load=TUNINGS.get(variant, {}), runs_on=runs_on)
        self.each = empty_parts + 1
        steps = [
            Step(
                Plane(plane.data_ptr(), unit_bytes, pages, number * unit_bytes, unit_bytes, 1),
                0,
                number // PLANES_PER_PART * self.each + empty_parts,
            )
            for number, plane in enumerate(self.device)
        ]
        self.program = self.copier.compile(steps, PARTS * self.each)
        slots = torch.arange(pages, device=GPU)
        self.pages = [Pages(self.tier.data_ptr() + slots * frame_bytes, slots)]
        self.addresses = self.pages[0].frames.cpu().numpy()
        made = self.copier.make_counters(PARTS * self.each)
        assert made is not None
        self.counters: LayerCounters = made
        self.loading, self.reading = torch.cuda.Stream(GPU, priority=-1), torch.cuda.Stream(GPU)
        self.fill()

    def fill(self) -> None:
        self.expected.random_(0, 256)
        self.tier.copy_(self.expected.transpose(0, 1))
        self.device.copy_(~self.expected)  # nothing is right by chance
        self.seen = torch.empty_like(self.device)
        torch.cuda.synchronize()

    def load(self) -> None:
        self.copier.load(self.program, self.pages, self.counters, [self.addresses])

    def load_and_read(self, *, wait: bool, ahead: int = 0) -> list[bool]:
        """For each part with planes, whether a reader on another stream saw its bytes.

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
                    self.counters.wait(min((part + 1) * self.each - 1 + ahead, self.counters.num_parts - 1))
                self.seen[planes].copy_(self.device[planes])
        torch.cuda.synchronize()
        return [
            torch.equal(seen, expected)
            for seen, expected in zip(self.seen.chunk(PARTS), self.expected.chunk(PARTS), strict=True)
        ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tuning", VARIANTS)
def test_whoever_waits_sees_the_part(tuning: str, shape: tuple[int, int]) -> None:
    scene = Scene(tuning, *shape)
    for _ in range(4):  # the same counters, load after load
        scene.fill()
        assert scene.load_and_read(wait=True) == [True] * PARTS
        assert torch.equal(scene.device, scene.expected)


@pytest.mark.parametrize("tuning", VARIANTS)
def test_parts_without_planes_are_raised(tuning: str) -> None:
    scene = Scene(tuning, *SHAPES[0], empty_parts=3)
    assert scene.load_and_read(wait=True) == [True] * PARTS


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
    scene = Scene(tuning, 65536, 300)
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
                scene.counters.wait(part)
                ready[part].record()
        torch.cuda.synchronize()
        whole = start.elapsed_time(done)
        shares = [start.elapsed_time(event) / whole for event in ready]
    assert shares == sorted(shares)
    # Spread over most of the load, whatever else the link carries.
    assert shares[0] < 0.4, shares
    assert shares[PARTS // 2] < 0.8, shares
    assert shares[-1] - shares[0] > 0.5, shares


def test_counters_wrap_around() -> None:
    scene = Scene("default", *SHAPES[0])
    scene.counters._counters.fill_(-10)
    scene.counters._target = 2**32 - 10
    for _ in range(3):
        scene.fill()
        assert scene.load_and_read(wait=True) == [True] * PARTS
    assert 0 < scene.counters._target < 2**20


def test_a_load_of_nothing_keeps_nobody_waiting() -> None:
    scene = Scene("default", *SHAPES[0])
    none = scene.pages[0].slots[:0]
    scene.copier.load(scene.program, [Pages(none, none)], scene.counters)
    scene.counters.wait(PARTS - 1)
    torch.cuda.synchronize()

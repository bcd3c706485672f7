"""The arena and its page table against plain arrays: any order of stores, loads, storage pages and new spaces.

Hypothesis chooses the scene (spaces, planes, banks of unequal size); a generator with its seed drives the steps, which
would cost hypothesis more than they cost the arena. 100 scenes of 1,000 steps are 10^5 steps.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_xmem import plan as plan_module
from sglang_xmem.arena import Arena, SpaceSpec, aligned
from sglang_xmem.config import CopySettings, Options
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.tiers import Extent, Ranks, Region
from tests.unit.fakes import FakeSettings, ShyFakeTier

SCENES, STEPS = 100, 1000
Bytes = npt.NDArray[np.uint8]


class BankedTier(ShyFakeTier):
    """Memory in pieces, as banks have it: extents with gaps between them and odd ends."""

    name = "banked"
    live: ClassVar[list[int]] = []
    cuts: ClassVar[tuple[int, ...]] = ()

    def _allocate(self, nbytes: int, granule: int) -> Region:
        frames = nbytes // granule
        bounds = [0, *sorted({cut % (frames + 1) for cut in self.cuts}), frames]
        extents, kept = [], []
        for first, last in pairwise(bounds):
            size = (last - first) * granule
            memory = (ctypes.c_uint8 * (size + granule - 1))()  # space for less than one frame more
            kept.append(memory)
            extents.append(Extent(ctypes.addressof(memory), len(memory)))
        self.live.append(nbytes)

        def release(keep: Any = kept) -> None:
            self.live.remove(nbytes)

        return Region(extents, "banks", release, granule=granule)


class SpaceScene(NamedTuple):
    """A space: its pages on both sides, the unit bytes of its planes, and index numbers of a page."""

    pages: int
    units: int
    unit_bytes: tuple[int, ...]
    slots: int


SPACES = st.builds(
    SpaceScene,
    pages=st.integers(1, 12),
    units=st.integers(2, 8),
    unit_bytes=st.lists(st.sampled_from((1, 3, 16, 132, 256, 656)), min_size=1, max_size=3).map(tuple),
    slots=st.sampled_from((1, 4, 64)),
)


class Modelled:
    """A space of an arena, and what it should hold."""

    def __init__(self, scene: SpaceScene, rng: random.Random) -> None:
        self.scene = scene
        self.frame_bytes = aligned(sum(scene.unit_bytes))
        self.held = np.zeros((scene.pages, self.frame_bytes), np.uint8)
        noise = np.random.default_rng(rng.getrandbits(32))
        self.device = [noise.integers(0, 256, (scene.units, n), np.uint8) for n in scene.unit_bytes]
        self.real = [torch.from_numpy(array.copy()) for array in self.device]
        self.offsets = [sum(scene.unit_bytes[:number]) for number in range(len(scene.unit_bytes))]
        self.planes = [
            Plane(real.data_ptr(), nbytes, scene.units, offset, nbytes, scene.slots)
            for real, nbytes, offset in zip(self.real, scene.unit_bytes, self.offsets, strict=True)
        ]

    def move(self, frames: list[int], units: list[int], *, load: bool) -> None:
        for array, offset in zip(self.device, self.offsets, strict=True):
            part = self.held[:, offset : offset + array.shape[1]]
            if load:
                array[units] = part[frames]
            else:
                part[frames] = array[units]

    def check(self) -> None:
        for real, array in zip(self.real, self.device, strict=True):
            assert np.array_equal(real.numpy(), array)


class Model:
    """An arena and its model that goes through random steps."""

    def __init__(self, scenes: list[SpaceScene], seed: int) -> None:
        self.rng = random.Random(seed)
        self.later = scenes[1:]
        self.spaces = {"space 0": Modelled(scenes[0], self.rng)}
        options = Options(tier="banked", copy=CopySettings(), tiers={"banked": FakeSettings(1 << 30)})
        placement = Placement(make_plan(options, Ranks(gpus=(None,)), None, lambda n: 1 << 40), 0, lambda n: 1 << 40)
        first = self.spaces["space 0"]
        spec = SpaceSpec("space 0", first.scene.pages, first.frame_bytes)
        self.arena = Arena(placement, [spec], device=torch.device("cpu"), copy=CopySettings())
        self.begin()

    def begin(self) -> None:
        self.arena.begin([Step(plane, 0, 0) for space in self.spaces.values() for plane in space.planes])
        self.programs: dict[tuple[str, ...], Any] = {}

    def run(self, steps: int) -> None:
        """Take random steps, and compare what each touched; all memory in the end."""
        actions = (self.load, self.load, self.store, self.store, self.read, self.write)
        for number in range(steps):
            if self.later and number % (STEPS // 4) == STEPS // 8:
                self.extend(self.later.pop())
            self.rng.choice(actions)()
        for name, space in self.spaces.items():
            for page in range(space.scene.pages):
                assert np.array_equal(self.frame(name, page), space.held[page])

    def extend(self, scene: SpaceScene) -> None:
        name = f"space {len(self.spaces)}"
        space = self.spaces[name] = Modelled(scene, self.rng)
        self.arena.extend(SpaceSpec(name, scene.pages, space.frame_bytes))
        self.begin()

    def load(self) -> None:
        self._move(load=True)

    def store(self) -> None:
        self._move(load=False)

    def _move(self, *, load: bool) -> None:
        names = tuple(self.rng.sample(list(self.spaces), self.rng.randint(1, len(self.spaces))))
        moves = {name: self._pick(self.spaces[name].scene, load=load) for name in names}
        found = self.arena.frames(
            [(name, torch.tensor(frames, dtype=torch.int64)) for name, (frames, _) in moves.items()]
        )
        pages = []
        for name, addresses in zip(names, found, strict=True):
            slots = self.spaces[name].scene.slots
            # Any index number of a page means it.
            numbers = [unit * slots + self.rng.randrange(slots) for unit in moves[name][1]]
            pages.append(Pages(addresses, torch.tensor(numbers, dtype=torch.int64)))
        if names not in self.programs:
            steps = [Step(plane, vector, 0) for vector, name in enumerate(names) for plane in self.spaces[name].planes]
            self.programs[names] = self.arena.compile(steps, 1), steps
        program, steps = self.programs[names]
        if self.rng.random() < 0.1:
            self.arena.copy_plainly(steps, pages, load=load)
        elif load:
            self.arena.load(program, pages)
        else:
            self.arena.store(program, pages)
        for name, (frames, units) in moves.items():
            space = self.spaces[name]
            space.move(frames, units, load=load)
            space.check()
            if not load:
                assert np.array_equal(self.frame(name, frames[0]), space.held[frames[0]])

    def _pick(self, scene: SpaceScene, *, load: bool) -> tuple[list[int], list[int]]:
        """Pages and units; what is read may come twice, what is written may not."""
        written, read = (scene.units, scene.pages) if load else (scene.pages, scene.units)
        count = self.rng.randint(1, written)
        targets, sources = self.rng.sample(range(written), count), self.rng.choices(range(read), k=count)
        return (sources, targets) if load else (targets, sources)

    def read(self) -> None:
        name, page, offset, nbytes = self._range()
        part = self.arena.read(name, page, offset, nbytes)
        assert np.array_equal(part.numpy(), self.spaces[name].held[page, offset : offset + nbytes])

    def write(self) -> None:
        name, page, offset, nbytes = self._range()
        data = np.frombuffer(self.rng.randbytes(nbytes), np.uint8)
        self.arena.write(name, page, offset, torch.from_numpy(data.copy()))
        self.spaces[name].held[page, offset : offset + nbytes] = data
        assert np.array_equal(self.frame(name, page), self.spaces[name].held[page])

    def _range(self) -> tuple[str, int, int, int]:
        name = self.rng.choice(list(self.spaces))
        space = self.spaces[name]
        offset = self.rng.randrange(space.frame_bytes)
        return name, self.rng.randrange(space.scene.pages), offset, self.rng.randint(1, space.frame_bytes - offset)

    def frame(self, name: str, page: int) -> Bytes:
        """A frame's bytes, at the address that the page table gives."""
        address = self.arena.address(name, page)
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.spaces[name].frame_bytes).from_address(address))


@pytest.fixture(scope="module", autouse=True)
def banked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "tier_classes", lambda: {"banked": BankedTier})
        yield
    assert BankedTier.live == []


@settings(max_examples=SCENES, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    scenes=st.lists(SPACES, min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=3).map(tuple),
    seed=st.integers(0, 2**32),
)
def test_an_arena_does_what_plain_arrays_do(scenes: list[SpaceScene], cuts: tuple[int, ...], seed: int) -> None:
    BankedTier.cuts = cuts
    model = Model(list(scenes), seed)
    try:
        model.run(STEPS)
        frames = sorted(
            (int(address), int(address) + space.frame_bytes)
            for name, space in model.spaces.items()
            for address in model.arena.spaces[name].table
        )
        assert all(end <= start for (_, end), (start, _) in pairwise(frames)), "frames overlap"
    finally:
        model.arena.close()


def test_a_wrong_page_table_is_noticed() -> None:
    """Negative control: two pages that share a frame."""
    BankedTier.cuts = (2,)
    model = Model([SpaceScene(4, 4, (16,), 1)], seed=1)
    table = model.arena.spaces["space 0"].table
    table[3] = table[0]
    try:
        with pytest.raises(AssertionError):
            model.run(STEPS)
    finally:
        model.arena.close()

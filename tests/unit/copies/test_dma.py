"""Loads by copy engines: the calls that they make, executed on host memory in any order that the driver may choose."""

from __future__ import annotations

import ctypes
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from sglang_xmem.arena import Arena
from sglang_xmem.copies import CopyPolicy, cuda, dma, make_copier
from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.dma import BUFFERS, DmaCopier, Frames, pieces_of
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.table import RECORD_BYTES
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.copies.tuning import CudaTuning
from sglang_xmem.errors import CopyError
from sglang_xmem.tiers import Traits
from tests.contracts.copiers import CopierContract, Limits

CPU = torch.device("cpu")
TUNING = CudaTuning(ctas=4, threads=64, unroll=2)
RAISES = 7
NO_SEAM = 1 << 62


class Counters(LayerCounters):
    """Counters in host memory, at any value."""

    def __init__(self, num_parts: int, target: int = 0xFFFFFFFF) -> None:
        # Not the base's: that one takes memory of a GPU.
        self.num_parts = num_parts
        self._target = target
        self._counters = torch.zeros(num_parts, dtype=torch.int32)
        self.address = self._counters.data_ptr()
        self.restored = 0
        LayerCounters.restore(self)

    def restore(self) -> None:
        self.restored += 1
        super().restore()

    def values(self) -> list[int]:
        return [int(value) & 0xFFFFFFFF for value in self._counters]


class Kernel(TorchPageCopier):
    """A CUDA copier's place, on the CPU."""

    alignment = 16

    def scatter(self, tuning: CudaTuning, alignment: int) -> tuple[CudaTuning, int]:
        self.alignment = alignment
        return TUNING, alignment

    def can_count(self) -> bool:
        return True

    def make_counters(self, num_parts: int) -> Any:
        return Counters(num_parts)

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        super()._copy(program, pages, load=load, counters=None)
        if counters is not None:
            counters._counters += RAISES
            counters.announce(RAISES)


class Gpu:
    """Executes a load's calls when it is joined: streams in any order that events allow.

    Attributes:
        calls: names of those made.
        turns: streams of launches.
        refuses: number of the call that fails; None: none does.
        on_write: called with each counter's address before it is written.
    """

    def __init__(self, seed: int = 0) -> None:
        self.calls: list[str] = []
        self.turns: list[int] = []
        self.refuses: int | None = None
        self.on_write: Any = lambda address: None
        self._random = random.Random(seed)
        self._queues: list[list[tuple[str, Any]]] = [[] for _ in range(BUFFERS)]
        self._recorded = [0] * BUFFERS  # of each event, how often `done` was called
        self._reached = [0] * BUFFERS  # and how often its stream has come there
        self._keep: list[Any] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._keep.append(torch.full((nbytes,), 0xEE, dtype=torch.uint8))
        return cast(torch.Tensor, self._keep[-1])

    def upload(self, content: bytearray) -> torch.Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        try:
            yield
        finally:
            while any(self._queues):
                ready = [turn for turn, queue in enumerate(self._queues) if queue and self._is_ready(*queue[0])]
                assert ready, "the streams wait for each other"
                turn = self._random.choice(ready)
                kind, what = self._queues[turn].pop(0)
                getattr(self, f"_do_{kind}")(what)

    def _is_ready(self, kind: str, what: Any) -> bool:
        return kind != "wait" or self._reached[what[0]] >= what[1]

    def _call(self, kind: str, turn: int, what: Any) -> None:
        if self.refuses == len(self.calls):
            self.refuses = None
            raise CopyError("The driver refuses.")
        self.calls.append(kind)
        self._queues[turn].append((kind, what))

    def copy(self, descriptor: int, turn: int) -> None:
        self._call("copy", turn, words(descriptor, 16))

    def follow(self, turn: int) -> None:
        self._call("wait", turn, ((turn - 1) % BUFFERS, self._recorded[turn - 1]))

    def done(self, turn: int) -> None:
        self._call("record", turn, turn)
        self._recorded[turn] += 1

    def write(self, operations: int, count: int, turn: int) -> None:
        assert 0 < count <= 256
        self._call("write", turn, [words(operations + 48 * number, 6) for number in range(count)])

    def launch(self, function: int, grid: int, tuning: CudaTuning, parameters: int, turn: int) -> None:
        assert tuning is TUNING
        assert 1 <= grid <= tuning.ctas
        places = words(parameters, 6)
        numbers = [ctypes.c_uint32.from_address(places[number]).value for number in (1, 2, 4)]
        table, counters, vectors = words(places[0], 1)[0], words(places[3], 1)[0], words(places[5], 64)
        assert numbers[1:] == [1, 0]
        assert counters == 0
        self.turns.append(turn)
        self._call("launch", turn, (function, table, numbers[0], vectors))

    def _do_copy(self, what: list[int]) -> None:
        assert (what[2], what[9]) == (4, 4)
        assert [what[number] for number in (0, 1, 3, 5, 7, 8, 10, 12)] == [0] * 8
        source, source_pitch, target, target_pitch, width, height = (what[n] for n in (4, 6, 11, 13, 14, 15))
        assert width <= min(source_pitch, target_pitch)
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    def _do_launch(self, what: tuple[int, int, int, list[int]]) -> None:
        alignment, table, planes, vectors = what
        for number in range(planes):
            device, stride, offset, slot_magic, _, shape, *_ = words(table + RECORD_BYTES * number, 8)
            pieces, vector = shape & 0xFFFFFFFF, shape >> 32 & 0xFFFF
            frames, slots, slots_stride, count = vectors[4 * vector : 4 * vector + 4]
            found = words(slots, (count - 1) * slots_stride + 1)[::slots_stride]
            for frame, slot in zip(words(frames, count), found, strict=True):
                unit = slot * slot_magic >> 64 if slot_magic else slot
                ctypes.memmove(device + unit * stride, frame + offset, pieces * alignment)

    def _do_wait(self, what: Any) -> None:
        pass

    def _do_record(self, turn: int) -> None:
        self._reached[turn] += 1

    def _do_write(self, what: list[list[int]]) -> None:
        for kind, address, value, *rest in what:
            assert (kind, rest) == (2, [0, 0, 0])
            self.on_write(address)
            ctypes.c_uint32.from_address(address).value = value


def words(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines make any load."""
    for name, value in {
        "MIN_LOAD_BYTES": 1, "MIN_CHUNK_BYTES": 5000, "MIN_ROW_BYTES": 0, "MIN_COPY_BYTES": 0, "MOST_CALLS": 1 << 20,
    }.items():  # fmt: skip
        monkeypatch.setattr(dma, name, value)


@pytest.mark.usefixtures("small")
class TestDma(CopierContract):
    seeds = range(20)
    limits = Limits(units=1 << 18, pages=20, large=False)
    reads_all_units = True
    made = 0

    def make(self, slabs: Sequence[Slab], device: torch.device) -> DmaCopier:
        type(self).made += 1
        buffer = (1 << 12, 1 << 16, 1 << 20)[self.made % 3]
        seam = (NO_SEAM, 10_000)[self.made % 2]
        return DmaCopier(cast(Any, Kernel(slabs, device)), cast(Any, Gpu(self.made)), BUFFERS * buffer, seam)

    def test_scenes_are_loaded_by_engines(self) -> None:
        """Else the contract would be the kernel's."""
        loads = {"engines": 0, "kernel": 0}
        for seed in range(10):
            scene = self.scene(seed)
            scene.run()
            for way, count in cast(DmaCopier, scene.copier).loads.items():
                loads[way] += count
        assert loads["engines"] > 5
        assert loads["engines"] > loads["kernel"]


PAGES, UNIT, LAYERS = 24, 3072, 6


class Model:
    """Keys and values of some layers: component after component in a frame, as SGLang's pools have them.

    Args:
        empty: parts before, between and behind those of layers.
    """

    def __init__(self, empty: int = 0, staging_bytes: int = BUFFERS * 10 * 2 * UNIT) -> None:
        self.tier = torch.randint(0, 255, (PAGES, 2, LAYERS, UNIT), dtype=torch.uint8)
        self.device = torch.zeros((2, LAYERS, PAGES, UNIT), dtype=torch.uint8)
        self.gpu = Gpu()
        frame = self.tier[0].numel()
        slabs = [Slab(self.tier.data_ptr(), PAGES, frame)]
        self.kernel = Kernel(slabs, CPU)
        self.copier = DmaCopier(cast(Any, self.kernel), cast(Any, self.gpu), staging_bytes, NO_SEAM)
        self.each = empty + 1
        self.num_parts = LAYERS * self.each + empty
        self.steps = [
            Step(
                Plane(self.device[which, layer].data_ptr(), UNIT, PAGES, (which * LAYERS + layer) * UNIT, UNIT, 1),
                0,
                layer * self.each + empty,
            )
            for layer in range(LAYERS)
            for which in range(2)
        ]
        self.program = self.copier.compile(self.steps, self.num_parts)
        self.counters = Counters(self.num_parts)

    def load(self, frames: Sequence[int], counters: Counters | None = None, addresses: bool = True) -> None:
        order = torch.tensor(frames, dtype=torch.int64)
        self.slots = torch.randperm(PAGES)[: len(frames)]
        self.frames = order
        there = self.tier.data_ptr() + order * self.tier[0].numel()
        self.copier.load(self.program, [Pages(there, self.slots)], counters, [there.numpy()] if addresses else None)

    def in_place(self, layer: int) -> bool:
        return torch.equal(self.device[:, layer, self.slots], self.tier[self.frames, :, layer].transpose(0, 1))

    def right(self) -> bool:
        return all(self.in_place(layer) for layer in range(LAYERS))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("empty", [0, 2])
@pytest.mark.parametrize("group_bytes", [1, 3 * PAGES * 2 * UNIT, 1 << 30])
def test_a_counter_is_written_when_its_part_is_in_place(
    empty: int, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dma, "MIN_CHUNK_BYTES", group_bytes)
    model = Model(empty, BUFFERS * 3 * PAGES * 2 * UNIT)
    model.frames, model.slots = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    written = []

    def on_write(address: int) -> None:
        part, rest = divmod(address - model.counters.address, 4)
        assert rest == 0
        written.append(part)
        for layer in range(LAYERS):
            if layer * model.each + empty <= part:
                assert model.in_place(layer), f"part {part} is written before layer {layer} is there"

    model.gpu.on_write = on_write
    for target in (0, 1, 2):
        model.device.zero_()
        model.load(range(PAGES), model.counters)
        assert model.right()
        assert written == list(range(model.num_parts)), "each once, in order"
        assert model.counters.values() == [target] * model.num_parts
        assert model.counters._target == target
        written.clear()
    assert model.copier.loads == {"engines": 3, "kernel": 0}


@pytest.mark.usefixtures("small")
def test_loads_by_both_ways_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    for number in range(6):
        model.device.zero_()
        model.load(range(PAGES), model.counters, addresses=number % 2 == 0)
        assert model.right()
        assert model.counters.values() == [model.counters._target] * LAYERS
    assert model.copier.loads == {"engines": 3, "kernel": 3}
    assert model.counters._target == 3 * (1 + RAISES) - 1


@pytest.mark.usefixtures("small")
def test_a_run_of_frames_is_one_copy() -> None:
    model = Model(staging_bytes=BUFFERS * 1024 * UNIT)
    frames = [*range(6, 12), *range(15, 20), 5, 4, 3]
    model.load(frames)
    assert model.right()
    runs = 2 + 3
    # Keys and values of a layer are not adjacent.
    assert model.gpu.calls.count("copy") == runs * 2 * LAYERS
    assert model.gpu.calls.count("launch") == LAYERS
    assert model.gpu.turns == [0, 1] * (LAYERS // 2), "one is filled while the other one is emptied"


@pytest.mark.usefixtures("small")
def test_what_engines_are_slower_with_is_loaded_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    every_other = range(0, PAGES, 2)
    nbytes = len(every_other) * 2 * LAYERS * UNIT
    for limit, value in {
        "MIN_LOAD_BYTES": nbytes + 1,
        "MOST_CALLS": 30,
        "MIN_ROW_BYTES": UNIT + 1,
        "MIN_COPY_BYTES": UNIT + 1,
    }.items():
        with monkeypatch.context() as patched:
            patched.setattr(dma, limit, value)
            model = Model()
            model.load(every_other, model.counters)
            assert model.right()
            assert (model.copier.loads, model.gpu.calls) == ({"engines": 0, "kernel": 1}, []), limit
    model = Model(staging_bytes=BUFFERS * 4096)
    model.load(every_other)
    assert model.copier.loads["kernel"] == 1, "a row has no place in a buffer"


@pytest.mark.usefixtures("small")
def test_a_refusal_midway_leaves_the_load_to_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    whole = Model(empty=1)
    whole.load(range(PAGES), whole.counters)
    assert {"copy", "wait", "launch", "write", "record"} == set(whole.gpu.calls)
    for call in range(len(whole.gpu.calls)):
        model = Model(empty=1)
        model.gpu.refuses = call
        caplog.clear()
        model.load(range(PAGES), model.counters)
        assert "the copy kernel makes a load instead of copy engines: The driver refuses." in caplog.text
        assert model.right()
        assert (model.counters.restored, model.copier.loads) == (1, {"engines": 0, "kernel": 1})
        assert model.counters.values() == [RAISES - 1] * model.num_parts
        model.device.zero_()
        model.load(range(PAGES), model.counters)
        assert model.right()
        assert model.counters.values() == [RAISES] * model.num_parts
        assert model.copier.loads["engines"] == 1


@pytest.mark.usefixtures("small")
def test_a_driver_that_goes_on_refusing_is_asked_no_more(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    for refused in (True, True, False, True, True, True, True, True):
        model.gpu.refuses = len(model.gpu.calls) if refused else None
        model.load(range(PAGES), model.counters)
        assert model.right()
    assert caplog.text.count("The driver refuses") == 2 + 3
    assert "copy engines refuse (1 of 8 so far)" in model.copier.describe()


@pytest.mark.usefixtures("small")
def test_counters_of_another_load_are_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match="7 counters for a load of 6 parts"):
        model.load(range(PAGES), Counters(LAYERS + 1))


@pytest.mark.parametrize(
    ("layers", "units", "most"), [(36, (131072, 131072), 600), (27, (73728,), 140), (61, (73728, 8448), 700)]
)
def test_models_loads_take_few_calls(layers: int, units: tuple[int, ...], most: int) -> None:
    """1280 pages of 64 tokens: Qwen3-8B, DeepSeek-V2-Lite, and DeepSeek with an indexer."""
    pages, frame = 1280, layers * sum(units)
    slab = Slab(1 << 40, 2000, frame)
    steps = []
    for layer in range(layers):
        offset = 0
        for vector, nbytes in enumerate(units):
            plane = Plane((1 << 41) + offset, nbytes, 2000, offset + layer * nbytes, nbytes, 64)
            # Keys and values are one pool's; an indexer is another pool.
            steps.append(Step(plane, vector if nbytes != units[0] else 0, layer))
            offset += layers * nbytes
    copier = DmaCopier(cast(Any, Plans([slab], CPU)), cast(Any, Gpu()), 256 << 20, NO_SEAM)
    program = copier.compile(steps, layers)
    numbers = torch.arange(pages)
    given = [Pages(numbers, numbers)] * program.num_vectors
    nbytes = pages * frame
    layout = program.layout_for(nbytes, copier.buffer_bytes)
    assert layout is not None
    addresses = [slab.address + numbers.numpy() * frame] * program.num_vectors
    plan = copier._plan(program, layout, given, Counters(layers), addresses)
    assert plan is not None
    calls = len(plan.copies) + 3 * len(plan.grids) + np.count_nonzero(plan.operations_of)
    assert calls <= most
    assert int((plan.copies[:, 14] * plan.copies[:, 15]).sum()) == nbytes


class Plans(Kernel):
    """Makes plans for memory that is not there."""

    def compile(self, steps: Sequence[Step], num_parts: int) -> Any:
        return Program(self, steps, num_parts)


def test_planes_that_lie_side_by_side_are_one_segment() -> None:
    def step(offset: int, nbytes: int, vector: int, part: int) -> Step:
        return Step(Plane(1 << 30, 4096, 9, offset, nbytes, 1), vector, part)

    steps = [
        step(4096, 512, 0, 1),
        step(4608, 512, 0, 1),
        step(0, 256, 1, 1),
        step(9000, 8, 0, 3),
        step(5120, 64, 0, 3),
    ]
    pieces, first_parts = pieces_of(steps, 1)
    assert first_parts == [1, 3]
    assert [(piece.group, piece.vector, piece.segments) for piece in pieces] == [
        (0, 0, ((4096, 1024, 0),)),
        (0, 1, ((0, 256, 0),)),
        (1, 0, ((5120, 64, 0), (9000, 8, 64))),
    ]
    pieces, first_parts = pieces_of(steps, 2)
    assert first_parts == [1]
    assert [(piece.vector, piece.segments) for piece in pieces] == [
        (0, ((4096, 1088, 0), (9000, 8, 1088))),
        (1, ((0, 256, 0),)),
    ]
    assert [step.plane.offset for step in pieces[0].steps] == [0, 512, 1024, 1088]


def test_runs_end_at_slabs_and_at_seams() -> None:
    frames = Frames([Slab(2000, 10, 100), Slab(1000, 10, 100), Slab(3000, 5, 200)], 500)
    found = np.array([1000, 1100, 1300, 1400, 1500, 1900, 2000, 2100, 3000, 3200, 3100])
    begins, pitch = frames.runs(found)
    assert begins.tolist() == [1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1]
    without_seams, _ = Frames([Slab(2000, 10, 100), Slab(1000, 10, 100)], NO_SEAM).runs(found[:8])
    assert without_seams.tolist() == [1, 0, 1, 0, 0, 1, 1, 0], "slabs may be adjacent and still be two memories"
    assert pitch.tolist() == [100] * 8 + [200] * 3


def host_copier(monkeypatch: pytest.MonkeyPatch, gpu: Any, counts: bool = True, **more: Any) -> PageCopier:
    """What `make_copier` makes, with stand-ins for what needs a GPU."""

    class Cuda(Kernel):
        def __init__(self, slabs: Any, device: Any, **settings: Any) -> None:
            super().__init__(slabs, CPU)

        def can_count(self) -> bool:
            return counts

    monkeypatch.setattr(cuda, "CudaPageCopier", Cuda)
    monkeypatch.setattr(dma, "Gpu", gpu)
    return make_copier("cuda", [Slab(1 << 20, 8, 4096)], torch.device("cuda", 0), link="pcie", **more)[0]


def test_staging_memory_makes_the_difference(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Full(Gpu):
        def allocate(self, nbytes: int) -> torch.Tensor:
            raise CopyError(f"The GPU has no {nbytes >> 20} MiB free.")

    caplog.set_level(logging.INFO)
    copier = host_copier(monkeypatch, lambda device: Gpu(), staging_bytes=1 << 20)
    assert isinstance(copier, DmaCopier)
    assert "loads of 16 MiB and more by copy engines through 1 MiB (0 of 0 so far)" in copier.describe()
    assert not isinstance(host_copier(monkeypatch, lambda device: Gpu()), DmaCopier), "0 MiB: none"
    runner = CopyPolicy(runner=1)
    assert not isinstance(host_copier(monkeypatch, lambda device: Gpu(), staging_bytes=1, policy=runner), DmaCopier)
    assert not caplog.text
    assert not isinstance(host_copier(monkeypatch, lambda device: Full(), staging_bytes=1 << 30), DmaCopier)
    assert "the copy kernel makes all loads instead of copy engines: The GPU has no 1024 MiB free" in caplog.text
    assert not isinstance(host_copier(monkeypatch, lambda device: Gpu(), False, staging_bytes=1 << 20), DmaCopier)


@pytest.mark.parametrize(
    ("link", "host", "device", "staging"),
    [("pcie", True, "cuda", 64), ("cxl", True, "cuda", 64), ("nvlink", False, "cuda", 0), ("none", True, "cpu", 0)],
)
def test_host_memory_alone_is_staged(link: Any, host: bool, device: str, staging: int) -> None:
    arena: Any = SimpleNamespace(
        tier=SimpleNamespace(traits=Traits(cpu_addressable=host, counts_as_host_ram=host, link=link)),
        device=torch.device(device),
        _copy=SimpleNamespace(staging_mib=64),
    )
    assert Arena._staging_bytes(arena) == staging << 20


def test_scenes_differ_by_order() -> None:
    """The stand-in for the GPU does not always choose the same stream."""
    orders = set()
    for seed in range(20):
        gpu = Gpu(seed)
        memory = torch.zeros(64, dtype=torch.uint8)
        order: list[int] = []
        gpu.on_write = order.append
        with gpu.ordered():
            for turn in range(2):
                table = np.array([[2, memory.data_ptr() + 4 * turn, 1, 0, 0, 0]], dtype=np.uint64)
                gpu.write(table.ctypes.data, 1, turn)
        orders.add(tuple(address - memory.data_ptr() for address in order))
    assert orders == {(0, 4), (4, 0)}

"""Loads through the staging ring, without a GPU: streams are played out in any order that their events allow.

The stand-in for CUDA keeps what each stream is given, and runs it afterwards, a random stream's next operation at a
time. Each piece of the copy engine's and each chunk of the kernel's really moves bytes.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_xmem.copies import staged, with_staging
from sglang_xmem.copies.engine import CopyEngine
from sglang_xmem.copies.staged import SLOTS, StagedCopier, chunks_of, runs_of
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.copies.tuning import CudaTuning
from sglang_xmem.errors import CopyError

PAGE, ROW = 4, 16
PAGE_BYTES = PAGE * ROW
LAYERS, TIER_PAGES, DEVICE_PAGES = 5, 96, 64
PLANES = 2 * LAYERS


class Stream:
    def __init__(self, *_: Any, handle: int = 0) -> None:
        self.todo: deque[tuple[Event, int] | Callable[[], object]] = deque()
        self.cuda_stream = handle or id(self)

    def query(self) -> bool:
        return not self.todo

    def wait_event(self, event: Event) -> None:
        if event.recorded:
            self.todo.append((event, event.recorded))


class Event:
    def __init__(self) -> None:
        self.recorded = self.passed = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def passes() -> None:
            self.passed = number

        stream.todo.append(passes)


class Cuda:
    """Streams by handle, and the current one, which loads are enqueued on."""

    def __init__(self) -> None:
        self.load = Stream()
        self.streams = [self.load]
        self.ignored: set[int] = set()  # streams whose waits do nothing

    def stream(self, device: Any) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def by_handle(self, handle: int) -> Stream:
        return next(stream for stream in self.streams if stream.cuda_stream == handle)

    def run(self, seed: int) -> None:
        """Everything that was enqueued, in a random order among streams."""
        order = random.Random(seed)
        while True:
            ready = []
            for stream in self.streams:
                while stream.todo and isinstance(stream.todo[0], tuple):
                    event, number = stream.todo[0]
                    if event.passed < number and stream.cuda_stream not in self.ignored:
                        break
                    stream.todo.popleft()
                if stream.todo and not isinstance(stream.todo[0], tuple):
                    ready.append(stream)
            if not ready:
                assert not any(stream.todo for stream in self.streams), "a deadlock"
                return
            # Runs of one stream are as likely as turns of all.
            stream = order.choice(ready)
            for _ in range(order.choice((1, 1, 50))):
                if not stream.todo or isinstance(stream.todo[0], tuple):
                    break
                step = stream.todo.popleft()
                assert not isinstance(step, tuple)
                step()


@contextmanager
def fake_cuda() -> Iterator[Cuda]:
    cuda = Cuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", cuda.stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: cuda.load)
        patch.setattr(torch.cuda, "device", nullcontext)
        patch.setattr(staged, "MIN_LAYER_BYTES", 1)
        patch.setattr(staged, "MIN_RUN_BYTES", 1)
        yield cuda


class Engine:
    """Reads its arrays during the call, and moves bytes when its stream comes to it."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.pieces, self.calls = cuda, 0, 0
        self.fails_at = -1

    def copy(self, targets: int, sources: int, sizes: int, count: int, stream: int) -> None:
        if self.calls == self.fails_at:
            raise CopyError("The driver refuses.")
        self.calls += 1
        self.pieces += count
        arrays = [list((ctypes.c_int64 * count).from_address(array)) for array in (targets, sources, sizes)]
        self.cuda.by_handle(stream).todo += [partial(ctypes.memmove, *piece) for piece in zip(*arrays, strict=True)]


class Kernel(TorchPageCopier):
    """The page kernel: copies when the current stream comes to it, and raises counters."""

    def __init__(self, cuda: Cuda, tier: Sequence[torch.Tensor], device: Sequence[torch.Tensor]) -> None:
        super().__init__(tier, device, PAGE)
        self.cuda = cuda
        self.load_tuning = self.store_tuning = CudaTuning()
        self.signalled = 0

    def start(
        self,
        tier_rows: torch.Tensor,
        device_rows: torch.Tensor,
        planes: range,
        *,
        load: bool,
        counters: Any,
        stream: int,
    ) -> int:
        assert load
        assert stream == self.cuda.load.cuda_stream
        address, planes_per_counter = counters
        assert planes_per_counter == len(planes) == 2

        def run() -> None:
            super(Kernel, self)._copy(tier_rows, device_rows, planes, load=True)
            ctypes.c_uint32.from_address(address).value += tier_rows.numel()

        self.cuda.load.todo.append(run)
        return tier_rows.numel()

    def load_signalling(self, *arguments: Any) -> None:
        self.signalled += 1

    def make_signals(self, num_parts: int) -> Any:
        return Signals(num_parts)

    def describe(self) -> str:
        return "the kernel"


class Signals:
    def __init__(self, num_parts: int = LAYERS, cuda: Cuda | None = None) -> None:
        self.num_parts, self.cuda = num_parts, cuda or Cuda()
        self.memory = torch.zeros(num_parts, dtype=torch.int32)
        self.target = 0

    def check_parts(self, planes: range) -> None:
        assert len(planes) % self.num_parts == 0

    def counters(self, planes: range) -> tuple[int, int]:
        return self.memory.data_ptr(), len(planes) // self.num_parts

    def announce(self, raises: int) -> None:
        self.target += raises

    def restore(self) -> None:
        self.cuda.load.todo.append(partial(self.memory.fill_, self.target))


class Scene:
    def __init__(self, cuda: Cuda, slot_pages: int, pinned: Sequence[int] = ()) -> None:
        generator = torch.Generator().manual_seed(slot_pages)
        self.cuda = cuda
        self.tier = torch.randint(0, 256, (PLANES, TIER_PAGES * PAGE, ROW), dtype=torch.uint8, generator=generator)
        self.device = torch.zeros(PLANES, DEVICE_PAGES * PAGE, ROW, dtype=torch.uint8)
        self.direct = Kernel(cuda, list(self.tier), list(self.device))
        self.engine = Engine(cuda)
        made: Any = StagedCopier
        self.copier: StagedCopier = made(
            self.direct,
            lambda planes: Kernel(cuda, planes, list(self.device)),
            self.engine,
            SLOTS * 2 * slot_pages * PAGE_BYTES,
            [self.tier.data_ptr() + at for at in pinned],
        )
        assert self.copier.slot_pages == slot_pages
        self.signals = Signals(cuda=cuda)

    def load(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, on_cpu: bool = True) -> None:
        signals: Any = self.signals
        rows = tier_rows if on_cpu else None
        self.copier.load_signalling(tier_rows, device_rows, range(PLANES), signals, rows)

    def expected(self, tier_rows: torch.Tensor, device_rows: torch.Tensor) -> torch.Tensor:
        device = self.device.clone()
        TorchPageCopier(list(self.tier), list(device), PAGE).load(tier_rows, device_rows, range(PLANES))
        return device


def rows_of(runs: Sequence[tuple[int, int]], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of runs of tier pages (first, pages), of which a page may be loaded twice, to different random pages."""
    pages = torch.cat([torch.arange(first, first + count) for first, count in runs])[:DEVICE_PAGES]
    generator = torch.Generator().manual_seed(seed)
    # As SGLang's: a view that steps over the tokens of each page.
    view = (pages * PAGE).repeat_interleave(PAGE)[::PAGE]
    return view, torch.randperm(DEVICE_PAGES, generator=generator)[: len(pages)] * PAGE


runs_of_pages = st.lists(
    st.integers(0, TIER_PAGES - 1).flatmap(
        lambda first: st.tuples(st.just(first), st.integers(1, min(40, TIER_PAGES - first)))
    ),
    min_size=1,
    max_size=6,
)


@given(runs=runs_of_pages, slot_pages=st.integers(1, 70))
def test_chunks_have_every_page_once_and_in_its_place(runs: list[tuple[int, int]], slot_pages: int) -> None:
    rows, _ = rows_of(runs, 0)
    count = rows.numel()
    chunks = chunks_of(rows.numpy(), runs_of(rows.numpy(), PAGE), PAGE, ROW, slot_pages)
    assert len(chunks) == -(-count // slot_pages)
    assert [chunk.pages.start for chunk in chunks] == [0, *(chunk.pages.stop for chunk in chunks[:-1])]
    assert chunks[-1].pages.stop == count
    pieces = 0
    for chunk in chunks:
        assert 1 <= chunk.pages.stop - chunk.pages.start <= slot_pages
        found = {}
        for offset, place, size in zip(*(each.tolist() for each in chunk[1:]), strict=True):
            for at in range(0, size, PAGE_BYTES):
                found[(place + at) // PAGE_BYTES] = (offset + at) // ROW
            pieces += 1
        assert found == dict(enumerate(rows[chunk.pages].tolist()))
    breaks = int((rows.diff() != PAGE).sum())
    assert pieces <= 1 + breaks + len(chunks) - 1, "neighbours go together"


@given(
    loads=st.lists(st.tuples(runs_of_pages, st.integers(0, 9)), min_size=1, max_size=3),
    slot_pages=st.integers(1, 70),
    order=st.integers(0, 10**6),
)
def test_bytes_are_right_in_every_order_of_streams(
    loads: list[tuple[list[tuple[int, int]], int]], slot_pages: int, order: int
) -> None:
    with fake_cuda() as cuda:
        scene = Scene(cuda, slot_pages)
        expected = scene.device
        for runs, seed in loads:
            tier_rows, device_rows = rows_of(runs, seed)
            scene.load(tier_rows, device_rows)
            scene_expected = expected.clone()
            TorchPageCopier(list(scene.tier), list(scene_expected), PAGE).load(tier_rows, device_rows, range(PLANES))
            expected = scene_expected
        cuda.run(order)
        assert scene.direct.signalled == 0
        assert torch.equal(scene.device, expected)
        assert scene.signals.memory.tolist() == [scene.signals.target] * LAYERS


@pytest.mark.parametrize("ignored", ["the copy engine's", "the kernel's"])
def test_without_the_streams_waits_bytes_are_wrong(ignored: str) -> None:
    """Else the test above could not fail."""
    wrong = 0
    for order in range(30):
        with fake_cuda() as cuda:
            scene = Scene(cuda, 4)
            cuda.ignored = {(cuda.streams[1] if ignored == "the copy engine's" else cuda.load).cuda_stream}
            tier_rows, device_rows = rows_of([(0, 40)], 1)
            expected = scene.expected(tier_rows, device_rows)
            scene.load(tier_rows, device_rows)
            cuda.run(order)
            wrong += not torch.equal(scene.device, expected)
    assert wrong > 20


@pytest.mark.parametrize("order", range(20))
def test_a_layer_is_in_place_when_its_counter_says_so(order: int) -> None:
    with fake_cuda() as cuda:
        scene = Scene(cuda, 7)
        tier_rows, device_rows = rows_of([(3, 30), (60, 20)], order)
        expected = scene.expected(tier_rows, device_rows)
        scene.load(tier_rows, device_rows)
        steps = list(cuda.load.todo)
        cuda.load.todo.clear()
        seen: set[int] = set()

        def look() -> None:
            told = [value == scene.signals.target for value in scene.signals.memory.tolist()]
            assert told == sorted(told, reverse=True), "layers come in order"
            for layer in range(sum(told)):
                planes = slice(2 * layer, 2 * layer + 2)
                assert torch.equal(scene.device[planes], expected[planes])
            seen.add(sum(told))

        for step in steps:
            cuda.load.todo += [step, look]
        cuda.run(order)
        assert seen == {*range(LAYERS + 1)}


@pytest.mark.parametrize("order", range(10))
def test_a_load_waits_for_what_is_on_its_stream(order: int) -> None:
    """The copy engine too: what it reads may just be stored."""
    with fake_cuda() as cuda:
        scene = Scene(cuda, 9)
        tier_rows, device_rows = rows_of([(0, 50)], 3)
        scene.tier.add_(1)
        expected = scene.expected(tier_rows, device_rows)
        scene.tier.sub_(1)
        cuda.load.todo.append(lambda: scene.tier.add_(1))
        scene.load(tier_rows, device_rows)
        cuda.run(order)
        assert torch.equal(scene.device, expected)


@pytest.mark.parametrize("why", ["no rows on the CPU", "a small layer", "short runs", "parts that are no layers"])
def test_what_the_ring_does_not_help_goes_directly(why: str) -> None:
    with fake_cuda() as cuda, pytest.MonkeyPatch.context() as patch:
        scene = Scene(cuda, 20)
        tier_rows, device_rows = rows_of([(0, 10), (40, 10)], 1)
        patch.setattr(staged, "MIN_LAYER_BYTES", 2 * 20 * PAGE_BYTES + (why == "a small layer"))
        patch.setattr(staged, "MIN_RUN_BYTES", 10 * PAGE_BYTES + (why == "short runs"))
        if why == "parts that are no layers":
            scene.signals = Signals(1)
        scene.load(tier_rows, device_rows, on_cpu=why != "no rows on the CPU")
        assert scene.direct.signalled == 1
        assert scene.engine.calls == 0
        scene.signals = Signals()
        patch.setattr(staged, "MIN_LAYER_BYTES", 2 * 20 * PAGE_BYTES)
        patch.setattr(staged, "MIN_RUN_BYTES", 10 * PAGE_BYTES)
        scene.load(tier_rows, device_rows)
        assert scene.direct.signalled == 1
        assert scene.engine.pieces == 2 * 2 * LAYERS


def test_a_load_of_nothing_is_nothing() -> None:
    with fake_cuda() as cuda:
        scene = Scene(cuda, 4)
        empty = torch.empty(0, dtype=torch.int64)
        scene.load(empty, empty)
        assert not any(stream.todo for stream in cuda.streams)
        assert scene.signals.target == 0


def test_a_refused_piece_fails_the_load_and_the_next_one_is_right() -> None:
    for order in range(5):
        with fake_cuda() as cuda:
            scene = Scene(cuda, 4)
            tier_rows, device_rows = rows_of([(0, 30)], 1)
            scene.engine.fails_at = 5
            with pytest.raises(CopyError, match="refuses"):
                scene.load(tier_rows, device_rows)
            assert scene.signals.target == 0, "nobody may take the load for complete"
            scene.engine.fails_at = -1
            scene.load(tier_rows, device_rows)
            cuda.run(order)
            assert torch.equal(scene.device, scene.expected(tier_rows, device_rows))
            # What the failed load has raised counts for nobody.
            assert scene.signals.memory.tolist() == [scene.signals.target] * LAYERS


@given(
    runs=runs_of_pages,
    slot_pages=st.integers(1, 70),
    pinned=st.lists(st.integers(0, PLANES * TIER_PAGES * PAGE_BYTES), max_size=4),
    order=st.integers(0, 10**6),
)
def test_no_piece_goes_across_a_seam(
    runs: list[tuple[int, int]], slot_pages: int, pinned: list[int], order: int
) -> None:
    """Where ranges of pinned memory meet, and bytes are as right as without seams."""
    with fake_cuda() as cuda:
        scene = Scene(cuda, slot_pages, pinned)
        first = scene.tier.data_ptr()
        moved: list[tuple[int, int]] = []
        copy = scene.engine.copy

        def watched(targets: int, sources: int, sizes: int, count: int, stream: int) -> None:
            arrays = [list((ctypes.c_int64 * count).from_address(array)) for array in (sources, sizes)]
            moved.extend((source - first, size) for source, size in zip(*arrays, strict=True))
            copy(targets, sources, sizes, count, stream)

        scene.engine.copy = watched  # type: ignore[method-assign]
        tier_rows, device_rows = rows_of(runs, 5)
        expected = scene.expected(tier_rows, device_rows)
        scene.load(tier_rows, device_rows)
        assert not [piece for piece in moved for seam in pinned if piece[0] < seam < sum(piece)]
        assert all(size > 0 for _, size in moved)
        cuda.run(order)
        assert torch.equal(scene.device, expected)


def test_stores_and_loads_without_signals_are_the_direct_copiers() -> None:
    with fake_cuda() as cuda:
        scene = Scene(cuda, 4)
        tier_rows, device_rows = rows_of([(0, 30)], 1)
        expected = scene.expected(tier_rows, device_rows)
        scene.copier.load(tier_rows, device_rows, range(PLANES))
        assert torch.equal(scene.device, expected)
        scene.tier.zero_()
        scene.copier.store(tier_rows, device_rows, range(PLANES))
        assert torch.equal(
            scene.tier[:, : 30 * PAGE].view(PLANES, 30, -1),
            expected.view(PLANES, DEVICE_PAGES, -1)[:, device_rows // PAGE],
        )
        assert scene.engine.calls == 0
        assert scene.copier.describe() == "the kernel; long runs loaded by the copy engine through 0 MiB"
        assert scene.copier.make_signals(3).num_parts == 3  # type: ignore[union-attr]


def test_a_ring_that_the_gpu_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda() as cuda:
        scene = Scene(cuda, 4)

        def full(*shape: Any, **how: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

        monkeypatch.setattr(torch, "empty", full)
        made: Any = StagedCopier
        with pytest.raises(CopyError) as error:
            made(scene.direct, None, scene.engine, 5 << 20)
    assert str(error.value) == (
        "cpu has no room left for a staging ring of 5 MiB; lower copy.staging_mib or --mem-fraction-static."
    )


@pytest.mark.parametrize(("memory", "ring"), [(141 << 30, 256 << 20), (24 << 30, 48 << 20)])
def test_the_usual_ring_is_small_on_a_small_gpu(monkeypatch: pytest.MonkeyPatch, memory: int, ring: int) -> None:
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(staged, "CopyEngine", lambda: None)
    monkeypatch.setattr(staged, "CudaPageCopier", Kernel)
    with fake_cuda() as cuda:
        scene = Scene(cuda, 4)
        monkeypatch.setattr(Kernel, "__init__", lambda *arguments: None)
        assert staged.staged(scene.direct).ring_bytes == ring
        assert staged.staged(scene.direct, 5 << 20).ring_bytes == 5 << 20


def test_a_ring_smaller_than_its_pages_is_refused() -> None:
    with fake_cuda() as cuda, pytest.raises(CopyError, match="A staging ring of 0 bytes has no room for pages of 64"):
        Scene(cuda, 0)


def test_a_copier_that_cannot_have_a_ring_keeps_without_unless_one_was_asked_for() -> None:
    planes = [torch.zeros(8, ROW, dtype=torch.uint8) for _ in range(2)]
    plain = TorchPageCopier(planes, planes, 1)
    assert with_staging(plain, 0) == (plain, None)
    copier, why = with_staging(plain, None)
    assert copier is plain
    assert "for the copier 'cuda' without relays, and this is 'torch'" in str(why)
    with pytest.raises(CopyError, match=r"copy\.staging_mib is for"):
        with_staging(plain, 1 << 20)


class Driver:
    """Has a batch of copies as C has it: an address, and arrays of words."""

    CUmemcpySrcAccessOrder = SimpleNamespace(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM=1)

    def __init__(self, status: int = 0) -> None:
        self.calls: list[Any] = []
        word, size = ctypes.c_void_p, ctypes.c_size_t
        self.function = ctypes.CFUNCTYPE(ctypes.c_int, word, word, word, size, word, word, size, word, word)(self.batch)
        self.status, self.asked = status, []  # type: ignore[var-annotated]

    @staticmethod
    def CUmemcpyAttributes() -> Any:
        return SimpleNamespace(getPtr=lambda: 4711)

    @staticmethod
    def CUresult(status: int) -> Any:
        return SimpleNamespace(name=f"ERROR_{status}")

    def cuGetProcAddress(self, name: bytes, version: int, flags: int) -> Any:
        self.asked.append((name, version, flags))
        found = ctypes.cast(self.function, ctypes.c_void_p).value if self.status != 500 else 0
        return SimpleNamespace(value=0, name="SUCCESS"), found, SimpleNamespace(name="NOT_SUFFICIENT")

    def batch(self, *arguments: Any) -> int:
        targets, sources, sizes, count, how, first, number, failed, stream = arguments
        arrays = [list((ctypes.c_int64 * count).from_address(array)) for array in (targets, sources, sizes)]
        self.calls.append((arrays, how, ctypes.c_size_t.from_address(first).value, number, bool(failed), stream))
        return self.status


def test_the_copy_engine_is_told_arrays_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr("sglang_xmem.gpus.driver", lambda: driver)
    engine = CopyEngine()
    assert driver.asked == [(b"cuMemcpyBatchAsync", 12080, 0)]
    arrays = torch.tensor([[1, 2, 3], [2**48, 5, 6], [7, 8, 2**33]])
    engine.copy(*(row.data_ptr() for row in arrays), 3, 99)  # type: ignore[call-arg]
    assert driver.calls == [(arrays.tolist(), 4711, 0, 1, True, 99)]
    driver.status = 1
    with pytest.raises(CopyError, match=r"refuses a batch of copies: ERROR_1\."):
        engine.copy(*(row.data_ptr() for row in arrays), 3, 99)  # type: ignore[call-arg]


def test_an_old_driver_or_old_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_xmem.gpus.driver", lambda: Driver(500))
    with pytest.raises(CopyError, match=r"needs a driver of CUDA 12\.8"):
        CopyEngine()
    monkeypatch.setattr("sglang_xmem.gpus.driver", SimpleNamespace)
    with pytest.raises(CopyError, match=r"needs cuda-bindings 12\.8"):
        CopyEngine()

"""Page copiers on a GPU, byte by byte: every variant, both directions, every kind of tier memory, and stream order."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from sglang_xmem.copies import PageCopier, make_copier
from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.triton import TritonPageCopier
from sglang_xmem.copies.tuning import CudaTuning

pytestmark = pytest.mark.gpu

GPU = "cuda:0"
PEER = "cuda:1"
POISON = 0xA5

Planes = list[torch.Tensor]
MakeCopier = Callable[[Planes, Planes, int], PageCopier]


def with_tuning(tuning: CudaTuning) -> MakeCopier:
    return lambda tier, device, page_size: CudaPageCopier(tier, device, page_size, load=tuning, store=tuning)


COPIERS: dict[str, MakeCopier] = {
    "default": lambda tier, device, page_size: make_copier("auto", tier, device, page_size),
    "register8": with_tuning(CudaTuning(unroll=8)),
    "register16": with_tuning(CudaTuning(unroll=16, streaming=True)),
    "register3": with_tuning(CudaTuning(ctas=3, threads=96, unroll=3)),
    "bulk": with_tuning(CudaTuning(variant="bulk")),
    "bulk_rings": with_tuning(
        CudaTuning(variant="bulk", ctas=5, rings=4, stages=3, stage_bytes=4096, pending_stores=1)
    ),
    "bulk_large": with_tuning(CudaTuning(variant="bulk", stages=7, stage_bytes=32768, pending_stores=3)),
    "bulk_waits": with_tuning(CudaTuning(variant="bulk", ctas=2, stages=2, stage_bytes=2048, pending_stores=0)),
    "triton": TritonPageCopier,
    "remote": lambda tier, device, page_size: make_copier("cuda", tier, device, page_size, runs_on=1),
    "shared": lambda tier, device, page_size: make_copier(
        "cuda", tier, device, page_size, tier_locality="host", relays=(1,)
    ),
}
#: Those that another GPU runs, or runs a share of.
REMOTE = [pytest.param(name, marks=pytest.mark.gpus(2)) for name in ("remote", "shared")]
TIERS = ["hbm", "host", pytest.param("peer", marks=pytest.mark.gpus(2))]


@dataclass(frozen=True)
class Case:
    """Sizes of one copy. The first and the last plane are not copied: they are guards."""

    row_bytes: int
    page_size: int
    num_pages: int
    num_planes: int = 4

    @property
    def planes(self) -> range:
        return range(1, self.num_planes - 1)


SMALL = [
    Case(1024, 1, 0),
    Case(1024, 1, 1),
    Case(16, 1, 1, num_planes=98),
    Case(1024, 64, 1),
    Case(1024, 1, 4097),
    Case(16, 1, 3001),
    Case(64, 1, 5003),
    Case(656, 1, 3001),
    Case(1152, 1, 3001),
    Case(7, 3, 101),
    Case(24, 1, 2001),
    Case(72, 4, 501),
    Case(80, 16, 301),
    Case(144, 64, 71),
    Case(512, 16, 1001, num_planes=12),
    Case(656, 64, 53),
    Case(1024, 64, 301),
    Case(1024, 256, 21),
    Case(2048, 128, 9),
    Case(512, 32, 5, num_planes=98),
]
LARGE = [Case(1024, 64, 3125), Case(1024, 1, 200_000), Case(64, 1, 200_000)]


@pytest.fixture(scope="module", autouse=True)
def cache_of_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled here, not found in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_XMEM_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def peer_access() -> None:
    """Let kernels on GPU 0 reach the memory of GPU 1 that torch allocates."""
    from cuda.bindings import driver

    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("the two GPUs cannot reach each other's memory")
    torch.ones(1, device=PEER).to(GPU)  # both contexts exist, and torch has probably enabled access on its own
    with torch.cuda.device(GPU):
        torch.cuda.synchronize()
        status, peer = driver.cuDeviceGet(1)
        assert status.value == 0, status
        status, context = driver.cuDevicePrimaryCtxRetain(peer)
        assert status.value == 0, status
        (status,) = driver.cuCtxEnablePeerAccess(context, 0)
        assert status.name in ("CUDA_SUCCESS", "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"), status


def allocate(tier: str, case: Case, num_pages: int, *, random: bool) -> torch.Tensor:
    """Memory of all planes in one piece, shape (planes, rows, row_bytes), so that a stray write hits a neighbour.

    There is one row behind the last page of each plane, so planes are as badly aligned as rows are.
    """
    shape = (case.num_planes, num_pages * case.page_size + 1, case.row_bytes)
    if tier == "host":
        memory = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        memory.copy_(allocate("hbm", case, num_pages, random=random))
        return memory
    device = PEER if tier == "peer" else GPU
    if random:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return torch.full(shape, POISON, dtype=torch.uint8, device=device)


def page_rows(case: Case, num_pages: int, stride: int) -> torch.Tensor:
    """First rows of different pages in random order on the GPU, a view of the given element stride."""
    rows = torch.randperm(num_pages, device=GPU)[: case.num_pages] * case.page_size
    table = torch.full((max(case.num_pages * stride, 1),), 2**50, dtype=torch.int64, device=GPU)
    view = table[: case.num_pages * stride : stride]
    view.copy_(rows)
    return view


def paged(plane: torch.Tensor, case: Case) -> torch.Tensor:
    """View of a plane, shape (pages, page bytes), less the row behind the last page."""
    pages = plane.shape[0] // case.page_size
    return plane[: pages * case.page_size].view(pages, case.page_size * case.row_bytes)


def sync() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def check(case: Case, tier_kind: str, make: MakeCopier, *, load: bool) -> None:
    """One copy; every byte of the destination must be as the contract says, and the source unchanged.

    Raises:
        AssertionError: a byte differs.
    """
    tier_pages, device_pages = case.num_pages + 2, case.num_pages + 5
    tier = allocate(tier_kind, case, tier_pages, random=load)
    device = allocate("hbm", case, device_pages, random=not load)
    tier_rows = page_rows(case, tier_pages, 1 if case.page_size == 1 else case.page_size)
    device_rows = page_rows(case, device_pages, 3)
    source, destination = (tier, device) if load else (device, tier)
    src_rows, dst_rows = (tier_rows, device_rows) if load else (device_rows, tier_rows)

    # The reference, by torch on GPU 0.
    before = source.to(GPU, copy=True)
    expected = destination.to(GPU, copy=True)
    src_pages, dst_pages = src_rows // case.page_size, dst_rows // case.page_size
    for plane in case.planes:
        paged(expected[plane], case)[dst_pages] = paged(before[plane], case)[src_pages]
    sync()

    copier = make(list(tier.unbind()), list(device.unbind()), case.page_size)
    (copier.load if load else copier.store)(tier_rows, device_rows, case.planes)
    sync()
    what = f"{case} {tier_kind} load={load} by {copier.describe()}"
    assert torch.equal(destination.to(GPU), expected), what
    assert torch.equal(source.to(GPU), before), f"source of {what}"


def prepare_tier(tier: str, request: pytest.FixtureRequest) -> None:
    if tier == "peer":
        request.getfixturevalue("peer_access")


@pytest.mark.parametrize("load", [True, False], ids=["load", "store"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("copier", [*(name for name in COPIERS if name not in ("triton", "remote", "shared")), *REMOTE])
def test_small_copies(copier: str, tier: str, load: bool, request: pytest.FixtureRequest) -> None:
    prepare_tier(tier, request)
    for case in SMALL:
        check(case, tier, COPIERS[copier], load=load)


@pytest.mark.parametrize("load", [True, False], ids=["load", "store"])
@pytest.mark.parametrize("tier", TIERS)
def test_small_copies_by_triton(tier: str, load: bool, request: pytest.FixtureRequest) -> None:
    prepare_tier(tier, request)
    # Triton compiles for every size of page: fewer of them.
    for case in (SMALL[1], SMALL[2], SMALL[4], SMALL[7], SMALL[9], SMALL[10], SMALL[15], SMALL[16]):
        check(case, tier, TritonPageCopier, load=load)


@pytest.mark.parametrize("load", [True, False], ids=["load", "store"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("copier", ["default", "bulk", "triton", *REMOTE])
def test_200k_tokens(copier: str, tier: str, load: bool, request: pytest.FixtureRequest) -> None:
    prepare_tier(tier, request)
    for case in LARGE:
        check(case, tier, COPIERS[copier], load=load)


@pytest.mark.parametrize("swap", ["planes", "rows"])
def test_check_notices_a_broken_copier(swap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tier: Planes, device: Planes, page_size: int) -> PageCopier:
        copier = make_copier("cuda", tier[::-1] if swap == "planes" else tier, device, page_size)
        if swap == "rows":
            copy = copier._copy
            monkeypatch.setattr(
                copier, "_copy", lambda tier, device, planes, *, load: copy(tier.flip(0), device, planes, load=load)
            )
        return copier

    with pytest.raises(AssertionError):
        check(Case(1024, 4, 50), "hbm", broken, load=True)


def test_bulk_gives_way_to_register_for_unaligned_planes() -> None:
    bulk = CudaTuning(variant="bulk")
    memory = torch.randint(0, 256, (8 + 64 * 1024,), dtype=torch.uint8, device=GPU)
    shifted = memory[8:].view(64, 1024)  # every row is a multiple of 16 bytes, but not the address
    target = torch.zeros((64, 1024), dtype=torch.uint8, device=GPU)
    copier = CudaPageCopier([shifted], [target], 1, load=bulk, store=bulk)
    assert copier.load_tuning.variant == "register"
    rows = torch.arange(64, device=GPU)
    copier.load(rows, rows, range(1))
    assert torch.equal(target, shifted)
    aligned = CudaPageCopier([target.clone()], [target], 1, load=bulk, store=bulk)
    bulk_runs = torch.cuda.get_device_capability(GPU) >= (9, 0)
    assert aligned.load_tuning.variant == ("bulk" if bulk_runs else "register")


VARIANTS = ["register8", "bulk", "triton", *REMOTE]
SLEEP_CYCLES = 400_000_000  # about 0.2 s


class Scene:
    """A copier that is already compiled and warm, on one page set, for tests of order."""

    def __init__(self, copier: str) -> None:
        self.case = Case(1024, 64, 64)
        self.tier = allocate("hbm", self.case, self.case.num_pages, random=True)
        self.device = allocate("hbm", self.case, self.case.num_pages, random=False)
        self.copier = COPIERS[copier](list(self.tier.unbind()), list(self.device.unbind()), self.case.page_size)
        self.rows = torch.arange(self.case.num_pages, device=GPU) * self.case.page_size
        self.everything = range(self.case.num_planes)
        self.copier.load(self.rows, self.rows, self.everything)
        self.copier.store(self.rows, self.rows, self.everything)
        self.streams = [torch.cuda.Stream(GPU), torch.cuda.Stream(GPU)]
        torch.cuda._sleep(1000)
        self.tier.fill_(1)
        self.device.fill_(2)
        sync()

    def whole_pages(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[:, : self.case.num_pages * self.case.page_size]


@pytest.mark.parametrize("wait", [True, False], ids=["with_event", "without_event"])
@pytest.mark.parametrize("copier", VARIANTS)
def test_copy_is_ordered_by_its_stream_alone(copier: str, wait: bool) -> None:
    """The source is written late on another stream. Without the event the copy must see the old bytes.

    That is what shows that the case with the event tests something, and that nothing synchronizes on the way.
    """
    scene = Scene(copier)
    writer, reader = scene.streams
    written = torch.cuda.Event()
    with torch.cuda.stream(writer):
        torch.cuda._sleep(SLEEP_CYCLES)
        scene.tier.fill_(3)
        written.record()
    started = time.perf_counter()
    with torch.cuda.stream(reader):
        if wait:
            reader.wait_event(written)
        scene.copier.load(scene.rows, scene.rows, scene.everything)
    launched_in = time.perf_counter() - started
    assert not written.query(), "the writer was done before the copy was even enqueued: nothing was tested"
    assert launched_in < 0.1
    sync()
    assert torch.all(scene.whole_pages(scene.device) == (3 if wait else 1))


@pytest.mark.parametrize("wait", [True, False], ids=["with_event", "without_event"])
@pytest.mark.parametrize("copier", VARIANTS)
def test_reader_behind_the_copy_sees_its_bytes(copier: str, wait: bool) -> None:
    """The copy comes late; a reader on another stream needs the copy's event, as attention does for a layer."""
    scene = Scene(copier)
    copying, reader = scene.streams
    copied = torch.cuda.Event()
    seen = torch.empty_like(scene.device)
    sync()
    with torch.cuda.stream(copying):
        torch.cuda._sleep(SLEEP_CYCLES)
        scene.copier.load(scene.rows, scene.rows, scene.everything)
        copied.record()
    with torch.cuda.stream(reader):
        if wait:
            reader.wait_event(copied)
        seen.copy_(scene.device)
    assert not copied.query(), "the copy was done before the reader was enqueued: nothing was tested"
    sync()
    assert torch.all(scene.whole_pages(seen) == (1 if wait else 2))


@pytest.mark.parametrize("copier", VARIANTS)
def test_loads_and_stores_of_different_pages_overlap(copier: str) -> None:
    case = Case(1024, 16, 512)
    for _ in range(5):
        tier = allocate("hbm", case, case.num_pages, random=True)
        device = allocate("hbm", case, case.num_pages, random=True)
        rows = torch.randperm(case.num_pages, device=GPU) * case.page_size
        ours, theirs = rows[::2], rows[1::2]
        expected_device, expected_tier = device.clone(), tier.clone()
        tokens = torch.arange(case.page_size, device=GPU)
        loaded = (ours[:, None] + tokens).flatten()
        stored = (theirs[:, None] + tokens).flatten()
        expected_device[:, loaded] = tier[:, loaded]
        expected_tier[:, stored] = device[:, stored]
        made = COPIERS[copier](list(tier.unbind()), list(device.unbind()), case.page_size)
        streams = [torch.cuda.Stream(GPU), torch.cuda.Stream(GPU)]
        sync()
        for layer in range(case.num_planes // 2):
            planes = range(2 * layer, 2 * layer + 2)
            with torch.cuda.stream(streams[0]):
                made.load(ours, ours, planes)
            with torch.cuda.stream(streams[1]):
                made.store(theirs, theirs, planes)
        sync()
        assert torch.equal(device, expected_device)
        assert torch.equal(tier, expected_tier)


def load_in_thread(scene: Scene, prepare: Callable[[], None]) -> None:
    """Run prepare() and one load in a new thread; raises what the thread raised."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            prepare()
            scene.copier.load(scene.rows, scene.rows, scene.everything)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    sync()
    assert torch.all(scene.whole_pages(scene.device) == 1)


@pytest.mark.parametrize("copier", VARIANTS)
def test_new_thread_may_launch(copier: str) -> None:
    load_in_thread(Scene(copier), lambda: None)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("copier", VARIANTS)
def test_launch_while_another_gpu_is_current(copier: str) -> None:
    def prepare() -> None:
        torch.cuda.set_device(PEER)
        torch.ones(1, device=PEER)

    load_in_thread(Scene(copier), prepare)


@pytest.mark.parametrize("copier", ["register8", "bulk"])
def test_launch_costs_little(copier: str, record_property: Callable[[str, object], None]) -> None:
    scene = Scene(copier)
    rows = scene.rows[:1]
    best = float("inf")
    for _ in range(20):
        sync()
        started = time.perf_counter()
        for _ in range(100):
            scene.copier.load(rows, rows, range(2))
        best = min(best, (time.perf_counter() - started) / 100)
    record_property("launch_microseconds", best * 1e6)
    print(f"{copier}: {best * 1e6:.1f} us a launch")
    assert best < 25e-6  # a loose bound for slow and busy machines; 10 us is the aim


def test_launcher_error_is_raised_once_and_clear() -> None:
    """A refused launch is a CopyError, not a silent no-op."""
    from sglang_xmem.errors import CopyError

    scene = Scene("register8")
    assert isinstance(scene.copier, CudaPageCopier)
    scene.copier._load._threads = 2048  # more than a block can have
    with pytest.raises(CopyError, match="INVALID_VALUE"):
        scene.copier.load(scene.rows, scene.rows, scene.everything)

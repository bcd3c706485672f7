"""Tier peer without a GPU: which peers a rank gets, and that the driver is left as it was found, whatever fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from cuda.bindings import driver as bindings
from hypothesis import given
from hypothesis import strategies as st

from sglang_xmem import gpus
from sglang_xmem.errors import ConfigError, Unavailable
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers.peer import CONTEXT_BYTES, RESERVE_BYTES, PeerRankPlan, PeerSettings, PeerTier

MIB = 1 << 20
GRANULARITY = 2 * MIB
FIRST_ADDRESS = 1 << 40
SUCCESS = bindings.CUresult.CUDA_SUCCESS
FAILURE = bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY


class Block(NamedTuple):
    gpu: int
    size: int


class FakeDriver:
    """CUDA's virtual memory management with its rules: what the driver would refuse is an AssertionError here.

    Attributes:
        free: bytes that each GPU has left.
        context_bytes: what a context takes of its GPU.
        fail_at: which of the calls that acquire something fails, counted from 0; None for none.
    """

    CUmemAllocationGranularity_flags = bindings.CUmemAllocationGranularity_flags
    CUmemAllocationProp = bindings.CUmemAllocationProp
    CUmemAllocationType = bindings.CUmemAllocationType
    CUmemLocationType = bindings.CUmemLocationType
    CUmemAccessDesc = bindings.CUmemAccessDesc
    CUmemAccess_flags = bindings.CUmemAccess_flags

    def __init__(self, free: dict[int, int]) -> None:
        self.free = free
        self.context_bytes = 0
        self.fail_at: int | None = None
        self.calls: list[str] = []
        self.ranges: dict[int, int] = {}
        self.handles: dict[int, Block] = {}
        self.mapped: dict[int, Block] = {}
        self.readers: dict[int, tuple[int, ...]] = {}
        self.contexts: list[int] = []
        self._acquired = 0
        self._numbers = iter(range(1, 1 << 20))

    def _fails(self, name: str) -> bool:
        self.calls.append(name)
        self._acquired += 1
        return self._acquired - 1 == self.fail_at

    def cuDeviceGet(self, gpu: int) -> tuple[Any, int]:
        return SUCCESS, gpu

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, Any]:
        if self._fails("retain"):
            return FAILURE, None
        if device not in self.contexts:
            self.free[device] -= self.context_bytes
        self.contexts.append(device)
        return SUCCESS, object()

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any]:
        self.calls.append("release context")
        self.contexts.remove(device)
        if device not in self.contexts:
            self.free[device] += self.context_bytes
        assert not any(block.gpu == device for block in self.mapped.values()), "idle clocks with memory in use"
        return (SUCCESS,)

    def cuMemGetAllocationGranularity(self, prop: Any, flags: Any) -> tuple[Any, int]:
        return (FAILURE, 0) if self._fails("granularity") else (SUCCESS, GRANULARITY)

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[Any, Any]:
        assert size > 0
        assert size % GRANULARITY == 0
        if self._fails("reserve"):
            return FAILURE, None
        base = FIRST_ADDRESS * next(self._numbers)
        self.ranges[base] = size
        return SUCCESS, bindings.CUdeviceptr(base)

    def cuMemCreate(self, size: int, prop: Any, flags: int) -> tuple[Any, Any]:
        assert size > 0
        assert size % GRANULARITY == 0
        assert prop.type == bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert prop.location.type == bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        gpu = prop.location.id
        if self._fails("create") or size > self.free[gpu]:
            return FAILURE, None
        self.free[gpu] -= size
        handle = next(self._numbers)
        self.handles[handle] = Block(gpu, size)
        return SUCCESS, handle

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any]:
        assert handle in self.handles, "mapped after its handle was released"
        assert offset == 0
        assert size == self.handles[handle].size
        assert address % GRANULARITY == 0
        assert any(base <= address and address + size <= base + length for base, length in self.ranges.items())
        for other, block in self.mapped.items():
            assert address + size <= other or other + block.size <= address, "mapped over another mapping"
        if self._fails("map"):
            return (FAILURE,)
        self.mapped[address] = self.handles[handle]
        return (SUCCESS,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any]:
        assert count == len(access)
        assert all(a.flags == bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE for a in access)
        inside = [block.size for at, block in self.mapped.items() if address <= at < address + size]
        assert sum(inside) == size, "access to addresses without memory"
        if self._fails("access"):
            return (FAILURE,)
        gpus_with_access = [a.location.id for a in access]
        self.readers[address] = (size, *gpus_with_access)
        return (SUCCESS,)

    def cuMemRelease(self, handle: int) -> tuple[Any]:
        self.calls.append("release")
        block = self.handles.pop(handle)
        if not any(mapped is block for mapped in self.mapped.values()):
            self.free[block.gpu] += block.size
        return (SUCCESS,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any]:
        self.calls.append("unmap")
        block = self.mapped.pop(address)
        assert block.size == size
        self.free[block.gpu] += size
        return (SUCCESS,)

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any]:
        self.calls.append("free")
        assert not any(address <= at < address + size for at in self.mapped), "freed with memory mapped"
        assert self.ranges.pop(address) == size
        self.readers.pop(address, None)
        return (SUCCESS,)


class Machine:
    """GPUs of a machine. `busy`: who uses a GPU; `apart`: pairs without peer access."""

    def __init__(self, free: list[int]) -> None:
        self.start = dict(enumerate(free))
        self.driver = FakeDriver(dict(self.start))
        self.busy: dict[int, str] = {}
        self.apart: set[tuple[int, int]] = set()
        self.asked: list[int] = []

    def foreign_use(self, gpu: int) -> str | None:
        self.asked.append(gpu)
        return self.busy.get(gpu)

    def check_untouched(self) -> None:
        """Nothing is reserved, mapped or held."""
        assert self.driver.ranges == {}
        assert self.driver.mapped == {}
        assert self.driver.handles == {}
        assert self.driver.contexts == []
        assert self.driver.free == self.start


@contextmanager
def machine_with(free: list[int]) -> Iterator[Machine]:
    """A machine with the given bytes free on its GPUs, instead of this one."""
    machine = Machine(free)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "driver", lambda: machine.driver)
        patch.setattr(gpus, "visible_gpus", lambda: range(len(free)))
        patch.setattr(gpus, "foreign_use", machine.foreign_use)
        patch.setattr(gpus, "can_access_peer", lambda gpu, peer: (gpu, peer) not in machine.apart)
        patch.setattr(gpus, "memory_bytes", lambda gpu: (machine.driver.free[gpu], 0))
        # The text of an error comes from libcuda, which is not here.
        patch.setattr(bindings, "cuGetErrorString", lambda status: (SUCCESS, b"out of memory"))
        yield machine


@pytest.fixture
def eight() -> Iterator[Machine]:
    """Eight idle GPUs."""
    with machine_with([RESERVE_BYTES + 1024 * MIB] * 8) as machine:
        yield machine


def dealt_to(ranks: tuple[int | None, ...], settings: PeerSettings | None = None) -> list[tuple[int, ...]]:
    return [plan.gpus for plan in PeerTier.plan_ranks(settings or PeerSettings(), Ranks(gpus=ranks))]


# ---- rank plans ----


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((0,), [(1, 2, 3, 4, 5, 6, 7)]),
        ((3,), [(0, 1, 2, 4, 5, 6, 7)]),
        ((0, 1), [(2, 4, 6), (3, 5, 7)]),
        ((0, 2), [(1, 4, 6), (3, 5, 7)]),
        ((0, 1, 2, 3), [(4,), (5,), (6,), (7,)]),
    ],
)
def test_idle_gpus_are_dealt_to_the_ranks(eight: Machine, ranks: tuple[int, ...], expected: object) -> None:
    assert dealt_to(ranks) == expected
    assert eight.driver.calls == [], "planning asks the driver for nothing"


def test_busy_gpus_are_left_alone(eight: Machine) -> None:
    eight.busy = {2: "GPU 2 is in use by process 7", 5: "GPU 5 is in use by process 8"}
    assert dealt_to((0, 1)) == [(3, 6), (4, 7)]


def test_named_gpus_are_taken_in_their_order_and_may_be_busy(eight: Machine) -> None:
    eight.busy = {5: "GPU 5 is in use by process 7"}
    assert dealt_to((0, 1), PeerSettings(gpus=(7, 5, 3))) == [(7, 3), (5,)]
    assert eight.asked == []
    assert all(plan.named for plan in PeerTier.plan_ranks(PeerSettings(gpus=(5,)), Ranks(gpus=(0,))))


@given(st.data())
def test_rank_plans_are_disjoint_idle_and_never_the_engines_own(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    ranks = tuple(data.draw(st.lists(st.sampled_from(range(count)), min_size=1, unique=True)))
    busy = data.draw(st.sets(st.sampled_from(range(count))))
    usable = set(range(count)) - busy - set(ranks)
    with machine_with([RESERVE_BYTES] * count) as machine:
        machine.busy = {gpu: f"GPU {gpu} is in use by process 7" for gpu in busy}
        if len(usable) < len(ranks):
            with pytest.raises(Unavailable):
                dealt_to(ranks)
            return
        dealt = dealt_to(ranks)
    assert len(dealt) == len(ranks)
    assert all(dealt)
    assert Counter(gpu for peers in dealt for gpu in peers) == Counter(usable)


def test_the_first_peer_gets_access_where_it_reaches_all(eight: Machine) -> None:
    settings = PeerSettings(gpus=(5, 6), stripe_mib=2)
    (plan,) = PeerTier.plan_ranks(settings, Ranks(gpus=(0,)))
    for apart, reaching in (((6, 5), (5,)), ((5, 6), ()), ((5, 0), ())):
        eight.apart = {apart}
        region = PeerTier(settings, plan, 0).allocate(8 * MIB)
        assert region.gpus == (5, 6)
        assert region.reachable_from == reaching
        assert [readers[1:] for readers in eight.driver.readers.values()] == [(0, *reaching)]
        region.release()
        eight.check_untouched()


def test_the_gpu_that_copies_is_idle(eight: Machine) -> None:
    eight.busy = {5: "GPU 5 is in use by process 7"}
    settings = PeerSettings(gpus=(5, 6), copy_on="peer")
    with pytest.raises(Unavailable, match=r"GPU 5 is in use by process 7, but peer.copy_on needs it idle"):
        PeerTier.plan_ranks(settings, Ranks(gpus=(0,)))
    # Only the first peer of a rank runs copies.
    assert dealt_to((0,), PeerSettings(gpus=(6, 5), copy_on="peer")) == [(6, 5)]
    assert dealt_to((0,), PeerSettings(copy_on="peer")) == [(1, 2, 3, 4, 6, 7)]


def test_too_few_peers_is_told_with_the_reasons(eight: Machine) -> None:
    eight.busy = {gpu: f"GPU {gpu} is in use by process {70 + gpu}" for gpu in (4, 5, 6)}
    with pytest.raises(Unavailable) as caught:
        dealt_to((0, 1, 2, 3))
    assert "4 rank(s) need a peer each, but only 1 other GPU(s) are usable" in str(caught.value)
    for gpu in (4, 5, 6):
        assert f"GPU {gpu} is in use by process {70 + gpu}" in str(caught.value)


def test_one_gpu_machine_has_no_peer() -> None:
    with machine_with([RESERVE_BYTES]), pytest.raises(Unavailable, match=r"only 0 other GPU\(s\) are usable"):
        dealt_to((0,))


def test_a_named_peer_without_access_is_told(eight: Machine) -> None:
    eight.apart = {(1, 3)}
    with pytest.raises(Unavailable, match="GPU 1 has no peer access to GPU 3"):
        dealt_to((0, 1), PeerSettings(gpus=(2, 3)))


def test_an_unreachable_peer_is_left_out(eight: Machine) -> None:
    eight.apart = {(1, 3)}
    assert dealt_to((0, 1)) == [(2, 5, 7), (4, 6)]


def test_cpu_engine_has_no_peer(eight: Machine) -> None:
    with pytest.raises(Unavailable, match="the engine runs on the CPU; use --hicache-xmem-tier dram"):
        dealt_to((None, None))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (PeerSettings(gpus=(8,)), ["peer.gpus", "GPU 8", "0 to 7"]),
        (PeerSettings(gpus=(-1,)), ["peer.gpus", "GPU -1"]),
        (PeerSettings(gpus=(0,)), ["peer.gpus", "GPU 0", "another GPU"]),
        (PeerSettings(gpus=()), ["peer.gpus", "at least one"]),
        (PeerSettings(gpus=(2, 2)), ["peer.gpus", "[2, 2]", "twice"]),
        (PeerSettings(stripe_mib=1), ["peer.stripe_mib", "is 1.", "Give 2 to"]),
        (PeerSettings(stripe_mib=-32), ["peer.stripe_mib", "-32"]),
    ],
)
def test_impossible_settings_are_refused(eight: Machine, settings: PeerSettings, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        dealt_to((0,), settings)
    for word in words:
        assert word in str(caught.value)


# ---- capacity ----


def tier(*peers: int, stripe_mib: int = 8, named: bool = False) -> PeerTier:
    return PeerTier(PeerSettings(stripe_mib=stripe_mib), PeerRankPlan(gpus=peers, named=named), 0)


def test_capacity_is_what_all_peers_have_above_the_reserve() -> None:
    with machine_with([0, RESERVE_BYTES + 64 * MIB, RESERVE_BYTES + 64 * MIB, RESERVE_BYTES - 1]):
        assert tier(1).capacity_bytes() == 64 * MIB
        assert tier(1, 2).capacity_bytes() == 128 * MIB
        assert tier(3).capacity_bytes() == 0


@given(
    frees=st.lists(st.integers(0, 200 * MIB), min_size=1, max_size=4),
    stripe_mib=st.sampled_from([2, 3, 8, 32, 64]),
    less=st.integers(0, 64 * MIB),
)
def test_all_the_capacity_can_be_allocated_and_the_reserve_stays(frees: list[int], stripe_mib: int, less: int) -> None:
    peers = range(1, len(frees) + 1)
    with machine_with([0, *(RESERVE_BYTES + free for free in frees)]) as machine:
        where = tier(*peers, stripe_mib=stripe_mib)
        capacity = where.capacity_bytes()
        assert 0 <= capacity <= sum(frees)
        if capacity > less:
            region = where.allocate(capacity - less)
            # Less the rounding of a stripe, and of the whole, to what the driver allocates.
            assert all(machine.driver.free[peer] >= RESERVE_BYTES - 2 * GRANULARITY for peer in peers)
            region.release()
        machine.check_untouched()


def test_peers_taken_since_are_left_alone_unless_they_were_named(eight: Machine) -> None:
    eight.busy = {2: "GPU 2 is in use by process 7"}
    assert tier(1, 2, 3).capacity_bytes() == 2048 * MIB
    assert tier(1, 2, 3, named=True).capacity_bytes() == 3072 * MIB
    region = tier(2, 3).allocate(8 * MIB)
    assert used(eight) == {3: 8}
    region.release()
    eight.busy[1] = "GPU 1 is in use by process 8"
    for call in (tier(1, 2).capacity_bytes, lambda: tier(1, 2).allocate(8 * MIB)):
        with pytest.raises(Unavailable, match=r"^GPU 1 is in use by process 8; GPU 2 is in use by process 7$"):
            call()
    eight.check_untouched()


# ---- memory ----


@contextmanager
def small_peers(count: int, mib: int = 64) -> Iterator[Machine]:
    """GPUs 1 to `count` have `mib` MiB each for a pool."""
    with machine_with([0] + [RESERVE_BYTES + mib * MIB] * count) as machine:
        yield machine


def used(machine: Machine) -> dict[int, int]:
    """MiB allocated on each GPU with allocations."""
    now = machine.driver.free
    return {gpu: (then - now[gpu]) // MIB for gpu, then in machine.start.items() if then != now[gpu]}


def test_one_peer_gives_one_block() -> None:
    with small_peers(1) as machine:
        region = tier(1).allocate(33 * MIB + 1)
        assert region.nbytes == 33 * MIB + 1
        assert machine.driver.mapped == {region.extents[0].address: Block(1, 34 * MIB)}
        assert machine.driver.readers == {region.extents[0].address: (34 * MIB, 0, 1)}, (
            "the rank's GPU and the one that copies"
        )
        assert machine.driver.handles == {}, "the mapping alone keeps the memory"
        assert machine.driver.contexts == [1], "the peer is kept at full clocks"
        assert "GPU 1" in region.summary
        region.release()
        machine.check_untouched()


@pytest.mark.parametrize(
    ("mib", "stripe_mib", "peers", "expected"),
    [
        (100, 8, (1, 2), {1: 52, 2: 48}),
        (128, 8, (2, 1), {1: 64, 2: 64}),
        (66, 8, (1, 2), {1: 34, 2: 32}),
        (100, 3, (2, 1), {2: 52, 1: 48}),  # stripes of 4 MiB
        (192, 32, (1, 2, 3), {1: 64, 2: 64, 3: 64}),
    ],
)
def test_stripes_cover_the_range_in_turn(
    mib: int, stripe_mib: int, peers: tuple[int, ...], expected: dict[int, int]
) -> None:
    with small_peers(3) as machine:
        region = tier(*peers, stripe_mib=stripe_mib).allocate(mib * MIB - 5)
        stripe = -(-stripe_mib // 2) * 2 * MIB
        at = region.extents[0].address
        blocks = sorted(machine.driver.mapped.items())
        for number, (address, block) in enumerate(blocks):
            assert address == at
            assert block.gpu == peers[number % len(peers)]
            assert block.size == stripe or number == len(blocks) - 1
            at += block.size
        assert at == region.extents[0].address + mib * MIB
        assert used(machine) == expected
        assert machine.driver.readers == {region.extents[0].address: (mib * MIB, 0, peers[0])}
        assert sorted(machine.driver.contexts) == sorted(peers)
        region.release()
        machine.check_untouched()


@pytest.mark.parametrize(
    ("mib", "expected"),
    [(2, {3}), (32, {3}), (64, {3}), (66, {3, 1}), (120, {3, 1}), (130, {3, 1, 2}), (190, {3, 1, 2})],
)
def test_no_more_peers_than_needed_in_the_plans_order(mib: int, expected: set[int]) -> None:
    with small_peers(3) as machine:
        region = tier(3, 1, 2, stripe_mib=2).allocate(mib * MIB)
        assert set(used(machine)) == expected
        assert all(f"{gpu}" in region.summary for gpu in expected)
        region.release()
        machine.check_untouched()


def test_all_named_peers_are_used() -> None:
    with small_peers(3) as machine:
        region = tier(3, 1, stripe_mib=2, named=True).allocate(8 * MIB)
        assert used(machine) == {1: 4, 3: 4}
        region.release()
        machine.check_untouched()


def test_release_is_idempotent_and_frees_its_own_alone() -> None:
    with small_peers(2) as machine:
        first, second = tier(1).allocate(8 * MIB), tier(2).allocate(8 * MIB)
        first.release()
        calls = list(machine.driver.calls)
        first.release()
        assert machine.driver.calls == calls
        assert used(machine) == {2: 8}
        assert list(machine.driver.ranges) == [second.extents[0].address]
        second.release()
        machine.check_untouched()


#: Two granularities, two contexts, a reservation, three stripes created and mapped, access.
CALLS = 2 + 2 + 1 + 3 * 2 + 1


@pytest.mark.parametrize("failing", range(CALLS))
def test_a_failure_of_any_call_leaves_nothing_behind(failing: int) -> None:
    with small_peers(2, 80) as machine:
        machine.driver.fail_at = failing
        with pytest.raises(Unavailable, match=r"failed with CUDA error 2: out of memory") as caught:
            tier(1, 2, stripe_mib=40).allocate(100 * MIB)
        assert "\n" not in str(caught.value)
        machine.check_untouched()


def test_all_calls_are_covered_by_the_failures() -> None:
    with small_peers(2, 80) as machine:
        machine.driver.fail_at = CALLS
        region = tier(1, 2, stripe_mib=40).allocate(96 * MIB)
        acquiring = [call for call in machine.driver.calls if call not in ("release", "unmap", "free")]
        assert len(acquiring) == CALLS
        region.release()
        machine.check_untouched()


def test_memory_that_went_since_is_told_with_size_and_gpu() -> None:
    with machine_with([0, RESERVE_BYTES + 8 * MIB]) as machine:
        with pytest.raises(Unavailable, match=r"^2\.00 GB are needed on GPU 1, but 0\.01 GB are free; lower"):
            tier(1).allocate(2_000_000_000)
        assert machine.driver.calls == []


def test_pools_of_a_rank_share_what_they_are_expected_to_need() -> None:
    """A second pool is not refused because the first filled a GPU; and one GPU runs the copies of both."""
    with small_peers(3) as machine:
        where = tier(1, 2, 3, stripe_mib=2)
        where.expect(80 * MIB)
        regions = [where.allocate(60 * MIB), where.allocate(20 * MIB)]
        assert [region.gpus for region in regions] == [(1, 2), (1, 2)]
        for region in regions:
            region.release()
        machine.check_untouched()


def test_a_later_pool_finds_the_gpu_that_has_room() -> None:
    with small_peers(3) as machine:
        machine.driver.context_bytes = CONTEXT_BYTES
        where = tier(1, 2, 3, stripe_mib=2)
        regions = [where.allocate(60 * MIB)]
        assert where.capacity_bytes() == 128 * MIB
        regions += [where.allocate(64 * MIB), where.allocate(64 * MIB)]
        assert [region.gpus for region in regions] == [(1,), (2,), (3,)]
        for region in regions:
            region.release()
        machine.check_untouched()


def test_a_context_is_reserved_once() -> None:
    with machine_with([0, RESERVE_BYTES + 64 * MIB]) as machine:
        machine.driver.context_bytes = CONTEXT_BYTES
        where = tier(1)
        first = where.allocate(32 * MIB)
        assert where.capacity_bytes() == 32 * MIB
        where.allocate(32 * MIB).release()
        first.release()
        assert where.capacity_bytes() == 64 * MIB
        machine.check_untouched()


@given(
    frees=st.lists(st.integers(16 * MIB, 200 * MIB), min_size=1, max_size=3),
    stripe_mib=st.sampled_from([2, 8]),
    share=st.floats(0.01, 0.99),
    named=st.booleans(),
)
def test_an_automatic_size_fits_in_two_pools(frees: list[int], stripe_mib: int, share: float, named: bool) -> None:
    peers = range(1, len(frees) + 1)
    with machine_with([0, *(RESERVE_BYTES + free for free in frees)]) as machine:
        machine.driver.context_bytes = CONTEXT_BYTES
        where = tier(*peers, stripe_mib=stripe_mib, named=named)
        size = where.capacity_bytes() - 2 * where.waste_bytes(1)
        if size < 2:
            return
        where.expect(size)
        first = max(1, int(size * share))
        for region in [where.allocate(nbytes) for nbytes in (first, size - first) if nbytes]:
            region.release()
        machine.check_untouched()


def test_ranks_without_a_gpu_among_others_have_no_peer(eight: Machine) -> None:
    with pytest.raises(Unavailable, match="the engine runs on the CPU"):
        dealt_to((0, None))


def test_replicas_on_one_gpu_have_peers_of_their_own(eight: Machine) -> None:
    assert dealt_to((0, 0, 1)) == [(2, 5), (3, 6), (4, 7)]

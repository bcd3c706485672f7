"""Tier dram: seats, placement by threads, pinning and its undoing; libnuma and the driver are stand-ins."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as bindings

from sglang_xmem import gpus
from sglang_xmem.errors import ConfigError, TierUnavailable
from sglang_xmem.pool import region_bytes
from sglang_xmem.tiers import Ranks, dram
from sglang_xmem.tiers.dram import DramSeat, DramSettings, DramTier

MIB = 1 << 20
SUCCESS = bindings.CUresult.CUDA_SUCCESS
FAILURE = bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY


class FakeNuma:
    """py-libnuma: which thread was bound to what."""

    def __init__(self) -> None:
        self.bound: list[tuple[int, int]] = []
        self.refuses = False
        self.memory = SimpleNamespace(set_membind_nodes=self._bind, get_membind_nodes=self._nodes)

    def _bind(self, node: int) -> None:
        self.bound.append((threading.get_ident(), node))

    def _nodes(self) -> list[int]:
        return [0, 1] if self.refuses else [node for thread, node in self.bound if thread == threading.get_ident()]


class FakeDriver:
    """Pinning: what is registered, and a call that fails. `seen_at` shifts the address that the GPU sees."""

    CU_MEMHOSTREGISTER_PORTABLE = 1
    CU_MEMHOSTREGISTER_DEVICEMAP = 2

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.sizes: list[int] = []
        self.fail_at: int | None = None
        self.seen_at = 0

    def cuMemHostRegister(self, address: int, size: int, flags: int) -> tuple[Any]:
        assert flags == 3
        for at, length in self.registered.items():
            assert address + size <= at or at + length <= address, "registered twice"
        if len(self.sizes) == self.fail_at:
            return (FAILURE,)
        self.sizes.append(size)
        self.registered[address] = size
        return (SUCCESS,)

    def cuMemHostUnregister(self, address: int) -> tuple[Any]:
        del self.registered[address]
        return (SUCCESS,)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple[Any, Any]:
        return SUCCESS, bindings.CUdeviceptr(address + self.seen_at)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> FakeNuma:
    """A machine of two NUMA nodes with GPUs 0 and 1 on node 0 and 1, and GPU 2 on one that it does not tell."""
    numa = FakeNuma()
    fields = {"MemTotal": 100, "MemFree": 10, "Inactive(file)": 5, "SReclaimable": 2}
    monkeypatch.setattr(dram, "_nodes", lambda: [0, 1])
    monkeypatch.setattr(dram, "_node_field", lambda node, field: fields[field] * (node + 1) * MIB)
    monkeypatch.setattr(dram, "_libnuma", lambda: numa)
    monkeypatch.setattr(gpus, "numa_node", {0: 0, 1: 1, 2: None}.get)
    return numa


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A driver that pins."""
    driver = FakeDriver()
    monkeypatch.setattr(gpus, "driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(bindings, "cuGetErrorString", lambda status: (SUCCESS, b"out of memory"))
    monkeypatch.setattr(dram, "REGISTER_BYTES", 2 * MIB)
    return driver


@pytest.fixture
def mappings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[mmap.mmap]]:
    """All mappings made from now on; none may be left open."""
    made: list[mmap.mmap] = []

    class Recorded(mmap.mmap):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)

    monkeypatch.setattr(mmap, "mmap", Recorded)
    yield made
    assert made
    assert all(mapping.closed for mapping in made)


def nodes_of(ranks: tuple[int | None, ...], **settings: Any) -> list[int | None]:
    return [seat.numa_node for seat in DramTier.seats(DramSettings(**settings), Ranks(gpus=ranks))]


def tier(numa_node: int | None = None, gpu: int | None = None, threads: int = 0) -> DramTier:
    return DramTier(DramSettings(threads=threads), DramSeat(numa_node), gpu)


# ---- seats ----


def test_each_rank_gets_the_node_of_its_gpu(two_nodes: FakeNuma) -> None:
    assert nodes_of((0, 1, 2, None)) == [0, 1, None, None]


def test_a_named_node_is_for_all_ranks(two_nodes: FakeNuma) -> None:
    assert nodes_of((0, 1, None), numa_node=1) == [1, 1, 1]


@pytest.mark.parametrize("nodes", [[0], []])
def test_one_node_leaves_placement_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch, two_nodes: FakeNuma, nodes: list[int]
) -> None:
    monkeypatch.setattr(dram, "_nodes", lambda: nodes)
    monkeypatch.setattr(dram, "_libnuma", lambda: pytest.fail("libnuma is not needed"))
    assert nodes_of((0, None)) == [None, None]
    if nodes:
        assert nodes_of((0, None), numa_node=0) == [None, None]


def test_an_unknown_node_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch, two_nodes: FakeNuma) -> None:
    with pytest.raises(ConfigError, match=r"'dram.numa_node' is 7; this machine has node 0, 1\."):
        nodes_of((None,), numa_node=7)
    monkeypatch.setattr(dram, "_nodes", list)
    with pytest.raises(ConfigError, match=r"'dram.numa_node' is 0; this machine has node information for none\."):
        nodes_of((None,), numa_node=0)


@pytest.mark.parametrize("threads", [-1, 1025])
def test_threads_out_of_range_are_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match=rf"'dram.threads' is {threads}; give 1 to 1024, or 0"):
        nodes_of((None,), threads=threads)


class FakePeers:
    """GPUs 0 to 3, of which 3 reaches no other; and the contexts that are held."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def can_access_peer(self, gpu: int, peer: int) -> bool:
        return gpu != 3

    def hold_context(self, gpu: int, undo: Any) -> None:
        self.held.append(gpu)
        undo.callback(self.held.remove, gpu)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch, two_nodes: FakeNuma) -> FakePeers:
    peers = FakePeers()
    monkeypatch.setattr(dram, "_nodes", lambda: [0])
    monkeypatch.setattr(gpus, "visible_gpus", lambda: range(4))
    for name in ("can_access_peer", "hold_context"):
        monkeypatch.setattr(gpus, name, getattr(peers, name))
    return peers


def test_relays_are_dealt_to_the_ranks(four_gpus: FakePeers) -> None:
    def relays(ranks: tuple[int, ...], *named: int) -> list[tuple[int, ...]]:
        return [seat.relays for seat in DramTier.seats(DramSettings(relays=named), Ranks(gpus=ranks))]

    assert relays((0,)) == [()]
    assert relays((0,), 2, 1) == [(2, 1)]
    assert relays((0, 3), 1, 2) == [(1,), (2,)]
    assert relays((0, 1), 2) == [(2,), ()]


@pytest.mark.parametrize(
    ("ranks", "relays", "sentence"),
    [
        ((0,), (1, 1), "'dram.relays' is [1, 1]; name no GPU twice."),
        ((0,), (4,), "'dram.relays' names GPU 4, but this process sees GPUs 0 to 3."),
        ((0, 1), (1,), "'dram.relays' names GPU 1, which this engine computes on; name another GPU."),
        ((None,), (1,), "'dram.relays' is [1], and SGLang runs on the CPU; leave it out."),
        ((0,), (3,), "GPU 3, which dram.relays names, has no peer access to GPU 0; name another GPU"),
    ],
)
def test_impossible_relays_are_refused(
    four_gpus: FakePeers, ranks: tuple[int | None, ...], relays: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises((ConfigError, TierUnavailable), match=re.escape(sentence) + "$"):
        DramTier.seats(DramSettings(relays=relays), Ranks(gpus=ranks))


def test_relays_have_a_context_when_memory_is_pinned(
    four_gpus: FakePeers, pinning: FakeDriver, mappings: list[mmap.mmap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered as portable it is pinned for the contexts that there are."""
    seen: list[list[int]] = []
    plain = pinning.cuMemHostRegister

    def register(address: int, size: int, flags: int) -> tuple[Any]:
        seen.append(list(four_gpus.held))
        return plain(address, size, flags)

    monkeypatch.setattr(pinning, "cuMemHostRegister", register)
    region = DramTier(DramSettings(), DramSeat(None, relays=(2, 1)), 0).allocate(3 * MIB)
    assert region.relays == (2, 1)
    assert region.summary == "pinned host memory, relayed by GPU 2, 1"
    assert seen == [[2, 1]] * 2
    region.release()
    assert four_gpus.held == []

    pinning.fail_at = len(pinning.sizes)
    with pytest.raises(TierUnavailable, match="pinning"):
        DramTier(DramSettings(), DramSeat(None, relays=(1,)), 0).allocate(MIB)
    assert four_gpus.held == []


def install_numa(monkeypatch: pytest.MonkeyPatch, *, available: bool) -> SimpleNamespace:
    """Put a py-libnuma in place whose library is there or not."""
    info, memory = SimpleNamespace(numa_available=lambda: available), SimpleNamespace()
    numa = SimpleNamespace(info=info, memory=memory)
    for name, module in (("numa", numa), ("numa.info", info), ("numa.memory", memory)):
        monkeypatch.setitem(sys.modules, name, module)
    return numa


@pytest.mark.parametrize("lacking", ["bindings", "library"])
def test_missing_libnuma_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.setattr(dram, "_nodes", lambda: [0, 1])
    monkeypatch.setattr(gpus, "numa_node", lambda gpu: 1)
    if lacking == "bindings":
        monkeypatch.setitem(sys.modules, "numa", None)
    else:
        install_numa(monkeypatch, available=False)
    for ranks, node in (((0,), None), ((None,), 1)):
        with pytest.raises(TierUnavailable, match=r"apt-get install libnuma1 and pip install py-libnuma"):
            nodes_of(ranks, numa_node=node)
    assert nodes_of((None,)) == [None], "nothing to place, so nothing is missing"


def test_libnuma_is_found_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    numa = install_numa(monkeypatch, available=True)
    assert dram._libnuma() is numa


def test_nodes_are_those_with_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dram, "_NODES", str(tmp_path))
    monkeypatch.setattr(dram, "_allowed_nodes", lambda: None)
    for node, total in ((0, 1000), (2, 0), (10, 3000)):
        (tmp_path / f"node{node}").mkdir()
        lines = [f"Node {node} MemTotal:  {total} kB", f"Node {node} MemFree: 7 kB", f"Node {node} SReclaimable: 2 kB"]
        (tmp_path / f"node{node}" / "meminfo").write_text("\n".join(lines) + "\n")
    for other in ("has_cpu", "nodes", "node_x"):
        (tmp_path / other).touch()
    assert dram._nodes() == [0, 10]
    monkeypatch.setattr(dram, "_allowed_nodes", lambda: {0, 5})
    assert dram._nodes() == [0], "a node that the cpuset forbids would crash the bindings"
    assert tier(numa_node=10).capacity_bytes() == 9 * 1024
    assert tier(numa_node=3).capacity_bytes() == 0
    monkeypatch.setattr(dram, "_NODES", str(tmp_path / "none such"))
    assert dram._nodes() == []


def test_ranks_of_a_node_share_its_room(two_nodes: FakeNuma) -> None:
    """All ask before any of them has touched its memory."""
    node = [10 + 5 + 2, 2 * (10 + 5 + 2)]

    def rooms(ranks: tuple[int | None, ...], **settings: Any) -> list[float]:
        given = DramSettings(**settings)
        seats = DramTier.seats(given, Ranks(gpus=ranks))
        return [DramTier(given, seat, gpu).capacity_bytes() / MIB for seat, gpu in zip(seats, ranks, strict=True)]

    assert rooms((0, 1)) == node
    assert rooms((0, 0, 1)) == [node[0] / 2, node[0] / 2, node[1]]
    assert rooms((0, 1, None), numa_node=1) == pytest.approx([node[1] / 3] * 3, abs=1e-6)
    # What others have taken of the node since is gone too.
    assert DramTier(DramSettings(), DramSeat(0, share_bytes=1 << 40), 0).capacity_bytes() == node[0] * MIB


def test_room_is_the_nodes_or_the_machines(two_nodes: FakeNuma) -> None:
    assert tier(numa_node=1).capacity_bytes() == 2 * (10 + 5 + 2) * MIB
    assert tier().capacity_bytes() > MIB


# ---- plain memory ----


@pytest.mark.parametrize("nbytes", [1, 4096, 3 * MIB + 17])
def test_memory_reads_and_writes_over_its_whole_length(mappings: list[mmap.mmap], nbytes: int) -> None:
    region = tier().allocate(nbytes)
    assert region.nbytes == nbytes
    assert region.summary == "host memory"
    view = region_bytes(region, torch.device("cpu"))
    pattern = torch.arange(nbytes, dtype=torch.int64).remainder(251).to(torch.uint8)
    view.copy_(pattern)
    assert ctypes.string_at(region.address, nbytes) == pattern.numpy().tobytes()
    assert torch.equal(view, pattern)
    del view
    region.release()
    region.release()


def test_regions_are_apart(mappings: list[mmap.mmap]) -> None:
    regions = [tier().allocate(MIB) for _ in range(4)]
    spans = sorted((region.address, region.address + region.nbytes) for region in regions)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for region in regions:
        ctypes.memset(region.address, 1, MIB)
        region.release()


READ_AFTER_RELEASE = """
import torch
from sglang_xmem.pool import region_bytes
from sglang_xmem.tiers.dram import DramSeat, DramSettings, DramTier

region = DramTier(DramSettings(), DramSeat(None), None).allocate(64 << 20)
view = region_bytes(region, torch.device("cpu"))
view.fill_(3)
region.release()
print(int(view.sum()))
"""


def test_a_tensor_outlives_the_release() -> None:
    done = subprocess.run([sys.executable, "-c", READ_AFTER_RELEASE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{3 * (64 << 20)}\n")


def test_more_than_the_address_space_is_told() -> None:
    with pytest.raises(TierUnavailable):
        tier().allocate(1 << 60)


# ---- placement ----


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(thread, address, bytes) of what is touched, a MiB at a time."""
    calls: list[tuple[int, int, int]] = []
    plain = ctypes.memset
    together = threading.Barrier(4)

    def memset(address: int, value: int, count: int) -> int:
        if len(calls) < 4:  # else one thread could do it all before the others start
            calls.append((threading.get_ident(), address, count))
            together.wait(10)
        else:
            calls.append((threading.get_ident(), address, count))
        return plain(address, value, count)

    monkeypatch.setattr(ctypes, "memset", memset)
    monkeypatch.setattr(dram, "TOUCH_BYTES", MIB)
    return calls


def check_touched_once(touched: list[tuple[int, int, int]], address: int, nbytes: int) -> None:
    at = address
    for start, count in sorted((start, count) for _, start, count in touched):
        assert start == at
        at += count
    assert at == address + nbytes


def test_every_byte_is_touched_by_a_thread_bound_once(
    two_nodes: FakeNuma, touched: list[tuple[int, int, int]], mappings: list[mmap.mmap]
) -> None:
    nbytes = 9 * MIB + 123
    region = tier(numa_node=1, threads=4).allocate(nbytes)
    assert region.summary == "host memory of NUMA node 1"
    check_touched_once(touched, region.address, nbytes)
    binds = Counter(two_nodes.bound)
    assert set(binds.values()) == {1}
    assert len(binds) == 4
    assert {node for _, node in binds} == {1}
    assert {thread for thread, _, _ in touched} == {thread for thread, _ in binds}
    assert threading.get_ident() not in {thread for thread, _ in binds}, "the caller keeps its own policy"
    region.release()


def test_a_kernel_that_refuses_the_node_is_told(two_nodes: FakeNuma, mappings: list[mmap.mmap]) -> None:
    two_nodes.refuses = True
    with pytest.raises(TierUnavailable, match="does not let this process bind memory to NUMA node 1"):
        tier(numa_node=1, threads=2).allocate(8 * MIB)


def test_memory_without_node_and_gpu_is_not_touched(touched: list[tuple[int, int, int]]) -> None:
    tier(threads=4).allocate(8 * MIB).release()
    assert touched == []


def test_pinned_memory_is_touched_first_also_without_a_node(
    pinning: FakeDriver, touched: list[tuple[int, int, int]], mappings: list[mmap.mmap]
) -> None:
    region = tier(gpu=0, threads=4).allocate(8 * MIB)
    check_touched_once(touched, region.address, 8 * MIB)
    region.release()


# ---- pinning ----


def test_pinned_memory_is_registered_whole_and_given_back(
    pinning: FakeDriver, two_nodes: FakeNuma, mappings: list[mmap.mmap]
) -> None:
    region = tier(numa_node=1, gpu=0).allocate(5 * MIB)
    assert region.summary == "pinned host memory of NUMA node 1"
    assert pinning.registered == {region.address + at * MIB: min(2, 5 - at) * MIB for at in (0, 2, 4)}
    assert region.pinned == tuple(pinning.registered)
    region.release()
    assert pinning.registered == {}
    region.release()


@pytest.mark.parametrize("failing", range(3))
def test_a_failing_registration_is_told_and_undone(
    pinning: FakeDriver, mappings: list[mmap.mmap], failing: int
) -> None:
    pinning.fail_at = failing
    with pytest.raises(TierUnavailable) as caught:
        tier(gpu=0).allocate(5 * MIB)
    message = str(caught.value)
    assert re.search(r"pinning 0\.00 GB of host memory failed with CUDA error 2: out of memory", message)
    assert "ulimit -l" in message
    assert "--hicache-size" in message
    assert "\n" not in message
    assert pinning.registered == {}


def flags_of_mapping(address: int) -> set[str]:
    """VmFlags of the mapping at an address: proc(5), smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    pytest.skip("this kernel does not tell a mapping's flags")


def test_a_forked_child_does_not_get_pinned_memory(pinning: FakeDriver, mappings: list[mmap.mmap]) -> None:
    """Else the child keeps the pages that the GPU writes to, and this process gets others when it writes."""
    for gpu in (0, None):
        region = tier(gpu=gpu).allocate(MIB)
        assert ("dc" in flags_of_mapping(region.address)) is (gpu is not None)
        region.release()


def test_another_address_on_the_gpu_is_refused_and_undone(pinning: FakeDriver, mappings: list[mmap.mmap]) -> None:
    pinning.seen_at = 4096
    with pytest.raises(TierUnavailable, match="another address"):
        tier(gpu=0).allocate(5 * MIB)
    assert pinning.registered == {}

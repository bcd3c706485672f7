"""Tier dram: rank plans, placement and pinning, and what is a warning and what a refusal; the driver is a stand-in."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import gpus, machine
from sglang_xmem.errors import ConfigError, Remedy, SettingError, Unavailable
from sglang_xmem.tiers import Ranks, dram, hostmem
from sglang_xmem.tiers.dram import DramRankPlan, DramSettings, DramTier
from tests.unit.test_machine import SECCOMP, run
from tests.unit.tiers.fake_pinning import PinDriver, pinning

MIB = 1 << 20
GIB = 1 << 30
EPERM = "Operation not permitted"


class Nodes:
    """A machine with NUMA nodes, instead of this one.

    Attributes:
        cpus: of each node.
        free: bytes of each node, after its reserve.
        refusal: what the kernel says to binding.
        bound: ranges that were bound.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.cpus: dict[int, set[int]] = {0: {0}, 1: {1}}
        self.free = {0: 10 * GIB, 1: 20 * GIB}
        self.host = 100 * GIB
        self.hugepages: dict[tuple[int, ...], int] = {}
        self.refusal: str | None = None
        self.bound: list[tuple[int, int, tuple[int, ...]]] = []
        self.near: dict[int, int | None] = {0: 0, 1: 1, 2: None}
        patch.setattr(machine, "memory_nodes", lambda: tuple(self.cpus))
        patch.setattr(machine, "cxl_nodes", lambda: tuple(node for node, cpus in self.cpus.items() if not cpus))
        patch.setattr(machine, "node_cpus", lambda node: self.cpus[node])
        patch.setattr(machine, "node_available_bytes", lambda node: self.free[node] + GIB)
        patch.setattr(machine, "node_reserve_bytes", lambda node: GIB)
        patch.setattr(machine, "host_available_bytes", lambda: self.host)
        patch.setattr(machine, "bind_refusal", lambda nodes: self.refusal)
        patch.setattr(machine, "bind", self._bind)
        patch.setattr(machine, "free_hugepage_bytes", lambda size, nodes=(): self.hugepages.get(tuple(nodes), 0))
        patch.setattr(gpus, "numa_node", self.near.get)

    def _bind(self, address: int, nbytes: int, nodes: Sequence[int]) -> str | None:
        self.bound.append((address, nbytes, tuple(nodes)))
        return self.refusal


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (hostmem.HUGEPAGE_VARIABLE, hostmem.REGISTER_VARIABLE, hostmem.THREADS_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Two NUMA nodes with GPUs 0 and 1 on node 0 and 1, and GPU 2 on an unknown one."""
    return Nodes(monkeypatch)


@pytest.fixture
def pins() -> Iterator[PinDriver]:
    with pinning() as driver:
        yield driver
        driver.check_untouched()


def plans(ranks: tuple[int | None, ...], **settings: Any) -> tuple[DramRankPlan, ...]:
    return DramTier.plan_ranks(DramSettings(**settings), Ranks(gpus=ranks))


def nodes_of(ranks: tuple[int | None, ...], **settings: Any) -> list[tuple[int, ...]]:
    return [plan.nodes for plan in plans(ranks, **settings)]


def capacities(ranks: tuple[int | None, ...], **settings: Any) -> list[float]:
    """GiB of each rank."""
    given = DramSettings(**settings)
    planned = DramTier.plan_ranks(given, Ranks(gpus=ranks))
    return [DramTier(given, plan, gpu).capacity_bytes() / GIB for plan, gpu in zip(planned, ranks, strict=True)]


def tier(gpu: int | None = None, threads: int = 0, **plan: Any) -> DramTier:
    return DramTier(DramSettings(threads=threads), DramRankPlan(**plan), gpu)


# ---- rank plans ----


def test_each_rank_gets_the_node_of_its_gpu(two_nodes: Nodes) -> None:
    assert nodes_of((0, 1, 2, None)) == [(0,), (1,), (), ()]


def test_a_named_node_is_for_all_ranks(two_nodes: Nodes) -> None:
    assert nodes_of((0, 1, None), numa_node=1) == [(1,)] * 3


@pytest.mark.parametrize("nodes", [[0], []])
def test_one_node_leaves_placement_to_the_kernel(two_nodes: Nodes, nodes: list[int]) -> None:
    two_nodes.cpus = {node: {0} for node in nodes}
    two_nodes.refusal = EPERM
    assert nodes_of((0, None)) == [(), ()]
    if nodes:
        assert nodes_of((0, None), numa_node=0, numa_required=True) == [(), ()]


def test_memory_without_cpus_is_used_where_it_is_named(two_nodes: Nodes) -> None:
    """CXL in system-ram mode."""
    two_nodes.cpus[2] = set()
    two_nodes.free[2] = 500 * GIB
    two_nodes.near[3] = 2
    # Without that information, all nodes but that one.
    assert nodes_of((0, 1, 2, 3, None)) == [(0,), (1,), (0, 1), (0, 1), (0, 1)]
    assert nodes_of((0, None), numa_node=2) == [(2,), (2,)]
    two_nodes.host = 600 * GIB
    assert capacities((None,)) == [30]
    assert capacities((None,), numa_node=2) == [500]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"numa_node": 7},
            "'dram.numa_node' is 7, but this machine has memory on node 0, 1. Give 0 or 1, or leave it ",
        ),
        (
            {"numa_required": True},
            "'dram.numa_required' is true, but 'dram.numa_node' is not set. Set 'dram.numa_node', or leave this out.",
        ),
        ({"threads": -1}, "'dram.threads' is -1. Give 1 to 1024, or 0 for auto."),
        ({"threads": 1025}, "'dram.threads' is 1025. Give 1 to 1024, or 0 for auto."),
    ],
)
def test_impossible_settings_are_refused(two_nodes: Nodes, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError) as caught:
        plans((None,), **settings)
    assert str(caught.value).startswith(f"--hicache-xmem-config {sentence}")


def test_a_node_on_a_machine_that_does_not_tell_is_refused(two_nodes: Nodes) -> None:
    two_nodes.cpus = {}
    with pytest.raises(SettingError, match=r"is 0, but this machine reports no NUMA nodes\. Leave it out\."):
        plans((None,), numa_node=0)


# ---- where the kernel does not bind ----


@pytest.mark.parametrize("refusal", [EPERM, "Function not implemented"])
def test_a_refused_binding_is_a_warning_and_first_touch(
    two_nodes: Nodes, caplog: pytest.LogCaptureFixture, refusal: str
) -> None:
    """As in Docker without CAP_SYS_NICE on a machine of two sockets; and in sandboxes without the call."""
    two_nodes.refusal = refusal
    with caplog.at_level(logging.WARNING):
        planned = plans((0, 0, 1))
    assert [(plan.nodes, plan.bound, plan.share_bytes) for plan in planned] == [
        ((0,), False, None),
        ((0,), False, None),
        ((1,), False, None),
    ]
    assert len(caplog.messages) == 2, "once a node"
    assert f"bind memory to NUMA node 0 ({refusal})" in caplog.messages[0]
    # Pages beyond the node's memory come from another node: no process is killed, and the machine's memory is the
    #     limit.
    assert capacities((0, 1)) == [100, 100]


def test_unbound_memory_is_touched_by_the_nodes_cpus(
    two_nodes: Nodes, monkeypatch: pytest.MonkeyPatch, pins: PinDriver
) -> None:
    where: list[set[int]] = []
    cpu = min(os.sched_getaffinity(0))
    two_nodes.cpus[1] = {cpu}
    monkeypatch.setattr(ctypes, "memset", lambda *_: where.append(os.sched_getaffinity(0)))
    region = tier(gpu=0, nodes=(1,), bound=False).allocate(MIB)
    assert region.summary == "pinned host memory of NUMA node 1 (by first touch)"
    assert where == [{cpu}]
    assert two_nodes.bound == []
    region.release()


def test_a_binding_that_is_refused_later_is_no_failure(
    two_nodes: Nodes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cpusets change while an engine loads its weights."""
    where: list[set[int]] = []
    two_nodes.cpus[1] = {min(os.sched_getaffinity(0))}
    monkeypatch.setattr(ctypes, "memset", lambda *_: where.append(os.sched_getaffinity(0)))
    two_nodes.refusal = "Invalid argument"
    region = tier(nodes=(1,)).allocate(MIB)
    assert len(two_nodes.bound) == 1
    assert where == [two_nodes.cpus[1]]
    assert "Invalid argument" in caplog.text
    region.release()


def test_a_refused_binding_is_a_refusal_where_the_user_says_so(two_nodes: Nodes) -> None:
    two_nodes.refusal = EPERM
    with pytest.raises(Unavailable, match=rf"NUMA node 1 \({EPERM}\), but dram\.numa_required is true") as caught:
        plans((0,), numa_node=1, numa_required=True)
    assert Remedy("leave_out", "dram.numa_required") in caught.value.remedies
    two_nodes.refusal = None
    assert nodes_of((0,), numa_node=1, numa_required=True) == [(1,)]


def test_a_node_without_cpus_is_reached_by_binding_alone(two_nodes: Nodes) -> None:
    """First touch would put all of it elsewhere."""
    two_nodes.cpus[2] = set()
    two_nodes.refusal = EPERM
    with pytest.raises(Unavailable, match="the node has no CPU to place it by first touch"):
        plans((0,), numa_node=2)


def test_a_container_without_cap_sys_nice_starts() -> None:
    """With the system call refused in earnest; the second node alone is a stand-in."""
    script = (
        SECCOMP
        + """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from sglang_xmem import gpus, machine
machine.memory_nodes = lambda: (0, 1)
machine.cxl_nodes = lambda: ()
gpus.numa_node = lambda gpu: 0
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers.dram import DramSettings, DramTier
(plan,) = DramTier.plan_ranks(DramSettings(), Ranks(gpus=(0,)))
region = DramTier(DramSettings(), plan, None).allocate(8 << 20)
print(region.summary)
"""
    )
    *warned, summary = run(script).splitlines()
    assert len(warned) == 1
    assert EPERM in warned[0]
    assert summary == "host memory of NUMA node 0 (by first touch)"


# ---- relays ----


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch, two_nodes: Nodes) -> None:
    """GPUs 0 to 3, of which 3 reaches no other."""
    two_nodes.cpus = {0: {0}}
    monkeypatch.setattr(gpus, "visible_gpus", lambda: range(4))
    monkeypatch.setattr(gpus, "can_access_peer", lambda gpu, peer: gpu != 3)


def test_relays_are_dealt_to_the_ranks(four_gpus: None) -> None:
    def relays(ranks: tuple[int, ...], *named: int) -> list[tuple[int, ...]]:
        return [plan.relays for plan in plans(ranks, relays=named)]

    assert relays((0,)) == [()]
    assert relays((0,), 2, 1) == [(2, 1)]
    assert relays((0, 3), 1, 2) == [(1,), (2,)]
    assert relays((0, 1), 2) == [(2,), ()]


@pytest.mark.parametrize(
    ("ranks", "relays", "sentence"),
    [
        ((0,), (1, 1), "'dram.relays' is [1, 1]. Name no GPU twice."),
        ((0,), (4,), "'dram.relays' names GPU 4, but this process sees GPUs 0 to 3. Name one of these."),
        ((0, 1), (1,), "'dram.relays' names GPU 1, which this engine computes on. Name another GPU."),
        ((None,), (1,), "'dram.relays' is [1], but the engine runs on the CPU. Leave it out."),
        ((0,), (3,), "GPU 3 of dram.relays has no peer access to GPU 0; set "),
    ],
)
def test_impossible_relays_are_refused(
    four_gpus: None, ranks: tuple[int | None, ...], relays: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises((ConfigError, Unavailable), match=re.escape(sentence)):
        plans(ranks, relays=relays)


def test_relays_reach_the_memory(four_gpus: None, pins: PinDriver) -> None:
    region = tier(gpu=0, relays=(2, 1)).allocate(3 * MIB)
    assert region.reachable_from == (2, 1)
    assert region.gpus == ()
    assert region.summary == "pinned host memory, relayed by GPU 2, 1"
    assert pins.held_when_pinned == [[2, 1, 0]] * 2
    region.release()


# ---- capacity ----


def test_ranks_of_a_node_share_its_capacity(two_nodes: Nodes) -> None:
    """All ask before any of them has touched its memory; also replicas and stages that share a GPU."""
    assert capacities((0, 1)) == [10, 20]
    assert capacities((0, 0, 1)) == [5, 5, 20]
    assert capacities((0, 1, None), numa_node=1) == pytest.approx([20 / 3] * 3)
    # Memory that others have used since counts too, and so does a container's limit.
    assert tier(nodes=(0,), share_bytes=1 << 40).capacity_bytes() == 10 * GIB
    two_nodes.host = 3 * GIB
    assert capacities((0, 0)) == [1.5, 1.5]


def test_capacity_is_the_nodes_or_the_machines(two_nodes: Nodes) -> None:
    assert tier(nodes=(1,)).capacity_bytes() == 20 * GIB
    assert tier(nodes=(0, 1)).capacity_bytes() == 30 * GIB
    assert tier().capacity_bytes() == 100 * GIB
    two_nodes.free[0] = -2 * GIB
    assert tier(nodes=(0,)).capacity_bytes() == 0


# ---- hugepages ----


def test_reserved_hugepages_are_the_capacity(two_nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with reserved memory, which MemAvailable does not include."""
    monkeypatch.setenv("SGLANG_HUGEPAGE_SIZE", "2MB")
    two_nodes.host = 0
    two_nodes.hugepages = {(0,): 8 * GIB, (1,): 6 * GIB, (): 14 * GIB}
    assert capacities((0, 0, 1, None)) == [4, 4, 6, 14]
    planned = plans((0,))[0]
    assert planned.hugepage_bytes == 2 * MIB
    assert not DramTier(DramSettings(), planned, 0).traits.counts_as_host_ram
    assert tier().traits.counts_as_host_ram


def test_too_few_hugepages_are_refused_before_a_model_is_loaded(
    two_nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HUGEPAGE_SIZE", "1GB")
    two_nodes.hugepages = {(0,): 4 * GIB, (1,): 0}
    with pytest.raises(
        Unavailable, match=r"SGLANG_HUGEPAGE_SIZE requires hugepages of 1024 MiB.*unset SGLANG_HUGEPAGE"
    ):
        plans((0, 1))
    with pytest.raises(Unavailable, match="requires hugepages"):
        tier(nodes=(0,), hugepage_bytes=GIB).allocate(5 * GIB)
    monkeypatch.setenv("SGLANG_HUGEPAGE_SIZE", "16MB")
    with pytest.raises(ConfigError, match=r"SGLANG_HUGEPAGE_SIZE is '16MB'\. Give 2MB or 1GB"):
        plans((0,))


def test_a_hugepage_that_the_node_does_not_have_is_no_signal(two_nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reserves them for the machine; a bound one may be missing when it is touched."""
    two_nodes.hugepages = {(0,): 8 * GIB}
    plain = hostmem.map_anonymous
    monkeypatch.setattr(hostmem, "map_anonymous", lambda nbytes, hugepage: plain(nbytes))

    def populate(*_: object, **__: object) -> None:
        raise OSError(14, "Bad address")

    monkeypatch.setattr(hostmem, "populate", populate)
    with pytest.raises(Unavailable, match="requires hugepages of 2 MiB"):
        tier(nodes=(0,), hugepage_bytes=2 * MIB).allocate(MIB)


@pytest.mark.parametrize("reserved", [2])
def test_hugepages_are_used_where_there_are_some(reserved: int) -> None:
    """Reserves two for the moment, where the machine lets a test do so."""
    control = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    try:
        before = control.read_text()
        control.write_text(str(int(before) + reserved))
    except OSError:
        pytest.skip("no hugepages can be reserved here")
    try:
        if machine.free_hugepage_bytes(2 * MIB) < reserved * 2 * MIB:
            pytest.skip("no hugepages can be reserved here")
        region = tier(hugepage_bytes=2 * MIB).allocate(3 * MIB)
        assert region.summary == "host memory in hugepages of 2 MiB"
        assert "ht" in flags_of_mapping(region.extents[0].address)
        assert machine.free_hugepage_bytes(2 * MIB) == 0
        region.release()
        assert machine.free_hugepage_bytes(2 * MIB) >= reserved * 2 * MIB
    finally:
        control.write_text(before)


# ---- memory ----


READ_AFTER_RELEASE = """
import numpy
from sglang_xmem.tiers.dram import DramRankPlan, DramSettings, DramTier

region = DramTier(DramSettings(), DramRankPlan(), None).allocate(64 << 20)
view = numpy.frombuffer(region.owner[0], dtype=numpy.uint8)
view[:] = 3
region.release()
print(int(view.sum()))
"""


def test_a_view_outlives_the_release() -> None:
    done = subprocess.run([sys.executable, "-c", READ_AFTER_RELEASE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{3 * (64 << 20)}\n")


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(ctypes, "memset", lambda address, value, count: calls.append(count))
    return calls


def test_memory_is_bound_whole_before_it_is_touched(two_nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    bind = machine.bind

    def recorded(address: int, nbytes: int, nodes: Sequence[int]) -> str | None:
        order.append("bind")
        return bind(address, nbytes, nodes)

    monkeypatch.setattr(machine, "bind", recorded)
    monkeypatch.setattr(ctypes, "memset", lambda *_: order.append("touch"))
    region = tier(nodes=(1,)).allocate(3 * MIB + 5)
    assert order == ["bind", "touch"]
    assert two_nodes.bound == [(region.extents[0].address, 3 * MIB + 5, (1,))]
    assert region.summary == "host memory of NUMA node 1"
    region.release()


def test_memory_without_node_and_gpu_is_not_touched(touched: list[int]) -> None:
    tier(threads=4).allocate(8 * MIB).release()
    assert touched == []


def test_pinned_memory_is_touched_first_also_without_a_node(touched: list[int], pins: PinDriver) -> None:
    tier(gpu=0, threads=4).allocate(8 * MIB).release()
    assert sum(touched) == 8 * MIB


def flags_of_mapping(address: int) -> set[str]:
    """VmFlags of the mapping at an address: proc(5), smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    pytest.skip("this kernel does not report a mapping's flags")


def test_a_forked_child_does_not_get_pinned_memory(pins: PinDriver) -> None:
    """Else the child keeps the pages that the GPU writes to, and this process gets others when it writes."""
    for gpu in (0, None):
        region = tier(gpu=gpu).allocate(MIB)
        assert ("dc" in flags_of_mapping(region.extents[0].address)) is (gpu is not None)
        region.release()


def test_nothing_stays_mapped_where_pinning_fails(pins: PinDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[mmap.mmap] = []

    class Recorded(mmap.mmap):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)

    monkeypatch.setattr(mmap, "mmap", Recorded)
    pins.fail_at = 2  # behind a context, which is made current
    with pytest.raises(Unavailable, match="pinning 0.00 of 0.01 GB"):
        tier(gpu=0).allocate(5 * MIB)
    assert [mapping.closed for mapping in made] == [True]


def test_variables_are_checked_before_a_model_is_loaded(two_nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (hostmem.REGISTER_VARIABLE, hostmem.THREADS_VARIABLE):
        with monkeypatch.context() as patch:
            patch.setenv(name, "x")
            with pytest.raises(ConfigError, match=name):
                plans((0,))


def test_traits_follow_the_gpu() -> None:
    assert tier(gpu=0).traits == DramTier.traits
    assert tier().traits.link == "none"
    assert dram.DramTier.traits.cpu_addressable

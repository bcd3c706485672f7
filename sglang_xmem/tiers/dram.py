"""Tier `dram`: host memory on a chosen NUMA node, pinned if the rank has a GPU.

The range is bound to its node before its first touch. Several threads touch it, which also shortens pinning: pinning
untouched memory faults every page in on one thread. Binding only affects speed. Where the kernel refuses it (containers
without CAP_SYS_NICE), threads on the node's CPUs touch the memory first, which places it on the node while that has
free memory.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import ExitStack
from typing import Any

import msgspec

from sglang_xmem import gpus, machine
from sglang_xmem.errors import LOWER_SIZE, Remedy, SettingError, Unavailable
from sglang_xmem.tiers import hostmem
from sglang_xmem.tiers.base import Extent, MemoryTier, Ranks, Region, Traits

logger = logging.getLogger(__name__)


class DramSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of `dram` in --hicache-xmem-config.

    Attributes:
        numa_node: NUMA node of all ranks' memory. Default: the node of each rank's GPU. Without a GPU, or if its node
            is unknown, the kernel chooses among the nodes with CPUs.
        numa_required: refuse to start if memory cannot be bound to `numa_node`. Default: warn, and place it by first
            touch from the node's CPUs.
        threads: threads that place the memory at startup; 0: SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS, else half the
            CPUs, at most 16.
        relays: CUDA ordinals of GPUs that the engine does not compute on, assigned to ranks round-robin. Each moves a
            share of every copy through its own PCIe link and forwards it to the rank's GPU over NVLink.
    """

    numa_node: int | None = None
    numa_required: bool = False
    threads: int = 0
    relays: tuple[int, ...] = ()


class DramRankPlan(msgspec.Struct, frozen=True):
    """Placement of a rank's memory.

    Attributes:
        nodes: NUMA nodes; empty leaves placement to the kernel.
        bound: the kernel allows binding to the nodes; otherwise first touch places the memory.
        relays: CUDA ordinals.
        share_bytes: the rank's limit, since ranks that share nodes share their free capacity; None: no limit.
        hugepage_bytes: size of the reserved hugepages to use; None: ordinary pages.
    """

    nodes: tuple[int, ...] = ()
    bound: bool = True
    relays: tuple[int, ...] = ()
    share_bytes: int | None = None
    hugepage_bytes: int | None = None


class DramTier(MemoryTier):
    name = "dram"
    nominal_gbps = 55.0  # measured, PCIe 5 x16
    traits = Traits(cpu_addressable=True, counts_as_host_ram=True, link="pcie")
    Settings = DramSettings

    settings: DramSettings
    rank_plan: DramRankPlan

    def __init__(self, settings: Any, rank_plan: Any, gpu: int | None) -> None:
        super().__init__(settings, rank_plan, gpu)
        self.traits = Traits(
            cpu_addressable=True,
            # Reserved hugepages are not part of the machine's available RAM.
            counts_as_host_ram=self.rank_plan.hugepage_bytes is None,
            link="none" if gpu is None else "pcie",
        )

    @classmethod
    def plan_ranks(cls, settings: DramSettings, ranks: Ranks) -> tuple[DramRankPlan, ...]:
        if not 0 <= settings.threads <= 1024:
            raise SettingError("dram.threads", f"is {settings.threads}", "give 1 to 1024, or 0 for auto")
        _check_node(settings)
        _check_relays(settings.relays, ranks)
        hugepage = hostmem.hugepage_bytes()
        hostmem.register_bytes()  # checks the variable before a model is loaded
        hostmem.touch_threads(settings.threads)
        chosen = [_nodes_for(settings.numa_node, gpu) for gpu in ranks.gpus]
        refused = _refused_nodes(settings, set(chosen))
        # All ranks read their capacity before any has touched its memory. With bound memory, the kernel kills a process
        # that finds its node full.
        shares = {
            nodes: _capacity_bytes(nodes, nodes not in refused, hugepage) // users
            for nodes, users in Counter(chosen).items()
        }
        if hugepage is not None and not all(shares.values()):
            raise _no_hugepages(hugepage)
        plans = []
        for index, (gpu, nodes) in enumerate(zip(ranks.gpus, chosen, strict=True)):
            relays = settings.relays[index :: len(ranks.gpus)]
            for relay in relays:
                assert gpu is not None
                if not gpus.can_access_peer(relay, gpu):
                    raise Unavailable(
                        f"GPU {relay} of dram.relays has no peer access to GPU {gpu}",
                        Remedy("set_option", "dram.relays", "other GPUs"),
                    )
            # The engine's host budget divides the host's RAM as a whole.
            share = shares[nodes] if (nodes and nodes not in refused) or hugepage is not None else None
            plans.append(DramRankPlan(nodes, nodes not in refused, relays, share, hugepage))
        return tuple(plans)

    def capacity_bytes(self) -> int:
        plan = self.rank_plan
        available = _capacity_bytes(plan.nodes, plan.bound, plan.hugepage_bytes)
        return available if plan.share_bytes is None else min(available, plan.share_bytes)

    def waste_bytes(self, granule: int) -> int:
        return self.rank_plan.hugepage_bytes or super().waste_bytes(granule)

    def _allocate(self, nbytes: int, granule: int) -> Region:
        plan = self.rank_plan
        with ExitStack() as undo:
            free = _capacity_bytes(plan.nodes, plan.bound, plan.hugepage_bytes)
            if nbytes > free:
                if plan.hugepage_bytes is not None:
                    raise _no_hugepages(plan.hugepage_bytes)
                # Memory beyond the machine's or a cgroup's limit causes SIGKILL and not an error.
                raise Unavailable(
                    f"{nbytes / 1e9:.2f} GB are needed, but {free / 1e9:.2f} GB of host memory are free (within the "
                    "limits of this process's cgroups)",
                    LOWER_SIZE,
                )
            mapping = hostmem.map_anonymous(nbytes, hugepage=plan.hugepage_bytes)
            undo.callback(mapping.close)
            if self.gpu is not None:
                hostmem.keep_from_children(mapping.address, nbytes)
            self._place(mapping)
            if self.gpu is not None:
                hostmem.pin(mapping.address, nbytes, self.gpu, undo, plan.relays)
            keep = undo.pop_all()
        return Region(
            [Extent(mapping.address, nbytes)],
            self._summary(),
            keep.close,
            granule=granule,
            reachable_from=plan.relays,
            owner=(mapping.owner,),
        )

    def _place(self, mapping: hostmem.Mapping) -> None:
        plan, bound = self.rank_plan, self.rank_plan.bound
        if plan.nodes and bound:
            refusal = machine.bind(mapping.address, mapping.nbytes, plan.nodes)
            if refusal is not None:  # the launcher was allowed to, but cpusets change
                _check_first_touch(self.settings, plan.nodes, refusal)
                bound = False
        cpus = set() if bound else set().union(*(machine.node_cpus(node) for node in plan.nodes))
        threads = hostmem.touch_threads(self.settings.threads)
        if plan.hugepage_bytes is not None:  # touching a page that the kernel cannot provide raises a signal
            size = plan.hugepage_bytes
            whole = -(-mapping.nbytes // size) * size
            try:
                hostmem.populate(mapping.address, whole, threads=threads, page_bytes=size)
            except OSError:
                raise _no_hugepages(size) from None
        elif self.gpu is not None or plan.nodes:
            hostmem.touch(mapping.address, mapping.nbytes, threads=threads, cpus=cpus)
        # Otherwise nothing is placed or pinned: the kernel allocates pages on first use.

    def _summary(self) -> str:
        plan = self.rank_plan
        words = "pinned host memory" if self.gpu is not None else "host memory"
        if plan.hugepage_bytes is not None:
            words += f" in hugepages of {plan.hugepage_bytes >> 20} MiB"
        if plan.nodes:
            words += f" of NUMA node {_listed(plan.nodes)}" + ("" if plan.bound else " (by first touch)")
        if plan.relays:
            words += f", relayed by GPU {_listed(plan.relays)}"
        return words


def _nodes_for(named: int | None, gpu: int | None) -> tuple[int, ...]:
    """Return the NUMA nodes for a rank's memory, without CPU-less nodes unless named; empty if there is no choice."""
    nodes = machine.memory_nodes()
    if len(nodes) < 2:
        return ()
    if named is not None:
        return (named,)
    usual = tuple(node for node in nodes if node not in machine.cxl_nodes()) or nodes
    if gpu is not None:
        near = gpus.numa_node(gpu)
        if near in usual:
            return (near,)
    return usual if len(usual) < len(nodes) else ()


def _refused_nodes(settings: DramSettings, choices: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Return those of `choices` that the kernel refuses to bind memory to, and warn about them.

    Raises:
        Unavailable: the kernel refuses one, and first touch is not sufficient.
    """
    refused = set()
    for nodes in sorted(choices):
        reason = machine.bind_refusal(nodes) if nodes else None
        if reason is not None:
            _check_first_touch(settings, nodes, reason)
            refused.add(nodes)
    return refused


def _check_first_touch(settings: DramSettings, nodes: tuple[int, ...], reason: str) -> None:
    """Warn that first touch places the memory, since the kernel refuses to bind it.

    Raises:
        Unavailable: the user requires binding, or the nodes have no CPU that could touch the memory.
    """
    problem = f"the kernel does not let this process bind memory to NUMA node {_listed(nodes)} ({reason})"
    allow = Remedy("do", value="give the container CAP_SYS_NICE")
    if settings.numa_required:
        leave = Remedy("leave_out", "dram.numa_required")
        raise Unavailable(f"{problem}, but dram.numa_required is true", allow, leave)
    if not any(machine.node_cpus(node) for node in nodes):
        leave = Remedy("leave_out", "dram.numa_node")
        raise Unavailable(f"{problem}, and the node has no CPU to place it by first touch", allow, leave)
    logger.warning(
        "sglang_xmem: %s. The node's CPUs place it by first touch instead. Give the container CAP_SYS_NICE to bind it.",
        problem,
    )


def _capacity_bytes(nodes: tuple[int, ...], bound: bool, hugepage: int | None) -> int:
    """Return the bytes available now in these nodes (empty: all nodes), for all ranks that use them."""
    if hugepage is not None:
        return machine.free_hugepage_bytes(hugepage, nodes)
    available = machine.host_available_bytes()
    if nodes and bound:
        there = sum(machine.node_available_bytes(node) - machine.node_reserve_bytes(node) for node in nodes)
        return max(0, min(available, there))
    return available


def _no_hugepages(size: int) -> Unavailable:
    free = machine.free_hugepage_bytes(size)
    return Unavailable(
        f"{hostmem.HUGEPAGE_VARIABLE} requires hugepages of {size >> 20} MiB, but only {free / 1e9:.2f} GB of them are "
        "free on the chosen NUMA nodes",
        Remedy("do", value=f"reserve more of them (hugepages-{size >> 10}kB/nr_hugepages)"),
        hostmem.UNSET_HUGEPAGES,
        LOWER_SIZE,
    )


def _check_node(settings: DramSettings) -> None:
    node = settings.numa_node
    if node is None:
        if settings.numa_required:
            problem = "is true, but 'dram.numa_node' is not set"
            raise SettingError("dram.numa_required", problem, "set 'dram.numa_node', or leave this out")
        return
    nodes = machine.memory_nodes()
    if node not in nodes:
        fix = f"give {' or '.join(map(str, nodes))}, or leave it out" if nodes else "leave it out"
        has = f"has memory on node {_listed(nodes)}" if nodes else "reports no NUMA nodes"
        raise SettingError("dram.numa_node", f"is {node}, but this machine {has}", fix)


def _check_relays(relays: tuple[int, ...], ranks: Ranks) -> None:
    """Refuse GPUs that cannot be relays.

    Raises:
        SettingError: a GPU cannot.
    """
    if not relays:
        return
    if len(set(relays)) != len(relays):
        raise SettingError("dram.relays", f"is {list(relays)}", "name no GPU twice")
    if not ranks.uses_gpu:
        raise SettingError("dram.relays", f"is {list(relays)}, but the engine runs on the CPU", "leave it out")
    gpus.check_named("dram.relays", relays, ranks.gpus)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))

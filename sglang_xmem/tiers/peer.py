"""Tier `peer`: HBM of other GPUs of this host, over NVLink if they have it.

Memory comes from CUDA's virtual memory management: physical memory is created on the peer and mapped into this process.
The driver releases it when the process exits or crashes. A CUDA context on the peer (about 0.6 GB) keeps it at full
clocks, since a GPU with idle clocks serves its memory more slowly. The context also lets an idle peer execute the
copies.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from typing import Any, Literal

import msgspec

from sglang_xmem import gpus
from sglang_xmem.errors import LOWER_SIZE, Remedy, SettingError, Unavailable
from sglang_xmem.tiers.base import Extent, MemoryTier, Ranks, Region, Traits

#: Bytes left free on each peer: for this process's context there and the driver's page tables.
RESERVE_BYTES = 1 << 30
#: The context's part of the reserve; already deducted from the free memory once a region exists.
CONTEXT_BYTES = 600 << 20


class PeerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of `peer` in --hicache-xmem-config.

    Attributes:
        gpus: CUDA ordinals of the peers, assigned to ranks round-robin; a rank's pool is striped over all of its peers.
            A named GPU may be in use by others. Default: the smallest number of idle GPUs that can hold the pool.
        stripe_mib: stripe size in MiB (2^20 bytes), if a rank has several peers.
        copy_on: which GPU executes the copies: `rank`, the rank's own, or `peer`, the rank's first peer, which must be
            idle. Copies by the peer occupy no multiprocessor of the rank's GPU. `auto` is `peer` where that is
            possible.
    """

    gpus: tuple[int, ...] | None = None
    stripe_mib: int = 32
    copy_on: Literal["auto", "rank", "peer"] = "auto"


class PeerRankPlan(msgspec.Struct, frozen=True):
    """The peers of one rank. `named`: the user named them, so they may be in use by others."""

    gpus: tuple[int, ...]
    named: bool


class PeerTier(MemoryTier):
    name = "peer"
    nominal_gbps = 397.0  # measured, one direction, NV18 between two H200s
    traits = Traits(cpu_addressable=False, counts_as_host_ram=False, link="nvlink")
    Settings = PeerSettings

    settings: PeerSettings
    rank_plan: PeerRankPlan

    @classmethod
    def plan_ranks(cls, settings: PeerSettings, ranks: Ranks) -> tuple[PeerRankPlan, ...]:
        if not 2 <= settings.stripe_mib <= 1 << 20:
            raise SettingError("peer.stripe_mib", f"is {settings.stripe_mib}", f"give 2 to {1 << 20} (MiB)")
        named = settings.gpus
        if named is not None and (not named or len(set(named)) != len(named)):
            raise SettingError("peer.gpus", f"is {list(named)}", "name at least one GPU, and none twice")
        engine = [gpu for gpu in ranks.gpus if gpu is not None]
        if len(engine) < len(ranks.gpus) or not engine:
            raise Unavailable("it needs GPUs, but the engine runs on the CPU", Remedy("use_tier", value="dram"))
        reasons: list[str] = []
        if named is not None:
            gpus.check_named("peer.gpus", named, engine)
            peers = list(named)
        else:
            peers = []
            for gpu in gpus.visible_gpus():
                if gpu in engine:
                    continue
                reason = gpus.foreign_use(gpu) or _unreachable(engine, gpu)
                if reason is None:
                    peers.append(gpu)
                else:
                    reasons.append(reason)
        if len(peers) < len(engine):
            found = f"{len(engine)} rank(s) need a peer each, but only {len(peers)} other GPU(s) are usable"
            remedies = [] if named is None else [Remedy("set_option", "peer.gpus", "more GPUs")]
            raise Unavailable("; ".join([found, *reasons]), *remedies)
        plans = []
        for index, gpu in enumerate(engine):
            mine = tuple(peers[index :: len(engine)])
            for peer in mine:
                reason = _unreachable([gpu], peer)
                if reason is not None:
                    raise Unavailable(reason, Remedy("set_option", "peer.gpus", "other GPUs"))
            # GPUs that the user did not name are idle.
            use = gpus.foreign_use(mine[0]) if settings.copy_on == "peer" and named is not None else None
            if use is not None:
                raise Unavailable(
                    f"{use}, but peer.copy_on needs it idle",
                    Remedy("set_option", "peer.gpus", "other GPUs"),
                    Remedy("leave_out", "peer.copy_on"),
                )
            plans.append(PeerRankPlan(gpus=mine, named=named is not None))
        return tuple(plans)

    def __init__(self, settings: Any, rank_plan: Any, gpu: int | None) -> None:
        super().__init__(settings, rank_plan, gpu)
        #: Regions on each peer.
        self._awake: Counter[int] = Counter()
        #: Peers that can hold all expected bytes.
        self._expected: tuple[int, ...] | None = None

    def capacity_bytes(self) -> int:
        free = self._free()
        return max(self._pool_bytes(peers, free) for peers in self._choices(free))

    def waste_bytes(self, granule: int) -> int:
        # One GPU wastes up to its granularity. Several waste up to two stripes each: a partial one, and one of
        # imbalance.
        count = len(self.rank_plan.gpus)
        return 2 << 20 if count == 1 else 2 * self._stripe_bytes * count

    def expect(self, nbytes: int) -> None:
        free = self._free()
        self._expected = next((p for p in self._choices(free) if self._pool_bytes(p, free) >= nbytes), None)

    def _usable(self) -> tuple[int, ...]:
        """Return the rank's peers without those that others use by now; a GPU that the user named stays."""
        if self.rank_plan.named:
            return self.rank_plan.gpus
        uses = {gpu: gpus.foreign_use(gpu) for gpu in self.rank_plan.gpus}
        usable = tuple(gpu for gpu, use in uses.items() if use is None)
        if not usable:
            raise Unavailable("; ".join(use for use in uses.values() if use is not None))
        return usable

    def _free(self) -> dict[int, int]:
        """Return the bytes that pools can use on each usable peer."""
        free = {}
        for gpu in self._usable():
            reserve = RESERVE_BYTES - CONTEXT_BYTES * (self._awake[gpu] > 0)
            free[gpu] = max(0, gpus.memory_bytes(gpu)[0] - reserve)
        return free

    def _pool_bytes(self, peers: tuple[int, ...], free: dict[int, int]) -> int:
        """Return the bytes of a pool over `peers`: the peer with the least free memory limits it, since stripes are
        round-robin."""
        least = min(free[gpu] for gpu in peers)
        if len(peers) == 1:
            return least
        # Stripes are whole on each GPU, so up to one stripe a GPU stays unused.
        return (least // self._stripe_bytes) * self._stripe_bytes * len(peers)

    @property
    def _stripe_bytes(self) -> int:
        return self.settings.stripe_mib << 20

    def _choices(self, free: dict[int, int]) -> list[tuple[int, ...]]:
        """List the sets of peers for a pool, in order of preference.

        All GPUs that the user named; else the first idle one, the first two, and so on, so that others stay free; then
        those with the most free memory.
        """
        usable = tuple(free)
        if self.rank_plan.named:
            return [usable]
        emptiest = sorted(usable, key=lambda gpu: -free[gpu])
        counts = range(1, len(usable) + 1)
        return [usable[:count] for count in counts] + [tuple(emptiest[:count]) for count in counts]

    def _chosen(self, nbytes: int) -> tuple[int, ...]:
        """Choose the peers for a pool of `nbytes`.

        Raises:
            Unavailable: no choice of peers has enough free memory.
        """
        free = self._free()
        choices = self._choices(free)
        if self._expected is not None and set(self._expected) <= set(free):
            choices.insert(0, self._expected)
        for peers in choices:
            if self._pool_bytes(peers, free) >= nbytes:
                return peers
        most = max(choices, key=lambda peers: self._pool_bytes(peers, free))
        have = self._pool_bytes(most, free)
        raise Unavailable(
            f"{nbytes / 1e9:.2f} GB are needed on GPU {_listed(most)}, but {have / 1e9:.2f} GB are free", LOWER_SIZE
        )

    def _allocate(self, nbytes: int, granule: int) -> Region:
        d = gpus.driver()
        peers = self._chosen(nbytes)
        props = [_allocation_properties(d, gpu) for gpu in peers]
        granularity = math.lcm(
            *(
                gpus.checked(
                    d.cuMemGetAllocationGranularity(
                        p, d.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
                    ),
                    "asking for the allocation granularity",
                )
                for p in props
            )
        )
        total = -(-nbytes // granularity) * granularity
        stripe = total if len(peers) == 1 else -(-self._stripe_bytes // granularity) * granularity
        reaching = self._reaching(peers)
        what = f"allocating {nbytes / 1e9:.2f} GB on GPU {_listed(peers)}"
        with ExitStack() as undo:
            for gpu in peers:
                gpus.hold_context(gpu, undo)  # without a context, a peer runs at idle clocks
                self._awake[gpu] += 1
                undo.callback(self._awake.subtract, [gpu])
            base = int(gpus.checked(d.cuMemAddressReserve(total, granularity, 0, 0), "reserving addresses"))
            undo.callback(d.cuMemAddressFree, base, total)
            for number, offset in enumerate(range(0, total, stripe)):
                size = min(stripe, total - offset)
                handle = gpus.checked(d.cuMemCreate(size, props[number % len(peers)], 0), what)
                try:
                    gpus.checked(d.cuMemMap(base + offset, size, 0, handle, 0), what)
                finally:
                    d.cuMemRelease(handle)  # from here on the mapping keeps the memory
                undo.callback(d.cuMemUnmap, base + offset, size)
            access = [_access(d, gpu) for gpu in (self.gpu, *reaching)]
            gpus.checked(
                d.cuMemSetAccess(base, total, access, len(access)), f"giving GPU {self.gpu} access to its peers"
            )
            keep = undo.pop_all()
        return Region(
            [Extent(base, nbytes)],
            f"HBM of GPU {_listed(peers)}",
            keep.close,
            granule=granule,
            gpus=peers,
            reachable_from=reaching,
        )

    def _reaching(self, peers: tuple[int, ...]) -> tuple[int, ...]:
        """Return the first peer if it can access the others and the rank's GPU, else nothing."""
        first, others = peers[0], (self.gpu, *peers[1:])
        return (first,) if all(g is not None and gpus.can_access_peer(first, g) for g in others) else ()


def _unreachable(engine: list[int], peer: int) -> str | None:
    """Return a clause that names an engine GPU that cannot reach a peer, or None if all can."""
    for gpu in engine:
        if not gpus.can_access_peer(gpu, peer):
            return f"GPU {gpu} has no peer access to GPU {peer}"
    return None


def _access(d: Any, gpu: int | None) -> Any:
    access = d.CUmemAccessDesc()
    access.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = gpu
    access.flags = d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _allocation_properties(d: Any, gpu: int) -> Any:
    prop = d.CUmemAllocationProp()
    prop.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = gpu
    return prop


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))

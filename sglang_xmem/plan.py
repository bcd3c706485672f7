"""Choose the tier of a rank: planned once in the launcher, decided in each rank when its pools' sizes are known.

The launcher sees all ranks and has no CUDA context, so it makes the rank plans (which peer GPU belongs to which rank).
A rank knows its pools' bytes, so it chooses among the planned tiers. Both only query tiers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import msgspec

from sglang_xmem.config import AUTO, Options, check_copies
from sglang_xmem.copies.policy import CopyPolicy, common, decide
from sglang_xmem.errors import (
    LOWER_SIZE,
    SGLANG_FLAGS,
    ConfigError,
    FlagStyle,
    Remedy,
    SettingError,
    Unavailable,
    clause,
    sentence,
)
from sglang_xmem.tiers import MemoryTier, Ranks, Region, tier_classes


class Candidate(msgspec.Struct, frozen=True):
    """A tier that this machine has, with one plan per local rank."""

    tier: str
    rank_plans: tuple[Any, ...]


class Skipped(msgspec.Struct, frozen=True):
    """A tier that cannot serve, the reason, and its remedies."""

    tier: str
    reason: str
    remedies: tuple[Remedy, ...] = ()

    def words(self, flags: FlagStyle = SGLANG_FLAGS) -> str:
        """Return `reason; fix` for a list of tiers, without remedies that name another tier."""
        return clause(self.reason, [remedy for remedy in self.remedies if remedy.kind != "use_tier"], flags)


class Plan(msgspec.Struct, frozen=True):
    """The launcher's result, for every rank's process.

    Attributes:
        candidates: tiers to try, in order.
        skipped: tiers that cannot serve.
    """

    options: Options
    ranks: Ranks
    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]


class Allocation(NamedTuple):
    """A rank's memory: one region per requested space, all of one tier, and the copy policy."""

    tier: MemoryTier
    regions: tuple[Region, ...]
    policy: CopyPolicy


#: Returns the bytes of host RAM that pools of the given bytes may claim; applies only to tiers that count as host RAM.
HostBudget = Callable[[int], int]


def make_plan(options: Options, ranks: Ranks, pool_bytes: int | None, host_budget: HostBudget) -> Plan:
    """Plan tiers for `ranks`.

    Args:
        pool_bytes: bytes of all pools of one rank if the user sets a size, None if a ratio sets it.

    Raises:
        ConfigError: the requested tier is unavailable, `auto` finds no tier, or a setting is impossible.
    """
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    for found in examine(options, ranks, pool_bytes, host_budget):
        if isinstance(found, Candidate):
            candidates.append(found)
        else:
            skipped.append(found)
    if not candidates:
        raise ConfigError(_nothing_left(options, skipped))
    return Plan(options=options, ranks=ranks, candidates=tuple(candidates), skipped=tuple(skipped))


def tried_tiers(options: Options) -> list[str]:
    """List the tiers that `options` allow, in the order of trying."""
    if options.tier != AUTO:
        return [options.tier]
    return [name for name, tier in tier_classes().items() if tier.is_automatic(options.tiers[name])]


def examine(
    options: Options, ranks: Ranks, pool_bytes: int | None, host_budget: HostBudget
) -> Iterator[Candidate | Skipped]:
    """Yield `make_plan`'s result for each tier that `options` allow, in the order of trying.

    Raises:
        ConfigError: a setting is impossible.
    """
    if not ranks.gpus:
        raise ConfigError("No rank of this engine runs on this machine. Start it where one does.")
    check_copies(options, on_gpu=ranks.uses_gpu)
    for name in tried_tiers(options):
        try:
            candidate = Candidate(name, tier_classes()[name].plan_ranks(options.tiers[name], ranks))
            if pool_bytes is not None:
                for tier in _tiers_of(candidate, options, ranks):
                    _check_capacity(tier, pool_bytes, host_budget)
        except SettingError as error:
            raise ConfigError(sentence(error, options.flags)) from None
        except Unavailable as error:
            yield _skipped(name, error)
        else:
            yield candidate


def candidate_free_bytes(
    candidate: Candidate, options: Options, ranks: Ranks, nbytes: int, host_budget: HostBudget
) -> int:
    """Return the bytes available to each rank in a candidate's tier: the minimum over all ranks.

    Args:
        nbytes: the requested size, on which the host budget may depend.

    Raises:
        Unavailable: another process has claimed the planned memory since.
    """
    return max(0, min(_free_bytes(tier, nbytes, host_budget) for tier in _tiers_of(candidate, options, ranks)))


def _tiers_of(candidate: Candidate, options: Options, ranks: Ranks) -> list[MemoryTier]:
    """Make a candidate's tier for each rank."""
    tier = tier_classes()[candidate.tier]
    settings = options.tiers[candidate.tier]
    return [tier(settings, plan, gpu) for plan, gpu in zip(candidate.rank_plans, ranks.gpus, strict=True)]


class Placement:
    """One rank's view of the plan; allocates memory for its pools.

    Args:
        rank: index of this rank among the launcher's local ranks.
    """

    def __init__(self, plan: Plan, rank: int, host_budget: HostBudget) -> None:
        self.plan = plan
        self.rank = rank
        self.skipped = list(plan.skipped)
        self._host_budget = host_budget
        self._sized_against: int | None = None
        self._giving: MemoryTier | None = None
        classes = tier_classes()
        self._tiers: list[MemoryTier] = [
            classes[c.tier](plan.options.tiers[c.tier], c.rank_plans[rank], plan.ranks.gpus[rank])
            for c in plan.candidates
        ]

    def share_as(self, identities: Sequence[bytes], label: str) -> None:
        """Announce the contents of the next `allocate`'s spaces to the tiers, as MemoryTier.share_as."""
        for tier in self._tiers:
            tier.share_as(identities, label)

    def first_tier(self) -> MemoryTier:
        """Return the tier that sizes automatic pools: the first that is still available and has free capacity.

        Raises:
            ConfigError: no tier is left.
        """
        return self._first()[0]

    def automatic_bytes(self, host_bytes: int, granules: Sequence[int] = (1,)) -> int:
        """Return the total bytes of this rank's automatically sized pools in the first tier.

        The next `allocate` uses the same `host_bytes`: until then other ranks claim the shares that this rank's size
        already accounts for.

        Args:
            host_bytes: this rank's share of host RAM by the engine's own rule.
            granules: of the spaces that `allocate` will get.

        Raises:
            ConfigError: no tier is left.
        """
        tier, capacity = self._first()
        capacity -= sum(tier.waste_bytes(granule) for granule in granules)
        self._sized_against = host_bytes
        return max(0, min(capacity, host_bytes) if tier.traits.counts_as_host_ram else capacity)

    def _first(self) -> tuple[MemoryTier, int]:
        while self._tiers:
            tier = self._tiers[0]
            try:
                capacity = tier.capacity_bytes()
                if tier is not self._giving and capacity <= 0:
                    raise Unavailable("it has no free capacity left", LOWER_SIZE)
                return tier, capacity
            except Unavailable as error:
                self._skip(error)
        raise ConfigError(_nothing_left(self.plan.options, self.skipped))

    def allocate(self, wanted: Sequence[tuple[int, int]]) -> Allocation:
        """Allocate all spaces of a pool in the first tier that can hold them together.

        A tier that cannot is skipped permanently, so all pools of a rank are in one tier.

        Args:
            wanted: (bytes, granule) of each space, as MemoryTier.allocate's.

        Raises:
            ConfigError: no tier is left.
        """
        if not wanted:
            raise ValueError("spaces is empty")
        host_bytes, self._sized_against = self._sized_against, None
        while self._tiers:
            tier = self._tiers[0]
            try:
                allocation = self._allocate(tier, wanted, host_bytes)
            except Unavailable as error:
                self._skip(error)
            else:
                self._giving = tier
                return allocation
        raise ConfigError(_nothing_left(self.plan.options, self.skipped))

    def _allocate(self, tier: MemoryTier, wanted: Sequence[tuple[int, int]], host_bytes: int | None) -> Allocation:
        total = sum(-(-nbytes // granule) * granule for nbytes, granule in wanted)
        budget = self._host_budget if host_bytes is None else lambda _: host_bytes
        _check_capacity(tier, total, budget)
        tier.expect(total)
        with ExitStack() as undo:
            regions = []
            for nbytes, granule in wanted:
                regions.append(tier.allocate(nbytes, granule))
                undo.callback(regions[-1].release)
            policy = common([decide(tier.traits, tier.settings, region, tier.gpu) for region in regions])
            undo.pop_all()
        return Allocation(tier, tuple(regions), policy)

    @property
    def may_share(self) -> bool:
        """Whether the next allocation may be in a tier that shares pages."""
        return any(tier.traits.shared for tier in self._tiers)

    def skip_shared(self, error: Unavailable) -> None:
        """Skip all tiers that share pages."""
        for tier in [tier for tier in self._tiers if tier.traits.shared]:
            self._tiers.remove(tier)
            self.skipped.append(_skipped(tier.name, error))

    def _skip(self, error: Unavailable) -> None:
        self.skipped.append(_skipped(self._tiers.pop(0).name, error))


def _free_bytes(tier: MemoryTier, nbytes: int, host_budget: HostBudget) -> int:
    capacity = tier.capacity_bytes()
    return min(capacity, host_budget(nbytes)) if tier.traits.counts_as_host_ram else capacity


def _check_capacity(tier: MemoryTier, nbytes: int, host_budget: HostBudget) -> None:
    free = _free_bytes(tier, nbytes, host_budget)
    if nbytes > free:
        needs = f"the pools need {nbytes / 1e9:.2f} GB per rank, but {max(free, 0) / 1e9:.2f} GB are free"
        raise Unavailable(needs, LOWER_SIZE)


def _skipped(tier: str, error: Unavailable) -> Skipped:
    return Skipped(tier, error.reason, error.remedies)


def describe_skipped(skipped: Iterable[Skipped], flags: FlagStyle = SGLANG_FLAGS) -> str:
    """Format for the log line and for errors: `peer (reason; fix); dram (reason)`."""
    return "; ".join(f"{one.tier} ({one.words(flags)})" for one in skipped)


def _nothing_left(options: Options, skipped: Sequence[Skipped]) -> str:
    flags = options.flags
    if options.tier == AUTO:
        return f"{flags.tier} auto finds no tier for the pool: {describe_skipped(skipped, flags)}."
    last = skipped[-1]
    words = sentence(Unavailable(last.reason, *last.remedies), flags)
    return f"{flags.tier} {options.tier} is unavailable: {last.reason[:1]}{words[1:]}"

"""Which tier serves a rank: planned once in the launcher, settled in each rank when the pool's size is known.

The launcher sees all ranks and has no CUDA context, so it hands out seats (which peer GPU belongs to which rank);
a rank knows its pool's bytes, so it makes the last choice among the planned tiers. Both only ask tiers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from sglang_xmem.config import AUTO, Options
from sglang_xmem.errors import ConfigError, TierUnavailable
from sglang_xmem.tiers import Locality, MemoryTier, Ranks, Region, tier_classes


class Candidate(msgspec.Struct, frozen=True):
    """A tier that this machine has, with one seat a local rank."""

    tier: str
    seats: tuple[Any, ...]


class PassedOver(msgspec.Struct, frozen=True):
    """A tier that cannot serve, and why."""

    tier: str
    reason: str


class Plan(msgspec.Struct, frozen=True):
    """What the launcher found, for every rank's process.

    Attributes:
        candidates: tiers to try in this order.
        passed_over: tiers that cannot serve, each with the reason.
    """

    options: Options
    ranks: Ranks
    candidates: tuple[Candidate, ...]
    passed_over: tuple[tuple[str, str], ...]


#: Gives the bytes of host RAM that a pool of so many bytes may claim; applies to host tiers alone.
HostBudget = Callable[[int], int]


def make_plan(options: Options, ranks: Ranks, pool_bytes: int | None, host_budget: HostBudget) -> Plan:
    """Plan tiers for `ranks`.

    Args:
        pool_bytes: bytes of one rank's pool where --hicache-size fixes it, None where a ratio will.

    Raises:
        ConfigError: the tier asked for cannot be had, or `auto` finds none.
    """
    candidates: list[Candidate] = []
    passed_over: list[tuple[str, str]] = []
    for found in examine(options, ranks, pool_bytes, host_budget):
        if isinstance(found, Candidate):
            candidates.append(found)
        else:
            passed_over.append((found.tier, found.reason))
    if not candidates:
        raise ConfigError(_nothing_left(options, passed_over))
    return Plan(options=options, ranks=ranks, candidates=tuple(candidates), passed_over=tuple(passed_over))


def examine(
    options: Options, ranks: Ranks, pool_bytes: int | None, host_budget: HostBudget
) -> Iterator[Candidate | PassedOver]:
    """What `make_plan` finds of each tier that `options` allow, in the order of trying, as soon as it is known.

    Raises:
        ConfigError: settings that ask for something impossible.
    """
    names = list(tier_classes()) if options.tier == AUTO else [options.tier]
    for name in names:
        try:
            candidate = Candidate(name, tier_classes()[name].seats(options.tiers[name], ranks))
            if pool_bytes is not None:
                for tier in _tiers_of(candidate, options, ranks):
                    _check_room(tier, pool_bytes, host_budget)
        except TierUnavailable as reason:
            yield PassedOver(name, str(reason))
        else:
            yield candidate


def candidate_room_bytes(
    candidate: Candidate, options: Options, ranks: Ranks, nbytes: int, host_budget: HostBudget
) -> int:
    """Bytes that a pool of each rank could have in a candidate's tier: the least of all ranks.

    Args:
        nbytes: what is asked for, where the host's budget depends on it.

    Raises:
        TierUnavailable: what was planned has been taken since.
    """
    return max(0, min(_room_bytes(tier, nbytes, host_budget) for tier in _tiers_of(candidate, options, ranks)))


def _tiers_of(candidate: Candidate, options: Options, ranks: Ranks) -> list[MemoryTier]:
    """A candidate's tier for each rank."""
    tier = tier_classes()[candidate.tier]
    settings = options.tiers[candidate.tier]
    return [tier(settings, seat, gpu) for seat, gpu in zip(candidate.seats, ranks.gpus, strict=True)]


class Placement:
    """One rank's view of the plan; gives memory to its pools.

    Args:
        rank: index of this rank among the launcher's local ranks.
    """

    def __init__(self, plan: Plan, rank: int, host_budget: HostBudget) -> None:
        self.plan = plan
        self.rank = rank
        self._host_budget = host_budget
        self.passed_over = list(plan.passed_over)
        classes = tier_classes()
        self._giving: MemoryTier | None = None
        self._tiers: list[MemoryTier] = [
            classes[c.tier](plan.options.tiers[c.tier], c.seats[rank], plan.ranks.gpus[rank]) for c in plan.candidates
        ]

    def first_tier(self) -> MemoryTier:
        """The tier to size an automatic pool for: the first that is still there and has room.

        Raises:
            ConfigError: none is.
        """
        while self._tiers:
            tier = self._tiers[0]
            try:
                if tier is not self._giving and tier.capacity_bytes() <= 0:
                    raise TierUnavailable("it has no room left")
                return tier
            except TierUnavailable as reason:
                self._pass_over(reason)
        raise ConfigError(_nothing_left(self.plan.options, self.passed_over))

    def allocate(self, nbytes: int, parts: int = 1) -> tuple[MemoryTier, Region]:
        """Memory for a pool of `nbytes` in `parts` equal parts, from the first tier that can hold it.

        A tier that cannot is passed over for good, so that all pools of a rank end up in one tier.

        Raises:
            ConfigError: no tier is left.
        """
        while self._tiers:
            tier = self._tiers[0]
            try:
                _check_room(tier, nbytes, self._host_budget)
                region = tier.allocate(nbytes, parts)
                self._giving = tier
                return tier, region
            except TierUnavailable as reason:
                self._pass_over(reason)
        raise ConfigError(_nothing_left(self.plan.options, self.passed_over))

    def _pass_over(self, reason: TierUnavailable) -> None:
        self.passed_over.append((self._tiers.pop(0).name, str(reason)))


def _room_bytes(tier: MemoryTier, nbytes: int, host_budget: HostBudget) -> int:
    capacity = tier.capacity_bytes()
    if tier.locality is Locality.HOST:
        capacity = min(capacity, host_budget(nbytes))
    return capacity


def _check_room(tier: MemoryTier, nbytes: int, host_budget: HostBudget) -> None:
    capacity = _room_bytes(tier, nbytes, host_budget)
    if nbytes > capacity:
        raise TierUnavailable(
            f"the pool needs {nbytes / 1e9:.2f} GB a rank and there is room for {max(capacity, 0) / 1e9:.2f} GB; "
            "lower --hicache-size or --hicache-ratio"
        )


def describe_passed_over(passed_over: list[tuple[str, str]]) -> str:
    """For the log line and for errors: `peer (reason); dram (reason)`."""
    return "; ".join(f"{name} ({reason})" for name, reason in passed_over)


def _nothing_left(options: Options, passed_over: list[tuple[str, str]]) -> str:
    if options.tier == AUTO:
        return f"--hicache-xmem-tier auto finds no tier for the pool: {describe_passed_over(passed_over)}."
    return f"--hicache-xmem-tier {options.tier} cannot be used: {passed_over[-1][1]}."

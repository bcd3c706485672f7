"""Which tier serves: order, free capacity, what is skipped and why, and that nothing stays behind."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_xmem import plan as plan_module
from sglang_xmem.config import CopySettings, Options
from sglang_xmem.copies.policy import CopyPolicy
from sglang_xmem.errors import LOWER_SIZE, ConfigError, FlagStyle, Remedy, SettingError, Unavailable
from sglang_xmem.plan import (
    Candidate,
    Placement,
    Skipped,
    candidate_free_bytes,
    describe_skipped,
    examine,
    make_plan,
    tried_tiers,
)
from sglang_xmem.tiers import MemoryTier, Ranks, tier_classes
from tests.unit.fakes import FakeSettings, FakeTier, ShyFakeTier, SlowFakeTier

FAKES: list[type[FakeTier]] = [FakeTier, ShyFakeTier, SlowFakeTier]


@pytest.fixture(autouse=True)
def fake_tiers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan_module, "tier_classes", lambda: {tier.name: tier for tier in FAKES})
    for tier in FAKES:
        for name in ("missing", "lost", "fail_at"):
            monkeypatch.setattr(tier, name, None)
    yield
    for tier in FAKES:
        assert tier.live == []


def options(tier: str = "auto", fast: int = 1 << 30, slow: int = 1 << 30, **others: Any) -> Options:
    settings: dict[str, Any] = {
        "fake": FakeSettings(fast),
        "slowfake": FakeSettings(slow),
        "shyfake": FakeSettings(1 << 40),
    }
    return Options(tier=tier, copy=CopySettings(), tiers=settings, **others)


def budget(nbytes: int) -> int:
    return 1 << 40


RANKS = Ranks(gpus=(None, None))


def placement(chosen: Options, rank: int = 0, host_budget: plan_module.HostBudget = budget) -> Placement:
    return Placement(make_plan(chosen, RANKS, None, budget), rank, host_budget)


def tier_of(where: Placement, *wanted: tuple[int, int]) -> MemoryTier:
    """The tier that serves, given back at once."""
    allocation = where.allocate(wanted or [(1000, 1)])
    for region in allocation.regions:
        region.release()
        region.release()  # idempotent
    return allocation.tier


def test_every_tier_file_is_found_fastest_first() -> None:
    assert list(tier_classes()) == ["mtier", "peer", "bank", "dram", "dax"]


def test_auto_takes_the_fastest() -> None:
    tier = tier_of(placement(options(), rank=1))
    assert (tier.name, tier.rank_plan) == ("fake", 1)


def test_a_plan_goes_to_the_ranks_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTier, "missing", "no such card")
    monkeypatch.setattr(SlowFakeTier, "missing", None)
    plan = make_plan(options(), RANKS, None, budget)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_auto_skips_what_is_missing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTier, "missing", "no such card")
    monkeypatch.setattr(SlowFakeTier, "missing", None)
    plan = make_plan(options(), RANKS, None, budget)
    assert [c.tier for c in plan.candidates] == ["slowfake"]
    assert plan.skipped == (Skipped("fake", "no such card"),)


def test_auto_skips_a_full_tier_in_the_launcher() -> None:
    plan = make_plan(options(fast=100), RANKS, 1000, budget)
    assert [c.tier for c in plan.candidates] == ["slowfake"]
    assert plan.skipped[0].remedies == (LOWER_SIZE,)


def test_a_tier_that_auto_does_not_try_serves_by_name() -> None:
    assert tried_tiers(options()) == ["fake", "slowfake"]
    assert tried_tiers(options("shyfake")) == ["shyfake"]
    plan = make_plan(options(), RANKS, None, budget)
    assert [c.tier for c in plan.candidates] == ["fake", "slowfake"]
    assert plan.skipped == ()
    assert tier_of(placement(options("shyfake"))).name == "shyfake"


def test_a_rank_skips_a_tier_that_was_taken_since(monkeypatch: pytest.MonkeyPatch) -> None:
    where = placement(options())
    monkeypatch.setattr(FakeTier, "lost", "GPU 1 is in use by process 7")
    monkeypatch.setattr(SlowFakeTier, "lost", None)
    assert tier_of(where).name == "slowfake"
    assert where.skipped == [Skipped("fake", "GPU 1 is in use by process 7")]


# ---- several regions of one tier ----


def test_all_regions_are_of_one_tier() -> None:
    where = placement(options(fast=1000, slow=3000))
    allocation = where.allocate([(100, 10), (95, 10), (3, 1)])
    assert allocation.tier.name == "fake"
    assert [(region.nbytes, region.granule) for region in allocation.regions] == [(100, 10), (100, 10), (3, 1)]
    assert allocation.policy == CopyPolicy()
    for region in allocation.regions:
        region.release()
    # Each would fit, together they do not.
    assert tier_of(where, (600, 1), (600, 1)).name == "slowfake"


def test_granules_count_whole() -> None:
    """101 bytes in pieces of 100 are 200."""
    assert tier_of(placement(options(fast=199)), (101, 100)).name == "slowfake"
    assert tier_of(placement(options(fast=200)), (101, 100)).name == "fake"


@pytest.mark.parametrize("failing", range(3))
def test_nothing_stays_when_one_of_them_fails(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    monkeypatch.setattr(FakeTier, "fail_at", failing)
    monkeypatch.setattr(SlowFakeTier, "fail_at", None)
    where = placement(options())
    allocation = where.allocate([(10, 1)] * 3)
    assert allocation.tier.name == "slowfake"
    assert FakeTier.live == []
    assert where.skipped == [Skipped("fake", "the card is broken")]
    for region in allocation.regions:
        region.release()


def test_nothing_stays_when_nobody_may_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> CopyPolicy:
        raise Unavailable("GPU 1 is in use by process 7")

    monkeypatch.setattr(plan_module, "decide", refuse)
    with pytest.raises(ConfigError, match="fake is unavailable: GPU 1 is in use by process 7"):
        placement(options("fake")).allocate([(10, 1)] * 2)
    assert FakeTier.live == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_after_an_error_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: object) -> CopyPolicy:
        raise error

    monkeypatch.setattr(plan_module, "decide", fail)
    with pytest.raises(error):
        placement(options()).allocate([(10, 1)] * 2)
    assert FakeTier.live == []


# ---- sizes ----


def test_an_automatic_size_is_of_a_tier_with_free_capacity() -> None:
    """SGLang ends with a traceback if its budget is 0."""
    where = placement(options(fast=0))
    assert where.first_tier().name == "slowfake"
    assert where.skipped == [Skipped("fake", "it has no free capacity left", (LOWER_SIZE,))]
    with pytest.raises(ConfigError, match=r"fake is unavailable: it has no free capacity left\. Lower --hicache-size"):
        placement(options("fake", fast=0)).first_tier()


@pytest.mark.parametrize(
    ("tier", "own", "host", "expected"),
    [
        ("slowfake", 100, 1000, 100),  # a bank, or a node's share: less than the machine has
        ("slowfake", 1000, 100, 100),
        ("fake", 1000, 100, 1000),  # not of the host's RAM
        ("slowfake", 100, -5, 0),
    ],
)
def test_an_automatic_size_follows_the_tier_and_the_host(tier: str, own: int, host: int, expected: int) -> None:
    assert placement(options(tier, fast=own, slow=own)).automatic_bytes(host) == expected


def test_an_automatic_size_is_judged_by_what_it_was_made_of_and_the_next_pool_by_now() -> None:
    """Other ranks have used host memory since; a later pool is not judged by an older answer."""
    now = [1000]
    where = placement(options("slowfake"), host_budget=lambda nbytes: now[0])
    assert where.automatic_bytes(1000) == 1000
    now[0] = 500
    assert tier_of(where, (1000, 1)).name == "slowfake"
    with pytest.raises(ConfigError, match=r"need 0\.00 GB per rank"):
        where.allocate([(1000, 1)])
    where = placement(options("slowfake"), host_budget=lambda nbytes: now[0])
    with pytest.raises(ConfigError):
        where.allocate([(1000, 1)])


def test_an_automatic_size_leaves_what_each_space_may_waste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTier, "waste_bytes", lambda self, granule: 10 + granule)
    where = placement(options("fake", fast=1000))
    assert where.automatic_bytes(0) == 1000 - 11
    assert where.automatic_bytes(0, [100, 200]) == 1000 - 110 - 210
    assert where.automatic_bytes(0, [1000]) == 0


def test_a_tier_that_the_pool_has_filled_is_still_its_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    where = placement(options("fake", fast=1000))
    (region,) = where.allocate([(1000, 1)]).regions
    monkeypatch.setattr(FakeTier, "capacity_bytes", lambda self: 0)
    assert where.first_tier().name == "fake"
    assert where.automatic_bytes(1) == 0, "and it is no error that it is full"
    region.release()


def test_explicit_tier_never_falls_back() -> None:
    with pytest.raises(ConfigError, match=r"--hicache-xmem-tier fake is unavailable: the pools need .* GB are free"):
        make_plan(options("fake", fast=100), RANKS, 1000, budget)
    with pytest.raises(ConfigError, match="--hicache-xmem-tier fake is unavailable"):
        placement(options("fake", fast=100)).allocate([(1000, 1)])


def test_host_ram_limits_tiers_of_it_alone() -> None:
    """Neither GPUs' memory nor a devdax, which the CPU addresses too."""
    asked: list[int] = []

    def poor(nbytes: int) -> int:
        asked.append(nbytes)
        return 10

    for name in ("fake", "shyfake"):
        plan = make_plan(options(name), RANKS, 1000, poor)
        assert tier_of(Placement(plan, 0, poor)).name == name
    assert asked == []
    with pytest.raises(ConfigError, match=r"0\.00 GB are free"):
        make_plan(options("slowfake"), RANKS, 1000, poor)


# ---- words ----


def test_nothing_left_tells_every_reason() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(options(fast=1, slow=1), RANKS, 1000, budget)
    assert "auto finds no tier" in str(caught.value)
    assert "fake (" in str(caught.value)
    assert "slowfake (" in str(caught.value)


def test_words_are_the_engines_own() -> None:
    flags = FlagStyle("--cache-gb", "--tier", "--tier-config")
    with pytest.raises(ConfigError) as caught:
        make_plan(options("fake", fast=1, flags=flags), RANKS, 1000, budget)
    assert str(caught.value).startswith("--tier fake is unavailable: the pools need")
    assert str(caught.value).endswith(". Lower --cache-gb.")
    assert describe_skipped([Skipped("a", "why", (LOWER_SIZE,)), Skipped("b", "so")], flags) == (
        "a (why; lower --cache-gb); b (so)"
    )


def test_another_tier_is_no_fix_among_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    use = Remedy("use_tier", value="dram")
    assert describe_skipped([Skipped("a", "why", (use,))]) == "a (why)"

    def plan_ranks(settings: Any, ranks: Ranks) -> tuple[Any, ...]:
        raise Unavailable("it needs GPUs", use)

    monkeypatch.setattr(FakeTier, "plan_ranks", plan_ranks)
    with pytest.raises(ConfigError, match=r"fake is unavailable: it needs GPUs\. Use --hicache-xmem-tier dram\.$"):
        make_plan(options("fake"), RANKS, None, budget)


def test_a_setting_is_refused_by_the_name_of_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_ranks(settings: Any, ranks: Ranks) -> tuple[Any, ...]:
        raise SettingError("fake.card", "is 9", "give 1 to 8")

    monkeypatch.setattr(FakeTier, "plan_ranks", plan_ranks)
    with pytest.raises(ConfigError, match=r"^CONFIG 'fake\.card' is 9\. Give 1 to 8\.$"):
        make_plan(options("auto", flags=FlagStyle("S", "T", "CONFIG")), RANKS, None, budget)


def test_examination_tells_of_every_tier_where_none_can_serve() -> None:
    found = list(examine(options(fast=1, slow=1), RANKS, 1000, budget))
    assert [type(each) for each in found] == [Skipped, Skipped]
    assert [each.tier for each in found] == ["fake", "slowfake"]


def test_a_machine_without_a_rank_is_told() -> None:
    with pytest.raises(ConfigError, match="No rank"):
        make_plan(options(), Ranks(gpus=()), None, budget)


def test_capacity_of_a_candidate_is_that_of_each_rank() -> None:
    chosen = options(fast=300, slow=200)
    fast, slow = examine(chosen, RANKS, 100, budget)
    assert isinstance(fast, Candidate)
    assert isinstance(slow, Candidate)

    def poor(nbytes: int) -> int:
        return nbytes - 150

    assert candidate_free_bytes(fast, chosen, RANKS, 200, poor) == 300
    assert candidate_free_bytes(slow, chosen, RANKS, 200, poor) == 50
    assert candidate_free_bytes(slow, chosen, RANKS, 100, poor) == 0

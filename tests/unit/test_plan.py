"""Which tier serves: order, room, what is passed over and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeSettings, FakeTier, SlowFakeTier

from sglang_xmem import plan as plan_module
from sglang_xmem.config import CopySettings, Options
from sglang_xmem.errors import ConfigError
from sglang_xmem.plan import Candidate, PassedOver, Placement, candidate_room_bytes, examine, make_plan
from sglang_xmem.tiers import Ranks, tier_classes


@pytest.fixture(autouse=True)
def fake_tiers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiers = {"fake": FakeTier, "slowfake": SlowFakeTier}
    monkeypatch.setattr(plan_module, "tier_classes", lambda: tiers)
    monkeypatch.setattr(FakeTier, "missing", None)
    monkeypatch.setattr(FakeTier, "taken", None)
    yield
    assert FakeTier.live == []
    assert SlowFakeTier.live == []


def options(tier: str = "auto", fast: int = 1 << 30, slow: int = 1 << 30) -> Options:
    settings: dict[str, Any] = {"fake": FakeSettings(fast), "slowfake": FakeSettings(slow)}
    return Options(tier=tier, copy=CopySettings(), tiers=settings)


def budget(nbytes: int) -> int:
    return 1 << 40


RANKS = Ranks(gpus=(None, None))


def test_every_tier_file_is_found_fastest_first() -> None:
    assert list(tier_classes()) == ["mtier", "peer", "dram"]


def test_auto_takes_the_fastest() -> None:
    placement = Placement(make_plan(options(), RANKS, None, budget), 1, budget)
    tier, region = placement.allocate(1000)
    assert (tier.name, tier.seat) == ("fake", 1)
    region.release()
    region.release()  # idempotent


def test_auto_passes_over_what_is_missing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTier, "missing", "no such card")
    monkeypatch.setattr(SlowFakeTier, "missing", None)
    plan = make_plan(options(), RANKS, None, budget)
    assert [c.tier for c in plan.candidates] == ["slowfake"]
    assert plan.passed_over == (("fake", "no such card"),)


def test_auto_passes_over_a_tier_without_room_in_the_launcher() -> None:
    plan = make_plan(options(fast=100), RANKS, 1000, budget)
    assert [c.tier for c in plan.candidates] == ["slowfake"]
    assert "lower --hicache-size" in plan.passed_over[0][1]


def test_a_rank_passes_over_a_tier_that_was_taken_since(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(options(), RANKS, None, budget)
    monkeypatch.setattr(FakeTier, "taken", "GPU 1 is in use by process 7")
    monkeypatch.setattr(SlowFakeTier, "taken", None)
    placement = Placement(plan, 0, budget)
    tier, region = placement.allocate(1000)
    region.release()
    assert tier.name == "slowfake"
    assert placement.passed_over == [("fake", "GPU 1 is in use by process 7")]


def test_an_automatic_size_is_of_a_tier_with_room() -> None:
    """SGLang ends with a traceback where it is told that there is none."""
    placement = Placement(make_plan(options(fast=0), RANKS, None, budget), 0, budget)
    assert placement.first_tier().name == "slowfake"
    assert placement.passed_over == [("fake", "it has no room left")]
    with pytest.raises(ConfigError, match="--hicache-xmem-tier fake cannot be used: it has no room left"):
        Placement(make_plan(options("fake", fast=0), RANKS, None, budget), 0, budget).first_tier()


def test_a_tier_that_the_pool_has_filled_is_still_its_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = Placement(make_plan(options("fake", fast=1000), RANKS, None, budget), 0, budget)
    _, region = placement.allocate(1000)
    monkeypatch.setattr(FakeTier, "capacity_bytes", lambda self: 0)
    assert placement.first_tier().name == "fake"
    region.release()


def test_explicit_tier_never_falls_back() -> None:
    with pytest.raises(ConfigError, match=r"--hicache-xmem-tier fake cannot be used: the pool needs .* room for"):
        make_plan(options("fake", fast=100), RANKS, 1000, budget)
    placement = Placement(make_plan(options("fake", fast=100), RANKS, None, budget), 0, budget)
    with pytest.raises(ConfigError, match="--hicache-xmem-tier fake cannot be used"):
        placement.allocate(1000)


def test_host_ram_limits_host_tiers_alone() -> None:
    def poor(nbytes: int) -> int:
        return 10

    tier, region = Placement(make_plan(options("fake"), RANKS, 1000, poor), 0, poor).allocate(1000)
    region.release()
    assert tier.name == "fake"
    with pytest.raises(ConfigError, match="room for 0.00 GB"):
        make_plan(options("slowfake"), RANKS, 1000, poor)


def test_nothing_left_tells_every_reason() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(options(fast=1, slow=1), RANKS, 1000, budget)
    assert "auto finds no tier" in str(caught.value)
    assert "fake (" in str(caught.value)
    assert "slowfake (" in str(caught.value)


def test_examination_tells_of_every_tier_where_none_can_serve() -> None:
    found = list(examine(options(fast=1, slow=1), RANKS, 1000, budget))
    assert [type(each) for each in found] == [PassedOver, PassedOver]
    assert [each.tier for each in found] == ["fake", "slowfake"]


def test_room_of_a_candidate_is_that_of_a_pool_of_each_rank() -> None:
    chosen = options(fast=300, slow=200)
    fast, slow = examine(chosen, RANKS, 100, budget)
    assert isinstance(fast, Candidate)
    assert isinstance(slow, Candidate)

    def poor(nbytes: int) -> int:
        return nbytes - 150

    assert candidate_room_bytes(fast, chosen, RANKS, 200, poor) == 300
    assert candidate_room_bytes(slow, chosen, RANKS, 200, poor) == 50
    assert candidate_room_bytes(slow, chosen, RANKS, 100, poor) == 0

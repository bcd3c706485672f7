"""What of SGLang's settings tier bank refuses, and where `auto` goes then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_xmem.config import parse_options
from sglang_xmem.engines.sglang import launcher, versions
from sglang_xmem.errors import ConfigError
from sglang_xmem.plan import Candidate, Plan
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers.bank import BankRankPlan
from sglang_xmem.tiers.dram import DramRankPlan


def fitted(monkeypatch: pytest.MonkeyPatch, *tiers: str, sglang: str = "0.5.23", **settings: Any) -> Plan:
    """The plan of an engine whose machine has these tiers."""
    monkeypatch.setattr(versions, "installed", lambda: sglang)
    cfg = SimpleNamespace(**{"hicache_storage_backend": None, "enable_hierarchical_cache": True, **settings})
    plans = {"bank": BankRankPlan(1), "dram": DramRankPlan()}
    plan = Plan(parse_options(), Ranks((None,)), tuple(Candidate(tier, (plans[tier],)) for tier in tiers), ())
    return launcher.fit_bank(plan, cfg)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hicache_storage_backend": "file"}, "--hicache-storage-backend file"),
        ({"enable_hierarchical_cache": False}, "--enable-hierarchical-cache"),
        ({"sglang": "0.5.22"}, "SGLang 0.5.23"),
    ],
)
def test_what_does_not_work_is_a_sentence_or_another_tier(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str
) -> None:
    assert [c.tier for c in fitted(monkeypatch, "bank", "dram").candidates] == ["bank", "dram"]
    plan = fitted(monkeypatch, "bank", "dram", **settings)
    assert [c.tier for c in plan.candidates] == ["dram"]
    assert [(skipped.tier, words in skipped.reason) for skipped in plan.skipped] == [("bank", True)]
    with pytest.raises(ConfigError) as caught:
        fitted(monkeypatch, "bank", **settings)
    assert words in str(caught.value)
    assert str(caught.value).startswith("Tier bank cannot serve: ")
    assert "use --hicache-xmem-tier dram." in str(caught.value)
    assert [c.tier for c in fitted(monkeypatch, "dram", **settings).candidates] == ["dram"]

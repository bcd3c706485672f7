"""What the launcher refuses or plans around, by SGLang's settings, without SGLang."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from sglang_xmem.config import parse_options
from sglang_xmem.engines.sglang import flags, launcher
from sglang_xmem.errors import ConfigError
from sglang_xmem.plan import Candidate, Plan
from sglang_xmem.tiers import Ranks


def settings(**given: Any) -> types.SimpleNamespace:
    usual = {"hicache_host_memory_mode": "cache", "hicache_storage_backend": None, "enable_unified_memory": False}
    return types.SimpleNamespace(**{**usual, "device": "cpu", "hicache_mem_layout": "layer_first", **given})


def refused(cfg: types.SimpleNamespace) -> list[str]:
    return [option for option, value, supported, _ in launcher._unsupported(cfg) if value not in supported]


@pytest.mark.parametrize("size", [-1, float("nan"), float("inf"), 1e300, 10**400])
def test_a_size_that_is_none_is_one_sentence(size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sglang", "sglang.srt", "sglang.srt.arg_groups", "sglang.srt.arg_groups.overrides"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.environ", types.SimpleNamespace(envs=None))
    sys.modules["sglang.srt.arg_groups.overrides"].resolving_view = lambda record: record  # type: ignore[attr-defined]
    record = settings(disaggregation_mode="null", enable_hierarchical_cache=True, hicache_size=size)
    with pytest.raises(ConfigError, match=r"^--hicache-size must be >= 0 "):
        launcher.plan_for(record, flags.Request("dram", None, from_cli=True))


@pytest.mark.parametrize(
    ("backend", "layout", "options"),
    [
        # SGLang sets another layout for these by itself; no sentence may blame it, and here it does not matter.
        ("mooncake", "page_first", []),
        ("hf3fs", "page_first_direct", []),
        ("file", "layer_first", []),
        ("lmcache", "layer_first", ["--hicache-storage-backend"]),
    ],
)
def test_a_storage_backend_is_not_refused_for_its_layout(backend: str, layout: str, options: list[str]) -> None:
    assert refused(settings(hicache_storage_backend=backend, hicache_mem_layout=layout)) == options


@pytest.mark.parametrize(
    ("backend", "extra", "needed"),
    [
        ("mooncake", None, True),
        ("nixl", "{}", True),
        ("file", None, False),
        (None, None, False),
        ("dynamic", '{"interface_v1": 1}', True),
        ("dynamic", {"interface_v1": 0}, False),
        ("dynamic", "@a file that SGLang reads later", True),
    ],
)
def test_who_needs_addresses(backend: str | None, extra: Any, needed: bool) -> None:
    assert launcher.needs_addresses(backend, extra) is needed


def plan(*tiers: str) -> Plan:
    candidates = tuple(Candidate(tier=tier, rank_plans=(None,)) for tier in tiers)
    return Plan(options=parse_options("auto"), ranks=Ranks(gpus=(None,)), candidates=candidates, skipped=())


def test_a_backend_with_addresses_leaves_tiers_that_the_cpu_addresses() -> None:
    kept = launcher._with_addresses(plan("peer", "dram"), "--hicache-storage-backend mooncake")
    assert [candidate.tier for candidate in kept.candidates] == ["dram"]
    assert [skipped.tier for skipped in kept.skipped] == ["peer"]
    assert launcher._with_addresses(kept, "--hicache-storage-backend mooncake") == kept


def test_a_backend_with_addresses_over_gpu_memory_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^--hicache-storage-backend nixl needs memory .* tier peer is GPU memory\."):
        launcher._with_addresses(plan("peer"), "--hicache-storage-backend nixl")

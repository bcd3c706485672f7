"""Engines of the oldest SGLang that has a table, and of the newest with its patch and so without hooks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sglang_xmem.engines.sglang import versions
from tests.e2e import harness
from tests.e2e.kinds import KINDS, loads_of
from tests.e2e.test_kinds import check_tier_hit
from tests.unit.engines.other_sglang import patched, unpacked

pytestmark = pytest.mark.cpu_engine

NEWEST, *_, OLDEST = versions.known()


@pytest.mark.parametrize("case", [f"{OLDEST}", f"{NEWEST} with its patch"])
def test_an_engine_of_another_sglang(case: str, tiny_model: Path, tmp_path: Path) -> None:
    """A hit in the tier equals one in the device pool, and has moved every byte."""
    folder = patched(NEWEST, tmp_path / "patched") if "patch" in case else unpacked(OLDEST)
    kind = KINDS["mha"]
    spec = kind.spec(str(tiny_model), harness.XMEM_DRAM, {}, controls=False)
    result = harness.run(dataclasses.replace(spec, sglang=str(folder), forked=False))
    check_tier_hit(kind, result.answers)
    assert [load.wrong for load in loads_of(result.loads, kind)] == [{"kv": 0}]
    assert result.tier == "dram"
    assert result.survivors == []

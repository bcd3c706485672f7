"""SGLang's own host pools in the page bank: what the bank has no place for is one sentence, or another tier."""

from __future__ import annotations

import pytest

from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB
from tests.pools.factories import KINDS, make
from tests.pools.seam import sglang, xmem_in  # noqa: F401  (a fixture of this module)

pytestmark = pytest.mark.cpu_engine


@pytest.fixture(autouse=True)
def service(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTIER_SOCKET", str(start_daemon("--bank", f"host:{256 * MIB}", "--lazy").socket_path))


def tier_of(kind: str, tier: str) -> str:
    """Build a kind's pools; return the tier that their pages are in."""
    seam = xmem_in(tier)
    with seam.setup() as session:
        built = make(kind, page_size=KINDS[kind].page_sizes[-1], layout="page_first", attach=seam.attach)
        try:
            return str(session.arenas[-1].tier.name)
        finally:
            built.close()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("deepseek_v4", "it does not support models whose first pool has no bytes"),
        ("swa_mamba", "it does not support models with both sliding windows and Mamba states"),
    ],
)
def test_pools_that_cannot_be_shared_are_refused_in_one_sentence(
    kind: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tier_of(kind, "bank")
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line == f"sglang_xmem: --hicache-xmem-tier bank is unavailable: {why}. Use --hicache-xmem-tier dram."


@pytest.mark.parametrize(
    ("kind", "tier"),
    [("deepseek_v4", "dram"), ("swa_mamba", "dram"), ("mha", "bank"), ("swa", "bank"), ("gdn", "bank")],
)
def test_automatic_choice_has_a_place_for_each_kind(kind: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_xmem.plan.tried_tiers", lambda options: ["bank", "dram"])
    assert tier_of(kind, "auto") == tier

"""Who copies: the one place that decides, over facts of regions, settings and the machine."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_xmem import gpus
from sglang_xmem.copies.policy import CopyPolicy, common, decide
from sglang_xmem.errors import Unavailable
from sglang_xmem.tiers import Region, Traits
from sglang_xmem.tiers.dram import DramSettings, DramTier
from sglang_xmem.tiers.mtier import MTierSettings, MTierTier
from sglang_xmem.tiers.peer import PeerSettings, PeerTier


@pytest.fixture(autouse=True)
def busy(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Who uses a GPU."""
    uses: dict[int, str] = {}
    monkeypatch.setattr(gpus, "foreign_use", uses.get)
    return uses


def region(gpus: tuple[int, ...] = (), reachable_from: tuple[int, ...] = ()) -> Region:
    return Region([], "a test", lambda: None, gpus=gpus, reachable_from=reachable_from)


def peer(peers: tuple[int, ...], reachable_from: tuple[int, ...], rank: int | None = 0, **settings: Any) -> CopyPolicy:
    return decide(PeerTier.traits, PeerSettings(**settings), region(peers, reachable_from), rank)


def test_an_idle_peer_copies_that_reaches_all() -> None:
    assert peer((5, 6), (5,)) == CopyPolicy(runner=5)
    assert peer((5, 6), ()) == CopyPolicy()
    assert peer((5, 6), (5,), copy_on="rank") == CopyPolicy()
    assert peer((5, 6), (5,), copy_on="peer") == CopyPolicy(runner=5, required=True)
    assert peer((5, 6), (5,), rank=None) == CopyPolicy()


def test_a_named_peer_copies_while_it_is_idle(busy: dict[int, str]) -> None:
    assert peer((5, 6), (5,), gpus=(5, 6)) == CopyPolicy(runner=5)
    busy[5] = "GPU 5 is in use by process 7"
    assert peer((5, 6), (5,), gpus=(5, 6)) == CopyPolicy()
    assert peer((6, 5), (6,), gpus=(6, 5)) == CopyPolicy(runner=6)
    # A GPU that the user did not name was idle when it was chosen; this engine's own use does not count.
    assert peer((5, 6), (5,)) == CopyPolicy(runner=5)


def test_a_peer_that_was_asked_for_and_cannot_is_told(busy: dict[int, str]) -> None:
    with pytest.raises(
        Unavailable, match=r"GPU 5, selected by peer\.copy_on, cannot access GPU 0 and all of its peers"
    ):
        peer((5, 6), (), copy_on="peer")
    busy[5] = "GPU 5 is in use by process 7"
    with pytest.raises(Unavailable, match=r"GPU 5 is in use by process 7, but peer\.copy_on needs it idle"):
        peer((5, 6), (5,), copy_on="peer", gpus=(5, 6))


def test_relays_are_those_dealt_to_the_rank() -> None:
    settings = DramSettings(relays=(3, 1, 2))
    assert decide(DramTier.traits, settings, region((), (1, 2)), 0) == CopyPolicy(relays=(1, 2))
    assert decide(DramTier.traits, settings, region(), 0) == CopyPolicy()
    assert decide(DramTier.traits, DramSettings(), region(), 0) == CopyPolicy()
    assert decide(DramTier.traits, settings, region((), (1, 2)), None) == CopyPolicy()


def test_tiers_without_such_settings_copy_by_the_rank() -> None:
    traits = Traits(cpu_addressable=True, counts_as_host_ram=False, link="cxl")
    assert decide(MTierTier.traits, MTierSettings(), region(), 0) == CopyPolicy()
    assert decide(traits, object(), region((), ()), 0) == CopyPolicy()


def test_regions_of_one_copier_agree() -> None:
    one, other = CopyPolicy(runner=5), CopyPolicy(runner=6)
    assert common([one, one]) == one
    assert common([one, other]) == CopyPolicy()
    assert common([CopyPolicy(relays=(1, 2)), CopyPolicy(relays=(2,))]) == CopyPolicy(relays=(2,))
    with pytest.raises(Unavailable, match="no GPU can copy for all pools"):
        common([one._replace(required=True), other._replace(required=True)])

"""Tier mtier over a running service; tests/mtier/test_tier_contract.py starts one and runs this in a process."""

from __future__ import annotations

import pytest

from sglang_xmem.tiers.mtier import MTierSettings, MTierTier, bank_rooms
from tests.contracts.tiers import MIB, Case, TierContract, planned


class TestMTier(TierContract):
    @pytest.fixture(params=[None, (1,)])
    def case(self, request: pytest.FixtureRequest) -> Case:
        tier = planned(MTierTier, MTierSettings(banks=request.param), None)

        def check() -> None:
            assert bank_rooms() == [(16 * MIB, 16 * MIB), (64 * MIB, 64 * MIB)]

        check()
        return Case(tier, check)

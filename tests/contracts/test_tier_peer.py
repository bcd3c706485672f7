"""Tier peer keeps the contract, over a driver that has its rules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_xmem.tiers.peer import CONTEXT_BYTES, PeerSettings, PeerTier
from tests.contracts.tiers import Case, TierContract, planned
from tests.unit.tiers.test_peer import MIB, RESERVE_BYTES, machine_with


class TestPeer(TierContract):
    @pytest.fixture(params=[None, (1,), (2, 1)])
    def case(self, request: pytest.FixtureRequest) -> Iterator[Case]:
        with machine_with([0] + [RESERVE_BYTES + 64 * MIB] * 2) as machine:
            driver = machine.driver
            driver.context_bytes = CONTEXT_BYTES

            def fail(number: int | None) -> None:
                driver.fail_at, driver._acquired = number, 0

            def covers(address: int, nbytes: int) -> bool:
                return (
                    sum(b.size for at, b in driver.mapped.items() if at < address + nbytes and address < at + b.size)
                    >= nbytes
                )

            settings = PeerSettings(gpus=request.param, stripe_mib=2)
            tier = planned(PeerTier, settings, 0)
            peers = len(request.param or (1,))
            # Granularity and context of each, addresses, stripes made and mapped, access.
            calls = 2 * peers + 1 + 2 * peers + 1
            yield Case(tier, machine.check_untouched, None, covers=covers, fail=fail, calls=calls)

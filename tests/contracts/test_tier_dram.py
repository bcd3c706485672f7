"""Tier dram keeps the contract, with memory of the CPU's and with memory that a driver pins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_xmem import machine
from sglang_xmem.tiers.dram import DramSettings, DramTier
from tests.contracts.tiers import Case, TierContract, planned
from tests.unit.tiers.fake_pinning import MIB, pinning


@pytest.fixture(autouse=True)
def constant_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes allocate memory at the same time."""
    monkeypatch.setattr(machine, "host_available_bytes", lambda: 1 << 34)
    monkeypatch.setattr(machine, "memory_nodes", lambda: (0,))


class TestDramOfTheCpu(TierContract):
    @pytest.fixture
    def case(self) -> Case:
        return Case(planned(DramTier, DramSettings(), None), counts=False)


class TestDramThatIsPinned(TierContract):
    @pytest.fixture
    def case(self) -> Iterator[Case]:
        with pinning(2 * MIB) as driver:

            def fail(number: int | None) -> None:
                driver.fail_at, driver.acquired = number, 0

            tier = planned(DramTier, DramSettings(threads=2), 0)
            # A context, made current, two registrations and what the GPU sees of each.
            yield Case(tier, driver.check_untouched, counts=False, fail=fail, calls=6)

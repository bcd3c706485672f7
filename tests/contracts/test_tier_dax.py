"""Tier dax keeps the contract, with a file on tmpfs for its device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contracts.tiers import Case, TierContract
from tests.unit.tiers.fake_pinning import MIB, pinning
from tests.unit.tiers.test_dax import Device, device

__all__ = ["device"]


class TestDax(TierContract):
    @pytest.fixture
    def case(self, device: Device) -> Iterator[Case]:
        with pinning(2 * MIB) as driver:

            def fail(number: int | None) -> None:
                driver.fail_at, driver.acquired = number, 0

            def check() -> None:
                driver.check_untouched()
                device.plans()  # no range is claimed

            yield Case(device.tier(gpu=0), check, fail=fail, calls=6)

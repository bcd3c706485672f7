"""The tier contract, for tier bank against a running mtierd: spaces of one session alone."""

from __future__ import annotations

import pytest

from sglang_xmem.tiers.bank import BankSettings, BankTier
from tests.contracts.tiers import Case, TierContract, planned
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB
from tests.mtier.test_dax_bank import Bank, bank, device

__all__ = ["bank", "device"]  # fixtures


class TestBank(TierContract):
    @pytest.fixture
    def case(self, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> Case:
        daemon = start_daemon("--bank", f"host:{64 * MIB}")
        monkeypatch.setenv("MTIER_SOCKET", str(daemon.socket_path))

        def check_untouched() -> None:
            status = daemon.status()
            assert status["spaces"] == []
            assert status["banks"][0]["available"] == 64 * MIB

        return Case(planned(BankTier, BankSettings(), None), check_untouched)


class TestBankOnADevice(TierContract):
    @pytest.fixture
    def case(self, bank: Bank) -> Case:
        daemon = bank.start(nbytes=64 * MIB)

        def check_untouched() -> None:
            status = daemon.status()
            assert status["spaces"] == []
            assert status["devices"][0]["available"] == 60 * MIB  # less the superblock and a ledger

        return Case(planned(BankTier, BankSettings(memory="dax"), None), check_untouched)

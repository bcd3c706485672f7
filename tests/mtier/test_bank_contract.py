"""The tier contract, for tier bank against a running mtierd: spaces of one session alone."""

from __future__ import annotations

import pytest
from conftest import StartDaemon
from service import MIB
from tiers import Case, TierContract, planned

from sglang_xmem.tiers.bank import BankSettings, BankTier


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

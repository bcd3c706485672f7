"""SGLang's CPU engine with its pool in a bank of mtierd."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import StartDaemon
from service import MIB, client_environment, wait_until

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

pytestmark = [
    pytest.mark.cpu_engine,
    pytest.mark.skipif(importlib.util.find_spec("xmem") is None, reason="needs the package xmem-mtier"),
]


def test_hit_from_a_bank(tiny_model: Path, build: Path, start_daemon: StartDaemon) -> None:
    from harness import EVICT_AND_ASK_AGAIN, Spec, run
    from test_engines import check_ended, check_tier_hit

    daemon = start_daemon("--bank", f"host:{16 * MIB}", "--bank", f"host:{512 * MIB}")
    environment = client_environment(build, daemon.socket_path)
    options = {"hicache_use_xmem": True, "hicache_xmem_tier": "mtier", "hicache_xmem_config": {"mtier": {"banks": [1]}}}
    result = run(Spec("engine", str(tiny_model), options, EVICT_AND_ASK_AGAIN, environment))
    check_tier_hit(result.answers)
    check_ended(result)
    assert result.tier == "mtier"
    assert "in host memory of mtier bank 1" in result.log
    assert "bytes of bank 1" in daemon.log()
    wait_until(lambda: daemon.available(1) == 512 * MIB, 1)

"""SGLang's CPU engine with its pool in banks of mtierd."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest

from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, client_environment, wait_until

pytestmark = [
    pytest.mark.cpu_engine,
    pytest.mark.skipif(importlib.util.find_spec("xmem") is None, reason="needs the package xmem-mtier"),
]


def test_hit_from_a_bank(tiny_model: Path, build: Path, start_daemon: StartDaemon) -> None:
    from tests.e2e.harness import EVICT_AND_ASK_AGAIN, Spec, run
    from tests.e2e.test_engines import check_ended, check_tier_hit

    daemon = start_daemon("--bank", f"host:{16 * MIB}", "--bank", f"host:{512 * MIB}")
    environment = client_environment(build, daemon.socket_path)
    options = {"hicache_use_xmem": True, "hicache_xmem_tier": "mtier", "hicache_xmem_config": {"mtier": {"banks": [1]}}}
    result = run(Spec("engine", str(tiny_model), options, EVICT_AND_ASK_AGAIN, environment))
    check_tier_hit(result.answers)
    check_ended(result)
    assert result.tier == "mtier"
    assert "in host memory of mtier bank 1" in result.log
    assert "MB of bank 1" in daemon.log()
    wait_until(lambda: daemon.available(1) == 512 * MIB, 1)


def test_two_servers_share_a_bank_and_one_is_killed(
    tiny_model: Path, build: Path, fake_cuda: Path, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """The same as tests/gpu runs on GPUs, with GPU memory that is files."""
    from tests.mtier.sharing import share

    driver = {"MTIER_CUDA_LIBRARY": str(fake_cuda), "FAKE_CUDA_CONTEXT": "0"}
    daemon = start_daemon("--bank", f"gpu:1:{128 * MIB}", environment=driver)
    environment = {**client_environment(build, daemon.socket_path), **driver}
    result = share(daemon, str(tiny_model), ({}, {}), environment, tmp_path, mapped_memory, 180)
    assert result["cached"] == [{"device": 0, "host": 384}] * 2


def mapped_memory() -> int:
    """Bytes of the fake driver's memory that some process maps."""
    sizes: dict[str, int] = {}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in maps.read_text().splitlines():
                if "memfd:fake-gpu" in line:
                    bounds, _, _, _, inode, *_ = line.split()
                    start, end = (int(number, 16) for number in bounds.split("-"))
                    sizes[inode] = end - start
    return sum(sizes.values())


def test_a_pool_striped_over_banks(tiny_model: Path, build: Path, start_daemon: StartDaemon) -> None:
    from tests.e2e.harness import EVICT_AND_ASK_AGAIN, Spec, run
    from tests.e2e.test_engines import check_ended, check_tier_hit

    daemon = start_daemon("--bank", f"host:{64 * MIB}", "--bank", f"host:{64 * MIB}")
    environment = client_environment(build, daemon.socket_path)
    options = {"hicache_use_xmem": True, "hicache_xmem_tier": "mtier"}
    result = run(Spec("engine", str(tiny_model), options, EVICT_AND_ASK_AGAIN, environment))
    check_tier_hit(result.answers)
    check_ended(result)
    assert "in host memory of mtier bank 0, 1" in result.log

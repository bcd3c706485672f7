"""Tier mtier over a service: rank plans, free capacity, banks side by side, release, and each error's sentence."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sglang_xmem.errors import ConfigError, Unavailable
from sglang_xmem.tiers import Ranks, mtier
from sglang_xmem.tiers.mtier import MTierRankPlan, MTierSettings, MTierTier
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, client_environment, wait_until

needs_sdk = pytest.mark.skipif(
    importlib.util.find_spec("xmem") is None or importlib.util.find_spec("torch") is None,
    reason="needs the packages xmem-mtier and torch",
)

PRELUDE = """
import os, signal, subprocess, sys
from sglang_xmem.config import parse_options
from sglang_xmem.errors import ConfigError, Unavailable
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers.mtier import MTierSettings, MTierTier
MIB = 1 << 20
def plan(tier="mtier", banks=None, ranks=1, pool_bytes=None):
    config = {} if banks is None else {"mtier": {"banks": banks}}
    ranks = Ranks(gpus=(None,) * ranks)
    return make_plan(parse_options(tier, config), ranks, pool_bytes, lambda _: 1 << 40)
def sentence(function):
    try:
        function()
    except (ConfigError, Unavailable) as error:
        text = str(error)
        assert "\\n" not in text, text
        return text
    raise AssertionError("no error")
"""


def run(script: str, *arguments: str, environment: dict[str, str]) -> str:
    """Output of a script behind PRELUDE in a process of its own: the SDK connects once in a process's life."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *arguments]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    # Half-made objects of the SDK complain on stderr as they are collected; users must not see that.
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def test_importing_the_tier_imports_no_sdk() -> None:
    script = "import sys, sglang_xmem.tiers.mtier; print({'xmem', 'torch', 'cuda'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("banks", [(), (0, 0)])
def test_wrong_banks_are_refused_before_the_sdk_is_needed(banks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"'mtier.banks' is .*\. Name at least one bank, and none twice"):
        MTierTier.plan_ranks(MTierSettings(banks=banks), Ranks(gpus=(None,)))


@needs_sdk
@pytest.mark.parametrize("kinds", [("host", "host"), ("gpu:0", "gpu:1"), ("gpu:1", "host")])
def test_regions_lie_in_all_banks(
    build: Path, fake_cuda: Path, start_daemon: StartDaemon, kinds: tuple[str, str]
) -> None:
    """And these have their memory again.

    The fake driver's GPU memory is memory that the CPU reads, so the CPU's pool can be there too.
    """
    driver = {"MTIER_CUDA_LIBRARY": str(fake_cuda), "FAKE_CUDA_CONTEXT": "0"}
    banks = (f"{kinds[0]}:{16 * MIB}", f"{kinds[1]}:{64 * MIB}")
    daemon = start_daemon(*(word for bank in banks for word in ("--bank", bank)), environment=driver)
    script = """
    import ctypes
    from xmem import mtier_sdk as sdk

    frame, frames = 6_144_000 // 8, 16
    where = Placement(plan(), 0, lambda _: 1 << 40)
    allocation = where.allocate([(frames * frame, frame), (MIB, 4096)])
    assert allocation.tier.name == "mtier"
    traits = allocation.tier.traits
    assert (traits.cpu_addressable, traits.counts_as_host_ram, traits.link) == (True, True, "none")
    region, other = allocation.regions
    # Striped: half of the frames in each bank, and each bank's share in whole granules.
    assert [extent.nbytes for extent in region.extents] == [frames // 2 * frame] * 2
    assert [extent.nbytes for extent in other.extents] == [MIB // 2] * 2
    assert sdk.get_bank_status(0).available_memory == 16 * MIB - 8 * MIB
    assert sdk.get_bank_status(1).available_memory == 64 * MIB - 8 * MIB
    extents = [extent for each in allocation.regions for extent in each.extents]
    for number, (address, nbytes) in enumerate(extents):
        ctypes.memset(address, number + 1, nbytes)
    for number, (address, nbytes) in enumerate(extents):
        assert ctypes.string_at(address, nbytes) == bytes([number + 1]) * nbytes
    for each in allocation.regions:
        each.release()
        each.release()
    assert sdk.get_bank_status(0).available_memory == 16 * MIB
    assert sdk.get_bank_status(1).available_memory == 64 * MIB
    # Freed at exit without a close.
    (region,) = Placement(plan(banks=[1]), 0, lambda _: 1 << 40).allocate([(9 * MIB, 1)]).regions
    print(region.summary)
    """
    environment = {**client_environment(build, daemon.socket_path), **driver}
    assert run(script, environment=environment) == "host memory of mtier bank 1"
    wait_until(lambda: daemon.available(1) == 64 * MIB, 1)


def test_a_bank_of_the_wrong_kind_is_not_filled_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host bank's memory is populated, which no budget of host memory has allowed where a GPU's was planned."""
    asked: list[tuple[str, int]] = []

    def malloc(self: MTierTier, bank: int, nbytes: int) -> int:
        asked.append(("malloc", nbytes))
        return 4096

    def check(self: MTierTier, bank: int, address: int) -> None:
        assert address == 4096
        raise Unavailable(f"bank {bank} is host memory that GPUs cannot address")

    monkeypatch.setattr(MTierTier, "_free", lambda self: {0: 1 << 30})
    monkeypatch.setattr(MTierTier, "_malloc", malloc)
    monkeypatch.setattr(MTierTier, "_check_address", check)
    freed = ("free", 4096)
    monkeypatch.setattr(mtier, "_releaser", lambda address, context: lambda: asked.append(("free", address)))
    with pytest.raises(Unavailable, match="bank 0 is host memory"):
        MTierTier(MTierSettings(), MTierRankPlan((0,), (1 << 30,)), 0).allocate(512 * MIB, 128 * MIB)
    assert asked == [("malloc", mtier.GRANULE_BYTES), freed]


@needs_sdk
def test_rank_plans_capacity_and_errors(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(*(word for size in (64, 32, 16) for word in ("--bank", f"host:{size * MIB}")))
    script = """
    def banks_of(banks, ranks):
        return [one.banks for one in plan(banks=banks, ranks=ranks).candidates[0].rank_plans]
    assert banks_of(None, 1) == [(0, 1, 2)]
    assert banks_of(None, 2) == [(0, 2), (1,)]
    assert banks_of([2, 0], 3) == [(2,), (0,), (2,)]
    def sdk_free(bank):
        from xmem import mtier_sdk
        return mtier_sdk.get_bank_status(bank).available_memory // MIB
    def free(banks, ranks):
        return [MTierTier(MTierSettings(), one, None).capacity_bytes() // MIB
                for one in plan(banks=banks, ranks=ranks).candidates[0].rank_plans]
    assert free(None, 1) == [112]
    assert free(None, 2) == [80, 32]
    assert free([0], 3) == [20, 20, 20]  # whole granules
    assert free([0], 4) == [16, 16, 16, 16]  # who shares a bank shares its capacity
    # Two ranks that share a bank both get their pools.
    shared = plan(banks=[1], ranks=2, pool_bytes=16 * MIB)
    allocations = [Placement(shared, rank, lambda _: 1 << 40).allocate([(16 * MIB, 1)]) for rank in (0, 1)]
    for allocation in allocations:
        allocation.regions[0].release()

    assert sentence(lambda: plan(banks=[0, 3])) == (
        "--hicache-xmem-config 'mtier.banks' names bank 3, but the service has 3, counted from 0. Name one of these.")
    assert sentence(lambda: plan(tier="auto", banks=[-1])).startswith("--hicache-xmem-config 'mtier.banks'")
    too_much = sentence(lambda: plan(pool_bytes=113 * MIB))
    assert too_much.startswith("--hicache-xmem-tier mtier is unavailable: the pools need 0.12 GB per rank"), too_much
    one = plan().candidates[0].rank_plans[0]
    tier = MTierTier(MTierSettings(), one, None)
    out = sentence(lambda: tier.allocate(65 * MIB, 65 * MIB))
    assert "lower --hicache-size" in out and "0.07 GB in bank 0, 0.03 GB in bank 1, " in out, out
    # Granules are whole in a bank; a bank that is full is left out.
    out = sentence(lambda: tier.allocate(2 * 50 * MIB, 50 * MIB))
    assert "the pool needs 2 piece(s) of 0.05 GB, but" in out, out
    region = tier.allocate(7 * 14 * MIB, 14 * MIB)
    assert [sdk_free(bank) for bank in range(3)] == [64 - 56, 32 - 28, 16 - 14]
    assert [extent.nbytes // MIB for extent in region.extents] == [56, 28, 14]
    assert region.summary == "host memory of mtier bank 0, 1, 2"
    region.release()
    assert [sdk_free(bank) for bank in range(3)] == [64, 32, 16]
    # A bank that cannot give what it says: nothing of the others' stays.
    tier._free = lambda: {0: 64 * MIB, 1: 1 << 40}
    out = sentence(lambda: tier.allocate(4 * 30 * MIB, 30 * MIB))
    assert "bank 1" in out and [sdk_free(bank) for bank in range(3)] == [64, 32, 16], out

    auto = plan(tier="auto")
    assert [candidate.tier for candidate in auto.candidates] == ["mtier", "bank", "dram"]
    for process in sys.argv[1:]:
        os.kill(int(process), signal.SIGKILL)
    placement = Placement(auto, 0, lambda _: 1 << 40)
    allocation = placement.allocate([(MIB, 1)])
    assert allocation.tier.name == "dram"
    skipped = next(one for one in placement.skipped if one.tier == "mtier")
    assert "sglang-xmem mtierd" in skipped.words(), skipped
    allocation.regions[0].release()
    print("done")
    """
    environment = client_environment(build, daemon.socket_path)
    assert run(script, str(daemon.process.pid), str(daemon.serving), environment=environment) == "done"


@needs_sdk
def test_what_is_missing_is_said_and_skipped(build: Path, start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    environment = client_environment(build, daemon.socket_path)
    # By name, and by `auto`, which silently uses the next tier.
    said = """
    auto = plan(tier="auto")
    names = [candidate.tier for candidate in auto.candidates]
    assert "mtier" not in names and names[-1] == "dram"  # the service may have a page bank
    assert auto.skipped[0].tier == "mtier"
    print(sentence(plan))
    """

    def told(**changed: str) -> str:
        text = run(said, environment={**environment, **changed})
        assert text.startswith("--hicache-xmem-tier mtier is unavailable: ")
        return text

    def told_by_package(code: str) -> str:
        package = tmp_path / code.split()[-1] / "xmem"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        return told(PYTHONPATH=os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))

    assert "is not installed. Run pip install --no-deps xmem-mtier==0.1.2." in told_by_package("import xmem.mtier_sdk")
    assert "cannot be imported (No module named 'needed'). Install its dependencies" in told_by_package("import needed")
    nowhere = str(tmp_path / "libmtier.so")
    text = told(MTIER_LIB_PATH=nowhere)
    assert f"library {nowhere} does not exist. Set MTIER_LIB_PATH" in text
    assert "python -m sglang_xmem.mtier.build" in text
    Path(nowhere).write_text("not a library")
    assert "cannot be loaded" in told(MTIER_LIB_PATH=nowhere)
    libm = next(Path("/lib").rglob("libm.so.6"))
    assert "is not X-Mem's" in told(MTIER_LIB_PATH=str(libm))
    daemon.stop()
    text = told()
    assert f"no mtierd responds at {daemon.socket_path}" in text
    assert text.count("sglang-xmem mtierd") == 1, text


@needs_sdk
def test_service_that_starts_later_is_found(build: Path, tmp_path: Path) -> None:
    script = """
    mtierd, path = sys.argv[1:]
    assert "no mtierd responds" in sentence(plan)
    import time
    daemon = subprocess.Popen([mtierd, "--socket", path, "--bank", f"host:{8 * MIB}"], stderr=subprocess.DEVNULL)
    try:
        while not os.path.exists(path):
            time.sleep(0.01)
        assert plan().candidates[0].tier == "mtier"
    finally:
        daemon.terminate()
        daemon.wait()
    print("done")
    """
    path = tmp_path / "mtierd.sock"
    arguments = [str(build / "mtierd"), str(path)]
    assert run(script, *arguments, environment=client_environment(build, path)) == "done"

"""Tier mtier over a service with host banks: seats, room, a pool's bytes, release, and each error's sentence."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import StartDaemon
from service import MIB, client_environment, wait_until

from sglang_xmem.errors import ConfigError, TierUnavailable
from sglang_xmem.tiers import Ranks, mtier
from sglang_xmem.tiers.mtier import MTierSeat, MTierSettings, MTierTier

needs_sdk = pytest.mark.skipif(
    importlib.util.find_spec("xmem") is None or importlib.util.find_spec("torch") is None,
    reason="needs the packages xmem-mtier and torch",
)

PRELUDE = """
import os, signal, subprocess, sys
from sglang_xmem.config import parse_options
from sglang_xmem.errors import ConfigError, TierUnavailable
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.tiers import Locality, Ranks
from sglang_xmem.tiers.mtier import MTierSettings, MTierTier
MIB = 1 << 20
def plan(tier="mtier", banks=None, ranks=1, pool_bytes=None):
    config = {} if banks is None else {"mtier": {"banks": banks}}
    ranks = Ranks(gpus=(None,) * ranks)
    return make_plan(parse_options(tier, config), ranks, pool_bytes, lambda _: 1 << 40)
def sentence(function):
    try:
        function()
    except (ConfigError, TierUnavailable) as error:
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
    with pytest.raises(ConfigError, match=r"'mtier.banks' is .*; name at least one bank, and none twice"):
        MTierTier.seats(MTierSettings(banks=banks), Ranks(gpus=(None,)))


@needs_sdk
@pytest.mark.parametrize("kinds", [("host", "host"), ("gpu:0", "gpu:1"), ("gpu:1", "host")])
def test_pool_round_trip(build: Path, fake_cuda: Path, start_daemon: StartDaemon, kinds: tuple[str, str]) -> None:
    """A pool of random pages through the copier and back, in two banks, and these have their memory again.

    The fake driver's GPU memory is memory that the CPU reads, so the CPU's pool can lie there too.
    """
    driver = {"MTIER_CUDA_LIBRARY": str(fake_cuda), "FAKE_CUDA_CONTEXT": "0"}
    banks = (f"{kinds[0]}:{16 * MIB}", f"{kinds[1]}:{64 * MIB}")
    daemon = start_daemon(*(word for bank in banks for word in ("--bank", bank)), environment=driver)
    script = """
    import torch
    from sglang_xmem.config import CopySettings
    from sglang_xmem.pool import TierPool
    from xmem import mtier_sdk as sdk

    layers, tokens, page, row = 3, 2048, 16, 1000
    placement = Placement(plan(), 0, lambda _: 1 << 40)
    pool = TierPool(placement, num_layers=layers, num_tokens=tokens, page_size=page, row_bytes=row,
                    device=torch.device("cpu"), copy=CopySettings())
    assert pool.tier.name == "mtier" and pool.tier.locality is Locality.HOST
    # Striped: six planes of 2,048,000 bytes in turn, and each bank's share in whole granules.
    assert sdk.get_bank_status(0).available_memory == 16 * MIB - 6 * MIB
    assert sdk.get_bank_status(1).available_memory == 64 * MIB - 6 * MIB
    # K and V of a layer lie in different banks.
    apart = [abs(pool.bytes[0][layer].data_ptr() - pool.bytes[1][layer].data_ptr()) for layer in range(layers)]
    assert min(apart) >= 6 * MIB, apart
    planes = [[torch.randint(0, 256, (tokens, row), dtype=torch.uint8) for _ in range(layers)] for _ in range(2)]
    before = [[plane.clone() for plane in kind] for kind in planes]
    pool.attach(*planes)
    order = torch.randperm(tokens // page) * page
    rows = torch.arange(0, tokens, page)
    pool.store(order, rows)
    for kind in planes:
        for plane in kind:
            plane.zero_()
    for layer in range(layers):
        pool.load_layer(order, rows, layer)
    for kind in range(2):
        for layer in range(layers):
            assert torch.equal(planes[kind][layer], before[kind][layer])
            assert torch.equal(pool.bytes[kind][layer][int(order[5]) : int(order[5]) + page],
                               before[kind][layer][5 * page : 6 * page])
    # Storage pages: K of all layers before V, as in one range.
    first, second = int(order[5]), int(order[6])
    whole = torch.stack([torch.stack([b[5 * page : 6 * page] for b in kind]) for kind in before])
    assert torch.equal(pool.read_page(first), whole.flatten())
    pool.write_page(second, pool.read_page(first))
    assert torch.equal(pool.read_page(second), whole.flatten())
    kv = pool.as_kv(torch.bfloat16, 4, 125)
    assert kv[1][2].shape == (tokens, 4, 125) and kv[1][2].data_ptr() == pool.bytes[1][2].data_ptr()
    pool.close()
    pool.close()
    assert sdk.get_bank_status(0).available_memory == 16 * MIB
    assert sdk.get_bank_status(1).available_memory == 64 * MIB
    # Freed at exit where nobody closes.
    tier, region = Placement(plan(), 0, lambda _: 1 << 40).allocate(9 * MIB)
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
        raise TierUnavailable(f"bank {bank} is host memory that GPUs cannot address")

    monkeypatch.setattr(MTierTier, "_rooms", lambda self: {0: 1 << 30})
    monkeypatch.setattr(MTierTier, "_malloc", malloc)
    monkeypatch.setattr(MTierTier, "_check_address", check)
    freed = ("free", 4096)
    monkeypatch.setattr(mtier, "_releaser", lambda address, context: lambda: asked.append(("free", address)))
    with pytest.raises(TierUnavailable, match="bank 0 is host memory"):
        MTierTier(MTierSettings(), MTierSeat((0,), (1 << 30,)), 0).allocate(512 * MIB, 4)
    assert asked == [("malloc", mtier.GRANULE_BYTES), freed]


@needs_sdk
def test_seats_room_and_errors(build: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(*(word for size in (64, 32, 16) for word in ("--bank", f"host:{size * MIB}")))
    script = """
    def banks_of(banks, ranks):
        return [seat.banks for seat in plan(banks=banks, ranks=ranks).candidates[0].seats]
    assert banks_of(None, 1) == [(0, 1, 2)]
    assert banks_of(None, 2) == [(0, 2), (1,)]
    assert banks_of([2, 0], 3) == [(2,), (0,), (2,)]
    def sdk_room(bank):
        from xmem import mtier_sdk
        return mtier_sdk.get_bank_status(bank).available_memory // MIB
    def rooms(banks, ranks):
        return [MTierTier(MTierSettings(), seat, None).capacity_bytes() // MIB
                for seat in plan(banks=banks, ranks=ranks).candidates[0].seats]
    assert rooms(None, 1) == [112]
    assert rooms(None, 2) == [80, 32]
    assert rooms([0], 3) == [20, 20, 20]  # whole granules
    assert rooms([0], 4) == [16, 16, 16, 16]  # who shares a bank shares its room
    # Two ranks that share a bank both get their pools.
    shared = plan(banks=[1], ranks=2, pool_bytes=16 * MIB)
    regions = [Placement(shared, rank, lambda _: 1 << 40).allocate(16 * MIB)[1] for rank in (0, 1)]
    for region in regions:
        region.release()

    assert sentence(lambda: plan(banks=[0, 3])) == (
        "--hicache-xmem-config 'mtier.banks' names bank 3, but the service has 3, counted from 0.")
    assert sentence(lambda: plan(tier="auto", banks=[-1])).startswith("--hicache-xmem-config 'mtier.banks'")
    too_much = sentence(lambda: plan(pool_bytes=113 * MIB))
    assert too_much.startswith("--hicache-xmem-tier mtier cannot be used: the pool needs 0.12 GB a rank"), too_much
    seat = plan().candidates[0].seats[0]
    tier = MTierTier(MTierSettings(), seat, None)
    out = sentence(lambda: tier.allocate(65 * MIB))
    assert "lower --hicache-size" in out and "0.07 GB in bank 0, 0.03 GB in bank 1, " in out, out
    # Parts are whole in a bank; a bank that is full is passed over.
    out = sentence(lambda: tier.allocate(2 * 50 * MIB, 2))
    assert "holds 1 of the pool's 2 part(s) of 0.05 GB" in out, out
    region = tier.allocate(7 * 14 * MIB, 7)
    assert [sdk_room(bank) for bank in range(3)] == [64 - 56, 32 - 28, 16 - 14]
    assert len(set(region.parts)) == 7 and region.summary == "host memory of mtier bank 0, 1, 2"
    region.release()
    assert [sdk_room(bank) for bank in range(3)] == [64, 32, 16]
    # A bank that cannot give what it says: nothing of the others' stays.
    tier._rooms = lambda: {0: 64 * MIB, 1: 1 << 40}
    out = sentence(lambda: tier.allocate(4 * 30 * MIB, 4))
    assert "bank 1" in out and [sdk_room(bank) for bank in range(3)] == [64, 32, 16], out

    auto = plan(tier="auto")
    assert [candidate.tier for candidate in auto.candidates] == ["mtier", "dram"]
    os.kill(int(sys.argv[1]), signal.SIGKILL)
    placement = Placement(auto, 0, lambda _: 1 << 40)
    tier, region = placement.allocate(MIB)
    assert tier.name == "dram"
    name, reason = placement.passed_over[-1]
    assert name == "mtier" and "sglang-xmem mtierd" in reason, reason
    region.release()
    print("done")
    """
    environment = client_environment(build, daemon.socket_path)
    assert run(script, str(daemon.process.pid), environment=environment) == "done"


@needs_sdk
def test_what_is_missing_is_said_and_passed_over(build: Path, start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    environment = client_environment(build, daemon.socket_path)
    # By name, and by `auto`, which goes on to the next tier without a word on stderr.
    said = """
    auto = plan(tier="auto")
    assert [candidate.tier for candidate in auto.candidates] == ["dram"]
    assert auto.passed_over[0][0] == "mtier"
    print(sentence(plan))
    """

    def told(**changed: str) -> str:
        text = run(said, environment={**environment, **changed})
        assert text.startswith("--hicache-xmem-tier mtier cannot be used: ")
        return text

    def told_by_package(code: str) -> str:
        package = tmp_path / code.split()[-1] / "xmem"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        return told(PYTHONPATH=os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))

    assert "run pip install --no-deps xmem-mtier==0.1.2" in told_by_package("import xmem.mtier_sdk")
    assert "cannot be imported (No module named 'needed'); install what it needs" in told_by_package("import needed")
    nowhere = str(tmp_path / "libmtier.so")
    text = told(MTIER_LIB_PATH=nowhere)
    assert f"library is not at {nowhere}; set MTIER_LIB_PATH" in text
    assert "python -m sglang_xmem.mtier.build" in text
    Path(nowhere).write_text("not a library")
    assert "cannot be loaded" in told(MTIER_LIB_PATH=nowhere)
    libm = next(Path("/lib").rglob("libm.so.6"))
    assert "is not X-Mem's" in told(MTIER_LIB_PATH=str(libm))
    daemon.stop()
    text = told()
    assert f"no mtierd answers at {daemon.socket_path}" in text
    assert text.endswith("start X-Mem's service or `sglang-xmem mtierd`.")


@needs_sdk
def test_service_that_starts_later_is_found(build: Path, tmp_path: Path) -> None:
    script = """
    mtierd, path = sys.argv[1:]
    assert "no mtierd answers" in sentence(plan)
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

"""Tiers on real GPUs: memory that is where it should be, reads and writes right, and is gone afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from sglang_xmem import gpus
from sglang_xmem.config import CopySettings, parse_options
from sglang_xmem.copies.staged import StagedCopier
from sglang_xmem.errors import ConfigError
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.pool import TierPool
from sglang_xmem.tiers import Ranks

pytestmark = pytest.mark.gpu

GB = 10**9


def unlimited(nbytes: int) -> int:
    return 1 << 50


def placement(tier: str, config: dict[str, object] | None = None, gpu: int = 0) -> Placement:
    return Placement(make_plan(parse_options(tier, config), Ranks(gpus=(gpu,)), None, unlimited), 0, unlimited)


def need_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, this machine has {torch.cuda.device_count()}")


@pytest.mark.parametrize("tier", ["peer", "dram", "dram with a relay"])
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_round_trip_through_a_pool(tier: str, page_size: int) -> None:
    if tier != "dram":
        need_gpus(2)
    tier, _, relay = tier.partition(" ")
    config: dict[str, object] | None = {"dram": {"relays": [1]}} if relay else None
    torch.manual_seed(page_size)
    layers, heads, dim, device_tokens, tier_tokens = 3, 4, 128, 4096, 8192
    device = torch.device("cuda:0")
    k = [torch.randn(device_tokens, heads, dim, device=device, dtype=torch.bfloat16) for _ in range(layers)]
    v = [torch.randn(device_tokens, heads, dim, device=device, dtype=torch.bfloat16) for _ in range(layers)]
    before = [(a.clone(), b.clone()) for a, b in zip(k, v, strict=True)]
    pool = TierPool(
        placement(tier, config),
        num_layers=layers,
        num_tokens=tier_tokens,
        page_size=page_size,
        row_bytes=heads * dim * 2,
        device=device,
        copy=CopySettings(),
    )
    pool.attach(k, v)
    pages = device_tokens // page_size // 2
    device_pages = torch.randperm(device_tokens // page_size)[:pages]
    tier_pages = torch.randperm(tier_tokens // page_size)[:pages]
    offsets = torch.arange(page_size)
    device_indices = (device_pages[:, None] * page_size + offsets).flatten().to(device)
    tier_indices = (tier_pages[:, None] * page_size + offsets).flatten()  # on the CPU, as SGLang gives them
    pool.store(pool.stage_rows(tier_indices), pool.stage_rows(device_indices))
    torch.cuda.synchronize()
    for tensor in (*k, *v):
        tensor.view(torch.uint8).fill_(0xA5)
    for layer in range(layers):
        pool.load_layer(pool.stage_rows(tier_indices), pool.stage_rows(device_indices), layer)
    torch.cuda.synchronize()
    touched = torch.zeros(device_tokens, dtype=torch.bool, device=device)
    touched[device_indices] = True
    for layer in range(layers):
        for now, then in ((k[layer], before[layer][0]), (v[layer], before[layer][1])):
            assert torch.equal(now[touched].view(torch.uint8), then[touched].view(torch.uint8))
            assert bool((now[~touched].view(torch.uint8) == 0xA5).all())
    # storage pages: the same bytes, through the host and back
    row, device_row = int(tier_indices[0]), int(device_indices[0])
    page = pool.read_page(row)
    expected = torch.stack([torch.stack([b[i][device_row : device_row + page_size] for b in before]) for i in (0, 1)])
    assert torch.equal(page, expected.cpu().view(torch.uint8).flatten())
    pool.write_page(row, page.flip(0))
    assert torch.equal(pool.read_page(row), page.flip(0))
    pool.close()
    pool.close()


def test_staged_loads_through_a_pool_that_was_pinned_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of pages go across the places where two pinned ranges meet."""
    monkeypatch.setattr("sglang_xmem.tiers.dram.REGISTER_BYTES", 3 << 20)
    for name in ("MIN_LAYER_BYTES", "MIN_RUN_BYTES"):
        monkeypatch.setattr(f"sglang_xmem.copies.staged.{name}", 1)
    layers, tokens, page_size, row_bytes = 4, 8192, 64, 1024
    device = torch.device("cuda:0")
    k, v = (
        [torch.randint(0, 256, (tokens, row_bytes), dtype=torch.uint8, device=device) for _ in range(layers)]
        for _ in "kv"
    )
    before = [(a.clone(), b.clone()) for a, b in zip(k, v, strict=True)]
    shape = {"num_layers": layers, "num_tokens": tokens, "page_size": page_size, "row_bytes": row_bytes}
    pool = TierPool(placement("dram"), **shape, device=device, copy=CopySettings(staging_mib=4))
    pool.attach(k, v)
    assert isinstance(pool.copier, StagedCopier)
    assert len(pool.copier._seams) > 1
    everything = torch.arange(tokens)
    rows = pool.stage_rows(everything)
    pool.store(rows, rows)
    torch.cuda.synchronize()
    for tensor in (*k, *v):
        tensor.fill_(0xA5)
    to = torch.randperm(tokens // page_size, device=device) * page_size
    signals = pool.take_signals()
    assert signals is not None
    pool.load_layers(rows, to, signals, everything)
    torch.cuda.synchronize()
    assert pool.copier.staged_loads == 1
    for layer in range(layers):
        for now, then in ((k[layer], before[layer][0]), (v[layer], before[layer][1])):
            assert torch.equal(
                now.view(-1, page_size * row_bytes)[to // page_size], then.view(-1, page_size * row_bytes)
            )
    pool.close()


def test_peer_memory_is_on_the_peer_and_returns() -> None:
    need_gpus(2)
    start_free, _ = gpus.memory_bytes(1)
    tier, region = placement("peer", {"peer": {"gpus": [1]}}).allocate(4 * GB)
    during_free, _ = gpus.memory_bytes(1)
    region.release()
    after_free, _ = gpus.memory_bytes(1)
    assert 4 * GB <= start_free - during_free < 4 * GB + (1 << 30), "the pool and a context"
    assert start_free - after_free < 64 << 20
    assert tier.name == "peer"


def test_striping_over_several_peers() -> None:
    need_gpus(3)
    start = [gpus.memory_bytes(i)[0] for i in (1, 2)]
    _, region = placement("peer", {"peer": {"gpus": [1, 2], "stripe_mib": 64}}).allocate(4 * GB)
    used = [a - gpus.memory_bytes(i)[0] for a, i in zip(start, (1, 2), strict=True)]
    region.release()
    assert all(1.9 * GB < u < 2.7 * GB for u in used), used


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peer": {"gpus": [99]}}, "names GPU 99"),
        ({"peer": {"gpus": [0]}}, "which this engine computes on"),
        ({"peer": {"gpus": []}}, "at least one GPU"),
        ({"peer": {"gpus": [1, 1]}}, "none twice"),
        ({"peer": {"stripe_mib": 0}}, "stripe_mib"),
    ],
)
def test_impossible_peers_are_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        placement("peer", config)


def test_a_pool_larger_than_the_peer_is_refused_by_name_and_size() -> None:
    need_gpus(2)
    with pytest.raises(ConfigError, match=r"the pool needs 900.00 GB a rank and there is room for"):
        placement("peer").allocate(900 * GB)


HOLD = """
import sys, time
sys.path[:0] = {path!r}
from sglang_xmem.config import parse_options
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.tiers import Ranks
budget = lambda nbytes: 1 << 50
where = Placement(make_plan(parse_options("peer", {config!r}), Ranks(gpus=({gpu},)), None, budget), 0, budget)
tier, region = where.allocate({nbytes})
print("held", tier.seat.gpus, flush=True)
time.sleep(60)
"""


def hold(nbytes: int, gpu: int = 0) -> subprocess.Popen[str]:
    # Named, because by now this test process itself has a context on GPU 1: an automatic choice would pass it over.
    config = {"peer": {"gpus": [1]}}
    code = textwrap.dedent(HOLD).format(path=sys.path, nbytes=nbytes, gpu=gpu, config=config)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("held")
    return process


SHOW = """
import json, os, sys
sys.path[:0] = {path!r}
import torch
from sglang_xmem import gpus
from sglang_xmem.config import CopySettings, parse_options
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.pool import TierPool
from sglang_xmem.tiers import Ranks
budget = lambda nbytes: 1 << 50
config = {{"peer": {{"gpus": [1], "copy_on": "{copy_on}"}}}}
gpus.foreign_use = lambda gpu: None  # the test's own process may have a context there
where = Placement(make_plan(parse_options("peer", config), Ranks(gpus=(0,)), None, budget), 0, budget)
device = torch.device("cuda:0")
shape = dict(num_layers=4, num_tokens=1 << 18, page_size=64, row_bytes=1024)
pool = TierPool(where, **shape, device=device, copy=CopySettings())
planes = [torch.zeros(4096, 4, 128, device=device, dtype=torch.bfloat16) for _ in range(8)]
pool.attach(planes[:4], planes[4:])
held = gpus.processes(1)
print("RESULT", json.dumps([os.getpid() in held, held.get(os.getpid()), gpus.memory_bytes(1)[1]]), flush=True)
"""


@pytest.mark.parametrize("copy_on", ["auto", "rank"])
def test_a_peers_memory_shows_under_this_process(copy_on: str) -> None:
    """NVML names it on the peer, with the pool's bytes where it tells any."""
    need_gpus(2)
    code = textwrap.dedent(SHOW).format(path=sys.path, copy_on=copy_on)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    named, nbytes, used = json.loads(line.removeprefix("RESULT "))
    print("NVML:", copy_on, named, nbytes, used)
    assert used >= 2 << 30
    assert named
    if nbytes is not None:
        assert nbytes >= 2 << 30


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_memory_is_gone_when_the_process_is(how: signal.Signals) -> None:
    need_gpus(2)
    start_free, _ = gpus.memory_bytes(1)
    process = hold(8 * GB)
    try:
        assert start_free - gpus.memory_bytes(1)[0] >= 8 * GB
        os.kill(process.pid, how)
        process.wait(20)
        deadline = time.monotonic() + 20
        while start_free - gpus.memory_bytes(1)[0] > 64 << 20 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert start_free - gpus.memory_bytes(1)[0] <= 64 << 20
    finally:
        process.kill()


def test_auto_passes_over_a_peer_that_another_process_uses() -> None:
    need_gpus(2)
    process = hold(2 * GB)
    try:
        assert f"GPU 1 is in use by process {process.pid}" in str(gpus.foreign_use(1))
        where = placement("auto")
        assert where.plan.candidates[0].tier == ("peer" if torch.cuda.device_count() > 2 else "dram")
        if torch.cuda.device_count() == 2:
            assert "GPU 1 " in dict(where.plan.passed_over)["peer"]
    finally:
        process.kill()
        process.wait()

"""A pool whose planes lie apart: the same bytes come back as from one range, in copies and in storage pages."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_xmem.config import CopySettings, parse_options
from sglang_xmem.copies import make_copier
from sglang_xmem.errors import ConfigError, CopyError
from sglang_xmem.pool import TierPool, region_bytes
from sglang_xmem.tiers import Locality, Region

LAYERS, TOKENS, PAGE, ROW = 3, 64, 8, 96


def pool_over(n_places: int) -> tuple[TierPool, list[Any]]:
    """A pool on the CPU with its planes dealt to `n_places`, and what was released."""
    released: list[Any] = []

    def allocate(nbytes: int, parts: int) -> tuple[Any, Region]:
        assert (nbytes, parts) == (2 * LAYERS * TOKENS * ROW, 2 * LAYERS)
        size = nbytes // parts
        places = [(ctypes.c_uint8 * nbytes)() for _ in range(n_places)]
        starts = [ctypes.addressof(place) for place in places]
        apart = tuple(starts[part % n_places] + part // n_places * size for part in range(parts))
        region = Region(starts[0], nbytes, "a fake", lambda: released.append(places), parts=apart)
        if n_places == 1:
            region.parts = None
        return SimpleNamespace(name="fake", locality=Locality.HOST), region

    placement: Any = SimpleNamespace(allocate=allocate, passed_over=[])
    shape = {"num_layers": LAYERS, "num_tokens": TOKENS, "page_size": PAGE, "row_bytes": ROW}
    return TierPool(placement, **shape, device=torch.device("cpu"), copy=CopySettings()), released


@pytest.mark.parametrize("n_places", [1, 2, 3, 6])
def test_bytes_come_back(n_places: int) -> None:
    pool, released = pool_over(n_places)
    assert isinstance(pool.bytes, torch.Tensor) == (n_places == 1)
    starts = {pool.bytes[kind][layer].data_ptr() for kind in (0, 1) for layer in range(LAYERS)}
    assert len(starts) == 2 * LAYERS
    for kind in (0, 1):
        for layer in range(LAYERS):
            pool.bytes[kind][layer].fill_(0xA5)
    generator = torch.Generator().manual_seed(n_places)
    device = [
        [torch.randint(0, 256, (TOKENS, ROW), dtype=torch.uint8, generator=generator) for _ in range(LAYERS)]
        for _ in (0, 1)
    ]
    before = torch.stack([torch.stack(planes) for planes in device])
    pool.attach(*device)
    device_rows = torch.tensor([3, 0, 5]) * PAGE
    tier_rows = torch.tensor([7, 2, 0]) * PAGE
    pool.store(tier_rows, device_rows)
    for planes in device:
        for plane in planes:
            plane.fill_(0x5A)
    for layer in range(LAYERS):
        pool.load_layer(tier_rows, device_rows, layer)
    after = torch.stack([torch.stack(planes) for planes in device])
    for page in range(TOKENS // PAGE):
        rows = slice(page * PAGE, (page + 1) * PAGE)
        expected = before[:, :, rows] if page in (3, 0, 5) else torch.full_like(before[:, :, rows], 0x5A)
        assert torch.equal(after[:, :, rows], expected)
    # Storage pages are K of all layers before V, wherever the planes are.
    stored = pool.read_page(7 * PAGE)
    assert torch.equal(stored, before[:, :, 3 * PAGE : 4 * PAGE].flatten())
    pool.write_page(PAGE, stored)
    assert torch.equal(pool.read_page(PAGE), stored)
    untouched = pool.read_page(4 * PAGE)
    assert bool((untouched == 0xA5).all())
    kv = pool.as_kv(torch.bfloat16, 4, 12)
    assert torch.equal(kv[1][2][7 * PAGE : 8 * PAGE].view(torch.uint8).flatten(), before[1, 2, 24:32].flatten())
    pool.close()
    pool.close()
    assert len(released) == 1
    for late in (lambda: pool.read_page(PAGE), lambda: pool.write_page(PAGE, stored)):
        with pytest.raises(RuntimeError, match="the pool is closed"):
            late()


def test_memory_is_given_back_behind_a_storage_thread() -> None:
    """SGLang ends its storage threads after it has closed the pool."""
    pool, released = pool_over(1)
    reading, go_on, read = threading.Event(), threading.Event(), []
    rows_of_page = pool._rows_of_page

    def slowly(row: int) -> list[torch.Tensor]:
        rows = rows_of_page(row)
        reading.set()
        assert go_on.wait(10)
        assert not released
        return rows

    pool._rows_of_page = slowly  # type: ignore[method-assign]
    reader = threading.Thread(target=lambda: read.append(pool.read_page(0)))
    closer = threading.Thread(target=pool.close)
    reader.start()
    assert reading.wait(10)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    assert not released
    go_on.set()
    reader.join(10)
    closer.join(10)
    assert len(read) == len(released) == 1


@pytest.mark.parametrize("required", [False, True])
def test_the_ranks_own_gpu_copies_where_the_peer_cannot(monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    pool, _ = pool_over(1)
    pool._region.copying_gpu, pool._region.copying_required = 5, required
    asked: list[int | None] = []

    def make(*arguments: Any, runs_on: int | None = None, **settings: Any) -> Any:
        asked.append(runs_on)
        if runs_on is not None:
            raise CopyError("GPU 5 cannot reach it.")
        return make_copier(*arguments, **settings)

    monkeypatch.setattr("sglang_xmem.pool.make_copier", make)
    device = [[torch.zeros(TOKENS, ROW, dtype=torch.uint8) for _ in range(LAYERS)] for _ in (0, 1)]
    if required:
        with pytest.raises(CopyError, match="GPU 5 cannot reach it"):
            pool.attach(*device)
        assert asked == [5]
    else:
        pool.attach(*device)
        assert asked == [5, None]
        assert pool.copier.name == "torch"


def test_relays_copy_beside_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = pool_over(1)
    pool._region.relays = (3, 1)
    asked: list[Any] = []

    def make(*arguments: Any, relays: tuple[int, ...], **settings: Any) -> Any:
        asked.append((settings.get("runs_on"), settings["tier_locality"], relays))
        return make_copier(*arguments, **settings)

    monkeypatch.setattr("sglang_xmem.pool.make_copier", make)
    pool.attach(*[[torch.zeros(TOKENS, ROW, dtype=torch.uint8) for _ in range(LAYERS)] for _ in (0, 1)])
    assert asked == [(None, "host", (3, 1))]


def test_a_region_apart_is_not_taken_for_one_range() -> None:
    region = Region(1 << 20, 8, "a fake", lambda: None, parts=(1 << 20, 1 << 30))
    with pytest.raises(AssertionError, match="lies apart"):
        region_bytes(region, torch.device("cpu"))


def attached(pool: TierPool) -> None:
    pool.attach(*[[torch.zeros(TOKENS, ROW, dtype=torch.uint8) for _ in range(LAYERS)] for _ in (0, 1)])


def test_a_staging_ring_that_was_asked_for_and_cannot_be_had_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    for mib in (None, 0):
        pool, _ = pool_over(1)
        pool._copy = CopySettings(staging_mib=mib)
        with caplog.at_level("INFO"):
            attached(pool)
        assert pool.copier.name == "torch"
        assert "staged" not in caplog.text, "nobody expects a ring on a machine without a GPU"
    pool, _ = pool_over(1)
    pool._copy = CopySettings(staging_mib=64)
    with pytest.raises(
        CopyError, match=r"copy\.staging_mib is for the copier 'cuda' without relays, and this is 'torch'"
    ):
        attached(pool)


@pytest.mark.parametrize("locality", Locality)
def test_host_memory_alone_is_staged(monkeypatch: pytest.MonkeyPatch, locality: Locality) -> None:
    """And the copier is told the tier's rows as they are on the CPU."""
    pool, _ = pool_over(1)
    pool.tier.locality = locality
    pool._copy = CopySettings(staging_mib=3)
    pool._region.pinned = (4711,)
    asked: list[Any] = []
    loads: list[Any] = []

    def staging(copier: Any, nbytes: int | None, pinned: Any) -> Any:
        asked.append((nbytes, pinned))
        return copier, None

    monkeypatch.setattr("sglang_xmem.pool.with_staging", staging)
    attached(pool)
    assert asked == ([(3 << 20, (4711,))] if locality is Locality.HOST else [])
    monkeypatch.setattr(pool.copier, "load_signalling", lambda *load: loads.append(load), raising=False)
    signals: Any = object()
    indices = torch.arange(2 * PAGE, 4 * PAGE)
    rows = pool.stage_rows(indices)
    pool.load_layers(rows, rows, signals, indices)
    pool.load_layers(rows, rows, signals)
    pool.load_layers(rows, rows, signals, indices.to("meta"))
    told = [load[4] for load in loads]
    assert told[0].tolist() == rows.tolist() == [2 * PAGE, 3 * PAGE]
    assert told[1:] == [None, None]
    assert all(load[3] is signals for load in loads)


def test_impossible_rings_are_refused() -> None:
    for mib in (-1, 1 << 20, 1.5, "256"):
        with pytest.raises(ConfigError, match="staging_mib"):
            parse_options("dram", {"copy": {"staging_mib": mib}})
    assert parse_options("dram", {"copy": {"staging_mib": 0}}).copy.staging_mib == 0

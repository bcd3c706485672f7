"""The host pool that HiCache gets: SGLang's own KV pool on the CPU, ours over tier dram, bytes compared page by page.

All goes through SGLang's methods. Where stock HiCache can do the same, its pool is the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_xmem import plan as plan_module
from sglang_xmem.adapters import sglang_0_5_23 as adapter
from sglang_xmem.config import parse_options
from sglang_xmem.errors import ConfigError, TierUnavailable
from sglang_xmem.plan import Candidate, Placement, Plan, make_plan
from sglang_xmem.tiers import Locality, Ranks, Region
from sglang_xmem.tiers.dram import DramSeat, DramTier

pytestmark = pytest.mark.cpu_engine

DTYPES = {"bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
PAGE_SIZES = (1, 2, 16, 64, 128, 256)
#: (heads, head_dim)
HEADS = ((2, 64), (1, 80), (3, 24), (8, 128))
GB = 10**9
POISON = 0xA5
POISON_AGAIN = 0x5A
DEVICE_PAGES = 6
#: kind (0 is K), layer, page
Place = tuple[int, int, int]


@functools.cache
def sglang() -> SimpleNamespace:
    """What these tests use of SGLang, imported by the first test that runs."""
    from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import _mha_host_inputs
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
    from sglang_cpu import copies

    return SimpleNamespace(
        host_inputs=_mha_host_inputs, kv_pool=MHATokenToKVPool, budget=host_memory_budget_scope, copies=copies
    )


@dataclass(frozen=True)
class Shape:
    """A KV pool, with `device_pages` pages for use."""

    dtype: str = "bf16"
    heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    layers: int = 3
    device_pages: int = DEVICE_PAGES

    @property
    def row_bytes(self) -> int:
        return self.heads * self.head_dim * DTYPES[self.dtype].itemsize

    def kv_pool(self) -> Any:
        """SGLang's KV pool, filled with random bytes."""
        pool = sglang().kv_pool(
            size=self.device_pages * self.page_size,
            page_size=self.page_size,
            dtype=DTYPES[self.dtype],
            head_num=self.heads,
            head_dim=self.head_dim,
            layer_num=self.layers,
            device="cpu",
            enable_memory_saver=False,
        )
        generator = torch.Generator().manual_seed(hash((self.heads, self.head_dim, self.page_size)))
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            as_bytes = buffer.view(torch.uint8)
            as_bytes.copy_(torch.randint(0, 256, as_bytes.shape, dtype=torch.uint8, generator=generator))
        return pool


def host_pool(kv_pool: Any, *, ours: bool, ratio: float = 2.0, size_gb: float = 0) -> Any:
    """The host pool as `build_kv_host_pool` makes it, poisoned."""
    stock_class, host_input, kwargs = sglang().host_inputs(kv_pool, ())
    host_class = adapter.tier_host_pool_class() if ours else stock_class
    # Stock wants 10 GiB of host RAM to stay free, which says nothing about a pool of some MB.
    with sglang().budget(1 << 40):
        pool = host_class(
            host_input,
            ratio,
            size_gb,
            kv_pool.page_size,
            "layer_first",
            pin_memory=False,
            allocator_type="default",
            pool_label="kv",
            **kwargs,
        )
    pool.kv_buffer.view(torch.uint8).fill_(POISON)
    return pool


@pytest.fixture(autouse=True)
def regions() -> Iterator[list[Region]]:
    """A placement over tier dram; the regions that it gave."""
    given_out: list[Region] = []
    allocate = DramTier.allocate

    def recorded(self: DramTier, nbytes: int, parts: int = 1) -> Region:
        given_out.append(allocate(self, nbytes, parts))
        return given_out[-1]

    def budget(nbytes: int) -> int:
        return 1 << 40

    plan = make_plan(parse_options("dram", None), Ranks(gpus=(None,)), None, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DramTier, "allocate", recorded)
        patch.setattr(adapter, "_placement", Placement(plan, 0, budget))
        patch.setattr(adapter, "_tier_names", [])
        yield given_out


def released(region: Region) -> bool:
    return region._release is None


# ---- comparing ----


def device_bytes(kv_pool: Any) -> torch.Tensor:
    """A copy of all of a KV pool: uint8, (K|V, layer, token, byte)."""
    kinds = (kv_pool.k_buffer, kv_pool.v_buffer)
    return torch.stack([torch.stack([b.view(torch.uint8).flatten(1) for b in kind]) for kind in kinds])


def host_bytes(host: Any) -> torch.Tensor:
    """A copy of all of a host pool, likewise."""
    return torch.stack([torch.stack([b.view(torch.uint8).flatten(1) for b in kind]) for kind in host.kv_buffer])


def different(expected: torch.Tensor, found: torch.Tensor, page_size: int) -> set[Place]:
    """The pages in which two pools' bytes differ: the comparison of all tests here."""
    assert expected.shape == found.shape
    places = (expected != found).any(dim=3).nonzero().tolist()
    return {(kind, layer, token // page_size) for kind, layer, token in places}


def rows_of(pages: torch.Tensor, page_size: int) -> torch.Tensor:
    """All token indices of `pages`, as SGLang hands them to a host pool."""
    return (pages[:, None] * page_size + torch.arange(page_size)).flatten()


def with_pages(pool: torch.Tensor, to: torch.Tensor, source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`pool` with rows `to` taken from rows `rows` of `source`."""
    after = pool.clone()
    after[:, :, to] = source[:, :, rows]
    return after


def poison_device(kv_pool: Any, value: int = POISON_AGAIN) -> None:
    for buffer in (*kv_pool.k_buffer, *kv_pool.v_buffer):
        buffer.view(torch.uint8).fill_(value)


def back_up(host: Any, kv_pool: Any, host_rows: torch.Tensor, device_rows: torch.Tensor, physical: bool) -> None:
    """As SGLang's controllers do it: in one call, or with prepared indices."""
    if physical:
        prepared = host.prepare_transfer_indices(host_rows, device_rows, "kernel")
        host.backup_from_device_all_layer_physical(kv_pool, *prepared, "kernel")
    else:
        host.backup_from_device_all_layer(kv_pool, host_rows, device_rows, "kernel")


def load(
    host: Any, kv_pool: Any, host_rows: torch.Tensor, device_rows: torch.Tensor, layer: int, physical: bool
) -> None:
    if physical:
        prepared = host.prepare_transfer_indices(host_rows, device_rows, "kernel")
        host.load_to_device_per_layer_physical(kv_pool, *prepared, layer, "kernel")
    else:
        host.load_to_device_per_layer(kv_pool, host_rows, device_rows, layer, "kernel")


def some_pages(count: int, of: int) -> torch.Tensor:
    return torch.randperm(of)[:count]


# ---- copies ----


@pytest.mark.parametrize("physical", [False, True], ids=["plain", "physical"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
def test_bytes_go_into_the_tier_and_back(dtype: str, heads: int, head_dim: int, page_size: int, physical: bool) -> None:
    shape = Shape(dtype, heads, head_dim, page_size)
    torch.manual_seed(page_size)
    kv_pool = shape.kv_pool()
    host = host_pool(kv_pool, ours=True)
    before, empty = device_bytes(kv_pool), host_bytes(host)
    assert before.shape[-1] == shape.row_bytes
    device_rows = rows_of(some_pages(DEVICE_PAGES - 2, DEVICE_PAGES + 1), page_size)
    host_rows = rows_of(some_pages(DEVICE_PAGES - 2, host.page_num), page_size)

    back_up(host, kv_pool, host_rows, device_rows, physical)
    stored = with_pages(empty, host_rows, before, device_rows)
    assert different(stored, host_bytes(host), page_size) == set()
    assert different(before, device_bytes(kv_pool), page_size) == set()

    poison_device(kv_pool)
    expected = device_bytes(kv_pool)
    for layer in (1, 0, 2):
        load(host, kv_pool, host_rows, device_rows, layer, physical)
        expected[:, layer, device_rows] = before[:, layer, device_rows]
        # After each layer, so that a load that touches another one shows.
        assert different(expected, device_bytes(kv_pool), page_size) == set()
    assert different(stored, host_bytes(host), page_size) == set()
    host.destroy()


@pytest.mark.parametrize("damage", ["nothing", "K and V", "layers", "pages", "one byte"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_damage_in_the_tier_is_seen(damage: str, page_size: int) -> None:
    """Negative control of the comparison that all of these tests rely on."""
    kv_pool = Shape(page_size=page_size).kv_pool()
    host = host_pool(kv_pool, ours=True)
    before = device_bytes(kv_pool)
    pages = some_pages(3, host.page_num)
    rows, device_rows = rows_of(pages, page_size), rows_of(torch.arange(1, 4), page_size)
    back_up(host, kv_pool, rows, device_rows, physical=False)
    stored = host.kv_buffer.view(torch.uint8)
    intact = host_bytes(host)
    touched: set[Place] = set()
    kinds, layers = (0, 1), range(3)
    if damage == "K and V":
        stored.copy_(stored.flip(0))
        touched = {(kind, layer, page) for kind in kinds for layer in layers for page in (1, 2, 3)}
    elif damage == "layers":
        stored[:, [0, 2]] = stored[:, [2, 0]]
        touched = {(kind, layer, page) for kind in kinds for layer in (0, 2) for page in (1, 2, 3)}
    elif damage == "pages":
        first, second = (rows_of(pages[i : i + 1], page_size) for i in (0, 2))
        stored[:, :, torch.cat((first, second))] = stored[:, :, torch.cat((second, first))]
        touched = {(kind, layer, page) for kind in kinds for layer in layers for page in (1, 3)}
    elif damage == "one byte":
        stored[1, 2, int(rows[-1]), 1, 5] ^= 1
        touched = {(1, 2, 3)}
    at = {device_page: int(page) for device_page, page in zip((1, 2, 3), pages, strict=True)}
    assert different(intact, host_bytes(host), page_size) == {(k, layer, at[page]) for k, layer, page in touched}
    poison_device(kv_pool)
    for layer in layers:
        load(host, kv_pool, rows, device_rows, layer, physical=False)
    after = device_bytes(kv_pool)
    after[:, :, :page_size] = before[:, :, :page_size]  # pages that nothing was loaded into
    after[:, :, 4 * page_size :] = before[:, :, 4 * page_size :]
    assert different(before, after, page_size) == touched
    host.destroy()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3"])
@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
def test_layout_is_that_of_stock(dtype: str, heads: int, head_dim: int, page_size: int) -> None:
    """After the same backup the two buffers are the same, and so are their storage pages."""
    kv_pool = Shape(dtype, heads, head_dim, page_size).kv_pool()
    ours, stock = (host_pool(kv_pool, ours=kind) for kind in (True, False))
    for name in ("kv_buffer", "k_buffer", "v_buffer"):
        mine, theirs = getattr(ours, name), getattr(stock, name)
        assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert (ours.size, ours.page_num, ours.dtype) == (stock.size, stock.page_num, stock.dtype)
    assert (ours.token_stride_size, ours.layout_dim) == (stock.token_stride_size, stock.layout_dim)
    device_rows = rows_of(some_pages(4, DEVICE_PAGES + 1), page_size)
    host_rows = rows_of(some_pages(4, stock.page_num), page_size)
    back_up(ours, kv_pool, host_rows, device_rows, physical=False)
    # What stock's backup calls; its io backend `direct` is the one in plain torch.
    sglang().copies.transfer_kv_direct(
        src_layers=stock.device_k_buffers + stock.device_v_buffers,
        dst_layers=stock.host_kv_data_refs,
        src_indices=device_rows,
        dst_indices=host_rows,
        page_size=page_size,
    )
    assert different(host_bytes(stock), host_bytes(ours), page_size) == set()
    for row in host_rows[::page_size].tolist():
        for flat in (True, False):
            mine, theirs = ours.get_data_page(row, flat), stock.get_data_page(row, flat)
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            assert torch.equal(mine.view(torch.uint8), theirs.contiguous().view(torch.uint8))
    ours.destroy()


# ---- storage pages ----


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_pages_go_out_and_in(dtype: str, page_size: int) -> None:
    kv_pool = Shape(dtype, 1, 80, page_size).kv_pool()
    host = host_pool(kv_pool, ours=True)
    source, target = 1, 3
    row = source * page_size
    back_up(host, kv_pool, rows_of(torch.tensor([source]), page_size), rows_of(torch.tensor([2]), page_size), True)
    stored = host_bytes(host)
    page = host.get_data_page(row)
    assert page.dim() == 1
    assert page.numel() * page.element_size() == host.get_page_buffer_element_size()
    dummy = host.get_dummy_flat_data_page()
    assert (dummy.shape, dummy.dtype) == (page.shape, page.dtype)
    assert not dummy.view(torch.uint8).any()

    # A backend reads into the dummy page, and hands it over.
    dummy.copy_(page)
    host.set_from_flat_data_page(target * page_size, dummy)
    rows = [rows_of(torch.tensor([at]), page_size) for at in (target, source)]
    assert different(with_pages(stored, rows[0], stored, rows[1]), host_bytes(host), page_size) == set()
    # What came out is a copy: HiCache may give the slot to others while a backend still writes the page.
    kept = page.clone()
    host.set_from_flat_data_page(row, host.get_dummy_flat_data_page())
    assert torch.equal(page.view(torch.uint8), kept.view(torch.uint8))
    assert not host.get_data_page(row).view(torch.uint8).any()
    host.set_from_flat_data_page(torch.tensor(row), page)  # indices also come as tensors
    assert torch.equal(host.get_data_page(torch.tensor(row)).view(torch.uint8), kept.view(torch.uint8))
    host.destroy()


def test_addresses_are_not_given_to_storage_backends() -> None:
    host = host_pool(Shape().kv_pool(), ours=True)
    with pytest.raises(NotImplementedError, match="use --hicache-storage-backend file"):
        host.get_page_buffer_meta(torch.arange(16))
    host.destroy()


# ---- random transfers ----

Operation = tuple[str, list[tuple[int, int]]]


def operations(device_pages: int, host_pages: int) -> st.SearchStrategy[list[Operation]]:
    """Transfers of pairs (device page, host page); a destination occurs once in each."""
    pair = st.tuples(st.integers(0, device_pages - 1), st.integers(0, host_pages - 1))
    transfers = [
        st.tuples(st.just(name), st.lists(pair, max_size=device_pages, unique_by=lambda p, side=side: p[side]))  # type: ignore[misc]
        for name, side in (("store", 1), ("load", 0), ("store prepared", 1), ("load prepared", 0))
    ]
    page = st.tuples(st.just("write page"), st.lists(pair, min_size=1, max_size=1))
    return st.lists(st.one_of(*transfers, page), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    shape=st.builds(
        Shape,
        dtype=st.sampled_from(list(DTYPES)),
        heads=st.integers(1, 4),
        head_dim=st.sampled_from([1, 8, 24, 64, 80]),
        page_size=st.sampled_from([1, 2, 3, 16]),
        layers=st.integers(1, 4),
    ),
)
def test_any_transfers_give_what_a_model_gives(data: st.DataObject, shape: Shape) -> None:
    kv_pool = shape.kv_pool()
    host = host_pool(kv_pool, ours=True)
    model_device, model_host = device_bytes(kv_pool), host_bytes(host)
    for name, pairs in data.draw(operations(DEVICE_PAGES + 1, host.page_num)):
        device_pages = torch.tensor([pair[0] for pair in pairs], dtype=torch.int64)
        host_pages = torch.tensor([pair[1] for pair in pairs], dtype=torch.int64)
        device_rows, host_rows = rows_of(device_pages, shape.page_size), rows_of(host_pages, shape.page_size)
        prepared = name.endswith("prepared")
        if name.startswith("store"):
            back_up(host, kv_pool, host_rows, device_rows, prepared)
            model_host[:, :, host_rows] = model_device[:, :, device_rows]
        elif name.startswith("load"):
            for layer in range(shape.layers):
                load(host, kv_pool, host_rows, device_rows, layer, prepared)
            model_device[:, :, device_rows] = model_host[:, :, host_rows]
        else:
            page = model_device[:, :, device_rows].contiguous()
            host.set_from_flat_data_page(int(host_rows[0]), page.flatten().view(host.dtype))
            model_host[:, :, host_rows] = page
        assert different(model_host, host_bytes(host), shape.page_size) == set()
        assert different(model_device, device_bytes(kv_pool), shape.page_size) == set()
    host.destroy()


# ---- sizes and slots ----


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.builds(
        Shape,
        dtype=st.sampled_from(list(DTYPES)),
        heads=st.integers(1, 5),
        head_dim=st.sampled_from([8, 80, 128]),
        page_size=st.sampled_from(PAGE_SIZES),
        layers=st.integers(1, 4),
        device_pages=st.integers(1, 8),
    ),
    ratio=st.one_of(st.sampled_from([1.0, 1.37, 2.0, 4.5]), st.floats(0.1, 6)),
    size_gb=st.one_of(st.just(0.0), st.floats(1e-6, 4e-3)),
)
def test_sizes_are_those_of_stock(shape: Shape, ratio: float, size_gb: float, regions: list[Region]) -> None:
    """--hicache-size and --hicache-ratio mean the same, to the token."""
    kv_pool = shape.kv_pool()
    ours, stock = (host_pool(kv_pool, ours=kind, ratio=ratio, size_gb=size_gb) for kind in (True, False))
    assert (ours.size, ours.page_num, ours.logical_size) == (stock.size, stock.page_num, stock.logical_size)
    assert ours.available_size() == stock.available_size()
    assert ours.get_size_per_token() == stock.get_size_per_token() == 2 * shape.layers * shape.row_bytes
    assert ours.kv_buffer.shape == stock.kv_buffer.shape
    assert regions[-1].nbytes == math.prod(stock.kv_buffer.shape) * stock.dtype.itemsize
    ours.destroy()
    assert all(map(released, regions))


def test_slots_are_given_and_taken_back() -> None:
    kv_pool = Shape(page_size=2).kv_pool()
    host = host_pool(kv_pool, ours=True)
    assert host.size == host.available_size() == 2 * 2 * DEVICE_PAGES + 2
    assert host.alloc(host.size + 2) is None
    everything = host.alloc(host.size)
    assert sorted(everything.tolist()) == list(range(host.size))
    assert host.alloc(2) is None
    # All of it is memory: every page can be written and read.
    before = device_bytes(kv_pool)
    device_rows = rows_of(torch.arange(host.page_num) % (DEVICE_PAGES + 1), 2)
    back_up(host, kv_pool, everything, device_rows, physical=True)
    assert different(with_pages(host_bytes(host), everything, before, device_rows), host_bytes(host), 2) == set()
    assert host.free(everything[2:6]) == 4
    with pytest.raises(AssertionError, match="Double-free"):
        host.free(everything[2:4])
    assert sorted(host.alloc(4).tolist()) == sorted(everything[2:6].tolist())
    host.clear()
    assert host.available_size() == host.size
    assert len(host.alloc(host.size)) == host.size
    host.destroy()


def test_destroy_gives_the_memory_back_once(regions: list[Region]) -> None:
    kv_pool = Shape().kv_pool()
    first, second = (host_pool(kv_pool, ours=True) for _ in range(2))
    assert [released(region) for region in regions] == [False, False]
    first.destroy()
    first.destroy()
    assert first.kv_buffer is None
    assert [released(region) for region in regions] == [True, False]
    back_up(second, kv_pool, rows_of(torch.arange(3), 16), rows_of(torch.arange(3), 16), physical=True)
    second.destroy()
    assert all(map(released, regions))


@pytest.mark.parametrize("layout", ["page_first", "page_head"])
def test_another_layout_is_refused(layout: str, regions: list[Region], capsys: pytest.CaptureFixture[str]) -> None:
    _, host_input, kwargs = sglang().host_inputs(Shape().kv_pool(), ())
    with pytest.raises(SystemExit, match="78"):
        adapter.tier_host_pool_class()(host_input, 2.0, 0, 16, layout, pin_memory=False, **kwargs)
    assert f"--hicache-mem-layout {layout}" in capsys.readouterr().err
    assert regions == []


def test_a_tier_without_room_ends_the_rank_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, regions: list[Region], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DramTier, "capacity_bytes", lambda self: 1000)
    with pytest.raises(SystemExit, match="78"):
        host_pool(Shape().kv_pool(), ours=True)
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("sglang_xmem: ")]) == 1
    assert "the pool needs 0.00 GB a rank and there is room for 0.00 GB; lower --hicache-size" in said[-1]
    assert regions == []


class _Full(DramTier):
    """A device's memory with room for 130 GB that fails when it is asked for."""

    locality = Locality.DEVICE

    def capacity_bytes(self) -> int:
        return 130 * GB

    def allocate(self, nbytes: int, parts: int = 1) -> Region:
        raise TierUnavailable("GPU 1 has no memory left")


@pytest.mark.parametrize("locality", Locality)
def test_an_automatic_size_of_another_tier_is_no_budget_of_host_memory(
    monkeypatch: pytest.MonkeyPatch, locality: Locality
) -> None:
    """SGLang answers with what it sized the pool by, which was the first tier's room, and counts it down."""
    from sglang.srt.mem_cache.pool_host import base

    monkeypatch.setattr(_Full, "locality", locality)
    monkeypatch.setattr(plan_module, "tier_classes", lambda: {"peer": _Full, "dram": DramTier})
    monkeypatch.setattr(DramTier, "capacity_bytes", lambda self: 500 * GB)
    given_out: list[int] = []

    def allocate(self: DramTier, nbytes: int, parts: int = 1) -> Region:
        given_out.append(nbytes)
        return Region(0, nbytes, "a fake", lambda: None)

    monkeypatch.setattr(DramTier, "allocate", allocate)
    reserve = base.HICACHE_HOST_MEMORY_RESERVE_BYTES
    available = [reserve + 60 * GB]
    monkeypatch.setattr(base, "available_host_memory_bytes", lambda **_: available[0])
    monkeypatch.setattr(adapter, "_sized_against", None)
    candidates = (Candidate("peer", (DramSeat(None),)), Candidate("dram", (DramSeat(None),)))
    plan = Plan(parse_options("auto", None), Ranks(gpus=(None,)), candidates, ())
    placement = Placement(plan, 0, adapter._host_budget)
    monkeypatch.setattr(adapter, "_placement", placement)
    unhooked = getattr(base.host_memory_budget_bytes, "__wrapped__", base.host_memory_budget_bytes)
    sized = adapter._host_memory_budget_bytes(unhooked, auto_size=True)
    assert sized == (130 * GB if locality is Locality.DEVICE else 60 * GB)
    available[0] = 0  # the other ranks have taken theirs; this one's share is still its own
    with base.host_memory_budget_scope(int(0.8 * sized)):
        with pytest.raises(ConfigError, match=r"the pool needs 90\.00 GB a rank and there is room for 60\.00 GB"):
            Placement(plan, 0, adapter._host_budget).allocate(90 * GB)
        tier, _ = placement.allocate(48 * GB)
    assert (tier.name, given_out) == ("dram", [48 * GB])

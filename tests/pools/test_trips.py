"""Every pool class of SGLang: pages there and back, byte by byte."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_xmem import session
from sglang_xmem.arena import Arena
from tests.pools import factories
from tests.pools.factories import KINDS, Pools, make
from tests.pools.seam import Seam, available, sglang  # noqa: F401  (sglang is a fixture)
from tests.pools.trips import POISON, Trip, as_bytes, there_and_back


def _cases() -> Iterator[tuple[Seam, str, int, torch.dtype, str]]:
    for seam in available():
        for kind, traits in KINDS.items():
            for layout in traits.layouts if seam.layouts is None else seam.layouts:
                for page_size in traits.page_sizes:
                    for dtype in traits.dtypes:
                        # One layout takes every page size and dtype; the others the largest and the first.
                        first = layout == (traits.layouts if seam.layouts is None else seam.layouts)[0]
                        if first or (page_size, dtype) == (traits.page_sizes[-1], traits.dtypes[0]):
                            yield seam, kind, page_size, dtype, layout


def _version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version("sglang").split(".")[:3])
    except importlib.metadata.PackageNotFoundError:
        return ()


@pytest.fixture
def pools(request: pytest.FixtureRequest) -> Iterator[Pools]:
    """The pools of a case, assembled through its seam."""
    seam, kind, page_size, dtype, layout = request.param
    if _version() < KINDS[kind].since:
        pytest.skip(f"SGLang {'.'.join(map(str, _version()))} has no {kind}")
    with seam.setup():
        built = make(kind, page_size=page_size, dtype=dtype, layout=layout, attach=seam.attach)
        try:
            yield built
        finally:
            built.close()


def _name(case: tuple[Seam, str, int, torch.dtype, str]) -> str:
    seam, kind, page_size, dtype, layout = case
    return f"{seam.name}-{kind}-{page_size}-{str(dtype).removeprefix('torch.')}-{layout}"


@pytest.mark.parametrize("pools", list(_cases()), indirect=True, ids=_name)
def test_there_and_back(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages come back byte by byte, layer by layer, and no other page changes."""
    loads = 0

    def load(arena: Arena, program: Any, pages: Any, counters: Any = None, addresses: Any = None) -> None:
        nonlocal loads
        loads += 1
        assert [each.tolist() for each in addresses] == [each.frames.tolist() for each in pages]
        plain(arena, program, pages, counters, addresses)

    plain = Arena.load
    monkeypatch.setattr(Arena, "load", load)
    there_and_back(pools)
    assert loads > 0 or not session.active(), "copy engines plan with addresses on the CPU"


def _small(kinds: tuple[str, ...]) -> list[tuple[Seam, str, int, torch.dtype, str]]:
    return [case for case in _cases() if case[1] in kinds and case[2] == KINDS[case[1]].page_sizes[-1]]


@pytest.mark.parametrize("pools", _small(("mha", "gdn", "dsa", "swa")), indirect=True, ids=_name)
def test_random_schedules(pools: Pools) -> None:
    """Any stores and loads in any order: a host page gives what was stored last in it."""
    trip = Trip(pools, seed=1)
    held: dict[str, dict[int, list[torch.Tensor | None]]] = {space: {} for space in trip.spaces}
    host = {space: trip.host_pages(space, 4) for space in trip.spaces}
    for _ in range(20):
        spaces = trip.rng.sample(trip.spaces, trip.rng.randint(1, len(trip.spaces)))
        numbers = {space: trip.rng.sample(range(4), trip.rng.randint(1, 4)) for space in spaces}
        if trip.rng.random() < 0.5 or any(n not in held[space] for space in spaces for n in numbers[space]):
            trip.fill()
            device = {space: trip.pick(space, len(numbers[space])) for space in spaces}
            trip.store(device, {space: _some(trip, space, host[space], numbers[space]) for space in spaces})
            for space in spaces:
                for number, page in zip(numbers[space], device[space], strict=True):
                    held[space][number] = trip.read({space: [page]})
        else:
            device = {space: trip.pick(space, len(numbers[space])) for space in spaces}
            wanted: list[torch.Tensor | None] = []
            for index, array in enumerate(pools.arrays):
                space = pools.spaces[array.pool]
                parts = [held[space][number][index] for number in numbers.get(space, [])]
                wanted.append(torch.cat([part for part in parts if part is not None]) if parts else None)
            trip.poison()
            trip.load(
                {space: _some(trip, space, host[space], numbers[space]) for space in spaces},
                device,
                wanted,
                shuffled=True,
            )


@pytest.mark.parametrize(
    "pools", [case for case in _small(tuple(KINDS)) if case[0].name == "xmem"], indirect=True, ids=_name
)
def test_counts_and_bytes_in_use(pools: Pools) -> None:
    """What a session says of pages in use and of bytes moved is what was allocated and moved, for every pool class."""
    from sglang_xmem.engines.sglang.pools import used_fraction

    active = session.current()
    trip = Trip(pools)
    before = {space: used_fraction(active, active.arenas[0], space) for space in active.arenas[0].spaces}
    host = {space: trip.host_pages(space, 2) for space in trip.spaces}
    trip.store({space: trip.pick(space, 2) for space in trip.spaces}, host)
    for name, space in active.arenas[0].spaces.items():
        held = used_fraction(active, active.arenas[0], name) - before[name]
        assert round(held * space.spec.pages) == 2
    moved = sum(each.section.nbytes for each in active.pools if each.layers)
    assert active.counts["bytes:store"] == 2 * moved
    assert active.counts["copies:store"] == 1


def _some(trip: Trip, space: str, indices: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    return indices.reshape(-1, trip.pools.slots_of(space))[numbers].flatten()


@pytest.mark.parametrize("pools", _small(("mha", "mla", "gdn", "dsa")), indirect=True, ids=_name)
def test_a_missing_page_is_noticed(pools: Pools) -> None:
    """Negative control: a trip whose load leaves out one row of one array fails."""
    trip = Trip(pools)
    source = {space: trip.pick(space, 2) for space in trip.spaces}
    kept = trip.read(source)
    host = {space: trip.host_pages(space, 2) for space in trip.spaces}
    trip.store(source, host)
    for victim in range(len(pools.arrays)):
        trip.poison()
        spoilt = [each if each is None else each.clone() for each in kept]
        bytes_wanted = spoilt[victim]
        assert bytes_wanted is not None
        bytes_wanted.view(-1)[-1] ^= 1
        with pytest.raises(AssertionError, match=f"array {victim} of layer"):
            trip.load(host, trip.pick_all(source), spoilt)


def test_every_array_of_a_page_is_described() -> None:
    """Bytes of a host page are those of its arrays' rows, so no array was forgotten here."""
    from tests.pools.seam import STOCK

    with STOCK.setup():
        for kind, traits in KINDS.items():
            if _version() < traits.since:
                continue
            pools = make(kind, layout=traits.layouts[0])
            try:
                for name, pool in pools.host_pools.items():
                    expected = sum(
                        as_bytes(array.tensor)[0].numel() * (pools.slots_of(pools.spaces[name]) // array.slots)
                        for array in pools.arrays
                        if array.pool == name
                    )
                    assert expected == _page_bytes(pool), (kind, name)
            finally:
                pools.close()


def _page_bytes(pool: object) -> int:
    """Bytes of a host page, from the memory that SGLang takes for it."""
    buffers = next(
        (
            b
            for b in (getattr(pool, n, None) for n in ("kv_buffer", "index_k_with_scale_buffer", "k_buffer"))
            if b is not None
        ),
        None,
    )
    if buffers is None:
        return 0
    tensors = list(buffers) if isinstance(buffers, (list, tuple)) else [buffers]
    sides = list(getattr(pool, "slot_state_buffers", ()))
    total = sum(t.numel() * t.element_size() for t in tensors if all(t is not s for s in sides))
    total += sum(t.numel() * t.element_size() for t in sides)
    pages = getattr(pool, "indexer_page_num", None) or getattr(pool, "num_host_pages", None) or pool.page_num  # type: ignore[attr-defined]
    assert total % pages == 0
    return total // pages


def test_poison_is_not_what_random_bytes_are() -> None:
    """The poison differs from a page with certainty."""
    tensor = torch.randint(0, 256, (64,), dtype=torch.uint8)
    assert not bool((tensor == POISON).all())
    assert factories.DEVICE_PAGES > 10  # a trip takes up to 5 pages and 5 others

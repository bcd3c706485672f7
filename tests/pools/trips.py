"""Trips of pages from the device to the host pools and back, compared through the device pools' own tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from tests.pools.factories import DEVICE_PAGES, MAMBA, Array, Pools

POISON = 0xA5

Pages = dict[str, list[int]]


class Trip:
    """One set of pools with random bytes, of which pages are stored, lost and loaded."""

    def __init__(self, pools: Pools, seed: int = 0) -> None:
        """Fill the device pools with random bytes."""
        self.pools = pools
        self.rng = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.spaces = list(dict.fromkeys(pools.spaces.values()))
        self.fill()

    def fill(self) -> None:
        """Write random bytes to all arrays."""
        for array in self.pools.arrays:
            data = torch.randint(0, 256, as_bytes(array.tensor).shape, dtype=torch.uint8, generator=self.noise)
            as_bytes(array.tensor).copy_(data)

    def poison(self) -> None:
        """Overwrite all arrays."""
        for array in self.pools.arrays:
            as_bytes(array.tensor).fill_(POISON)

    def pick(self, space: str, count: int, but: Sequence[int] = ()) -> list[int]:
        """Choose device pages in any order; SGLang keeps page 0 for itself."""
        return self.rng.sample([page for page in range(1, DEVICE_PAGES) if page not in but], count)

    def pick_all(self, pages: Pages, but: Pages | None = None) -> Pages:
        """Choose as many device pages in each space as `pages` has."""
        return {space: self.pick(space, len(each), (but or {}).get(space, ())) for space, each in pages.items()}

    def host_pages(self, space: str, count: int) -> torch.Tensor:
        """Take host pages that are neither in order nor side by side."""
        slots = self.pools.slots_of(space)
        indices = self.pools.alloc_host(space, 2 * count).reshape(2 * count, slots)
        order = torch.tensor(self.rng.sample(range(2 * count), 2 * count))
        self.pools.free_host(space, indices[order[count:]].flatten())
        return indices[order[:count]].flatten()

    def rows(self, array: Array, pages: Sequence[int]) -> torch.Tensor:
        """Rows of pages, page after page."""
        per_page = self.pools.slots_of(self.pools.spaces[array.pool]) // array.slots
        starts = torch.tensor(list(pages), dtype=torch.int64)[:, None] * per_page
        return (starts + torch.arange(per_page)).flatten()

    def read(self, pages: Pages) -> list[torch.Tensor | None]:
        """Bytes of pages in each array, None where the array's space is not among them."""
        return [
            as_bytes(array.tensor)[self.rows(array, pages[space])].clone() if space in pages else None
            for array, space in self._with_spaces()
        ]

    def store(self, pages: Pages, host: dict[str, torch.Tensor]) -> None:
        """Store device pages."""
        device = {space: self.pools.indices(space, each) for space, each in pages.items()}
        self.pools.submit_store(self.pools.store_transfers(host, device))

    def load(
        self,
        host: dict[str, torch.Tensor],
        pages: Pages,
        wanted: list[torch.Tensor | None],
        *,
        again: Sequence[tuple[str, torch.Tensor, list[int], list[torch.Tensor | None]]] = (),
        shuffled: bool = False,
    ) -> None:
        """Load into device pages, and compare: each layer as soon as a reader may have it, and at the end everything.

        Args:
            wanted: bytes of the pages, as `read` gives them.
            again: (pool, host, device pages, bytes) loaded too.
        """
        before = [as_bytes(array.tensor).clone() for array in self.pools.arrays]
        device = {space: self.pools.indices(space, each) for space, each in pages.items()}
        extra = [
            (pool, host_indices, self.pools.indices(self.pools.spaces[pool], each))
            for pool, host_indices, each, _ in again
        ]
        targets = [(None, pages, wanted), *((pool, {self.pools.spaces[pool]: each}, w) for pool, _, each, w in again)]

        def arrived(layer: int | None) -> None:
            for only, where, bytes_wanted in targets:
                for number, (array, space) in enumerate(self._with_spaces()):
                    expected = bytes_wanted[number]
                    if expected is None or space not in where or only not in (None, array.pool):
                        continue
                    if layer is not None and array.part != layer:
                        continue
                    found = as_bytes(array.tensor)[self.rows(array, where[space])]
                    wrong = int((found != expected).flatten(1).any(1).sum())
                    assert wrong == 0, (
                        f"{self.pools.kind}: {array.pool}, array {number} of layer {array.part}: {wrong} of "
                        f"{len(expected)} rows are wrong after "
                        + (f"layer {layer}" if layer is not None else "the load")
                    )

        transfers = self.pools.load_transfers(host, device, again=extra, rng=self.rng if shuffled else None)
        self.pools.submit_load(transfers, arrived)
        arrived(None)
        for number, (array, space) in enumerate(self._with_spaces()):
            mine = [where[space] for only, where, _ in targets if space in where and only in (None, array.pool)]
            others = torch.ones(array.tensor.shape[0], dtype=torch.bool)
            for each in mine:
                others[self.rows(array, each)] = False
            assert torch.equal(as_bytes(array.tensor)[others], before[number][others]), (
                f"{self.pools.kind}: {array.pool}, array {number} of layer {array.part}: rows of other pages changed"
            )

    def _with_spaces(self) -> list[tuple[Array, str]]:
        return [(array, self.pools.spaces[array.pool]) for array in self.pools.arrays]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, rows on axis 0; shares its memory."""
    return tensor.view(torch.uint8) if tensor.dtype is not torch.uint8 else tensor


def there_and_back(pools: Pools, seed: int = 0) -> None:
    """Store pages of all spaces, lose them, and load them: whole, in part, in other orders, twice, space by space."""
    trip = Trip(pools, seed)
    counts = {"kv": 5, "swa": 3, "mamba": 2}
    source: Pages = {space: trip.pick(space, counts[space]) for space in trip.spaces}
    kept = trip.read(source)
    host = {space: trip.host_pages(space, len(pages)) for space, pages in source.items()}
    trip.store(source, host)
    assert_equal(trip.read(source), kept, "a store changed the device")

    trip.poison()
    trip.load(host, trip.pick_all(source), kept)
    trip.poison()
    trip.load(host, trip.pick_all(source), kept, shuffled=True)

    # Some pages, in another order.
    trip.poison()
    chosen = {space: trip.rng.sample(range(len(pages)), max(1, len(pages) - 1)) for space, pages in source.items()}
    part_host = {space: page_rows(trip, space, host[space], numbers) for space, numbers in chosen.items()}
    part_kept = [
        each if each is None else page_rows(trip, space, each, chosen[space], array)
        for each, (array, space) in zip(kept, trip._with_spaces(), strict=True)
    ]
    trip.load(part_host, trip.pick_all(chosen), part_kept, shuffled=True)

    # A state goes to two slots: that of the tree's node, and the request's copy.
    if MAMBA in source:
        trip.poison()
        first = trip.pick_all(source)
        second = trip.pick(MAMBA, len(source[MAMBA]), but=first[MAMBA])
        trip.load(host, first, kept, again=[("mamba", host[MAMBA], second, kept)], shuffled=True)

    # Spaces by themselves: a load leaves the anchor out when nothing of it is wanted.
    for space in trip.spaces:
        trip.poison()
        alone = {space: trip.pick(space, len(source[space]))}
        trip.load({space: host[space]}, alone, kept, shuffled=True)

    # Host pages are used again by others.
    trip.fill()
    other = trip.pick_all(source)
    kept = trip.read(other)
    trip.store(other, host)
    trip.poison()
    trip.load(host, trip.pick_all(other), kept)
    for space, indices in host.items():
        pools.free_host(space, indices)


def page_rows(
    trip: Trip, space: str, values: torch.Tensor, pages: Sequence[int], array: Array | None = None
) -> torch.Tensor:
    """Rows of some of the pages that `values` has, in the order of `pages`."""
    per_page = trip.pools.slots_of(space) // (array.slots if array is not None else 1)
    return values.reshape(-1, per_page, *values.shape[1:])[list(pages)].reshape(-1, *values.shape[1:])


def assert_equal(found: list[torch.Tensor | None], wanted: list[torch.Tensor | None], what: str) -> None:
    """Compare what `Trip.read` gave."""
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other), f"{what} (array {number})"

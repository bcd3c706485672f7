"""An index space with frames in mtierd's page bank: a page gets a frame when it is stored or found there.

Pages are found by keys of 32 bytes, which the engine derives from a page's content. A page keeps its frame until the
engine frees it; a published frame then stays in the bank.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.arena import ALIGNMENT, Space
from sglang_xmem.bank import HAVE, NEW, BankSession
from sglang_xmem.sums import SectionSums

#: Bytes at the end of a frame for the sums of its sections, 8 each, in order of creation.
TRAILER_BYTES = ALIGNMENT
#: Maximum seconds that a store waits for frames that copies still use.
PATIENCE_S = 2.0


class BankSpace(Space):
    """Pages of a rank in the page bank.

    The scheduler thread stores and frees pages; storage threads find and publish them; never the same page
    concurrently.
    """

    def _first_table(self) -> torch.Tensor:
        # An address of 0 means no frame.
        table = torch.zeros(self.spec.pages, dtype=torch.int64)
        self._table = table.numpy()
        #: Mixed into keys, so that pages of other weights have other keys; None while pages of the previous weights may
        #: exist.
        self._epoch: int | None = 0
        self._next_epoch = 0
        self._sums: list[SectionSums] = []
        #: Whether a page that the bank already has adopts the bank's frame, and releases its own after the last copy:
        #: for engines whose ranks store equal bytes.
        self.gives_way = False
        #: Returns a function that reports whether all copies now in flight have ended.
        self.copies_in_flight: Callable[[], Callable[[], bool]] = lambda: lambda: True
        #: Replaced frames, and functions that report whether the copies that may use them have ended.
        self._given_up: list[tuple[npt.NDArray[np.int64], Callable[[], bool]]] = []
        self._giving_up = threading.Lock()
        self._trailers = self._map_trailers()
        return table

    def _map_trailers(self) -> npt.NDArray[np.int64] | None:
        """One row per frame; None if the CPU does not address them, so that pages have no stored sums."""
        bank = self.bank
        if self.region.owner is None or self.spec.frame_bytes <= TRAILER_BYTES:
            return None
        (owner,) = self.region.owner
        return np.ndarray(
            (self.region.extents[0].nbytes // bank.frame_bytes, TRAILER_BYTES // 8),
            np.int64,
            owner,
            self.spec.frame_bytes - TRAILER_BYTES,
            (bank.frame_bytes, 8),
        )

    @property
    def bank(self) -> BankSession:
        assert self.region.bank is not None
        return self.region.bank

    # ---- on the scheduler thread ----

    def look_up(self, pages: torch.Tensor, *, claim: bool) -> torch.Tensor:
        """As Space.look_up.

        Raises:
            RuntimeError: a page to load has no frame, so the engine's state differs from this class's.
        """
        numbers = pages.numpy()
        found = self._table[numbers]
        if not claim:
            if not found.all():
                raise RuntimeError("sglang_xmem: a load names a page without a frame; report this error")
            self.bank.touch(found)
            return torch.from_numpy(found)
        wanting = found == 0
        if not wanting.all():  # a rider stores to the frames of the pool whose pages it uses
            wanting[~wanting] = ~self.bank.owned(found[~wanting])
            self._release(numbers[wanting])
        self._table[numbers[wanting]] = found[wanting] = self._claim(int(wanting.sum()))
        return torch.from_numpy(found)

    def _claim(self, count: int) -> npt.NDArray[np.int64]:
        """Claim empty frames; if too few are free, wait for copies that use replaced frames.

        This occurs only with several ranks and a full pool, and lasts as long as a load. Without the wait, the rank and
        the server would end.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.bank.claim(count)
            except RuntimeError:
                if not self._given_up or time.monotonic() > deadline:
                    raise
            time.sleep(0.001)
            self.tidy()

    def free(self, pages: torch.Tensor) -> None:
        self._release(pages.numpy())

    def clear(self) -> None:
        self._release(np.arange(self.kept, self.spec.pages))
        self._epoch = self._next_epoch

    def _release(self, pages: npt.NDArray[np.int64]) -> None:
        found = self._table[pages]
        self._table[pages] = 0
        self.bank.release(found[found != 0])

    def carry(self, sums: SectionSums) -> None:
        assert (len(self._sums) + 1) * 8 <= TRAILER_BYTES
        self._sums.append(sums)

    def damaged(self, addresses: npt.NDArray[np.int64]) -> None:
        """Remove pages from the bank by their frames' addresses; returns at once."""
        self.bank.damaged(np.unique(addresses[addresses != 0]))

    def weights_changed(self, name: bytes) -> None:
        """Share nothing until the next `clear`, and then only with engines with weights of that name.

        Args:
            name: an identity of the weights; empty for the original ones.
        """
        self._epoch = None
        self._next_epoch = int.from_bytes(hashlib.sha256(name).digest(), "big") if name else 0

    # ---- on storage threads ----

    def find(self, keys: Sequence[bytes]) -> int:
        """Count the leading keys whose pages the bank has."""
        named = self._named(keys)
        return self.bank.find(named) if named else 0

    def look(self, keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Report for each key whether the bank has its page."""
        named = self._named(keys)
        return self.bank.look(named) if named else np.zeros(len(keys), np.bool_)

    def adopt(self, keys: Sequence[bytes], pages: torch.Tensor) -> int:
        """Adopt the bank's pages of the leading keys, as far as it has them; moves no byte.

        Args:
            pages: int64 (len(keys),), on the CPU; without frames.

        Returns: the number of adopted pages.
        """
        named = self._named(keys)
        if not named:
            return 0
        addresses = self.bank.adopt(named)
        numbers = pages.numpy()[: addresses.size]
        self._release(numbers)
        if self._trailers is not None:
            found = torch.from_numpy(self._trailers[self._rows(addresses)])
            for column, sums in enumerate(self._sums):
                sums.take(pages[: addresses.size], found[:, column])
        self._table[numbers] = addresses
        return int(addresses.size)

    def _rows(self, addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return (addresses - self.bank.slab.address) // self.bank.frame_bytes

    def publish(self, keys: Sequence[bytes], pages: torch.Tensor) -> int:
        """Publish pages whose bytes are complete.

        A page that the bank already has stays private, or adopts the bank's frame (`gives_way`).

        Args:
            pages: int64 (len(keys),), on the CPU; with frames.

        Returns: the number of newly published pages.
        """
        numbers = pages.numpy()
        addresses = self._table[numbers]
        named = self._named(keys)
        if not named or not addresses.all():
            self.bank.counts["bank:private"] += len(keys)
            return 0
        if self._trailers is not None:
            own = self.bank.owned(addresses)  # not readable by others yet
            rows = np.zeros((int(own.sum()), TRAILER_BYTES // 8), np.int64)
            for column, sums in enumerate(self._sums):
                rows[:, column] = sums.table[pages].numpy()[own]
            self._trailers[self._rows(addresses[own])] = rows
        verdicts = self.bank.publish(named, addresses)
        have = [number for number, verdict in enumerate(verdicts) if verdict == HAVE]
        if have and self.gives_way:
            self._give_way([named[number] for number in have], numbers[have], addresses[have])
        self.tidy()
        return verdicts.count(NEW)

    def _give_way(self, keys: Sequence[bytes], numbers: npt.NDArray[np.int64], own: npt.NDArray[np.int64]) -> None:
        """Adopt the bank's frames for pages, as far as it still has them."""
        found = self.bank.adopt(keys)
        numbers, own = numbers[: found.size], own[: found.size]
        # If the bank's page is this one, release the additional hold.
        pages = torch.from_numpy(numbers[found != own])
        for sums in self._sums:
            sums.forget(pages)  # a copy in flight compares with the previous page
        self._table[numbers] = found
        with self._giving_up:
            self._given_up.append((own, self.copies_in_flight()))

    def tidy(self) -> None:
        with self._giving_up:
            waiting, self._given_up = self._given_up, []
            for frames, have_ended in waiting:
                if have_ended():
                    self.bank.release(frames)
                else:
                    self._given_up.append((frames, have_ended))

    def _named(self, keys: Sequence[bytes]) -> list[bytes]:
        """Convert the engine's keys to the bank's; None while nothing is shared."""
        epoch = self._epoch
        if epoch is None:
            return []
        if epoch == 0:
            return list(keys)
        return [(int.from_bytes(key, "big") ^ epoch).to_bytes(len(key), "big") for key in keys]

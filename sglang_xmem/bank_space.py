"""An index space whose frames lie in mtierd's page bank: a page gets a frame when it is stored or found there.

Pages are found by keys, 32 bytes each, that the engine makes of what a page holds. A page keeps its frame until the
engine frees it; a frame that others know too stays in the bank then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sglang_xmem.arena import Space
from sglang_xmem.bank import NEW, BankSession


class BankSpace(Space):
    """Pages of a rank in the page bank.

    The scheduler thread stores and frees pages, storage threads find and publish them; never the same page at once.
    """

    def _first_table(self) -> torch.Tensor:
        # Whatever is to be sent to another GPU or process has to be a plain address, so 0 is no frame.
        table = torch.zeros(self.spec.pages, dtype=torch.int64)
        self._table = table.numpy()
        #: What keys are mixed with, so that pages of other weights have other keys; None while pages of the weights
        #: before may still be about.
        self._epoch: int | None = 0
        self._next_epoch = 0
        return table

    @property
    def bank(self) -> BankSession:
        assert self.region.bank is not None
        return self.region.bank

    # ---- on the scheduler thread ----

    def look_up(self, pages: torch.Tensor, *, claim: bool) -> torch.Tensor:
        """As Space.look_up.

        Raises:
            RuntimeError: a page that is to be loaded has no frame: the engine counts otherwise than this class.
        """
        numbers = pages.numpy()
        found = self._table[numbers]
        if not claim:
            if not found.all():
                raise RuntimeError("sglang_xmem: a page without a frame was to be loaded; report this")
            self.bank.touch(found)
            return torch.from_numpy(found)
        wanting = found == 0
        if not wanting.all():  # a pool that rides on another's pages stores to the frames that the first one got
            wanting[~wanting] = ~self.bank.owned(found[~wanting])
            self._release(numbers[wanting])
        self._table[numbers[wanting]] = found[wanting] = self.bank.claim(int(wanting.sum()))
        return torch.from_numpy(found)

    def free(self, pages: torch.Tensor) -> None:
        self._release(pages.numpy())

    def clear(self) -> None:
        self._release(np.arange(self.kept, self.spec.pages))
        self._epoch = self._next_epoch

    def _release(self, pages: npt.NDArray[np.int64]) -> None:
        found = self._table[pages]
        self._table[pages] = 0
        self.bank.release(found[found != 0])

    def weights_changed(self, name: bytes) -> None:
        """Share nothing until the next `clear`, and from then on with engines that have the weights of that name.

        Args:
            name: anything; empty for the weights that the space was joined with.
        """
        self._epoch = None
        self._next_epoch = int.from_bytes(hashlib.sha256(name).digest(), "big") if name else 0

    # ---- on storage threads ----

    def find(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys' pages the bank has."""
        named = self._named(keys)
        return self.bank.find(named) if named else 0

    def adopt(self, keys: Sequence[bytes], pages: torch.Tensor) -> int:
        """Let pages be those of the first keys, as far as the bank has them; moves no byte.

        Args:
            pages: int64 (len(keys),), on the CPU; without frames.

        Returns: how many.
        """
        named = self._named(keys)
        if not named:
            return 0
        addresses = self.bank.adopt(named)
        numbers = pages.numpy()[: addresses.size]
        self._release(numbers)
        self._table[numbers] = addresses
        return int(addresses.size)

    def publish(self, keys: Sequence[bytes], pages: torch.Tensor) -> int:
        """Let others find pages whose bytes are in place. Pages that the bank has already stay as they are.

        Args:
            pages: int64 (len(keys),), on the CPU; with frames.

        Returns: how many others can find from now on that they could not before.
        """
        addresses = self._table[pages.numpy()]
        named = self._named(keys)
        if not named or not addresses.all():
            self.bank.counts["bank:private"] += len(keys)
            return 0
        return self.bank.publish(named, addresses).count(NEW)

    def _named(self, keys: Sequence[bytes]) -> list[bytes]:
        """The bank's keys for the engine's; none while nothing is shared."""
        epoch = self._epoch
        if epoch is None:
            return []
        if epoch == 0:
            return list(keys)
        return [(int.from_bytes(key, "big") ^ epoch).to_bytes(len(key), "big") for key in keys]

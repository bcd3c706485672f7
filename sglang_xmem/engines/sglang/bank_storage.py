"""SGLang's storage interface over the page bank: a hit changes an entry of the page table, and moves no byte.

SGLang queries it before it computes a request, and publishes pages as soon as they are in the tier. Every failure is a
miss: an exception here would print a traceback per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult

from sglang_xmem import session
from sglang_xmem.bank_space import BankSpace
from sglang_xmem.engines.sglang import sharing
from sglang_xmem.engines.sglang.geometry import KV, pages_of, space_of
from sglang_xmem.errors import refuse

#: The value for --hicache-storage-backend-extra-config; SGLang's default threshold of 256 tokens excludes short
#: prompts.
EXTRA_CONFIG = {
    "backend_name": "xmem_bank",
    "module_path": __name__,
    "class_name": "BankStorage",
    "interface_v1": 1,
    "prefetch_threshold": 1,
}


class BankStorage(HiCacheStorage):
    """Pages of this rank's spaces in the bank; inactive if its pools are in another tier.

    A page of the anchor's space is usable only with the matching pages of all other spaces: with each page's (an
    indexer), with those of the last tokens (a sliding window), or with the state at its end (Mamba). A rider is in the
    frames of the space whose numbers it uses.

    Args:
        storage_config, kwargs: as SGLang passes them.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        self._spaces = {space.spec.name: space for space in sharing.bank_spaces()}
        for space in self._spaces.values():
            space.bank.counts = session.current().counts
            space.copies_in_flight = session.current().watch.in_flight
        # SGLang would let one rank publish pages that all ranks have, and the others would keep theirs. Here all ranks
        # publish: the bank keeps the first copy, which replaces the others'.
        if self._spaces and storage_config.is_mla_model:
            storage_config.is_mla_model = False
            self._spaces[KV].gives_way = storage_config.tp_size > 1
        _load_hash()

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return self._spaces[KV].find(_names(keys)) if self._spaces else 0

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        pages = self._pages(host_indices, self.mem_pool_host)
        got = self._spaces[KV].adopt(_names(keys), pages) if self._spaces else 0
        return [number < got for number in range(len(keys))]

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Publish pages. Returns True for each: after a False SGLang would drop the following pages."""
        if self._spaces:
            self._spaces[KV].publish(_names(keys), self._pages(host_indices, self.mem_pool_host))
        return [True] * len(keys)

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        names = _names(keys)
        found = self._spaces[KV].find(names) if self._spaces else 0
        hits = {PoolName.KV: found}
        #: Report which prefixes, indexed by their page count less one, can be restored.
        whole = np.ones(found, np.bool_)
        for transfer in pool_transfers or ():
            space = self._own_space(transfer)
            if space is not None and found:
                needed = max(1, len(transfer.keys or ()))
                whole &= _with_trailing(space.look(names[:found]), needed)
            elif self._is_unknown(transfer):
                whole[:] = False
            ends = np.flatnonzero(whole)
            hits[transfer.name] = int(ends[-1]) + 1 if ends.size else 0
        prefixes = (np.flatnonzero(whole) + 1).tolist()
        return PoolTransferResult(prefixes[-1] if prefixes else 0, hits, prefixes)

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        got: dict[str, list[bool]] = {}
        for transfer in sorted(transfers, key=lambda transfer: transfer.indices_from_pool is not None):
            space, keys = self._own_space(transfer), transfer.keys or ()
            count = len(keys)
            if space is not None:
                pages = self._pages_of(transfer)
                count = space.adopt(_names(keys), pages) if len(pages) == len(keys) else 0
            elif transfer.indices_from_pool in got:
                count = sum(got[transfer.indices_from_pool])
            elif self._is_unknown(transfer):
                count = 0
            got[transfer.name] = [number < count for number in range(len(keys))]
        return got

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """As batch_set_v1."""
        for transfer in transfers:
            space, keys = self._own_space(transfer), transfer.keys or ()
            if space is not None:
                pages = self._pages_of(transfer)
                if len(pages) == len(keys):
                    space.publish(_names(keys), pages)
        return {transfer.name: [True] * len(transfer.keys or ()) for transfer in transfers}

    def _own_space(self, transfer: Any) -> BankSpace | None:
        """Return the space whose pages a transfer numbers; None for a rider on another space's numbers."""
        name = space_of(str(getattr(transfer.name, "value", transfer.name)))
        return self._spaces.get(name) if name != KV and transfer.indices_from_pool is None else None

    def _is_unknown(self, transfer: Any) -> bool:
        """Whether a transfer has its own page numbers, which the bank does not have: its pages are misses."""
        name = space_of(str(getattr(transfer.name, "value", transfer.name)))
        return transfer.indices_from_pool is None and name not in self._spaces

    def _pages_of(self, transfer: Any) -> torch.Tensor:
        return self._pages(transfer.host_indices, self.registered_pools[transfer.name])

    @staticmethod
    def _pages(host_indices: torch.Tensor, pool: Any) -> torch.Tensor:
        return pages_of(host_indices.cpu(), pool.page_size)

    # SGLang's base class requires these, but does not call them with this interface.

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        return None

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        return [None] * len(keys)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return False

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return False


def _with_trailing(there: npt.NDArray[np.bool_], needed: int) -> npt.NDArray[np.bool_]:
    """Report for each prefix, by its page count less one, whether its last `needed` pages (or all) exist.

    Args:
        there: whether each page exists.
    """
    run = np.arange(len(there)) - np.maximum.accumulate(np.where(there, -1, np.arange(len(there))))
    return np.asarray(run >= np.minimum(needed, np.arange(len(there)) + 1), np.bool_)


def _names(keys: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(key) for key in keys]


def _load_hash() -> None:
    """Compile SGLang's page hash now: at the first look-up it would delay requests for seconds."""
    from sglang.srt.mem_cache.cpp_utils.native_hash import _load_native_hash_module

    try:
        _load_native_hash_module()
    except Exception:  # a compiler fails in many ways
        refuse(
            "SGLang cannot compile its page hash, which tier bank needs. Run apt-get install g++ libssl-dev "
            "ninja-build, or use --hicache-xmem-tier dram."
        )

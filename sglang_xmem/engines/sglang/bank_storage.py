"""SGLang's storage interface over the page bank: a hit is a changed entry of the page table, and moves no byte.

SGLang asks it before a request is computed, and gives it pages as soon as they are in the tier. Whatever goes wrong is
a miss: an exception here would be a traceback per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from sglang_xmem import session
from sglang_xmem.engines.sglang import sharing
from sglang_xmem.errors import refuse

#: What --hicache-storage-backend-extra-config would be; SGLang's default of 256 tokens leaves short prompts out.
EXTRA_CONFIG = {
    "backend_name": "xmem_bank",
    "module_path": __name__,
    "class_name": "BankStorage",
    "interface_v1": 1,
    "prefetch_threshold": 1,
}


class BankStorage(HiCacheStorage):
    """Pages of this rank's space in the bank; nothing where the pool is in another tier.

    Args:
        storage_config, kwargs: as SGLang gives them.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any]) -> None:
        spaces = sharing.bank_spaces()
        self._space = spaces[0] if spaces else None
        if self._space:
            self._space.bank.counts = session.current().counts
        _load_hash()

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return self._space.find(_names(keys)) if self._space else 0

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        got = self._space.adopt(_names(keys), self._pages(host_indices)) if self._space else 0
        return [number < got for number in range(len(keys))]

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Publish pages. True for each: after a False SGLang would give up those behind it."""
        if self._space:
            self._space.publish(_names(keys), self._pages(host_indices))
        return [True] * len(keys)

    def _pages(self, host_indices: torch.Tensor) -> torch.Tensor:
        slots = self.mem_pool_host.page_size
        return host_indices[::slots].cpu() // slots

    # Pools that ride on the anchor's numbers lie in its frames: their pages are there with its own.

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        found = self.batch_exists(keys)
        return PoolTransferResult(found, {transfer.name: found for transfer in pool_transfers or ()})

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: [True] * len(transfer.keys or ()) for transfer in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: [True] * len(transfer.keys or ()) for transfer in transfers}

    # What SGLang's base class wants and does not call with this interface.

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


def _names(keys: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(key) for key in keys]


def _load_hash() -> None:
    """Compile SGLang's hash of pages now: at the first look-up it would keep requests waiting for seconds."""
    from sglang.srt.mem_cache.cpp_utils.native_hash import _load_native_hash_module

    try:
        _load_native_hash_module()
    except Exception:  # whatever a compiler says
        refuse(
            "SGLang cannot compile its hash of pages, which tier bank needs. Run apt-get install g++ libssl-dev "
            "ninja-build, or use --hicache-xmem-tier dram."
        )

"""Storage backends (HiCache's L3) over an arena: pages as flat bytes for all tiers, addresses for CPU-addressable ones.

A pool's section of a frame is one range, component after component in the order of SGLang's storage keys, so a page is
one copy. SGLang's own pools store the same bytes in another order under the same key and size; `FORMAT` distinguishes
the two.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from sglang_xmem import session
from sglang_xmem.engines.sglang.geometry import pages_of
from sglang_xmem.sums import FAILURES, keyed_sum

if TYPE_CHECKING:
    from sglang_xmem.engines.sglang.pools import AdoptedPool

logger = logging.getLogger(__name__)

#: Name of this byte order of a page, in storage keys. Another order needs another name.
FORMAT = "xmem2"
#: Bytes after a page in backends that transfer bytes: the sum of its bytes and its key.
SUM_BYTES = 8


def attach(view: AdoptedPool) -> None:
    """Replace an adopted pool's functions for storage pages with the arena's."""
    pool, arena, section = view.pool, view.arena, view.section
    # Backends refuse to register memory twice, and a frame holds pages of all pools of its space.
    buffers = arena.host_buffers(section.space) if section.offset == 0 else []
    dtype = pool.dtype if section.nbytes % pool.dtype.itemsize == 0 else torch.uint8

    def get_data_page(index: Any, flat: bool = True) -> torch.Tensor:
        """Copy a page to the CPU, flat; RuntimeError if it is damaged."""
        page = int(index) // view.slots
        data = arena.read(section.space, page, section.offset, section.nbytes)
        if view.sums is not None and page % view.sums.every == 0:
            wrong = view.sums.wrong(torch.tensor([page]), data.numpy().reshape(1, -1), section.offset)
            if len(wrong):
                session.current().counts[FAILURES] += 1
                raise RuntimeError(f"sglang_xmem: page {page} in tier {arena.tier.name} is damaged and is not stored")
        return data.view(dtype)

    def set_from_flat_data_page(index: Any, data_page: torch.Tensor) -> None:
        """Write a page from `get_data_page`."""
        data = data_page.contiguous().view(torch.uint8).flatten()
        if data.numel() != section.nbytes:
            raise ValueError(f"a page has {section.nbytes} bytes, got {data.numel()}")
        page = int(index) // view.slots
        arena.write(section.space, page, section.offset, data)
        if view.sums is not None:
            view.sums.put(page, data.numpy(), section.offset)

    def get_dummy_flat_data_page() -> torch.Tensor:
        """Allocate a page on the CPU for a backend to fill."""
        return torch.zeros(section.nbytes, dtype=torch.uint8, pin_memory=arena.device.type == "cuda").view(dtype)

    def get_page_buffer_meta(indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return addresses and sizes of each page's components, page by page."""
        _addressable(arena)
        pages = pages_of(indices.cpu(), view.slots)
        starts = (arena.spaces[section.space].table[pages] + section.offset).tolist()
        offsets, at = [], 0
        for nbytes in view.component_bytes:
            offsets.append(at)
            at += nbytes
        return [start + offset for start in starts for offset in offsets], list(view.component_bytes) * len(starts)

    def get_hybrid_pool_buffer() -> list[torch.Tensor]:
        """Return the memory for a backend to register: none for a pool that shares its frames with an earlier one."""
        _addressable(arena)
        return buffers

    def is_stride_page_aligned(page_size_bytes: int = 4096) -> bool:
        """Whether every page's address is a multiple of `page_size_bytes`."""
        starts = arena.spaces[section.space].table + section.offset
        return bool((starts % page_size_bytes == 0).all()) and all(
            n % page_size_bytes == 0 for n in view.component_bytes
        )

    def destroy() -> None:
        """Release the arena's memory, including that of the other pools."""
        pool.kv_buffer = None
        arena.close()

    def not_here(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("sglang_xmem: SGLang called its own copy function for a pool in the tier; report this error")

    for function in (
        get_data_page,
        set_from_flat_data_page,
        get_dummy_flat_data_page,
        get_page_buffer_meta,
        get_hybrid_pool_buffer,
        is_stride_page_aligned,
        destroy,
    ):
        setattr(pool, function.__name__, function)
    for name in (
        "load_to_device_per_layer",
        "load_to_device_per_layer_physical",
        "backup_from_device_all_layer",
        "backup_from_device_all_layer_physical",
    ):
        setattr(pool, name, not_here)
    pool.storage_format_tag = FORMAT
    # The memory that backends register if the CPU addresses it; otherwise a tensor without memory.
    pool.kv_buffer = buffers[0] if len(buffers) == 1 else torch.empty(0, dtype=torch.uint8, device="meta")


def guard(backend: Any) -> None:
    """Append a sum to the pages of a backend that transfers bytes: a damaged or swapped page is a miss.

    Args:
        backend: SGLang's `file`, which accesses pages only by `get` and `set`.
    """
    backend = getattr(backend, "_backend", backend)  # for fault injection
    get, put = backend.get, backend.set
    # Includes model and rank, for a backend with one name for all of them.
    whole_key: Any = getattr(backend, "_get_suffixed_key", str)

    def get_checked(key: str, target_location: torch.Tensor, target_sizes: Any = None) -> torch.Tensor | None:
        target = target_location.view(torch.uint8).flatten()
        place = torch.empty(target.numel() + SUM_BYTES, dtype=torch.uint8)
        try:
            found = get(key, place)
        except OSError as error:  # shorter than a page, or a disk error
            session.current().counts["storage:read_failed"] += 1
            logger.warning("sglang_xmem: a page in storage cannot be read: %s", error)
            found = None
        if found is None:
            return None
        data, of_page = place[:-SUM_BYTES], place[-SUM_BYTES:]
        session.current().counts["storage:read"] += 1
        if keyed_sum(data.numpy(), whole_key(key)) != bytes(of_page.tolist()):
            session.current().counts[FAILURES] += 1
            logger.error("sglang_xmem: page %s in storage is damaged, or belongs to another key; it is a miss", key)
            return None
        target.copy_(data)
        return target_location

    def set_with_sum(key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        data = value.contiguous().view(torch.uint8).flatten()
        of_page = torch.frombuffer(bytearray(keyed_sum(data.numpy(), whole_key(key))), dtype=torch.uint8)
        done = bool(put(key, torch.cat((data, of_page)), target_location, target_sizes))
        session.current().counts["storage:write" if done else "storage:write_failed"] += 1
        return done

    backend.get, backend.set = get_checked, set_with_sum


def _addressable(arena: Any) -> None:
    if not arena.cpu_addressable:
        raise RuntimeError(
            f"sglang_xmem: this storage backend cannot address tier {arena.tier.name} (GPU memory). Use "
            "--hicache-xmem-tier dram, or --hicache-storage-backend file."
        )

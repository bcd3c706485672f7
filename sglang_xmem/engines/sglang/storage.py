"""Storage backends (HiCache's L3) over an arena: pages as flat bytes for all tiers, addresses where the CPU has them.

A pool's part of a frame is one range, component after component in the order of SGLang's storage keys, so a page is
one copy. SGLang's own pools order a page's bytes in other ways under the same key and size; `FORMAT` keeps the two
apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang_xmem.engines.sglang.pools import AdoptedPool

#: Name of this order of a page's bytes, in storage keys. Another order needs another name.
FORMAT = "xmem1"


def attach(view: AdoptedPool) -> None:
    """Give an adopted pool the arena's functions for storage pages, and take SGLang's away."""
    pool, arena, section = view.pool, view.arena, view.section
    # Backends refuse to register memory twice, and a frame holds the pages of all pools of its space.
    buffers = arena.host_buffers(section.space) if section.offset == 0 else []
    dtype = pool.dtype if section.nbytes % pool.dtype.itemsize == 0 else torch.uint8

    def get_data_page(index: Any, flat: bool = True) -> torch.Tensor:
        """Copy a page to the CPU, flat."""
        return arena.read(section.space, int(index) // view.slots, section.offset, section.nbytes).view(dtype)

    def set_from_flat_data_page(index: Any, data_page: torch.Tensor) -> None:
        """Put a page that `get_data_page` gave back."""
        data = data_page.contiguous().view(torch.uint8).flatten()
        if data.numel() != section.nbytes:
            raise ValueError(f"a page has {section.nbytes} bytes, got {data.numel()}")
        arena.write(section.space, int(index) // view.slots, section.offset, data)

    def get_dummy_flat_data_page() -> torch.Tensor:
        """Make room for a page that a backend will fill."""
        return torch.zeros(section.nbytes, dtype=torch.uint8, pin_memory=arena.device.type == "cuda").view(dtype)

    def get_page_buffer_meta(indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and sizes of the components of each page, page by page."""
        _addressable(arena)
        pages = indices[:: view.slots] // view.slots
        starts = (arena.spaces[section.space].table[pages.cpu()] + section.offset).tolist()
        offsets, at = [], 0
        for nbytes in view.component_bytes:
            offsets.append(at)
            at += nbytes
        return [start + offset for start in starts for offset in offsets], list(view.component_bytes) * len(starts)

    def get_hybrid_pool_buffer() -> list[torch.Tensor]:
        """The memory that a backend may register: none for a pool that shares its frames with an earlier one."""
        _addressable(arena)
        return buffers

    def is_stride_page_aligned(page_size_bytes: int = 4096) -> bool:
        """Whether every page's address is a multiple of `page_size_bytes`."""
        starts = arena.spaces[section.space].table + section.offset
        return bool((starts % page_size_bytes == 0).all()) and all(
            n % page_size_bytes == 0 for n in view.component_bytes
        )

    def destroy() -> None:
        """Give the arena's memory back, with that of the pools beside this one."""
        pool.kv_buffer = None
        arena.close()

    def not_here(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("sglang_xmem: a copy function of SGLang was called for a pool in the tier; report this")

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
    # What backends register, where the CPU has the bytes; a tensor without memory elsewhere, which nobody can read.
    pool.kv_buffer = buffers[0] if len(buffers) == 1 else torch.empty(0, dtype=torch.uint8, device="meta")


def _addressable(arena: Any) -> None:
    if not arena.cpu_addressable:
        raise RuntimeError(
            f"sglang_xmem: tier {arena.tier.name} is GPU memory, which this storage backend cannot address. Use "
            "--hicache-xmem-tier dram, or --hicache-storage-backend file."
        )

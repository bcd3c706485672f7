"""Stock HiCache's copies between device and host pool in torch and NumPy.

Names and parameters are those of `sgl_kernel.kvcacheio` and of SGLang's own kernels for Mamba states. All layouts
except page_head are supported. Everything is copied as bytes, because torch cannot index every KV dtype (fp8) on CPU.

`lf` is layer_first, `pf` page_first: a token's rows of all layers are contiguous, `layout_dim` bytes in total.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

#: Negative control: with this set to 1 a load swaps K and V, and a test that compares outputs must fail. (Reordered
#: tokens would not suffice: K contains its position, and attention sums over tokens.)
SWAP_KV_ENV = "SGLANG_CPU_SWAP_KV_ON_LOAD"


def _swapped(k: Any, v: Any) -> tuple[Any, Any]:
    return (v, k) if os.environ.get(SWAP_KV_ENV) == "1" else (k, v)


def _copy_rows(
    src: torch.Tensor | int,
    dst: torch.Tensor | int,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    row_bytes: int,
    src_stride: int | None = None,
    dst_stride: int | None = None,
    src_offset: int = 0,
    dst_offset: int = 0,
) -> None:
    """Copy row_bytes of each row; memory is a tensor or an address; the row distance is row_bytes or a stride."""
    if len(src_indices) == 0:
        return
    src_rows = _rows(src, src_indices, row_bytes, src_stride, src_offset)
    dst_rows = _rows(dst, dst_indices, row_bytes, dst_stride, dst_offset)
    dst_rows[dst_indices.numpy()] = src_rows[src_indices.numpy()]


def _rows(
    memory: torch.Tensor | int, indices: torch.Tensor, row_bytes: int, stride: int | None, offset: int
) -> np.ndarray[Any, Any]:
    address = memory if isinstance(memory, int) else memory.data_ptr()
    count, stride = int(indices.max()) + 1, stride or row_bytes
    if isinstance(memory, torch.Tensor):
        room = memory.untyped_storage().nbytes() - memory.storage_offset() * memory.element_size()
        assert offset + (count - 1) * stride + row_bytes <= room, "a row exceeds its buffer"
    buffer = (ctypes.c_uint8 * ((count - 1) * stride + row_bytes)).from_address(address + offset)
    return np.ndarray((count, row_bytes), dtype=np.uint8, buffer=memoryview(buffer), strides=(stride, 1))


def _row_bytes(buffer: torch.Tensor) -> int:
    return buffer[0].numel() * buffer.element_size()


# ---- io backend kernel: K and V ----


def transfer_kv_per_layer(
    src_k: torch.Tensor,
    dst_k: torch.Tensor,
    src_v: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    **launch: Any,
) -> None:
    """Load a layer of layer_first; `launch` takes parameters of the CUDA launch."""
    src_k, src_v = _swapped(src_k, src_v)
    _copy_rows(src_k, dst_k, src_indices, dst_indices, item_size)
    _copy_rows(src_v, dst_v, src_indices, dst_indices, item_size)


def transfer_kv_per_layer_pf_lf(
    src_k: torch.Tensor,
    dst_k: torch.Tensor,
    src_v: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
    **launch: Any,
) -> None:
    """Load a layer of page_first."""
    src_k, src_v = _swapped(src_k, src_v)
    for src, dst in ((src_k, dst_k), (src_v, dst_v)):
        transfer_kv_per_layer_mla_pf_lf(src, dst, src_indices, dst_indices, layer_id, item_size, src_layout_dim)


def transfer_kv_all_layer(
    src_k_layers: torch.Tensor,
    dst_k_layers: torch.Tensor,
    src_v_layers: torch.Tensor,
    dst_v_layers: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    num_layers: int,
    **launch: Any,
) -> None:
    """Back up all layers to layer_first, given as tables of addresses (uint64)."""
    for src, dst in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        transfer_kv_all_layer_mla(src, dst, src_indices, dst_indices, item_size, num_layers)


def transfer_kv_all_layer_lf_pf(
    src_k_layers: torch.Tensor,
    dst_k: torch.Tensor,
    src_v_layers: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    **launch: Any,
) -> None:
    """Back up all layers to page_first."""
    for src, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        transfer_kv_all_layer_mla_lf_pf(src, dst, src_indices, dst_indices, item_size, dst_layout_dim, num_layers)


# ---- io backend kernel: one array per layer, as for MLA latents ----


def transfer_kv_per_layer_mla(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    **launch: Any,
) -> None:
    """Load a layer of layer_first."""
    _copy_rows(src, dst, src_indices, dst_indices, item_size)


def transfer_kv_per_layer_mla_pf_lf(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
    **launch: Any,
) -> None:
    """Load a layer of page_first."""
    _copy_rows(
        src, dst, src_indices, dst_indices, item_size, src_stride=src_layout_dim, src_offset=layer_id * item_size
    )


def transfer_kv_all_layer_mla(
    src_layers: torch.Tensor,
    dst_layers: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    num_layers: int,
    **launch: Any,
) -> None:
    """Back up all layers to layer_first, given as tables of addresses (uint64)."""
    for src, dst in zip(src_layers.tolist(), dst_layers.tolist(), strict=True):
        _copy_rows(src, dst, src_indices, dst_indices, item_size)


def transfer_kv_all_layer_mla_lf_pf(
    src_layers: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    **launch: Any,
) -> None:
    """Back up all layers to page_first."""
    for layer, src in enumerate(src_layers.tolist()):
        _copy_rows(
            src, dst, src_indices, dst_indices, item_size, dst_stride=dst_layout_dim, dst_offset=layer * item_size
        )


#: SGLang's kernels for Mamba states work like those for latents, with slots instead of tokens.
transfer_kv_mamba_pf_lf = transfer_kv_per_layer_mla_pf_lf


def transfer_kv_mamba_lf_pf(
    src_ptrs: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    **launch: Any,
) -> None:
    """Back up a state of all layers."""
    transfer_kv_all_layer_mla_lf_pf(
        src_ptrs, dst, src_indices, dst_indices, item_size, dst_layout_dim, num_layers, **launch
    )


# ---- io backend direct ----


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy layer_first, both directions: a load names K and V of one layer, a backup those of all layers."""
    if len(src_layers) == 2:
        src_layers = _swapped(*src_layers)
    for src, dst in zip(src_layers, dst_layers, strict=True):
        _copy_rows(src, dst, src_indices, dst_indices, _row_bytes(dst))


def _pages(host: torch.Tensor, layer: int, page_size: int) -> tuple[int, int, int]:
    """Return bytes of a page of one layer and of all layers, and the layer's offset; host is [page, layer, ...]."""
    page_bytes = host[0, 0].numel() * host.element_size()
    assert host[0, 0].shape[0] == page_size or page_size == 1
    return page_bytes, host.stride(0) * host.element_size(), layer * host.stride(1) * host.element_size()


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Load a layer of page_first_direct: whole pages, each named by its tokens."""
    if len(src_ptrs) == 2:
        src_ptrs = _swapped(*src_ptrs)
    src_pages, dst_pages = src_indices[::page_size] // page_size, dst_indices[::page_size] // page_size
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        page_bytes, stride, offset = _pages(src, layer_id, page_size)
        _copy_rows(src, dst, src_pages, dst_pages, page_bytes, src_stride=stride, src_offset=offset)


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Back up all layers to page_first_direct: sources are the layers of each destination, in order."""
    src_pages, dst_pages = src_indices[::page_size] // page_size, dst_indices[::page_size] // page_size
    layers = len(src_ptrs) // len(dst_ptrs)
    for number, src in enumerate(src_ptrs):
        dst = dst_ptrs[number // layers]
        page_bytes, stride, offset = _pages(dst, number % layers, page_size)
        _copy_rows(src, dst, src_pages, dst_pages, page_bytes, dst_stride=stride, dst_offset=offset)


#: SGLang's modules that import these by name, only on CUDA. Each gets all of them.
MODULES = (
    "sglang.srt.mem_cache.pool_host.mha",
    "sglang.srt.mem_cache.pool_host.mla",
    "sglang.srt.mem_cache.pool_host.mamba",
    "sglang.srt.mem_cache.pool_host.dsa",
    "sglang.srt.mem_cache.memory_pool_host",
)
FUNCTIONS = {
    "transfer_kv_all_layer": transfer_kv_all_layer,
    "transfer_kv_all_layer_direct_lf_pf": transfer_kv_all_layer_direct_lf_pf,
    "transfer_kv_all_layer_lf_pf": transfer_kv_all_layer_lf_pf,
    "transfer_kv_all_layer_mla": transfer_kv_all_layer_mla,
    "transfer_kv_all_layer_mla_lf_pf": transfer_kv_all_layer_mla_lf_pf,
    "transfer_kv_direct": transfer_kv_direct,
    "transfer_kv_mamba_lf_pf": transfer_kv_mamba_lf_pf,
    "transfer_kv_mamba_pf_lf": transfer_kv_mamba_pf_lf,
    "transfer_kv_per_layer": transfer_kv_per_layer,
    "transfer_kv_per_layer_direct_pf_lf": transfer_kv_per_layer_direct_pf_lf,
    "transfer_kv_per_layer_mla": transfer_kv_per_layer_mla,
    "transfer_kv_per_layer_mla_pf_lf": transfer_kv_per_layer_mla_pf_lf,
    "transfer_kv_per_layer_pf_lf": transfer_kv_per_layer_pf_lf,
}

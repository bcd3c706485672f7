"""Torch-less versions of the copies that stock host pools take from `sgl_kernel.kvcacheio`, on raw addresses.

Names and parameters are the kernels'. They serve trips through stock SGLang, which show that the trips themselves are
right. Rows are copied as bytes; a kernel that would read outside its buffers is not noticed here.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

#: Modules of SGLang that import these names where CUDA is there, and nowhere else.
_MODULES = ("pool_host.mha", "pool_host.mla", "pool_host.dsa", "pool_host.mamba", "memory_pool_host")


def install() -> None:
    """Put the copies into SGLang's modules."""
    common: Any = importlib.import_module("sglang.srt.mem_cache.pool_host.common")
    common._cuda_host_register = lambda *args, **kwargs: None  # pinning goes through the CUDA runtime
    for name in _MODULES:
        module = importlib.import_module(f"sglang.srt.mem_cache.{name}")
        for function in _ALL:
            setattr(module, function.__name__, function)


def _copy(
    src: int, src_stride: int, src_rows: torch.Tensor, dst: int, dst_stride: int, dst_rows: torch.Tensor, nbytes: int
) -> None:
    if src_rows.numel() == 0:
        return
    source, target = _rows(src, src_stride, src_rows, nbytes), _rows(dst, dst_stride, dst_rows, nbytes)
    target[dst_rows.numpy()] = source[src_rows.numpy()]


def _rows(address: int, stride: int, rows: torch.Tensor, nbytes: int) -> np.ndarray:
    """Rows `0..max` of `nbytes` each, `stride` bytes apart."""
    count = int(rows.max()) + 1
    memory = (ctypes.c_uint8 * ((count - 1) * stride + nbytes)).from_address(address)
    flat = np.frombuffer(memoryview(memory), dtype=np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (count, nbytes), (stride, 1))


def transfer_kv_per_layer_mla(
    src: torch.Tensor, dst: torch.Tensor, src_indices: torch.Tensor, dst_indices: torch.Tensor, item_size: int
) -> None:
    """Copy rows of one array."""
    _copy(src.data_ptr(), item_size, src_indices, dst.data_ptr(), item_size, dst_indices, item_size)


def transfer_kv_per_layer_mla_pf_lf(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    """Load one layer of a page-first array."""
    address = src.data_ptr() + layer_id * item_size
    _copy(address, src_layout_dim, src_indices, dst.data_ptr(), item_size, dst_indices, item_size)


def transfer_kv_all_layer_mla(
    src_layers: torch.Tensor,
    dst_layers: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    """Store all layers of a layer-first array."""
    for src, dst in zip(src_layers.tolist(), dst_layers.tolist(), strict=True):
        _copy(src, item_size, src_indices, dst, item_size, dst_indices, item_size)


def transfer_kv_all_layer_mla_lf_pf(
    src_layers: torch.Tensor,
    dst: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """Store all layers of a page-first array."""
    assert len(src_layers) == num_layers
    for layer, src in enumerate(src_layers.tolist()):
        address = dst.data_ptr() + layer * item_size
        _copy(src, item_size, src_indices, address, dst_layout_dim, dst_indices, item_size)


def transfer_kv_per_layer(
    src_k: Any, dst_k: Any, src_v: Any, dst_v: Any, src_indices: Any, dst_indices: Any, item_size: int
) -> None:
    """Copy rows of K and of V of one layer."""
    transfer_kv_per_layer_mla(src_k, dst_k, src_indices, dst_indices, item_size)
    transfer_kv_per_layer_mla(src_v, dst_v, src_indices, dst_indices, item_size)


def transfer_kv_per_layer_pf_lf(
    src_k: Any,
    dst_k: Any,
    src_v: Any,
    dst_v: Any,
    src_indices: Any,
    dst_indices: Any,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    """Load K and V of one layer of page-first arrays."""
    for src, dst in ((src_k, dst_k), (src_v, dst_v)):
        transfer_kv_per_layer_mla_pf_lf(src, dst, src_indices, dst_indices, layer_id, item_size, src_layout_dim)


def transfer_kv_all_layer(
    src_k_layers: Any,
    dst_k_layers: Any,
    src_v_layers: Any,
    dst_v_layers: Any,
    src_indices: Any,
    dst_indices: Any,
    item_size: int,
    num_layers: int,
) -> None:
    """Store all layers of K and V of layer-first arrays."""
    for src, dst in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        transfer_kv_all_layer_mla(src, dst, src_indices, dst_indices, item_size, num_layers)


def transfer_kv_all_layer_lf_pf(
    src_k_layers: Any,
    dst_k: Any,
    src_v_layers: Any,
    dst_v: Any,
    src_indices: Any,
    dst_indices: Any,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """Store all layers of K and V of page-first arrays."""
    for src, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        transfer_kv_all_layer_mla_lf_pf(src, dst, src_indices, dst_indices, item_size, dst_layout_dim, num_layers)


def transfer_kv_mamba_pf_lf(
    src: Any, dst: Any, src_indices: Any, dst_indices: Any, layer_id: int, item_size: int, src_layout_dim: int
) -> None:
    """Load one layer of Mamba states."""
    transfer_kv_per_layer_mla_pf_lf(src, dst, src_indices, dst_indices, layer_id, item_size, src_layout_dim)


def transfer_kv_mamba_lf_pf(
    src_ptrs: Any,
    dst: Any,
    src_indices: Any,
    dst_indices: Any,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """Store all layers of Mamba states."""
    transfer_kv_all_layer_mla_lf_pf(src_ptrs, dst, src_indices, dst_indices, item_size, dst_layout_dim, num_layers)


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy rows of layer-first arrays, array by array."""
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst.view(torch.uint8)[dst_indices.long()] = src.view(torch.uint8)[src_indices.long()]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Load one layer of arrays of shape (pages, layers, page_size, ...)."""
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        rows = _as_bytes(src)[src_indices // page_size, layer_id, src_indices % page_size]
        _as_bytes(dst)[dst_indices.long()] = rows.reshape(len(dst_indices), *_as_bytes(dst).shape[1:])


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Store all layers of arrays of shape (pages, layers, page_size, ...)."""
    per_target = len(src_ptrs) // len(dst_ptrs)
    for number, dst in enumerate(dst_ptrs):
        target = _as_bytes(dst)
        for layer, src in enumerate(src_ptrs[number * per_target : (number + 1) * per_target]):
            rows = _as_bytes(src)[src_indices.long()]
            target[dst_indices // page_size, layer, dst_indices % page_size] = rows.reshape(
                len(dst_indices), *target.shape[3:]
            )


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


_ALL = (
    transfer_kv_per_layer_mla,
    transfer_kv_per_layer_mla_pf_lf,
    transfer_kv_all_layer_mla,
    transfer_kv_all_layer_mla_lf_pf,
    transfer_kv_per_layer,
    transfer_kv_per_layer_pf_lf,
    transfer_kv_all_layer,
    transfer_kv_all_layer_lf_pf,
    transfer_kv_mamba_pf_lf,
    transfer_kv_mamba_lf_pf,
    transfer_kv_direct,
    transfer_kv_per_layer_direct_pf_lf,
    transfer_kv_all_layer_direct_lf_pf,
)

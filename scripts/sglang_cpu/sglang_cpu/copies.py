"""Stock HiCache's copies between device and host pool in torch and NumPy, for the layout layer_first.

The names and parameters are those of `sgl_kernel.kvcacheio`. Everything is copied as bytes, because torch cannot
index every KV dtype (fp8) on CPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

#: Negative control: with this set to 1 a load puts K where V belongs and V where K belongs, and a test that compares
#: outputs has to notice. (Tokens in wrong order would not do: K carries its position, attention sums over tokens.)
SWAP_KV_ENV = "SGLANG_CPU_SWAP_KV_ON_LOAD"


def _swapped(k: Any, v: Any) -> tuple[Any, Any]:
    return (v, k) if os.environ.get(SWAP_KV_ENV) == "1" else (k, v)


def _copy_rows(src: torch.Tensor, dst: torch.Tensor, src_rows: torch.Tensor, dst_rows: torch.Tensor) -> None:
    dst.view(torch.uint8)[dst_rows.long()] = src.view(torch.uint8)[src_rows.long()]


def _rows_at(address: int, n_rows: int, row_bytes: int) -> np.ndarray:
    buffer = (ctypes.c_uint8 * (n_rows * row_bytes)).from_address(address)
    return np.frombuffer(memoryview(buffer), dtype=np.uint8).reshape(n_rows, row_bytes)


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Both directions of io backend `direct`: a load names K and V of one layer, a backup those of all layers."""
    if len(src_layers) == 2:
        src_layers = _swapped(*src_layers)
    for src, dst in zip(src_layers, dst_layers, strict=True):
        _copy_rows(src, dst, src_indices, dst_indices)


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
    """Load of io backend `kernel`; `launch` takes parameters of the CUDA launch."""
    src_k, src_v = _swapped(src_k, src_v)
    _copy_rows(src_k, dst_k, src_indices, dst_indices)
    _copy_rows(src_v, dst_v, src_indices, dst_indices)


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
    """Backup of io backend `kernel`: the layers come as tables of addresses (uint64)."""
    if len(src_indices) == 0:
        return
    src_rows, dst_rows = src_indices.numpy(), dst_indices.numpy()
    n_src, n_dst = int(src_rows.max()) + 1, int(dst_rows.max()) + 1
    for sources, destinations in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        for src, dst in zip(sources.tolist(), destinations.tolist(), strict=True):
            _rows_at(dst, n_dst, item_size)[dst_rows] = _rows_at(src, n_src, item_size)[src_rows]


ALL = (transfer_kv_direct, transfer_kv_per_layer, transfer_kv_all_layer)

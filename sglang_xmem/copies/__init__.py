"""Page copiers: one contract (`base`), three ways to keep it, and the function that picks one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sglang_xmem.copies.base import PageCopier

if TYPE_CHECKING:
    import torch

CopierName = Literal["auto", "cuda", "triton", "torch"]
_NAMES = ("auto", "cuda", "triton", "torch")

__all__ = ["CopierName", "PageCopier", "make_copier"]


def make_copier(
    name: CopierName,
    tier_planes: Sequence[torch.Tensor],
    device_planes: Sequence[torch.Tensor],
    page_size: int,
    *,
    tier_locality: Literal["host", "device"] = "device",
    load_ctas: int = 0,
    store_ctas: int = 0,
) -> PageCopier:
    """The page copier of a name.

    Args:
        name: `auto` is `cuda` for device planes on a GPU and `torch` for those on the CPU.
        tier_planes, device_planes, page_size: as PageCopier's.
        tier_locality: where the tier's bytes live, in host memory or on another device.
        load_ctas, store_ctas: thread blocks that a load or a store may occupy; 0 leaves it to the copier.

    Raises:
        ValueError: an unknown name, planes that do not match, or that this copier cannot reach.
        CopyError: the copier cannot run on this machine.
    """
    if name not in _NAMES:
        raise ValueError(f"unknown copier {name!r}; known are {', '.join(_NAMES)}")
    if name == "auto":
        name = "cuda" if device_planes and device_planes[0].device.type == "cuda" else "torch"
    # Imported on use: none of them needs what another one needs.
    if name == "torch":
        from sglang_xmem.copies.torch import TorchPageCopier

        return TorchPageCopier(tier_planes, device_planes, page_size)
    if name == "triton":
        from sglang_xmem.copies.triton import TritonPageCopier

        return TritonPageCopier(tier_planes, device_planes, page_size, load_ctas=load_ctas, store_ctas=store_ctas)
    from sglang_xmem.copies.cuda import CudaPageCopier

    return CudaPageCopier(
        tier_planes,
        device_planes,
        page_size,
        tier_locality=tier_locality,
        load_ctas=load_ctas,
        store_ctas=store_ctas,
    )

"""Page copiers: one contract (`base`), ways to keep it, and the functions that pick one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sglang_xmem.copies.base import PageCopier
from sglang_xmem.errors import CopyError

if TYPE_CHECKING:
    import torch

CopierName = Literal["auto", "cuda", "triton", "torch"]
_NAMES = ("auto", "cuda", "triton", "torch")

__all__ = ["CopierName", "PageCopier", "make_copier", "on_peer_or_rank", "with_staging"]


def on_peer_or_rank(
    make: Callable[..., PageCopier], gpu: int | None, *, required: bool
) -> tuple[PageCopier, CopyError | None]:
    """A copier that runs on another GPU, or on the rank's own where there is none or it cannot.

    Args:
        make: `make_copier` with all its arguments but `runs_on`.
        gpu: CUDA ordinal of the other GPU, if any.
        required: no other will do.

    Returns:
        The copier, and why it does not run on `gpu`.

    Raises:
        CopyError: as `make_copier`; also where `gpu` cannot run it and is required.
    """
    try:
        return make(runs_on=gpu), None
    except CopyError as error:
        if gpu is None or required:
            raise
        return make(), error


def with_staging(
    copier: PageCopier, nbytes: int | None, pinned: Sequence[int] = ()
) -> tuple[PageCopier, CopyError | None]:
    """A copier of host memory with its long loads by the copy engine, where that can be.

    Args:
        copier: from `make_copier`; one that is not the CUDA kernel of the rank's own GPU stays as it is.
        nbytes: of the staging ring on the GPU; None: the usual size if it can be had; 0: no ring.
        pinned: as `Region.pinned`.

    Returns:
        The copier to use, and why it has no ring.

    Raises:
        CopyError: a size was given and cannot be had.
    """
    if nbytes == 0:
        return copier, None
    try:
        if copier.name != "cuda":
            raise CopyError(
                f"copy.staging_mib is for the copier 'cuda' without relays, and this is {copier.name!r}; leave it out."
            )
        from sglang_xmem.copies.staged import staged

        return staged(copier, nbytes, pinned), None
    except CopyError as error:
        if nbytes is not None:
            raise
        return copier, error


def make_copier(
    name: CopierName,
    tier_planes: Sequence[torch.Tensor],
    device_planes: Sequence[torch.Tensor],
    page_size: int,
    *,
    tier_locality: Literal["host", "device"] = "device",
    load: Mapping[str, Any] = MappingProxyType({}),
    store: Mapping[str, Any] = MappingProxyType({}),
    runs_on: int | None = None,
    relays: Sequence[int] = (),
) -> PageCopier:
    """The page copier of a name.

    Args:
        name: `auto` is `cuda` for device planes on a GPU and `torch` for those on the CPU.
        tier_planes, device_planes, page_size: as PageCopier's.
        tier_locality: where the tier's bytes live, in host memory or on another device.
        load, store: changes to the measured settings of a direction, fields of `tuning.CudaTuning`. The Triton kernel
            takes `ctas` alone, the torch copier nothing.
        runs_on: CUDA ordinal of another GPU that runs the copies, which the CUDA kernel alone can.
        relays: CUDA ordinals of GPUs that each move a share of the pages beside that, which it alone can too.

    Raises:
        ValueError: an unknown name, planes that do not match, or that this copier cannot reach.
        CopyError: the copier cannot run on this machine.
    """
    if (runs_on is not None or relays) and name not in ("auto", "cuda"):
        raise CopyError(
            f"the copier {name!r} cannot run on another GPU; set copy.kernel to cuda, or "
            f"{'leave out dram.relays' if relays else 'set peer.copy_on to rank'}."
        )
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

        ctas = {f"{side}_ctas": given["ctas"] for side, given in (("load", load), ("store", store)) if "ctas" in given}
        return TritonPageCopier(tier_planes, device_planes, page_size, **ctas)
    from sglang_xmem.copies.cuda import CudaPageCopier

    def made(gpu: int | None) -> CudaPageCopier:
        return CudaPageCopier(
            tier_planes,
            device_planes,
            page_size,
            tier_locality=tier_locality,
            load=load,
            store=store,
            runs_on=gpu,
        )

    if not relays:
        return made(runs_on)
    from sglang_xmem.copies.shared import SharedCopier

    return SharedCopier([made(gpu) for gpu in (runs_on, *relays)])

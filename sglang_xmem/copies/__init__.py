"""Page copiers: one contract (`base`), its implementations, and the functions that choose one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sglang_xmem.copies.policy import CopyPolicy
from sglang_xmem.errors import CopyError

if TYPE_CHECKING:
    import torch

    from sglang_xmem.copies.base import PageCopier, Program, Step
    from sglang_xmem.copies.cuda import CudaPageCopier
    from sglang_xmem.copies.geometry import Slab
    from sglang_xmem.copies.tuning import Link

CopierName = Literal["auto", "cuda", "triton", "torch"]
_NAMES = ("auto", "cuda", "triton", "torch")
#: Settings of a direction that a copier supports; the CUDA kernel supports all fields of CudaTuning.
_SETTINGS: Mapping[str, tuple[str, ...]] = {"triton": ("ctas",), "torch": ()}

Settings = Mapping[str, Any]
_NO_SETTINGS: Settings = MappingProxyType({})

logger = logging.getLogger(__name__)

__all__ = ["CopierName", "CopyPolicy", "make_copier", "make_program"]


def make_copier(
    name: CopierName,
    slabs: Sequence[Slab],
    device: torch.device,
    *,
    link: Link,
    load: Settings = _NO_SETTINGS,
    store: Settings = _NO_SETTINGS,
    policy: CopyPolicy = CopyPolicy(),  # noqa: B008  (immutable)
    staging_bytes: int = 0,
) -> tuple[PageCopier, CopyError | None]:
    """Make the page copier of a name, executed as the policy decides.

    Args:
        name: `auto` is `cuda` for pools on a GPU and `torch` for those on the CPU.
        slabs: memory of the frames.
        device: of the pools.
        link: link to the tier, which selects the measured settings.
        load, store: overrides of the measured settings of a direction, fields of `tuning.CudaTuning`. The Triton kernel
            has only `ctas`, the torch copier none.
        policy: other GPUs that execute copies, which only the CUDA kernel supports. If `policy.runner` cannot and is
            not required, the rank's own GPU executes them.
        staging_bytes: GPU staging memory for loads from pinned host memory by copy engines, if the rank's own GPU alone
            copies. 0: none, as for all other slabs.

    Returns:
        The copier, and the reason if `policy.runner` does not execute.

    Raises:
        ValueError: an unknown name, or slabs or a device that this copier is not for.
        CopyError: unsupported settings, or the copier cannot run on this machine as required.
    """
    if name not in _NAMES:
        raise ValueError(f"unknown copier {name!r}; known are {', '.join(_NAMES)}")
    if name == "auto":
        name = "cuda" if device.type == "cuda" else "torch"
    _check_settings(name, {"load": load, "store": store})
    try:
        return _made(name, slabs, device, link, load, store, policy, staging_bytes), None
    except CopyError as error:
        if policy.runner is None or policy.required:
            raise
        alone = policy._replace(runner=None)
        return _made(name, slabs, device, link, load, store, alone, staging_bytes), error


def make_program(
    name: CopierName,
    slabs: Sequence[Slab],
    device: torch.device,
    steps: Sequence[Step],
    num_parts: int,
    *,
    link: Link,
    load: Settings = _NO_SETTINGS,
    store: Settings = _NO_SETTINGS,
    policy: CopyPolicy = CopyPolicy(),  # noqa: B008  (immutable)
    staging_bytes: int = 0,
) -> tuple[PageCopier, Program, CopyError | None]:
    """As `make_copier`, with its first program: also falls back if `policy.runner` cannot access the pools.

    Args: see `make_copier` and `PageCopier.compile`.

    Returns:
        The copier, the program, and the reason if `policy.runner` does not execute.
    """
    settings: dict[str, Any] = {"link": link, "load": load, "store": store, "staging_bytes": staging_bytes}
    copier, reason = make_copier(name, slabs, device, policy=policy, **settings)
    try:
        return copier, copier.compile(steps, num_parts), reason
    except CopyError as error:
        if policy.runner is None or policy.required or reason is not None:
            raise
        alone = policy._replace(runner=None)
        copier, _ = make_copier(name, slabs, device, policy=alone, **settings)
        return copier, copier.compile(steps, num_parts), error


def _check_settings(name: str, directions: Mapping[str, Settings]) -> None:
    """Raise CopyError for settings that a copier does not support."""
    has = _SETTINGS.get(name)
    if has is None:
        return
    unknown = [f"copy.{way}.{key}" for way, settings in directions.items() for key in settings if key not in has]
    if unknown:
        them = "it" if len(unknown) == 1 else "them"
        raise CopyError(
            f"The copier {name!r} has no {' and no '.join(unknown)}; leave {them} out, or set copy.kernel to cuda."
        )


def _made(
    name: str,
    slabs: Sequence[Slab],
    device: torch.device,
    link: Link,
    load: Settings,
    store: Settings,
    policy: CopyPolicy,
    staging_bytes: int,
) -> PageCopier:
    """Make the copier of a known name, without a fallback."""
    if name != "cuda" and (policy.runner is not None or policy.relays):
        raise CopyError(
            f"The copier {name!r} cannot run on another GPU; set copy.kernel to cuda, or "
            f"{'leave out dram.relays' if policy.relays else 'set peer.copy_on to rank'}."
        )
    # Imported on use: each has its own dependencies.
    if name == "torch":
        from sglang_xmem.copies.torch import TorchPageCopier

        return TorchPageCopier(slabs, device)
    if name == "triton":
        from sglang_xmem.copies.triton import TritonPageCopier

        ctas = {f"{way}_ctas": given["ctas"] for way, given in (("load", load), ("store", store)) if "ctas" in given}
        return TritonPageCopier(slabs, device, **ctas)
    from sglang_xmem.copies import cuda

    copiers = [
        cuda.CudaPageCopier(slabs, device, link=link, load=load, store=store, runs_on=gpu)
        for gpu in (policy.runner, *policy.relays)
    ]
    if len(copiers) == 1:
        return _with_engines(copiers[0], staging_bytes) if staging_bytes and policy.runner is None else copiers[0]
    from sglang_xmem.copies.shared import SharedCopier

    return SharedCopier(copiers)


def _with_engines(kernel: CudaPageCopier, staging_bytes: int) -> PageCopier:
    """Wrap a copier so that copy engines make large loads; return it unchanged if the GPU cannot."""
    from sglang_xmem.copies.dma import DmaCopier, Gpu
    from sglang_xmem.tiers.hostmem import register_bytes

    try:
        if not kernel.can_count():
            raise CopyError("Streams of this GPU cannot wait for values.")
        return DmaCopier(kernel, Gpu(kernel.device), staging_bytes, register_bytes())
    except CopyError as error:
        logger.info("sglang_xmem: the copy kernel makes all loads instead of copy engines: %s", error)
        return kernel

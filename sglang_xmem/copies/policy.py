"""Decide which GPU executes a rank's copies, from facts of the memory, the settings and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_xmem import gpus
from sglang_xmem.errors import Remedy, Unavailable
from sglang_xmem.tiers.base import Region, Traits


class CopyPolicy(NamedTuple):
    """The GPUs that execute copies.

    Attributes:
        runner: CUDA ordinal of another GPU that executes them; None: the rank's own, or the CPU.
        required: the user requires `runner`; otherwise the rank's own GPU executes them if the other one cannot.
        relays: CUDA ordinals of GPUs that each move a share of every copy through their own link.
    """

    runner: int | None = None
    required: bool = False
    relays: tuple[int, ...] = ()


def decide(traits: Traits, settings: Any, region: Region, rank_gpu: int | None) -> CopyPolicy:
    """Decide the policy of copies between a region and a rank's GPU.

    Args:
        settings: of the tier: `copy_on` ("auto", "rank" or "peer") and `gpus` of a tier in GPU memory, `relays` of a
            tier in host memory.

    Raises:
        Unavailable: the user requires a GPU that cannot copy.
    """
    if rank_gpu is None:
        return CopyPolicy()
    relays = getattr(settings, "relays", ()) if traits.cpu_addressable else ()
    # Only the relays assigned to this rank have access.
    policy = CopyPolicy(relays=tuple(gpu for gpu in relays if gpu in region.reachable_from))
    copy_on = getattr(settings, "copy_on", "rank")
    if copy_on == "rank" or not region.gpus:
        return policy
    first = region.gpus[0]
    problem = None
    if first not in region.reachable_from:
        problem = f"GPU {first}, selected by peer.copy_on, cannot access GPU {rank_gpu} and all of its peers"
    elif settings.gpus is not None and (use := gpus.foreign_use(first)) is not None:
        # Copies and another process's kernels would slow each other down. A GPU that the user did not name is idle.
        problem = f"{use}, but peer.copy_on needs it idle"
    if problem is None:
        return policy._replace(runner=first, required=copy_on == "peer")
    if copy_on == "peer":
        raise Unavailable(problem, Remedy("set_option", "peer.gpus", "other GPUs"), Remedy("leave_out", "peer.copy_on"))
    return policy


def common(policies: Sequence[CopyPolicy]) -> CopyPolicy:
    """Combine the policies of the regions that one copier serves.

    Raises:
        Unavailable: the user requires a GPU that differs between the regions.
    """
    first = policies[0]
    if all(policy == first for policy in policies):
        return first
    if any(policy.required for policy in policies):
        raise Unavailable("no GPU can copy for all pools", Remedy("leave_out", "peer.copy_on"))
    relays = set(first.relays).intersection(*(policy.relays for policy in policies))
    return CopyPolicy(relays=tuple(gpu for gpu in first.relays if gpu in relays))

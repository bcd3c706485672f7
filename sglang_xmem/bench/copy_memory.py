"""Memory that `sglang-xmem bench copy` copies to: a tier's, or a peer's in another way.

Whether the peer is awake changes what the link carries, how its memory is mapped does not; both can be measured beside
what the tier does. The tier also says which GPU copies; over the others that is the rank's own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from sglang_xmem import gpus
from sglang_xmem.bench.copy_jobs import RELAYED
from sglang_xmem.tiers import Region
from sglang_xmem.tiers.peer import PeerSeat, PeerSettings, PeerTier


def allocate(
    tier: str, memory: str, gpu: int | None, peer: int | None, nbytes: int, relays: tuple[int, ...] = ()
) -> Region:
    """Memory for `nbytes`.

    Args:
        tier: `peer` or `host`.
        memory: for a peer one of copy_jobs.MEMORIES; for the host `tier`, or copy_jobs.RELAYED.
        gpu: the rank's; None without one.
        peer: whose memory it is, for a peer.
        relays: GPUs that relay, for RELAYED.

    Raises:
        ConfigError, TierUnavailable: it cannot be had.
    """
    if tier == "peer" and memory == "context":
        assert gpu is not None
        assert peer is not None
        return _of_a_context(gpu, peer, nbytes)
    if tier == "peer" and memory == "asleep":
        assert peer is not None
        return _Asleep(PeerSettings(gpus=(peer,), copy_on="rank"), PeerSeat(gpus=(peer,), named=True), gpu).allocate(
            nbytes
        )
    from sglang_xmem.config import parse_options
    from sglang_xmem.plan import Placement, make_plan
    from sglang_xmem.tiers import Ranks

    def unlimited(nbytes: int) -> int:
        return 1 << 60

    name, config = ("peer", {"peer": {"gpus": [peer]}}) if tier == "peer" else ("dram", {})
    if memory == RELAYED:
        config = {"dram": {"relays": list(relays)}}
    plan = make_plan(parse_options(name, config), Ranks(gpus=(gpu,)), nbytes, unlimited)
    return Placement(plan, 0, unlimited).allocate(nbytes)[1]


class _Asleep(PeerTier):
    """Tier `peer` without a context on the peer, unless another process has one there."""

    def _wake(self, peers: tuple[int, ...], undo: ExitStack) -> None:
        pass


def why_not_by(peer: int, gpu: int) -> str:
    """A clause that says why tier `peer` does not have the peer copy for `gpu`. To be asked without memory there."""
    use = gpus.foreign_use(peer)
    return f"{use}, and only an idle peer copies" if use else f"GPU {peer} has no peer access to GPU {gpu}"


def _of_a_context(gpu: int, peer: int, nbytes: int) -> Region:
    """cuMemAlloc in the peer's primary context, which `gpu`'s own context gets access to."""
    import torch

    d = gpus.driver()
    torch.cuda.synchronize(gpu)  # its primary context exists and is current
    own = gpus.checked(d.cuCtxGetCurrent(), "asking for the current context")
    with ExitStack() as undo:
        context = gpus.hold_context(peer, undo)
        status = d.cuCtxEnablePeerAccess(context, 0)
        if status[0] != d.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
            gpus.checked(status, f"giving GPU {gpu} access to GPU {peer}")
            undo.callback(_in_context, d, own, d.cuCtxDisablePeerAccess, context)
        what = f"allocating {nbytes / 1e9:.2f} GB on GPU {peer}"
        address = int(gpus.checked(_in_context(d, context, d.cuMemAlloc, nbytes), what))
        undo.callback(_in_context, d, context, d.cuMemFree, address)
        keep = undo.pop_all()
    return Region(address, nbytes, f"HBM of GPU {peer}, cuMemAlloc", keep.close)


def _in_context(d: Any, context: Any, call: Any, *arguments: Any) -> Any:
    """`call` with a context current, and the one from before afterwards."""
    gpus.checked(d.cuCtxPushCurrent(context), "entering a context")
    try:
        return call(*arguments)
    finally:
        d.cuCtxPopCurrent()

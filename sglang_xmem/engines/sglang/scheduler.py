"""A scheduler's part: HiCache's pools in a tier. Placed only in schedulers of engines with the flag on."""

from __future__ import annotations

import functools
import logging
from typing import Any

from sglang_xmem import gpus, session
from sglang_xmem.engines.sglang import flags, identity, launcher, pools, storage, versions
from sglang_xmem.engines.sglang.hooks import place
from sglang_xmem.engines.sglang.launcher import BANK, INFO_KEY
from sglang_xmem.errors import ConfigError, CopyError, Remedy, Unavailable, UnsupportedSGLang, refuse
from sglang_xmem.plan import Placement, Plan
from sglang_xmem.session import Session
from sglang_xmem.watch import deadline_s

logger = logging.getLogger(__name__)

#: A pair that all of SGLang's pool classes accept. The flags select SGLang's layout and copies, which a tier does not
#: use.
LAYOUT, IO_BACKEND = "page_first", "kernel"

#: A draft model's pools, whose sizes are needed before SGLang builds them.
_announced: tuple[Any, ...] = ()
#: Whether pools are being built only to get their sizes.
_measuring = False


def publish(result: Any, server_args: Any, *, role: str, hf_config: Any = None, ranks: Any = None) -> None:
    """Begin a session (hook): every process publishes its configuration once, a scheduler before it builds anything."""
    plan = flags.attached(server_args)
    if plan is None or role not in ("scheduler", "dp_controller"):
        return
    if not isinstance(plan, Plan):  # the launcher did not call check_server_args
        refuse("--hicache-use-xmem does not work with this way of starting SGLang. Use sglang serve or sgl.Engine.")
    table = versions.current()
    try:
        place(table.scheduler_hooks if role == "scheduler" else table.controller_hooks)
    except UnsupportedSGLang as error:
        refuse(str(error))
    if role == "scheduler":
        _begin(plan, ranks)
        _settle_layout()
        if plan.candidates[0].tier == BANK:
            _settle_sharing(table, server_args, plan)


def _begin(plan: Plan, ranks: Any) -> None:
    local = plan.ranks.gpus
    gpu = getattr(ranks, "gpu_id", None) if plan.ranks.uses_gpu else None
    if plan.ranks.uses_gpu:
        if gpu not in local:
            refuse(
                f"This rank computes on GPU {gpu}, but tiers were planned for GPUs {', '.join(map(str, local))}. "
                "Leave out --hicache-use-xmem, and report this engine's command."
            )
        index = local.index(gpu)
        gpus.mark_as_rank()
    else:
        index = ranks.world_rank % len(local)
    session.start(Session(plan, Placement(plan, index, _host_budget), deadline_s()))
    version = versions.installed()
    if not versions.proven(version):
        session.current().notes.append(
            f"SGLang {version} is newer than the tested versions ({', '.join(versions.known())}); its functions were "
            "verified, and a self-test runs before the tier serves"
        )


def _settle_layout() -> None:
    from sglang.srt.runtime_context import get_context, get_memory

    memory = get_memory()
    given = (memory.hicache_mem_layout, memory.hicache_io_backend)
    if given != (LAYOUT, IO_BACKEND):
        get_context().override("sglang_xmem", hicache_mem_layout=LAYOUT, hicache_io_backend=IO_BACKEND)
        # SGLang sets up logging after this.
        session.current().notes.append(
            f"--hicache-mem-layout {given[0]} and --hicache-io-backend {given[1]} have no effect: the tier has its own "
            "page layout and copies"
        )


def _settle_sharing(table: versions.VersionTable, server_args: Any, plan: Plan) -> None:
    """Make the page bank SGLang's storage backend; the launcher has checked that there is no other."""
    import json

    from sglang.srt.runtime_context import get_context

    from sglang_xmem.engines.sglang.bank_storage import EXTRA_CONFIG

    try:
        place(table.bank_hooks)
    except UnsupportedSGLang as error:
        refuse(str(error))
    get_context().override(
        "sglang_xmem",
        hicache_storage_backend="dynamic",
        hicache_storage_backend_extra_config=json.dumps(EXTRA_CONFIG),
    )
    active = session.current()
    active.label = str(server_args.served_model_name or server_args.model_path)
    active.look_up_facts = functools.partial(identity.facts, server_args, plan.options.tiers[BANK].tag)
    active.facts = active.look_up_facts()
    if active.facts is not None:
        active.placement.share_as((), active.label)  # sizes come before pools; what is free depends on the model


def prepare_staging(original: Any, **kwargs: Any) -> None:
    """Reserve no GPU memory for SGLang's own stores, which never run with a tier (hook)."""


# --------------------------------------------------------------------------------------------------------------- sizes


def _host_budget(nbytes: int) -> int:
    """Return the host RAM for a pool of `nbytes` by SGLang's rule."""
    from sglang.srt.mem_cache.pool_host import base

    budget = base.host_memory_budget_bytes
    return int(getattr(budget, "__wrapped__", budget)(nbytes))


def host_memory_budget_bytes(original: Any, requested_bytes: int = 0, **auto_size: bool) -> int:
    """Size an automatic pool by its tier's capacity (hook); SGLang knows only host RAM.

    Args:
        auto_size: SGLang's flag of that name; 0.5.21 lacks it, and requests 0 bytes for automatic sizes.
    """
    active = session.current()
    if _measuring:
        return 1 << 62
    placement = active.placement
    try:
        if auto_size.get("auto_size", requested_bytes == 0) and not active.arenas:
            return placement.automatic_bytes(int(original(requested_bytes, **auto_size)))
        tier = placement.first_tier()
        if not tier.traits.counts_as_host_ram:
            return tier.capacity_bytes()
    except ConfigError as error:
        refuse(str(error))
    return int(original(requested_bytes, **auto_size))


# --------------------------------------------------------------------------------------------------------------- pools


def attach_pools(original: Any, cache: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Build HiCache's pools without memory (hook); they are adopted when SGLang groups them."""
    if {"SWA", "MAMBA"} <= {component.name for component in cache.components}:
        # SGLang builds the states' pool after the others are adopted, and the bank attached.
        why = "it does not support models with both sliding windows and Mamba states"
        session.current().placement.skip_shared(Unavailable(why, Remedy("use_tier", value="dram")))
    with pools.tier_memory():
        return original(cache, params, *args, **kwargs)


def note_draft(original: Any, params: Any, draft_plan: Any, *, enabled: bool) -> Any:
    """Remember a draft model's pools, which SGLang builds after the target's (hook)."""
    global _announced
    sidecar = draft_plan is not None and draft_plan.mode.value == "sidecar"
    _announced = tuple(draft_plan.device_pools) if sidecar else ()
    return original(params, draft_plan, enabled=enabled)


def group_pools(result: Any, self: Any, entries: Any) -> None:
    """Adopt the pools of a new HostPoolGroup (hook)."""
    global _measuring
    if _measuring:
        return
    from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler

    build = assembler.build_hicache_draft_sidecars
    _measuring = True
    try:
        with pools.tier_memory():
            sidecars = pools.draft_sidecars(self, _announced, getattr(build, "__wrapped__", build))
    finally:
        _measuring = False
    active = session.current()
    while active.notes:
        logger.info("sglang_xmem: %s", active.notes.pop(0))
    pools.adopt_group(active, self, sidecars)
    self._refresh_transfer_capabilities()


def group_another(result: Any, self: Any, entry: Any) -> None:
    """Adopt a pool that joins a HostPoolGroup, unless it is a draft's, which is already adopted (hook)."""
    if not _measuring:
        pools.adopt_another(session.current(), entry)
        self._refresh_transfer_capabilities()


def build_draft_sidecars(original: Any, *, draft_device_pools: Any, tree_cache: Any) -> Any:
    """Build a draft model's pools without memory, and adopt them (hook)."""
    with pools.tier_memory():
        specs, entries = original(draft_device_pools=draft_device_pools, tree_cache=tree_cache)
    group = tree_cache.cache_controller.mem_pool_host
    for entry in entries:
        pools.adopt_sidecar(session.current(), group, str(getattr(entry.name, "value", entry.name)), entry.host_pool)
    return specs, entries


def move_indices(original: Any, self: Any, host_indices: Any, device_indices: Any) -> Any:
    """Do not move indices (hook): a load looks up frames on the CPU, and SGLang's copy would wait for the GPU."""
    return host_indices, device_indices


def transfer_streams(result: Any, self: Any, io_backend: str) -> None:
    """Give loads a stream of high priority (hook), so that their thread blocks do not queue behind other kernels."""
    import torch

    if isinstance(self.host_to_device_stream, torch.cuda.Stream):
        self.host_to_device_stream = torch.cuda.Stream(self.host_to_device_stream.device, priority=-1)


def init_info(result: dict[str, Any], self: Any) -> dict[str, Any]:
    """Self-test the tier, and report it to the launcher (hook)."""
    from sglang.srt.runtime_context import get_observability

    active = session.current()
    try:
        pools.self_test(active)
        pools.share_loads(active, functools.partial(_gather, self.attn_tp_group), self.attn_tp_group.rank_in_group)
    except CopyError as error:
        refuse(str(error))
    active.used_fraction = functools.partial(pools.used_fraction, active)
    labels = _labels() if get_observability().enable_metrics else None
    active.serve(labels, pools.keep_pages(active))
    result[INFO_KEY] = ",".join(active.tier_names())
    return result


def _gather(group: Any, mine: Any) -> list[Any]:
    """Bring every rank's object to all ranks of a group of SGLang's."""
    import torch

    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, mine, group=group.cpu_group)
    return found


def _labels() -> dict[str, str]:
    """Return the labels of this rank's metrics."""
    from sglang.srt.runtime_context import get_parallel, get_serving

    parallel = get_parallel()
    return {
        "model_name": str(get_serving().served_model_name),
        "tp_rank": str(parallel.tp_rank),
        "pp_rank": str(parallel.pp_rank),
        "dp_rank": str(parallel.dp_rank or 0),
    }


def internal_state(result: Any, self: Any, recv_req: Any) -> None:
    """Add the tier to a rank's part of `/server_info` (hook)."""
    result.internal_state["sglang_xmem"] = session.current().describe()


def attach_storage(
    original: Any,
    self: Any,
    storage_backend: str,
    prefetch_threshold: int = 256,
    model_name: str | None = None,
    storage_backend_extra_config: Any = None,
) -> Any:
    """Refuse a storage backend that does not work over the tier, also one attached at run time (hook)."""
    arenas = session.current().arenas
    needs = launcher.needs_addresses(storage_backend, storage_backend_extra_config)
    if storage_backend not in launcher.BACKENDS:
        raise ValueError(f"sglang_xmem: storage backend {storage_backend} does not work over a tier. Use file.")
    if needs and arenas and not arenas[-1].cpu_addressable:
        raise ValueError(
            f"sglang_xmem: storage backend {storage_backend} needs addresses, and tier {arenas[-1].tier.name} is GPU "
            "memory. Use file, or start with --hicache-xmem-tier dram."
        )
    if not hasattr(type(self.mem_pool_host.anchor_entry.host_pool), "storage_format_tag"):  # SGLang 0.5.21
        model_name = f"{model_name}-{storage.FORMAT}" if model_name else storage.FORMAT
    result = original(self, storage_backend, prefetch_threshold, model_name, storage_backend_extra_config)
    if storage_backend in launcher.FLAT_BACKENDS:
        storage.guard(self.storage_backend)
    return result

"""The launcher's part: refuse unsupported settings, plan tiers for the ranks, check that each rank uses its tier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_xmem.config import parse_options
from sglang_xmem.engines.sglang import flags, versions
from sglang_xmem.engines.sglang.hooks import place, verify, verify_members
from sglang_xmem.engines.sglang.host_budget import launcher_host_budget
from sglang_xmem.errors import REFUSED_EXIT_STATUS, ConfigError, UnsupportedSGLang, refuse
from sglang_xmem.plan import Skipped, make_plan
from sglang_xmem.tiers import Ranks, tier_classes
from sglang_xmem.watch import deadline_s

if TYPE_CHECKING:
    from sglang_xmem.plan import Plan

#: Key of a scheduler's init info; its presence shows that the hooks are placed.
INFO_KEY = "hicache_xmem_tier"
#: Key of a data-parallel controller's init info.
CONTROLLER_KEY = "scheduler_pids"
#: Storage backends that transfer pages as bytes, and work with every tier.
FLAT_BACKENDS = ("file",)
#: Storage backends that use addresses of host memory.
ADDRESS_BACKENDS = ("mooncake", "nixl", "hf3fs")
BACKENDS = (*FLAT_BACKENDS, "dynamic", *ADDRESS_BACKENDS)

#: More GB per rank than any machine has, and small enough for a float.
_MOST_GB = 1e9
#: The tier that is also a storage backend.
BANK = "bank"

#: Whether the engine that this process starts has the flag on.
_launching_with_tier = False


def check_server_args(result: Any, self: Any) -> None:
    """Plan after SGLang's own checks, and refuse errors before any process starts (hook)."""
    global _launching_with_tier
    request = flags.attached(self)
    _launching_with_tier = request is not None
    if not isinstance(request, flags.Request):
        return
    table = versions.current()
    try:
        place(table.launcher_hooks)
        verify(table.scheduler_hooks)
        verify_members(table.members)
        flags.attach(self, plan_for(self, request))
    except (ConfigError, UnsupportedSGLang) as error:
        if request.from_cli:
            refuse(str(error))
        raise


def plan_for(record: Any, request: flags.Request) -> Plan:
    """Check SGLang's settings and plan tiers for this machine's ranks.

    Raises:
        ConfigError: one message with the unsupported setting and its fix.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.environ import envs

    cfg = resolving_view(record)
    retraction = cfg.disaggregation_mode == "decode" and cfg.disaggregation_decode_retraction_backup == "host_pool"
    if not cfg.enable_hierarchical_cache and not retraction:
        raise ConfigError("--hicache-use-xmem needs HiCache. Add --enable-hierarchical-cache.")
    options = parse_options(request.tier, request.config)
    if not 0 <= cfg.hicache_size < _MOST_GB:
        raise ConfigError(
            f"--hicache-size must be >= 0 and < 1e9 (GB per rank; 0 = use --hicache-ratio), got {cfg.hicache_size}."
        )
    ratio = cfg.hicache_ratio  # None for a decode server, for which SGLang sets its default later
    if ratio is not None and (not ratio > 0 or math.isinf(ratio)):
        raise ConfigError(f"--hicache-ratio must be > 0 (host pool size / GPU pool size), got {ratio}.")
    for option, value, supported, why in _unsupported(cfg):
        if value not in supported:
            fix = " or ".join("leave it out" if s is None or s is False else f"use {option} {s}" for s in supported)
            raise ConfigError(f"{option} {value} does not work with --hicache-use-xmem: {why}. Instead, {fix}.")
    if envs.SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS.get():
        raise ConfigError(
            "--hicache-use-xmem does not work with SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS: ranks must see all GPUs. "
            "Unset the variable."
        )
    deadline_s()
    gpus = local_gpus(cfg)
    pool_bytes = int(cfg.hicache_size * 1e9) or None
    plan = make_plan(options, Ranks(gpus=gpus), pool_bytes, launcher_host_budget(len(gpus)))
    backend = cfg.hicache_storage_backend
    plan = fit_bank(plan, cfg)
    if needs_addresses(backend, cfg.hicache_storage_backend_extra_config):
        plan = _with_addresses(plan, f"--hicache-storage-backend {backend}")
    return plan


def _with_addresses(plan: Plan, option: str) -> Plan:
    """Remove the tiers that the CPU does not address from a plan, because of `option`.

    Raises:
        ConfigError: no tier is left.
    """
    classes = tier_classes()
    names = ", ".join(candidate.tier for candidate in plan.candidates)
    return _without(
        plan,
        lambda tier: not classes[tier].traits.cpu_addressable,
        f"{option} needs memory that the CPU can address, and tier {names} is GPU memory. Use --hicache-xmem-tier "
        "dram, or --hicache-storage-backend file.",
        f"{option} cannot address it",
    )


def fit_bank(plan: Plan, cfg: Any) -> Plan:
    """Remove tier bank from a plan if SGLang's settings conflict with it.

    Raises:
        ConfigError: no other tier is left.
    """
    for reason, fix in _unfit_for_bank(cfg):
        plan = _without(plan, lambda tier: tier == BANK, f"Tier bank cannot serve: {reason}. {fix}.", reason)
    return plan


def _unfit_for_bank(cfg: Any) -> Iterator[tuple[str, str]]:
    """Yield (problem clause, fix) for each of SGLang's settings that conflicts with tier bank."""
    other = "use --hicache-xmem-tier dram"
    if cfg.hicache_storage_backend is not None:
        yield (
            f"it is a storage backend, and so is --hicache-storage-backend {cfg.hicache_storage_backend}",
            f"Leave it out, or {other}",
        )
    if not cfg.enable_hierarchical_cache:
        yield "nothing is cached without --enable-hierarchical-cache", f"Add that flag, or {other}"
    if not versions.current().bank_hooks:
        newest = next(iter(versions.known()))
        yield f"it needs SGLang {newest}", f"Run pip install sglang=={newest}, or {other}"


def _without(plan: Plan, unfit: Callable[[str], bool], problem: str, reason: str) -> Plan:
    """Remove the tiers that conflict with SGLang's settings from a plan.

    Args:
        unfit: whether to remove the tier of that name.
        problem: the error if no tier is left.
        reason: a clause, for each removed tier.

    Raises:
        ConfigError: no tier is left.
    """
    kept = tuple(c for c in plan.candidates if not unfit(c.tier))
    if not kept:
        raise ConfigError(problem)
    if len(kept) == len(plan.candidates):
        return plan
    gone = tuple(Skipped(c.tier, reason, ()) for c in plan.candidates if c not in kept)
    return msgspec.structs.replace(plan, candidates=kept, skipped=plan.skipped + gone)


def needs_addresses(backend: str | None, extra: Any) -> bool:
    """Whether a storage backend needs pages that the CPU can address."""
    return backend in ADDRESS_BACKENDS or (backend == "dynamic" and _interface_v1(extra))


def _interface_v1(extra: Any) -> bool:
    import json

    if isinstance(extra, str):
        try:
            extra = json.loads(extra)
        except ValueError:
            return True  # a file that SGLang reads later; assume that it needs addresses
    return bool(extra.get("interface_v1")) if isinstance(extra, dict) else False


def _unsupported(cfg: Any) -> list[tuple[str, Any, tuple[Any, ...], str]]:
    """List (option, value, supported values, reason against others)."""
    backends = (None, *BACKENDS)
    return [
        (
            "--hicache-host-memory-mode",
            cfg.hicache_host_memory_mode,
            ("cache",),
            "its host pool is a storage buffer and not a cache",
        ),
        (
            "--hicache-storage-backend",
            cfg.hicache_storage_backend,
            backends,
            "it has its own host memory or reads SGLang's page layout",
        ),
        (
            "--enable-unified-memory",
            bool(cfg.enable_unified_memory),
            (False,),
            "its pages combine several pools, and SGLang moves them itself",
        ),
        (
            "--enable-kv-cache-sharding",
            bool(getattr(cfg, "enable_kv_cache_sharding", False)),
            (False,),
            "its pages are sharded over ranks",
        ),
        ("--enable-hisparse", bool(getattr(cfg, "enable_hisparse", False)), (False,), "its kernels read host memory"),
        (
            "--enable-unified-cache-external-linker",
            bool(getattr(cfg, "enable_unified_cache_external_linker", False)),
            (False,),
            "it replaces HiCache",
        ),
        (
            "--use-ray",
            bool(getattr(cfg, "use_ray", False)),
            (False,),
            flags.WITHOUT_PLUGINS,
        ),
        (
            "--disaggregation-decode-enable-offload-kvcache",
            bool(getattr(cfg, "disaggregation_decode_enable_offload_kvcache", False)),
            (False,),
            "the decode worker offloads through its own pools",
        ),
        ("--device", cfg.device, ("cuda", "cpu"), "tiers support only NVIDIA GPUs"),
    ]


def local_gpus(cfg: Any) -> tuple[int | None, ...]:
    """Return the CUDA ordinals of the ranks that this launcher starts on this machine, in SGLang's start order.

    The arithmetic is SGLang's: `entrypoints/engine.py:_launch_scheduler_processes` and
    `managers/data_parallel_controller.py:launch_tensor_parallel_group`.
    """
    pp_per_node = max(cfg.pp_size // cfg.nnodes, 1)
    tp_per_node = cfg.tp_size // max(cfg.nnodes // cfg.pp_size, 1)
    replicas = 1 if cfg.enable_dp_attention else max(cfg.dp_size, 1)
    if cfg.device != "cuda":
        return (None,) * (replicas * pp_per_node * tp_per_node)
    return tuple(
        cfg.base_gpu_id
        + replica * cfg.tp_size * cfg.pp_size * cfg.gpu_id_step
        + pp * tp_per_node
        + tp * cfg.gpu_id_step
        for replica in range(replicas)
        for pp in range(pp_per_node)
        for tp in range(tp_per_node)
    )


def wait_for_scheduler_ready(original: Any, scheduler_pipe_readers: Any, scheduler_procs: Any) -> Any:
    """End the start if a rank refused (it has logged the reason), or started without the hooks (hook)."""
    if not _launching_with_tier:
        return original(scheduler_pipe_readers, scheduler_procs)
    try:
        infos = original(scheduler_pipe_readers, scheduler_procs)
    except RuntimeError:
        if any(process.exitcode == REFUSED_EXIT_STATUS for process in scheduler_procs):
            _end(scheduler_procs, "A rank exited during startup; see its error above.")
        raise
    silent = () if versions.current().controller_reports else (CONTROLLER_KEY,)
    for rank, info in enumerate(infos):
        if INFO_KEY not in info and not any(key in info for key in silent):
            _end(
                scheduler_procs,
                f"Rank {rank} started without the hooks of --hicache-use-xmem, so it would serve from stock "
                "HiCache. See sglang_xmem in its log, and check SGLANG_PLUGINS.",
            )
    return infos


def _end(processes: Any, message: str) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    refuse(message)


def controller_init_info(result: dict[str, Any], self: Any) -> dict[str, Any]:
    """Forward the ranks' report on the tier through a data-parallel controller (hook)."""
    infos = getattr(self, "_scheduler_init_infos", None)
    if infos and all(INFO_KEY in info for info in infos):
        result[INFO_KEY] = ",".join(sorted({info[INFO_KEY] for info in infos}))
    return result

"""SGLang 0.5.23: the flags, and the patches that put HiCache's L2 pool into a tier.

Two sets of hooks. `FLAG_HOOKS` are placed in every process and only carry the options. `POOL_HOOKS` touch HiCache,
and are placed in a scheduler process whose engine has the flag on, nowhere else.

SGLang itself is imported inside functions: plugins load early in every process, before SGLang has set up its own.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import multiprocessing
import sys
from typing import Any

import msgspec

from sglang_xmem import gpus
from sglang_xmem.adapters.hooks import Hook, place, verify
from sglang_xmem.adapters.host_budget import launcher_host_budget
from sglang_xmem.config import AUTO, parse_options
from sglang_xmem.errors import REFUSED_EXIT_STATUS, ConfigError, CopyError, UnsupportedSGLang, refuse
from sglang_xmem.plan import Placement, Plan, make_plan
from sglang_xmem.pool import TierPool
from sglang_xmem.tiers import Locality, Ranks, tier_classes

logger = logging.getLogger(__name__)

LAYOUT = "layer_first"
IO_BACKEND = "kernel"
SUPPORTED = (
    "sglang_xmem supports MHA/GQA models, layout layer_first, io backend kernel, page sizes 1 to 256 and tensor "
    "parallelism"
)
#: Key of a scheduler's init info by which the launcher knows that the patches are in.
INFO_KEY = "hicache_xmem_tier"


class Request(msgspec.Struct, frozen=True):
    """The user's raw values, on a ServerArgs record. `from_cli`: a mistake ends the command, else it raises."""

    tier: str
    config: Any
    from_cli: bool


# ---------------------------------------------------------------------------------------------------------------
# Flags: all processes
# ---------------------------------------------------------------------------------------------------------------


#: Whether the engine that this process is starting has the flag on.
_launching_with_tier = False


class _Default:
    """A parser default that can be told from the same value given by the user.

    Not a str: argparse passes strings through the option's type, which would make it an ordinary one.
    """

    def __init__(self, value: str) -> None:
        self.value = value

    def __str__(self) -> str:
        return self.value


def _add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sglang_xmem: HiCache's L2 pool in faster or larger memory")
    # store_true and store_false, because SGLang's --config files know no BooleanOptionalAction
    group.add_argument(
        "--hicache-use-xmem",
        action="store_true",
        default=None,
        help="Put the host pool of --enable-hierarchical-cache into a memory tier of sglang_xmem.",
    )
    group.add_argument(
        "--no-hicache-use-xmem",
        dest="hicache_use_xmem",
        action="store_false",
        help="Leave HiCache as SGLang has it (default).",
    )
    group.add_argument(
        "--hicache-xmem-tier",
        default=AUTO,
        metavar="{" + ",".join([AUTO, *tier_classes()]) + "}",
        help="Which memory: mtier is X-Mem's banks, peer is HBM of other GPUs, dram is NUMA-placed pinned host "
        "memory; auto takes the fastest that this machine has and that can hold the pool.",
    )
    group.add_argument(
        "--hicache-xmem-config",
        default=None,
        metavar="JSON|@FILE",
        help='Settings by tier, such as \'{"peer": {"gpus": [1]}, "dram": {"numa_node": 0}}\'.',
    )
    layout = parser.get_default("hicache_mem_layout")
    parser.set_defaults(hicache_mem_layout=_Default(layout))


def _from_cli_args(original: Any, cls: Any, args: argparse.Namespace) -> Any:
    on = getattr(args, "hicache_use_xmem", False)
    layout = getattr(args, "hicache_mem_layout", None)
    if isinstance(layout, _Default):
        args.hicache_mem_layout = LAYOUT if on else layout.value
    record = original(cls, args)
    if on is None:  # neither on nor off; who says where the pool goes expects it there
        for option, value, default in (
            ("--hicache-xmem-tier", args.hicache_xmem_tier, AUTO),
            ("--hicache-xmem-config", args.hicache_xmem_config, None),
        ):
            if value != default:
                refuse(f"{option} {value} says nothing without --hicache-use-xmem; add that, or leave it out.")
    if on:
        _attach(record, Request(tier=args.hicache_xmem_tier, config=args.hicache_xmem_config, from_cli=True))
    return record


class _ServerArgsFactory:
    """Stands in for `Engine.server_args_class`: takes this package's keywords out of the call.

    An object rather than a function: as a class attribute a function would be bound to the engine.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, **kwargs: Any) -> Any:
        if "hicache_use_xmem" not in kwargs:
            for name in ("hicache_xmem_tier", "hicache_xmem_config"):
                if name in kwargs:
                    raise ConfigError(f"{name} says nothing without hicache_use_xmem=True; add that, or leave it out.")
        on = kwargs.pop("hicache_use_xmem", False)
        tier = kwargs.pop("hicache_xmem_tier", AUTO)
        config = kwargs.pop("hicache_xmem_config", None)
        if not isinstance(on, bool):
            raise ConfigError(f"hicache_use_xmem is {on!r}; give True or False.")
        if on:
            kwargs.setdefault("hicache_mem_layout", LAYOUT)
        record = self.original(**kwargs)
        if on:
            _attach(record, Request(tier=tier, config=config, from_cli=False))
        return record


def _attach(record: Any, request: Request) -> None:
    # A bookkeeping name: SGLang seals the others, and pickles these along to every process.
    record._sglang_xmem = request


def _check_server_args(result: Any, self: Any) -> None:
    """Launcher, after SGLang's own checks: everything that can be refused before a process starts."""
    global _launching_with_tier
    request = getattr(self, "_sglang_xmem", None)
    _launching_with_tier = request is not None
    if not isinstance(request, Request):
        return
    try:
        place(LAUNCHER_HOOKS)
        verify(POOL_HOOKS)
        self._sglang_xmem = _plan(self, request)
    except (ConfigError, UnsupportedSGLang) as error:
        if request.from_cli:
            refuse(str(error))
        raise


def _plan(record: Any, request: Request) -> Plan:
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.environ import envs

    cfg = resolving_view(record)
    if not cfg.enable_hierarchical_cache:
        raise ConfigError("--hicache-use-xmem needs HiCache; add --enable-hierarchical-cache.")
    options = parse_options(request.tier, request.config)
    if cfg.hicache_size < 0:
        raise ConfigError(f"--hicache-size {cfg.hicache_size} is no size; give GB a rank, or 0 for --hicache-ratio's.")
    for option, value, supported in (
        ("--hicache-mem-layout", cfg.hicache_mem_layout, (LAYOUT,)),
        ("--hicache-io-backend", cfg.hicache_io_backend, (IO_BACKEND,)),
        ("--hicache-host-memory-mode", cfg.hicache_host_memory_mode, ("cache",)),
        ("--hicache-storage-backend", cfg.hicache_storage_backend, (None, "file")),
        ("--disaggregation-mode", cfg.disaggregation_mode, ("null",)),
        ("--speculative-algorithm", cfg.speculative_algorithm, (None,)),
        ("--pp-size", cfg.pp_size, (1,)),
        ("--dp-size", cfg.dp_size, (1,)),
        ("--dcp-size", cfg.dcp_size, (1,)),
        ("--enable-unified-memory", cfg.enable_unified_memory, (False,)),
        ("--device", cfg.device, ("cuda", "cpu")),
    ):
        if value not in supported:
            way_out = " or ".join("leave it out" if s is None or s is False else f"use {option} {s}" for s in supported)
            raise ConfigError(f"{option} {value} does not work with --hicache-use-xmem; {way_out} ({SUPPORTED}).")
    if not 1 <= cfg.page_size <= 256:
        raise ConfigError(f"--page-size {cfg.page_size} does not work with --hicache-use-xmem; {SUPPORTED}.")
    model = model_config_of(record)
    if model.attention_arch != AttentionArch.MHA or model.is_hybrid_swa:
        kind = "sliding-window" if model.is_hybrid_swa else model.attention_arch.name
        raise ConfigError(
            f"--hicache-use-xmem does not support {kind} attention of --model-path {cfg.model_path}; {SUPPORTED}, "
            "so leave the flag out for this model."
        )
    if envs.SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS.get():
        raise ConfigError(
            "--hicache-use-xmem needs ranks that see all GPUs; unset SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS."
        )

    per_node = max(1, cfg.tp_size // cfg.nnodes)
    ranks = Ranks(
        gpus=tuple(
            cfg.base_gpu_id + index * cfg.gpu_id_step if cfg.device == "cuda" else None for index in range(per_node)
        )
    )

    return make_plan(options, ranks, int(cfg.hicache_size * 1e9) or None, launcher_host_budget(per_node))


def _wait_for_scheduler_ready(original: Any, scheduler_pipe_readers: Any, scheduler_procs: Any) -> Any:
    """Launcher: a rank that refused has said why, and a rank without the patches must not serve."""
    if not _launching_with_tier:
        return original(scheduler_pipe_readers, scheduler_procs)
    try:
        infos = original(scheduler_pipe_readers, scheduler_procs)
    except RuntimeError:
        if any(process.exitcode == REFUSED_EXIT_STATUS for process in scheduler_procs):
            _end(scheduler_procs, "a rank refused to start; its reason stands above.")
        raise
    for rank, info in enumerate(infos):
        if INFO_KEY not in info:
            _end(
                scheduler_procs,
                f"rank {rank} came up without the patches for --hicache-use-xmem, so it would serve from stock "
                "HiCache; look for sglang_xmem in its log, and check SGLANG_PLUGINS.",
            )
    return infos


def _end(processes: Any, message: str) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    refuse(message)


def _publish(result: Any, server_args: Any, *, role: str, hf_config: Any = None, ranks: Any = None) -> None:
    """Every process publishes its configuration once; a scheduler does it before it builds anything."""
    plan = getattr(server_args, "_sglang_xmem", None)
    if role != "scheduler" or plan is None:
        return
    if not isinstance(plan, Plan):  # a launcher that does not call check_server_args
        refuse("--hicache-use-xmem does not work with this way of starting SGLang; use sglang serve or sgl.Engine.")
    global _placement
    try:
        place(POOL_HOOKS)
    except UnsupportedSGLang as error:
        refuse(str(error))
    if plan.ranks.uses_gpu:
        gpus.mark_as_rank()
    _placement = Placement(plan, ranks.world_rank % len(plan.ranks.gpus), _host_budget)


# ---------------------------------------------------------------------------------------------------------------
# HiCache: schedulers of engines with the flag on
# ---------------------------------------------------------------------------------------------------------------

_placement: Placement | None = None
_tier_names: list[str] = []
#: Host RAM that this rank may claim, as it was when SGLang began to size an automatic pool.
_sized_against: int | None = None


def _host_budget(nbytes: int) -> int:
    """Host RAM for a pool of so many bytes: SGLang's rule, also for a tier that is tried in place of another."""
    from sglang.srt.mem_cache.pool_host import base

    # Within an automatic size SGLang's function answers with what it sized by, which may be another tier's room, less
    # what has been asked for; and the machine's memory is the other ranks' meanwhile.
    if _sized_against is not None:
        return _sized_against
    budget = base.host_memory_budget_bytes
    return int(getattr(budget, "__wrapped__", budget)(nbytes))


def _host_memory_budget_bytes(original: Any, requested_bytes: int = 0, *, auto_size: bool = False) -> int:
    """SGLang sizes an automatic pool by host RAM; where the tier is not host memory, by the tier's room."""
    global _sized_against
    assert _placement is not None
    try:
        tier = _placement.first_tier()
        device = tier.locality is Locality.DEVICE
        if auto_size:
            _sized_against = int(original(auto_size=not device))
        if device:
            return tier.capacity_bytes()
    except ConfigError as error:
        refuse(str(error))
    return int(original(requested_bytes, auto_size=auto_size))


def _select_strategy(result: Any, kvcache: Any, components: Any) -> None:
    from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import _PlainKvStrategy
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    if not isinstance(result, _PlainKvStrategy) or isinstance(kvcache, MLATokenToKVPool):
        refuse(f"--hicache-use-xmem does not support {type(kvcache).__name__} of this model; {SUPPORTED}.")


def _get_mha_host_pool_cls(result: Any, buffer_info: Any) -> type:
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    if result is not MHATokenToKVPoolHost:
        refuse(f"--hicache-use-xmem does not support the KV cache of {result.__name__}; {SUPPORTED}.")
    if buffer_info.buffers.layout is not KVBufferLayout.NHD:
        refuse(
            f"--hicache-use-xmem does not support the layout {buffer_info.buffers.layout.value} of the GPU's KV cache; "
            "unset SGLANG_USE_HND_KVCACHE."
        )
    return tier_host_pool_class()


def _move_indices(original: Any, self: Any, host_indices: Any, device_indices: Any) -> Any:
    # The pool stages host indices itself, on the transfer stream and by pages (prepare_transfer_indices); SGLang
    # would copy one a token from pageable memory, which waits for the GPU.
    return host_indices, device_indices


def _transfer_streams(result: Any, self: Any, io_backend: str) -> None:
    """Loads before everything else: the forward pass waits for them, and theirs are a handful of thread blocks.

    On a stream of the forward pass's priority, a load's blocks queue behind those of whatever kernel came first.
    """
    import torch

    if isinstance(self.host_to_device_stream, torch.cuda.Stream):
        self.host_to_device_stream = torch.cuda.Stream(self.host_to_device_stream.device, priority=-1)


def _submit_host_to_device(
    original: Any,
    self: Any,
    transfers: Any,
    *,
    transfer_layer_id_max: int,
    start_event: Any = None,
    on_layer_done: Any = None,
) -> Any:
    """SGLang's loop over layers as one launch, whatever their number; `_layer_wait` is its other half."""
    from sglang.srt.managers.cache_controller import LayerLoadingEvent

    counter: Any = getattr(on_layer_done, "__self__", None)
    signals = None
    if isinstance(counter, LayerLoadingEvent):
        signals = _signals_for(counter, transfers, transfer_layer_id_max)
        setattr(counter, _SIGNALS, signals)
    if signals is None:
        return original(
            self,
            transfers,
            transfer_layer_id_max=transfer_layer_id_max,
            start_event=start_event,
            on_layer_done=on_layer_done,
        )
    stream = self.host_to_device_stream
    with self._submission(transfers, stream, "host_to_device", start_event) as (prepared, completion):
        transfers[0].host_pool.tier_pool.load_layers(
            prepared[0].host_indices, prepared[0].device_indices, signals, transfers[0].host_indices
        )
        counter.finish_event.record(stream)
    return completion


#: Attribute of a LayerLoadingEvent: the signals of the load that it stands for, None where its events tell. And where
#: the signals stay that were once taken for it.
_SIGNALS = "_sglang_xmem_signals"
_TAKEN = "_sglang_xmem_taken"


def _signals_for(counter: Any, transfers: Any, num_layers: int) -> Any:
    """Signals for a load that is of one pool, all layers in order, and that `counter` stands for; else None."""
    from sglang.srt.environ import envs

    transfer: Any = transfers[0] if len(transfers) == 1 else None
    pool = getattr(getattr(transfer, "host_pool", None), "tier_pool", None)
    if (
        not isinstance(pool, TierPool)
        or pool.num_layers != num_layers
        or (transfer.layer_mapper and [transfer.layer_mapper(i) for i in range(num_layers)] != [*range(num_layers)])
        or envs.SGLANG_TEST_HICACHE_H2D_DELAY_CYCLES.get()
    ):
        return None
    taken: Any = getattr(counter, _TAKEN, None)
    if taken is None:
        taken = (pool, pool.take_signals())
        setattr(counter, _TAKEN, taken)
    return taken[1] if taken[0] is pool else None


def _layer_wait(original: Any, self: Any, layer_index: int) -> None:
    signals = getattr(self, _SIGNALS, None)
    if signals is None:
        original(self, layer_index)
    else:
        signals.wait(layer_index)


def _get_init_info(result: dict[str, Any], self: Any) -> dict[str, Any]:
    result[INFO_KEY] = ",".join(_tier_names)
    return result


@functools.cache
def tier_host_pool_class() -> type:
    """SGLang's MHA host pool with its memory in a tier."""
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    class TierMHATokenToKVPoolHost(MHATokenToKVPoolHost):
        """HiCache's bookkeeping as it is; allocation, copies and storage pages by TierPool.

        Transfer indices reach the `_physical` methods as `prepare_transfer_indices` left them: one row a page.
        """

        tier_pool: TierPool

        def _allocate_host_buffer(self) -> None:
            assert _placement is not None
            if self.layout != LAYOUT:
                refuse(f"--hicache-mem-layout {self.layout} does not work with --hicache-use-xmem; use {LAYOUT}.")
            if self.size <= self.device_capacity_tokens:
                logger.warning(
                    "sglang_xmem: the pool (%d tokens) is smaller than the GPU's own (%d tokens); raise "
                    "--hicache-ratio or --hicache-size for more hits",
                    self.size,
                    self.device_capacity_tokens,
                )
            try:
                self.tier_pool = TierPool(
                    _placement,
                    num_layers=self.layer_num,
                    num_tokens=self.size,
                    page_size=self.page_size,
                    row_bytes=self.head_num * self.head_dim * self.dtype.itemsize,
                    device=self._transfer_device,
                    copy=_placement.plan.options.copy,
                )
            except ConfigError as error:
                refuse(str(error))
            _tier_names.append(self.tier_pool.tier.name)
            self.token_stride_size = self.tier_pool.row_bytes
            self.layout_dim = self.token_stride_size * self.layer_num
            self.kv_buffer: Any = self.tier_pool.as_kv(self.dtype, self.head_num, self.head_dim)
            self.fd = None

        def _initialize_transfer_views(self, buffer_info: Any, write_back_staging: Any) -> None:
            self.element_dim = self.head_num * self.head_dim
            self._init_device_row_stride((*self.device_k_buffers, *self.device_v_buffers))
            if not self.device_rows_packed:
                refuse(f"--hicache-use-xmem needs packed rows in the GPU's KV pool; {SUPPORTED}.")
            self.can_use_jit = False
            self.k_data_refs = [self.k_buffer[layer] for layer in range(self.layer_num)]
            self.v_data_refs = [self.v_buffer[layer] for layer in range(self.layer_num)]
            self.k_data_ptrs = self.v_data_ptrs = None
            self.host_kv_data_refs = self.k_data_refs + self.v_data_refs
            self._init_write_back_staging_buffers(buffer_info, write_back_staging)
            try:
                self.tier_pool.attach(self.device_k_buffers, self.device_v_buffers)
            except CopyError as error:
                refuse(str(error))

        def prepare_transfer_indices(self, host_indices: Any, device_indices: Any, io_backend: str) -> Any:
            return self.tier_pool.stage_rows(host_indices), self.tier_pool.stage_rows(device_indices)

        def load_to_device_per_layer_physical(
            self,
            device_pool: Any,
            host_indices: Any,
            device_indices: Any,
            layer_id: int,
            io_backend: str,
            *,
            is_draft: bool = False,
        ) -> None:
            self.tier_pool.load_layer(host_indices, device_indices, layer_id)

        def backup_from_device_all_layer_physical(
            self, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str
        ) -> None:
            self.tier_pool.store(host_indices, device_indices)

        def load_to_device_per_layer(
            self,
            device_pool: Any,
            host_indices: Any,
            device_indices: Any,
            layer_id: int,
            io_backend: str,
            *,
            is_draft: bool = False,
        ) -> None:
            tier_rows, device_rows = self.prepare_transfer_indices(host_indices, device_indices, io_backend)
            self.tier_pool.load_layer(tier_rows, device_rows, layer_id)

        def backup_from_device_all_layer(
            self, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str
        ) -> None:
            self.tier_pool.store(*self.prepare_transfer_indices(host_indices, device_indices, io_backend))

        def get_data_page(self, index: Any, flat: bool = True) -> Any:
            page = self.tier_pool.read_page(int(index)).view(self.dtype)
            return page if flat else page.view(2, self.layer_num, self.page_size, self.head_num, self.head_dim)

        def set_from_flat_data_page(self, index: Any, data_page: Any) -> None:
            self.tier_pool.write_page(int(index), data_page)

        def get_dummy_flat_data_page(self) -> Any:
            import torch

            return torch.zeros(
                2 * self.layer_num * self.page_size * self.head_num * self.head_dim,
                dtype=self.dtype,
                pin_memory=self._transfer_device.type == "cuda",
            )

        def get_page_buffer_meta(self, indices: Any) -> Any:
            raise NotImplementedError(
                "sglang_xmem gives storage backends pages, not addresses; use --hicache-storage-backend file."
            )

        def get_page_buffer_element_size(self, split_factor: int = 1) -> int:
            return 2 * self.layer_num * self.tier_pool.row_bytes * self.page_size

        def destroy(self) -> None:
            if getattr(self, "_destroyed", False):
                return
            self._destroyed = True
            self.kv_buffer = None
            self.k_data_refs = self.v_data_refs = self.host_kv_data_refs = []
            self.tier_pool.close()

    return TierMHATokenToKVPoolHost


# ---------------------------------------------------------------------------------------------------------------
# The hooks
# ---------------------------------------------------------------------------------------------------------------

_ARGS = "sglang.srt.server_args.ServerArgs"
_ASSEMBLER = "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler"
_POOL_HOST = "sglang.srt.mem_cache.pool_host"

FLAG_HOOKS = (
    Hook(f"{_ARGS}.add_cli_args", ("parser",), "after", _add_cli_args, "add its flags"),
    Hook(f"{_ARGS}.from_cli_args", ("args",), "around", _from_cli_args, "read its flags"),
    Hook(f"{_ARGS}.check_server_args", ("self",), "after", _check_server_args, "check its flags"),
    Hook(
        "sglang.srt.runtime_context.publish",
        ("server_args", "role", "hf_config", "ranks"),
        "after",
        _publish,
        "find the options in a scheduler",
    ),
)
LAUNCHER_HOOKS = (
    Hook(
        "sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
        ("scheduler_pipe_readers", "scheduler_procs"),
        "around",
        _wait_for_scheduler_ready,
        "check that every rank serves from the tier",
    ),
)
POOL_HOOKS = (
    Hook(f"{_ASSEMBLER}._select_strategy", ("kvcache", "components"), "after", _select_strategy, "check the model"),
    Hook(
        f"{_POOL_HOST}.mha.get_mha_host_pool_cls",
        ("buffer_info",),
        "after",
        _get_mha_host_pool_cls,
        "put the host pool into a tier",
    ),
    Hook(
        f"{_POOL_HOST}.base.host_memory_budget_bytes",
        ("requested_bytes", "auto_size"),
        "around",
        _host_memory_budget_bytes,
        "size the pool by its tier",
    ),
    Hook(
        "sglang.srt.managers.cache_controller.HiCacheController.move_indices",
        ("self", "host_indices", "device_indices"),
        "around",
        _move_indices,
        "keep transfers from waiting for the GPU",
    ),
    Hook(
        "sglang.srt.mem_cache.l2_transfer.L2TransferEngine.__init__",
        ("self", "io_backend"),
        "after",
        _transfer_streams,
        "give loads their priority",
    ),
    Hook(
        "sglang.srt.mem_cache.l2_transfer.L2TransferEngine.submit_host_to_device",
        ("self", "transfers", "transfer_layer_id_max", "start_event", "on_layer_done"),
        "around",
        _submit_host_to_device,
        "enqueue loads at little cost",
    ),
    Hook(
        "sglang.srt.managers.cache_controller.LayerLoadingEvent.wait",
        ("self", "layer_index"),
        "around",
        _layer_wait,
        "wait for a load's layers",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_init_info",
        ("self",),
        "after",
        _get_init_info,
        "tell the launcher about the tier",
    ),
)


def install_flags() -> None:
    """Patch what carries the options. Raises UnsupportedSGLang where something is not as in 0.5.23."""
    place(FLAG_HOOKS)
    engine = "sglang.srt.entrypoints.engine"
    if engine in sys.modules or multiprocessing.parent_process() is None:  # else an engine's child: keep it light
        engine_class = importlib.import_module(engine).Engine
        if not isinstance(engine_class.server_args_class, _ServerArgsFactory):
            engine_class.server_args_class = _ServerArgsFactory(engine_class.server_args_class)

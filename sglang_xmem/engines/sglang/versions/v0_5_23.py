"""SGLang 0.5.23."""

from sglang_xmem.engines.sglang.hooks import Hook
from sglang_xmem.engines.sglang.versions import VersionTable

_ARGS = "sglang.srt.server_args.ServerArgs"
_ASSEMBLER = "sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler"
_POOL_HOST = "sglang.srt.mem_cache.pool_host"
_TRANSFER = "sglang.srt.mem_cache.l2_transfer.L2TransferEngine"
_CONTROLLER = "sglang.srt.managers.cache_controller"
_OURS = "sglang_xmem.engines.sglang"

FLAG_HOOKS = (
    Hook(f"{_ARGS}.add_cli_args", ("parser",), "after", f"{_OURS}.flags:add_cli_args", "add its flags"),
    Hook(f"{_ARGS}.from_cli_args", ("args",), "around", f"{_OURS}.flags:from_cli_args", "read its flags"),
    Hook(f"{_ARGS}.check_server_args", ("self",), "after", f"{_OURS}.launcher:check_server_args", "check its flags"),
    Hook(
        "sglang.srt.runtime_context.publish",
        ("server_args", "role", "hf_config", "ranks"),
        "after",
        f"{_OURS}.scheduler:publish",
        "find the options in a scheduler",
    ),
)
LAUNCHER_HOOKS = (
    Hook(
        "sglang.srt.entrypoints.engine._wait_for_scheduler_ready",
        ("scheduler_pipe_readers", "scheduler_procs"),
        "around",
        f"{_OURS}.launcher:wait_for_scheduler_ready",
        "check that every rank serves from the tier",
    ),
)
CONTROLLER_HOOKS = (
    Hook(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info",
        ("self",),
        "after",
        f"{_OURS}.launcher:controller_init_info",
        "hear of the tier from data-parallel ranks",
    ),
)
SCHEDULER_HOOKS = (
    Hook(
        "sglang.srt.mem_cache.kv_cache_builder.prepare_hicache_staging",
        ("tp_worker", "draft_plan"),
        "around",
        f"{_OURS}.scheduler:prepare_staging",
        "leave GPU memory to the KV cache",
    ),
    Hook(
        "sglang.srt.mem_cache.hicache_auto_size.auto_size_hicache",
        ("params", "draft_plan", "enabled"),
        "around",
        f"{_OURS}.scheduler:note_draft",
        "make frames large enough for a draft model",
    ),
    Hook(
        f"{_ASSEMBLER}.attach_hybrid_pool_to_unified_cache",
        (
            "cache",
            "params",
            "server_args",
            "load_cache_event",
            "storage_backend",
            "storage_extra_config",
            "storage_prefetch_threshold",
        ),
        "around",
        f"{_OURS}.scheduler:attach_pools",
        "build host pools without memory",
    ),
    Hook(
        f"{_POOL_HOST}.group.HostPoolGroup.__init__",
        ("self", "entries"),
        "after",
        f"{_OURS}.scheduler:group_pools",
        "put host pools into a tier",
    ),
    Hook(
        f"{_POOL_HOST}.group.HostPoolGroup.add_entry",
        ("self", "entry"),
        "after",
        f"{_OURS}.scheduler:group_another",
        "put host pools that come later into a tier",
    ),
    Hook(
        f"{_ASSEMBLER}.build_hicache_draft_sidecars",
        ("draft_device_pools", "tree_cache"),
        "around",
        f"{_OURS}.scheduler:build_draft_sidecars",
        "put a draft model's host pools into a tier",
    ),
    Hook(
        f"{_POOL_HOST}.base.host_memory_budget_bytes",
        ("requested_bytes", "auto_size"),
        "around",
        f"{_OURS}.scheduler:host_memory_budget_bytes",
        "size the pool by its tier",
    ),
    Hook(
        f"{_CONTROLLER}.HiCacheController.move_indices",
        ("self", "host_indices", "device_indices"),
        "around",
        f"{_OURS}.scheduler:move_indices",
        "keep transfers from waiting for the GPU",
    ),
    Hook(
        f"{_CONTROLLER}.HiCacheController.attach_storage_backend",
        ("self", "storage_backend", "prefetch_threshold", "model_name", "storage_backend_extra_config"),
        "around",
        f"{_OURS}.scheduler:attach_storage",
        "refuse storage backends that cannot work over the tier",
    ),
    Hook(
        f"{_CONTROLLER}.LayerDoneCounter.__init__",
        ("self", "num_layers"),
        "after",
        f"{_OURS}.transfer:prepare_counters",
        "have counters ready before the first load",
    ),
    Hook(
        f"{_CONTROLLER}.LayerLoadingEvent.wait",
        ("self", "layer_index"),
        "around",
        f"{_OURS}.transfer:layer_wait",
        "wait for a load's layers",
    ),
    Hook(
        f"{_TRANSFER}.__init__",
        ("self", "io_backend"),
        "after",
        f"{_OURS}.scheduler:transfer_streams",
        "give loads their priority",
    ),
    Hook(
        f"{_TRANSFER}.submit_host_to_device",
        ("self", "transfers", "transfer_layer_id_max", "start_event", "on_layer_done"),
        "around",
        f"{_OURS}.transfer:submit_host_to_device",
        "load pages from the tier",
    ),
    Hook(
        f"{_TRANSFER}.submit_device_to_host",
        ("self", "transfers"),
        "around",
        f"{_OURS}.transfer:submit_device_to_host",
        "store pages in the tier",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_init_info",
        ("self",),
        "after",
        f"{_OURS}.scheduler:init_info",
        "tell the launcher about the tier",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        ("self", "recv_req"),
        "after",
        f"{_OURS}.scheduler:internal_state",
        "show the tier in server information",
    ),
)
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
BANK_HOOKS = tuple(
    Hook(
        f"{_WEIGHTS}.update_weights_from_{source}",
        ("self", "recv_req"),
        "around",
        f"{_OURS}.sharing:{function}",
        "keep pages of other weights apart",
    )
    for source, function in (
        ("disk", "weights_from_disk"),
        ("distributed", "weights_from_elsewhere"),
        ("tensor", "weights_from_elsewhere"),
        ("ipc", "weights_from_elsewhere"),
    )
)
MEMBERS = (
    "sglang.srt.arg_groups.overrides.resolving_view",
    "sglang.srt.runtime_context.get_context",
    "sglang.srt.runtime_context.get_memory",
    "sglang.srt.plugins.hook_registry.HookRegistry._apply_target",
    "sglang.srt.plugins.hook_registry.HookRegistry._patched",
    f"{_TRANSFER}._submission",
    f"{_POOL_HOST}.common.ALLOC_MEMORY_FUNCS",
    f"{_POOL_HOST}.group.HostPoolGroup._refresh_transfer_capabilities",
    f"{_POOL_HOST}.mla.maybe_dcp_kernel_indices",
    f"{_CONTROLLER}.LayerLoadingEvent.finish_event",
)
ENVIRONMENT = ("SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS",)

TABLE = VersionTable(
    version="0.5.23",
    flag_hooks=FLAG_HOOKS,
    launcher_hooks=LAUNCHER_HOOKS,
    controller_hooks=CONTROLLER_HOOKS,
    scheduler_hooks=SCHEDULER_HOOKS,
    bank_hooks=BANK_HOOKS,
    members=MEMBERS,
    environment=ENVIRONMENT,
)

"""SGLang 0.5.23."""

from sglang_xmem.engines.sglang.hooks import hooks_in
from sglang_xmem.engines.sglang.versions import VersionTable, reads

_SRT = "sglang.srt"
_ARGS = f"{_SRT}.server_args.ServerArgs"
_CONTEXT = f"{_SRT}.runtime_context"
_CACHE = f"{_SRT}.mem_cache"
_ASSEMBLER, _HYBRID = (f"{_CACHE}.hybrid_cache.{name}" for name in ("hybrid_pool_assembler", "hybrid_cache_controller"))
_HOST = f"{_CACHE}.pool_host"
_GROUP = f"{_HOST}.group.HostPoolGroup"
_TRANSFER = f"{_CACHE}.l2_transfer.L2TransferEngine"
_CONTROLLER = f"{_SRT}.managers.cache_controller"
_HICACHE = f"{_CONTROLLER}.HiCacheController"
_DATA_PARALLEL = f"{_SRT}.managers.data_parallel_controller.DataParallelController"
_BATCH = f"{_SRT}.managers.schedule_batch"
_WEIGHTS = f"{_SRT}.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_SCHEDULER = f"{_SRT}.managers.scheduler.Scheduler"

FLAG_HOOKS = hooks_in(f"""
{_ARGS}.add_cli_args(parser)
    after flags:add_cli_args: add its flags
{_ARGS}.from_cli_args(args)
    around flags:from_cli_args: read its flags
{_ARGS}.check_server_args(self)
    after launcher:check_server_args: check its flags
{_CONTEXT}.publish(server_args, role, hf_config, ranks)
    after scheduler:publish: find the options in a scheduler
""")
LAUNCHER_HOOKS = hooks_in(f"""
{_SRT}.entrypoints.engine._wait_for_scheduler_ready(scheduler_pipe_readers, scheduler_procs)
    around launcher:wait_for_scheduler_ready: check that every rank serves from the tier
""")
CONTROLLER_HOOKS = hooks_in(f"""
{_DATA_PARALLEL}.get_init_info(self)
    after launcher:controller_init_info: get the tier from data-parallel ranks
""")
SCHEDULER_HOOKS = hooks_in(f"""
{_CACHE}.kv_cache_builder.prepare_hicache_staging(tp_worker, draft_plan)
    around scheduler:prepare_staging: leave GPU memory to the KV cache
{_CACHE}.hicache_auto_size.auto_size_hicache(params, draft_plan, enabled)
    around scheduler:note_draft: make frames large enough for a draft model
{_ASSEMBLER}.attach_hybrid_pool_to_unified_cache(cache, params, server_args, load_cache_event, storage_backend,
    storage_extra_config, storage_prefetch_threshold)
    around scheduler:attach_pools: build host pools without memory
{_ASSEMBLER}.build_hicache_draft_sidecars(draft_device_pools, tree_cache)
    around scheduler:build_draft_sidecars: put a draft model's host pools into a tier
{_GROUP}.__init__(self, entries)
    after scheduler:group_pools: put host pools into a tier
{_GROUP}.add_entry(self, entry)
    after scheduler:group_another: put host pools that come later into a tier
{_HOST}.base.host_memory_budget_bytes(requested_bytes, auto_size)
    around scheduler:host_memory_budget_bytes: size the pool by its tier
{_HICACHE}.move_indices(self, host_indices, device_indices)
    around scheduler:move_indices: keep transfers from waiting for the GPU
{_HICACHE}.attach_storage_backend(self, storage_backend, prefetch_threshold, model_name, storage_backend_extra_config)
    around scheduler:attach_storage: refuse storage backends that cannot work over the tier
{_CONTROLLER}.LayerDoneCounter.__init__(self, num_layers)
    after transfer:prepare_counters: have counters ready before the first load
{_CONTROLLER}.LayerLoadingEvent.wait(self, layer_index)
    around transfer:layer_wait: wait for a load's layers
{_TRANSFER}.__init__(self, io_backend)
    after scheduler:transfer_streams: give loads their priority
{_TRANSFER}.submit_host_to_device(self, transfers, transfer_layer_id_max, start_event, on_layer_done)
    around transfer:submit_host_to_device: load pages from the tier
{_TRANSFER}.submit_device_to_host(self, transfers)
    around transfer:submit_device_to_host: store pages in the tier
{_HYBRID}.HybridCacheController.load(self, host_indices, priority, node_id, extra_pools, device_indices, anchor_indices)
    around recovery:load: make damaged pages misses
{_HYBRID}.HybridCacheController.write(self, device_indices, priority, node_id, extra_pools, flush, start_owner)
    around recovery:write: set a tier aside
{_CACHE}.unified_radix_cache.UnifiedRadixCache.write_backup_storage(self, node_id)
    around recovery:back_up: keep what damaged pages led to out of storage
{_BATCH}.ScheduleBatch.copy(self)
    after recovery:copy_batch: know a batch's load when its results come
{_SCHEDULER}.process_batch_result(self, batch, result)
    around recovery:settle: end requests whose pages came back damaged
{_SCHEDULER}.get_new_batch_prefill(self, running_batch)
    around recovery:plan_prefill: empty caches that hold damaged pages
{_SCHEDULER}.get_init_info(self)
    after scheduler:init_info: report the tier to the launcher
{_SCHEDULER}.get_internal_state(self, recv_req)
    after scheduler:internal_state: show the tier in server information
""")
BANK_HOOKS = hooks_in(
    "".join(
        f"{_WEIGHTS}.update_weights_from_{source}(self, recv_req)\n"
        f"    around sharing:weights_from_{known}: keep pages of other weights apart\n"
        for source, known in zip(("disk", "distributed", "tensor", "ipc"), ("disk", *["elsewhere"] * 3), strict=True)
    )
)
MEMBERS = (
    f"{_SRT}.arg_groups.overrides.resolving_view",
    f"{_SRT}.environ.envs.SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS",
    *(f"{_CONTEXT}.get_{name}" for name in ("context", "memory", "observability", "parallel", "serving")),
    *(f"{_SRT}.plugins.hook_registry.HookRegistry.{name}" for name in ("_apply_target", "_patched")),
    f"{_TRANSFER}._submission",
    f"{_HOST}.common.ALLOC_MEMORY_FUNCS",
    f"{_GROUP}._refresh_transfer_capabilities",
    f"{_HOST}.mla.maybe_dcp_kernel_indices",
    f"{_CONTROLLER}.LayerLoadingEvent.finish_event",
    *(f"{_CACHE}.hicache_storage.HiCacheFile.{name}" for name in ("get", "set")),
    *(f"{_SCHEDULER}.{name}" for name in ("abort_request", "collect_inflight_reqs", "flush_cache", "is_fully_idle")),
    f"{_SRT}.managers.io_struct.AbortReq",
    *(f"{_BATCH}.{name}" for name in ("FINISH_ABORT", "NextBatchPlan", "ScheduleBatch.hicache_consumer_index")),
    f"{_DATA_PARALLEL.rpartition('.')[0]}.SCHEDULER_PIDS_ARG",
)

TABLE = VersionTable(
    version="0.5.23",
    flag_hooks=FLAG_HOOKS,
    launcher_hooks=LAUNCHER_HOOKS,
    controller_hooks=CONTROLLER_HOOKS,
    scheduler_hooks=SCHEDULER_HOOKS,
    bank_hooks=BANK_HOOKS,
    members=MEMBERS,
    reads=reads.V0_5_23,
)

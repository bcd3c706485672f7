"""Members of instances of SGLang that this package reads, or replaces on the instance, as data.

These cannot be looked up before an instance exists, so no start verifies them; `scripts/check_versions.py` looks them
up in SGLang's sources, and reports members that the adapter reads and that are not listed here.
"""

from __future__ import annotations

from collections.abc import Mapping

_SRT = "sglang.srt"
_CACHE = f"{_SRT}.mem_cache"
_HOST = f"{_CACHE}.pool_host"
_CONTEXT = f"{_SRT}.runtime_context"
_MANAGERS = f"{_SRT}.managers"
_CONTROLLER = f"{_MANAGERS}.cache_controller"
_TRANSFERS = f"{_CACHE}.l2_transfer"

#: Class -> names of members, separated by spaces.
V0_5_23 = {
    f"{_SRT}.server_args.ServerArgs": "base_gpu_id device disaggregation_decode_enable_offload_kvcache "
    "disaggregation_decode_retraction_backup disaggregation_mode dp_size enable_dp_attention enable_hierarchical_cache "
    "enable_hisparse enable_kv_cache_sharding enable_unified_cache_external_linker enable_unified_memory gpu_id_step "
    "hicache_host_memory_mode hicache_ratio hicache_size hicache_storage_backend hicache_storage_backend_extra_config "
    "nnodes pp_size tp_size use_ray hicache_io_backend hicache_mem_layout served_model_name enable_metrics",
    f"{_MANAGERS}.scheduler.Scheduler": "attn_tp_group",
    f"{_SRT}.distributed.parallel_state.GroupCoordinator": "rank_in_group world_size cpu_group",
    f"{_CONTEXT}.SpawnRanks": "gpu_id world_rank",
    f"{_CONTEXT}.ParallelContext": "tp_rank pp_rank dp_rank",
    f"{_SRT}.speculative.base_spec_worker.HiCacheDraftPlan": "mode device_pools",
    f"{_MANAGERS}.schedule_batch.Req": "origin_input_ids cached_tokens_device cached_tokens_host cached_tokens_storage",
    f"{_MANAGERS}.io_struct.GetInternalStateReqOutput": "internal_state",
    f"{_MANAGERS}.data_parallel_controller.DataParallelController": "_scheduler_init_infos",
    f"{_CONTROLLER}.HiCacheController": "mem_pool_host storage_backend",
    f"{_CONTROLLER}.LayerDoneCounter": "events",
    f"{_CONTROLLER}.LayerLoadingEvent": "complete",
    f"{_TRANSFERS}.L2TransferEngine": "host_to_device_stream device_to_host_stream",
    f"{_TRANSFERS}.L2Transfer": "host_pool device_pool host_indices device_indices layer_mapper is_draft",
    f"{_TRANSFERS}.TransferCompletion": "start_event finish_event timing_enabled",
    f"{_CACHE}.hicache_storage.HiCacheStorageConfig": "is_mla_model tp_size",
    f"{_CACHE}.hicache_storage.PoolTransfer": "name keys host_indices indices_from_pool",
    f"{_HOST}.group.PoolEntry": "name host_pool",
    f"{_HOST}.group.HostPoolGroup": "entries anchor_entry page_size",
    f"{_HOST}.base.HostKVCache": "size logical_size page_size dtype kv_buffer dcp_size dcp_rank available_size "
    "storage_format_tag can_use_write_back_jit prepare_transfer_indices destroy get_data_page set_from_flat_data_page "
    "get_dummy_flat_data_page is_stride_page_aligned alloc clear load_to_device_per_layer "
    "load_to_device_per_layer_physical backup_from_device_all_layer backup_from_device_all_layer_physical",
    f"{_HOST}.mha.MHATokenToKVPoolHost": "_buffer_infos device_k_buffers device_v_buffers layer_num "
    "get_page_buffer_meta get_hybrid_pool_buffer",
    f"{_HOST}.mha.MHATokenToKOnlyPoolHost": "device_pool layer_num",
    f"{_HOST}.mla.MLATokenToKVPoolHost": "_is_dummy _native_buffers _host_layer_by_controller device_kv_buffers "
    "_target_layer_indices target_layer_num layer_num get_page_buffer_meta",
    f"{_HOST}.dsa.DSAIndexerPoolHost": "_is_dummy packed_device_index_buffers _device_to_host_layer "
    "_draft_host_layer layer_num get_page_buffer_meta get_hybrid_pool_buffer",
    f"{_HOST}.mamba.MambaPoolHost": "temporal_device_layers temporal_state_elem_size conv_device_layers "
    "slot_state_device_tensors num_mamba_layers get_page_buffer_meta get_hybrid_pool_buffer",
    f"{_HOST}.minimax_m3_nvfp4.MiniMaxM3Nvfp4IndexKPoolHost": "device_rows row_bytes",
    f"{_CACHE}.memory_pool_host.DeepSeekV4PagedHostPool": "device_buffers item_bytes slot_page_size",
    f"{_CACHE}.memory_pool_host.DeepSeekV4StateHostPool": "device_page_views state_page_bytes swa_page_size",
    f"{_CACHE}.unified_radix_cache.UnifiedRadixCache": "components",
    f"{_CACHE}.memory_pool.MHATokenToKOnlyPool": "k_buffer",
}


def _changed(newer: Mapping[str, str], gone: Mapping[str, str], added: Mapping[str, str]) -> Mapping[str, str]:
    """Members of an older version, without those that came later and with those that went."""
    changed = dict(newer)
    for owner, names in gone.items():
        changed[owner] = " ".join(name for name in changed[owner].split() if name not in names.split())
    for owner, names in added.items():
        changed[owner] = f"{changed.get(owner, '')} {names}"
    return changed


V0_5_22 = _changed(
    V0_5_23,
    gone={
        f"{_MANAGERS}.data_parallel_controller.DataParallelController": "_scheduler_init_infos",
        f"{_HOST}.mha.MHATokenToKVPoolHost": "_buffer_infos",
        f"{_HOST}.mla.MLATokenToKVPoolHost": "_host_layer_by_controller _native_buffers _target_layer_indices "
        "device_kv_buffers",
        f"{_HOST}.minimax_m3_nvfp4.MiniMaxM3Nvfp4IndexKPoolHost": "device_rows row_bytes",
    },
    added={
        f"{_HOST}.mla.MLATokenToKVPoolHost": "device_pool mtp_draft_device_pools",
        f"{_CACHE}.memory_pool.MLATokenToKVPool": "kv_buffer layer_shard_enabled",
    },
)
V0_5_21 = _changed(
    V0_5_22,
    gone={
        f"{_SRT}.server_args.ServerArgs": "enable_kv_cache_sharding",
        f"{_HOST}.base.HostKVCache": "storage_format_tag",
        f"{_HOST}.mha.MHATokenToKVPoolHost": "device_k_buffers device_v_buffers",
        f"{_HOST}.dsa.DSAIndexerPoolHost": "_device_to_host_layer _draft_host_layer",
        f"{_HOST}.mamba.MambaPoolHost": "temporal_device_layers conv_device_layers slot_state_device_tensors",
    },
    added={
        f"{_HOST}.mha.MHATokenToKVPoolHost": "device_pool mtp_draft_device_pools",
        f"{_HOST}.mamba.MambaPoolHost": "device_pool",
        f"{_CACHE}.memory_pool.MHATokenToKVPool": "k_buffer v_buffer",
    },
)

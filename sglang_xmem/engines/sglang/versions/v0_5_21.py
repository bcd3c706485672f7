"""SGLang 0.5.21, as it differs from 0.5.22."""

from dataclasses import replace

from sglang_xmem.engines.sglang.versions import reads, v0_5_22, with_parameters

_HYBRID = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
_PARAMETERS = {
    "sglang.srt.mem_cache.pool_host.base.host_memory_budget_bytes": ("requested_bytes",),
    f"{_HYBRID}.load": ("self", "host_indices", "priority", "node_id", "extra_pools"),
}

TABLE = replace(
    v0_5_22.TABLE,
    version="0.5.21",
    reads=reads.V0_5_21,
    scheduler_hooks=with_parameters(v0_5_22.TABLE.scheduler_hooks, _PARAMETERS),
)

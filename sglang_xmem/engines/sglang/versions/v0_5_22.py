"""SGLang 0.5.22, as it differs from 0.5.23."""

from dataclasses import replace

from sglang_xmem.engines.sglang.versions import reads, v0_5_23, with_parameters

_HYBRID = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
_PARAMETERS = {
    f"{_HYBRID}.write": ("self", "device_indices", "priority", "node_id", "extra_pools", "flush"),
}

TABLE = replace(
    v0_5_23.TABLE,
    version="0.5.22",
    reads=reads.V0_5_22,
    scheduler_hooks=with_parameters(v0_5_23.TABLE.scheduler_hooks, _PARAMETERS),
    bank_hooks=(),
    # The controller sends its parent a fixed set of facts.
    controller_hooks=(),
    controller_reports=False,
)

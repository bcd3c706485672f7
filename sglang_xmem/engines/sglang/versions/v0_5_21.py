"""SGLang 0.5.21, as it differs from 0.5.22."""

from dataclasses import replace

from sglang_xmem.engines.sglang.versions import reads, v0_5_22

_BUDGET = "sglang.srt.mem_cache.pool_host.base.host_memory_budget_bytes"

TABLE = replace(
    v0_5_22.TABLE,
    version="0.5.21",
    reads=reads.V0_5_21,
    scheduler_hooks=tuple(
        hook._replace(parameters=("requested_bytes",)) if hook.target == _BUDGET else hook
        for hook in v0_5_22.TABLE.scheduler_hooks
    ),
)

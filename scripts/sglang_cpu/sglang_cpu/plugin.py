"""The entry point: puts the CPU copies into stock HiCache and keeps host pools from pinning memory."""

from __future__ import annotations

import os
from typing import Any


def register() -> None:
    """Called by SGLang in each of its processes before it builds anything; does nothing without the CPU engine."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    from sglang.srt.mem_cache.pool_host import mha
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_cpu import copies

    # mha.py imports these names on CUDA alone, so there is no attribute that HookRegistry could replace.
    for function in copies.ALL:
        setattr(mha, function.__name__, function)
    HookRegistry.register("sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__", _without_pinning, HookType.BEFORE)


def _without_pinning(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pinning goes through the CUDA runtime, which a CPU build of torch does not have."""
    return args, {**kwargs, "pin_memory": False}

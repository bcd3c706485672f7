"""The entry point: installs the stand-ins in SGLang, and prevents host pools from pinning memory."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable
from typing import Any

#: Constructors of host pools that pin memory; some do not call a base class's.
PINNING = (
    "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__",
    "sglang.srt.mem_cache.pool_host.mamba.MambaPoolHost.__init__",
    "sglang.srt.mem_cache.pool_host.dsa.DSAIndexerPoolHost.__init__",
)


def register() -> None:
    """Called by SGLang in each process before it builds anything; does nothing without the CPU engine."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_cpu import allocator, copies, linear_attention, models

    for function in linear_attention.OPERATORS:
        if not hasattr(torch.ops.sgl_kernel, function.__name__):
            setattr(torch.ops.sgl_kernel, function.__name__, function)
    # These modules import the names only on CUDA, so HookRegistry has no attribute to replace.
    for name in copies.MODULES:
        # SGLang's versions differ; unknown names are ignored.
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            for function_name, copy in copies.FUNCTIONS.items():
                setattr(module, function_name, copy)
    for target in PINNING:
        if _exists(target):
            HookRegistry.register(target, _without_pinning, HookType.AROUND)
    for target, hook in models.AROUND.items():
        if _exists(target):
            HookRegistry.register(target, hook, HookType.AROUND)
    models.register_latent_attention()
    models.register_padding()
    allocator.register()


def _exists(target: str) -> bool:
    """Whether this version of SGLang has it; HookRegistry would log a traceback for a missing target."""
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def _without_pinning(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Build a host pool in plain memory: pinning goes through the CUDA runtime, which a CPU build of torch lacks."""
    # Up to 0.5.21 subclasses pass the argument by position.
    given = inspect.signature(original).bind(*args, **kwargs)
    given.arguments["pin_memory"] = False
    return original(*given.args, **given.kwargs)

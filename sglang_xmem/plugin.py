"""The entry point for SGLang, `sglang.srt.plugins`. Imports only the standard library.

SGLang calls `register` in every process that it starts, with or without the flag. SGLang only logs an exception here,
and would serve from DRAM. So if the user requests a tier, a failure ends the process instead.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


def register() -> None:
    """Add the flags to SGLang. HiCache itself is patched later, and only in engines with the flag on."""
    try:
        importlib.import_module("sglang_xmem.engines.sglang").install()
    except Exception as error:
        message = f"--hicache-use-xmem is unavailable: {error}"
        if any(arg.startswith(("--hicache-use-xmem", "--hicache-xmem-")) for arg in sys.argv[1:]):
            sys.stderr.write(f"sglang_xmem: {message}\n")
            raise SystemExit(2) from None
        logger.warning("sglang_xmem: %s", message)
        _guard_engine(message)


def _guard_engine(message: str) -> None:
    """Make `sgl.Engine(hicache_use_xmem=True)` fail with `message` if the keyword is unavailable.

    Uses `server_args_class`, which an engine's `__init__` reads after it has loaded plugins.
    """
    try:
        engine = importlib.import_module("sglang.srt.entrypoints.engine").Engine
        original = engine.server_args_class
    except Exception:  # nothing to guard: this SGLang has no such engine, or cannot be imported
        return
    engine.server_args_class = _Guard(original, message)


class _Guard:
    """Refuses this package's keywords, and forwards all others. An object, because a function would be bound to the
    engine."""

    def __init__(self, original: Any, message: str) -> None:
        self.original = original
        self.message = message

    def __call__(self, **kwargs: Any) -> Any:
        if kwargs.get("hicache_use_xmem"):
            raise RuntimeError(f"sglang_xmem: {self.message}")
        for name in ("hicache_use_xmem", "hicache_xmem_tier", "hicache_xmem_config"):
            kwargs.pop(name, None)
        return self.original(**kwargs)

"""SGLang's way in: the `sglang.srt.plugins` entry point. Imports the standard library alone.

SGLang calls `register` in every process it starts, with or without the flag. An exception here would only be logged,
and SGLang would serve from DRAM; so where the user asked for a tier, a failure ends the process instead.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


def register() -> None:
    """Add the flags to SGLang. HiCache itself is patched later, and only in an engine that has the flag on."""
    try:
        importlib.import_module("sglang_xmem.engines.sglang").install()
    except Exception as error:
        message = f"--hicache-use-xmem cannot be offered: {error}"
        if any(arg.startswith(("--hicache-use-xmem", "--hicache-xmem-")) for arg in sys.argv[1:]):
            sys.stderr.write(f"sglang_xmem: {message}\n")
            raise SystemExit(2) from None
        logger.warning("sglang_xmem: %s", message)
        _guard_engine(message)


def _guard_engine(message: str) -> None:
    """Make `sgl.Engine(hicache_use_xmem=True)` fail with `message` where the keyword cannot be offered.

    Through `server_args_class`, which an engine reads after it has loaded plugins; its `__init__` is running by then.
    """
    try:
        engine = importlib.import_module("sglang.srt.entrypoints.engine").Engine
        original = engine.server_args_class
    except Exception:  # nothing to guard: this SGLang has no such engine, or does not import
        return
    engine.server_args_class = _Guard(original, message)


class _Guard:
    """Refuses this package's keywords, and passes all others on. An object: a function would be bound to the engine."""

    def __init__(self, original: Any, message: str) -> None:
        self.original = original
        self.message = message

    def __call__(self, **kwargs: Any) -> Any:
        if kwargs.get("hicache_use_xmem"):
            raise RuntimeError(f"sglang_xmem: {self.message}")
        for name in ("hicache_use_xmem", "hicache_xmem_tier", "hicache_xmem_config"):
            kwargs.pop(name, None)
        return self.original(**kwargs)

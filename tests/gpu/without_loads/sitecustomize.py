"""On PYTHONPATH, every load from the tier is left out: the negative control of test_engines_gpu.py."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


def _leave_out_loads(pool: ModuleType) -> None:
    def nothing(self: Any, *arguments: Any) -> None: ...

    pool.TierPool.load_layers = pool.TierPool.load_layer = nothing
    pool.TierPool.take_signals = nothing


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "sglang_xmem.pool":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            _leave_out_loads(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())

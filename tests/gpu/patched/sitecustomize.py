"""On PYTHONPATH, changes a module of sglang_xmem as SGLANG_XMEM_TEST_PATCH says, for test_engines_gpu.py.

`without_loads`: every load from the tier is left out, the negative control. `always_staged`: loads go through the
staging ring however small they are, and say so on stderr.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any


def _leave_out_loads(pool: Any) -> None:
    def nothing(self: Any, *arguments: Any) -> None: ...

    pool.TierPool.load_layers = pool.TierPool.load_layer = nothing
    pool.TierPool.take_signals = nothing


def _always_stage(staged: Any) -> None:
    staged.MIN_LAYER_BYTES = staged.MIN_RUN_BYTES = 1
    load = staged.StagedCopier._load

    def load_and_say(self: Any, chunks: Any, *arguments: Any) -> Any:
        print(f"a staged load of {len(chunks)} chunks a layer", file=sys.stderr, flush=True)
        return load(self, chunks, *arguments)

    staged.StagedCopier._load = load_and_say


_PATCHES = {
    "without_loads": ("sglang_xmem.pool", _leave_out_loads),
    "always_staged": ("sglang_xmem.copies.staged", _always_stage),
}
_MODULE, _PATCH = _PATCHES[os.environ["SGLANG_XMEM_TEST_PATCH"]]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            _PATCH(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())

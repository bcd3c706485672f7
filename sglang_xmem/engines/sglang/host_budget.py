"""The host RAM that a launcher of SGLang 0.5.23 gives its ranks' pools, without importing SGLang.

SGLang's rule (the process's cgroup limits, then the machine's memory) is in one file that needs only psutil. Its
package imports torch and more, which takes 10 s, too long for `sglang-xmem doctor`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from sglang_xmem.machine import HOST_RESERVE_BYTES
from sglang_xmem.plan import HostBudget

_MODULE = "sglang.srt.mem_cache.host_memory"
_NAME = "available_host_memory_bytes"


def launcher_host_budget(n_ranks: int) -> HostBudget:
    """Return the host RAM that each of a launcher's `n_ranks` on this machine may claim."""
    available_bytes = _available_host_memory_bytes()
    return lambda nbytes: (available_bytes() - HOST_RESERVE_BYTES) // n_ranks


def _available_host_memory_bytes() -> Callable[[], int]:
    """Return SGLang's function, from its module if that is imported, otherwise from its file."""
    loaded = sys.modules.get(_MODULE)
    found: Callable[..., int] = getattr(loaded, _NAME) if loaded is not None else _from_file()
    # Used only for explicit sizes, for which SGLang too continues if it finds no cgroup of this process.
    return functools.partial(found, allow_cgroup_fallback=True)


@functools.cache
def _from_file() -> Callable[..., int]:
    package = importlib.util.find_spec("sglang")  # imports nothing
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("SGLang is not installed", name="sglang")
    path = Path(package.submodule_search_locations[0], *_MODULE.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location("sglang_xmem._sglang_host_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., int] = getattr(module, _NAME)
    return found

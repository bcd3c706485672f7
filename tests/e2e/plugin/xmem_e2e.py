"""A plugin of SGLang for the end-to-end tests: says what loads move, leaves pools out of them, and delays copies.

This directory on PYTHONPATH is enough for SGLang to find it, beside whatever else is installed; `harness` puts it
there. Without the variables below it does nothing. It knows SGLang and the copier contract, and no adapter: it acts on
instances of SGLang's transfer engine, in front of whatever has replaced that class's methods.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: File with the names of pools (kv, swa, mamba, draft) whose loads are left out, with commas between. It is read at
#: each load, so a test may change it while the engine runs. Where the variable is set, each load is logged too.
LEAVE_OUT = "SGLANG_XMEM_TEST_LEAVE_OUT"
#: With 1, copies of loads are delayed until somebody waits for them, and their destinations are poisoned before.
LAZY = "SGLANG_XMEM_TEST_LAZY"

#: Names of host pools as SGLang's group has them, by id; pools live as long as their engine.
_names: dict[int, str] = {}


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if LEAVE_OUT in os.environ:
        group = "sglang.srt.mem_cache.pool_host.group.HostPoolGroup"
        HookRegistry.register(f"{group}.__init__", _group_made, HookType.AFTER)
        HookRegistry.register(f"{group}.add_entry", _entry_added, HookType.AFTER)
        engine = "sglang.srt.mem_cache.l2_transfer.L2TransferEngine"
        HookRegistry.register(f"{engine}.__init__", _engine_made, HookType.AFTER)
    if os.environ.get(LAZY) == "1":
        import torch

        HookRegistry.register("sglang_xmem.copies.make_copier", _lazy_copier, HookType.AROUND)
        HookRegistry.register("sglang_xmem.copies.make_program", _lazy_program, HookType.AROUND)
        # What the CPU has for events: always complete. Whoever asks wants the load to be.
        for name in ("query", "synchronize"):
            setattr(torch.cpu.Event, name, _finishing(getattr(torch.cpu.Event, name)))


def _group_made(result: Any, group: Any, entries: Any, *args: Any, **kwargs: Any) -> None:
    for entry in entries:
        _entry_added(None, group, entry)


def _entry_added(result: Any, group: Any, entry: Any) -> None:
    _names[id(entry.host_pool)] = entry.name.value


def _engine_made(result: Any, engine: Any, *args: Any, **kwargs: Any) -> None:
    # Bound here and now: what adapters have made of the method is behind it, whatever the order of plugins.
    submit = engine.submit_host_to_device

    def without_some(transfers: list[Any], **kwargs: Any) -> Any:
        left_out = _left_out()
        kept = [transfer for transfer in transfers if _name(transfer) not in left_out]
        moved = " ".join(f"{_name(transfer)}={transfer.host_indices.numel()}" for transfer in transfers)
        _say(f"load {moved}; left out: {len(transfers) - len(kept)}")
        return submit(kept, **kwargs)

    engine.submit_host_to_device = without_some


def _name(transfer: Any) -> str:
    name = _names.get(id(transfer.host_pool), "?")
    return f"{name}+draft" if transfer.is_draft else name


def _left_out() -> set[str]:
    try:
        return set(Path(os.environ[LEAVE_OUT]).read_text().strip().split(","))
    except FileNotFoundError:
        return set()


def _say(what: str) -> None:
    print(f"xmem_e2e: {what}", flush=True)


# ---- the latest order that the copier contract allows ----


def _lazy() -> Any:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "fakes"))
    try:
        import lazy
    finally:
        sys.path.pop()
    return lazy


def _lazy_copier(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    copier, reason = original(*args, **kwargs)
    lazy = _lazy()
    return copier if isinstance(copier, lazy.LazyCopier) else lazy.LazyCopier(copier, report=_say), reason


def _lazy_program(
    original: Callable[..., Any], name: Any, slabs: Any, device: Any, steps: Any, num_parts: int, **kwargs: Any
) -> Any:
    copier, _, reason = original(name, slabs, device, steps, num_parts, **kwargs)
    copier, _ = _lazy_copier(lambda: (copier, reason))
    return copier, copier.compile(steps, num_parts), reason


def _finishing(original: Callable[..., Any]) -> Callable[..., Any]:
    def finished(*args: Any, **kwargs: Any) -> Any:
        _lazy().finish_all()
        return original(*args, **kwargs)

    return finished

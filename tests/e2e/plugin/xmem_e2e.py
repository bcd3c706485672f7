"""A plugin of SGLang for the end-to-end tests: checks what loads move, leaves pools out of them, and delays copies.

SGLang finds it if this directory is on PYTHONPATH, in addition to installed plugins; `harness` puts it there. Without
the variables below it does nothing. It knows SGLang and the copier contract, and no adapter: it acts on instances of
SGLang's transfer engine, in front of whatever has replaced that class's methods.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: File with the names of pools (kv, swa, mamba, draft) whose loads are left out, with commas between. It is read at
#: each load, so a test may change it while the engine runs. Where the variable is set, each load is logged and checked
#: too; empty, nothing is hooked, for what is timed.
LEAVE_OUT = "SGLANG_XMEM_TEST_LEAVE_OUT"
#: With 1, copies of loads are delayed until something waits for them, and their destinations are poisoned before.
LAZY = "SGLANG_XMEM_TEST_LAZY"
#: File with the name of a fault (tests/fakes/faults.py), read at each copy.
FAULT = "SGLANG_XMEM_TEST_FAULT"
#: How many allocations tiers make before they have no memory any more.
ALLOCATIONS = "SGLANG_XMEM_TEST_ALLOCATIONS"
#: Folder that describes, as sysfs does, a file which is a devdax here (tests/unit/tiers/fake_dax.py).
DAX_ROOT = "SGLANG_XMEM_TEST_DAX_ROOT"

#: Entries of SGLang's group of host pools, by id of the host pool; those live as long as their engine.
_entries: dict[int, Any] = {}
#: What a row (of all layers) of a device pool held when it was stored, by host pool, device pool and host index.
_stored: dict[tuple[int, int], dict[int, bytes]] = {}


def register() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if os.environ.get(LEAVE_OUT):
        group = "sglang.srt.mem_cache.pool_host.group.HostPoolGroup"
        HookRegistry.register(f"{group}.__init__", _group_made, HookType.AFTER)
        HookRegistry.register(f"{group}.add_entry", _entry_added, HookType.AFTER)
        engine = "sglang.srt.mem_cache.l2_transfer.L2TransferEngine"
        HookRegistry.register(f"{engine}.__init__", _engine_made, HookType.AFTER)
    if os.environ.get(FAULT):
        HookRegistry.register("sglang_xmem.copies.make_program", _faulty_program, HookType.AROUND)
    if os.environ.get(ALLOCATIONS):
        HookRegistry.register("sglang_xmem.plan.Placement._allocate", _faulty_tier, HookType.AROUND)
    if os.environ.get(DAX_ROOT):
        from sglang_xmem.tiers import dax

        root = dax.StandIn(Path(os.environ[DAX_ROOT]))
        find = dax._open
        dax._open = lambda path, stand_in: find(path, root)
    if os.environ.get(LAZY) == "1":
        import torch

        from sglang_xmem import canary

        canary.PERIOD_S = float("inf")  # nothing would wait for its copies
        HookRegistry.register("sglang_xmem.copies.make_copier", _lazy_copier, HookType.AROUND)
        HookRegistry.register("sglang_xmem.copies.make_program", _lazy_program, HookType.AROUND)
        # The CPU's events are always complete, so a query completes the load.
        for name in ("query", "synchronize"):
            setattr(torch.cpu.Event, name, _finishing(getattr(torch.cpu.Event, name)))


def _group_made(result: Any, group: Any, entries: Any, *args: Any, **kwargs: Any) -> None:
    for entry in entries:
        _entry_added(None, group, entry)


def _entry_added(result: Any, group: Any, entry: Any) -> None:
    _entries[id(entry.host_pool)] = entry


def _engine_made(result: Any, engine: Any, *args: Any, **kwargs: Any) -> None:
    # Bound here and now: what adapters have made of the methods is behind these, whatever the order of plugins.
    submit_load, submit_store = engine.submit_host_to_device, engine.submit_device_to_host

    def load(transfers: list[Any], **kwargs: Any) -> Any:
        left_out = _left_out()
        kept = [transfer for transfer in transfers if _name(transfer) not in left_out]
        done = submit_load(kept, **kwargs)
        moved = " ".join(f"{_name(transfer)}={transfer.host_indices.numel()}" for transfer in transfers)
        # A lazy load has not written yet, and its reader may change a state once it has. A GPU's is still in flight.
        unchecked = os.environ.get(LAZY) == "1" or _on_gpu()
        wrong = "" if unchecked else " ".join(f"{_name(one)}={_wrong(one)}" for one in transfers)
        _say(f"load {moved}; wrong {wrong}; left out {len(transfers) - len(kept)}")
        return done

    def store(transfers: list[Any], **kwargs: Any) -> Any:
        for transfer in () if _on_gpu() else transfers:
            _record(transfer)
        return submit_store(transfers, **kwargs)

    engine.submit_host_to_device, engine.submit_device_to_host = load, store


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _name(transfer: Any) -> str:
    entry = _entries.get(id(transfer.host_pool))
    name = "?" if entry is None else entry.name.value
    return f"{name}+draft" if transfer.is_draft else name


def _left_out() -> set[str]:
    try:
        return set(Path(os.environ[LEAVE_OUT]).read_text().strip().split(","))
    except FileNotFoundError:
        return set()


def _rows(transfer: Any, device_pool: Any) -> dict[int, bytes]:
    """A digest of each row, of all tensors that the device pool has, read without any address computation.

    A row is a token, a state, or the page of an indexer; it goes by its index in the host pool.
    """
    import torch

    host, device = transfer.host_indices.long(), transfer.device_indices.long()
    if _name(transfer) == "indexer":
        tensors = list(device_pool.index_k_with_scale_buffer)
        page = transfer.host_pool.page_size
        host, device = host[::page] // page, device[::page] // page
    elif hasattr(device_pool, "mamba_cache"):
        cache = device_pool.mamba_cache
        tensors = [layer for state in (cache.temporal, *cache.conv) for layer in state]
    elif hasattr(device_pool, "k_buffer"):
        tensors = [*device_pool.k_buffer, *device_pool.v_buffer]
    else:
        tensors = list(device_pool.kv_buffer)
    rows = [tensor[device].contiguous().view(torch.uint8).reshape(len(device), -1) for tensor in tensors]
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in torch.cat(rows, 1).numpy()]
    return dict(zip(host.tolist(), digests, strict=True))


def _record(transfer: Any) -> None:
    entry = _entries.get(id(transfer.host_pool))
    # Drafts that are packed with the target are no transfers of their own.
    for device_pool in (transfer.device_pool, *getattr(entry, "packed_draft_device_pools", ())):
        held = _stored.setdefault((id(transfer.host_pool), id(device_pool)), {})
        held.update(_rows(transfer, device_pool))


def _wrong(transfer: Any) -> int:
    """Rows that do not hold what was stored; those that were not stored from a device pool do not count."""
    held = _stored.get((id(transfer.host_pool), id(transfer.device_pool)), {})
    return sum(held.get(index, row) != row for index, row in _rows(transfer, transfer.device_pool).items())


def _say(what: str) -> None:
    print(f"xmem_e2e: {what}", flush=True)


# ---- the latest order that the copier contract allows ----


def _fake(name: str) -> Any:
    return importlib.import_module(f"tests.fakes.{name}")


def _lazy() -> Any:
    return _fake("lazy")


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


def _faulty_program(
    original: Callable[..., Any], name: Any, slabs: Any, device: Any, steps: Any, num_parts: int, **kwargs: Any
) -> Any:
    copier, _, reason = original(name, slabs, device, steps, num_parts, **kwargs)
    faulty = _fake("faults").FaultyCopier(copier, _fault, report=lambda fault: _say(f"fault: {fault}"))
    return faulty, faulty.compile(steps, num_parts), reason


def _faulty_tier(original: Callable[..., Any], placement: Any, tier: Any, *args: Any) -> Any:
    return original(placement, _fake("faults").FaultyTier(tier, int(os.environ[ALLOCATIONS])), *args)


def _fault() -> str:
    try:
        return Path(os.environ[FAULT]).read_text().strip()
    except FileNotFoundError:
        return ""


def _finishing(original: Callable[..., Any]) -> Callable[..., Any]:
    def finished(*args: Any, **kwargs: Any) -> Any:
        # The watch asks how long copies took, and waits for none.
        if threading.current_thread().name != "sglang_xmem-watch":
            _lazy().finish_all()
        return original(*args, **kwargs)

    return finished

"""Who moves the pages of a trip: SGLang's own host pools, or an adapter's."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Seam:
    """A way for pages to travel.

    Attributes:
        setup: a context manager for a whole test: what has to be in place before any pool of SGLang is built.
        attach: a context manager that `factories.make` enters around the assembly of HiCache.
        layouts: memory layouts that it is tried with; None means all that the kind has.
        refuses: kinds that it refuses, with a part of the sentence that it refuses them with.
    """

    name: str
    setup: Callable[[], AbstractContextManager[Any]]
    attach: Callable[[], AbstractContextManager[Any]] = nullcontext
    layouts: tuple[str, ...] | None = None
    refuses: tuple[tuple[str, str], ...] = ()


@contextmanager
def _stock() -> Iterator[None]:
    common = importlib.import_module("sglang.srt.mem_cache.pool_host.common")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_cuda_host_register", lambda *args, **kwargs: None)  # pinning needs the CUDA runtime
        yield


#: SGLang's own host pools over plain memory, with the copies of sglang_cpu.
STOCK = Seam("stock", _stock)


@contextmanager
def _xmem(tier: str = "dram") -> Iterator[Any]:
    """Place the adapter's hooks in this process, and begin a session on a tier.

    Yields:
        The session.
    """
    from sglang_xmem.engines.sglang import versions

    with placed(versions.current().scheduler_hooks), _xmem_session(tier) as session:
        yield session


@contextmanager
def _xmem_session(tier: str) -> Iterator[Any]:
    """Do what `scheduler.publish` does for one rank on the CPU, and end it: memory back, session gone."""
    from sglang_xmem import session
    from sglang_xmem.config import parse_options
    from sglang_xmem.plan import Placement, make_plan
    from sglang_xmem.session import Session
    from sglang_xmem.tiers import Ranks

    plan = make_plan(parse_options(tier), Ranks(gpus=(None,)), None, lambda nbytes: 1 << 40)
    active = Session(plan, Placement(plan, 0, lambda nbytes: 1 << 40), deadline_s=0)
    session.start(active)
    try:
        yield active
    finally:
        for arena in active.arenas:
            arena.close()
        session.start(None)


@pytest.fixture(scope="module", autouse=True)
def sglang() -> None:
    """Import SGLang once, with its plugins, as each of its processes does. Test modules import this fixture."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        pytest.skip("builds SGLang's pools on the CPU, which is for machines without a GPU")
    pytest.importorskip("sglang")
    from sglang.srt.plugins import load_plugins

    load_plugins()


#: The adapter, with its arena in tier `dram`.
XMEM = Seam("xmem", _xmem, layouts=("page_first",))


def xmem_in(tier: str) -> Seam:
    """The adapter, with its arena in a tier; `auto`: in the first that can hold it."""
    return Seam(f"xmem in {tier}", functools.partial(_xmem, tier), layouts=("page_first",))


SEAMS = {seam.name: seam for seam in (STOCK, XMEM)}


def available() -> list[Seam]:
    """The seams that this checkout has."""
    try:
        importlib.import_module("sglang_xmem.engines.sglang.scheduler")
    except ImportError:
        return [STOCK]
    return [STOCK, XMEM]


@contextmanager
def placed(hooks: Any) -> Iterator[None]:
    """Patch SGLang with an adapter's hooks, and take the patches out behind the test, copies of names included."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_xmem.engines.sglang import hooks as placing

    before = {hook.target: _attribute(hook.target) for hook in hooks}
    placing.place(hooks)
    wrappers = {hook.target: pkgutil.resolve_name(hook.target) for hook in hooks}
    try:
        yield
    finally:
        for target, (owner, name, original) in before.items():
            setattr(owner, name, original)
            if not isinstance(owner, type):  # others have imported it by name
                for module in list(sys.modules.values()):
                    if getattr(module, "__name__", "").startswith("sglang."):
                        for key, value in list(vars(module).items()):
                            if value is wrappers[target]:
                                setattr(module, key, original)
            placing._placed.discard(target)
            HookRegistry._patched.discard(target)


def _attribute(target: str) -> tuple[Any, str, Any]:
    """Owner, name and the attribute as it is stored, so that a static method stays one."""
    path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(path)
    return owner, name, vars(owner)[name]

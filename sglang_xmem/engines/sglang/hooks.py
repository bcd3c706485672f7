"""Place hooks in SGLang. A hook that cannot be placed is an error here; SGLang itself only logs it.

Other plugins' hooks on the same targets stay active: early hooks are registered with SGLang's registry, which applies
them after all plugins have loaded; later hooks wrap the function that is current then.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from sglang_xmem.errors import UnsupportedSGLang


class Hook(NamedTuple):
    """A function of SGLang to patch.

    Attributes:
        target: dotted path.
        parameters: names of the expected parameters, in order.
        kind: "after" (result, *args) or "around" (original, *args), as in SGLang's HookType.
        function: the hook, as `module:function`, so that tables of hooks are plain data.
        why: the hook's purpose; shown if it cannot be placed.
    """

    target: str
    parameters: tuple[str, ...]
    kind: str
    function: str
    why: str


def hooks_in(text: str) -> tuple[Hook, ...]:
    """Parse a table of hooks: `target(parameters)` lines, each followed by a line `kind module:function: why`.

    The module is one of this package's.
    """
    return tuple(
        Hook(target, tuple(re.split(r",\s*", parameters)), kind, f"{_PACKAGE}.{function}", why)
        for target, parameters, kind, function, why in _HOOK.findall(text)
    )


_HOOK = re.compile(r"(\S+)\(([^)]*)\)\s+(after|around) (\S+): (.+)")
#: Package of the hooks' functions.
_PACKAGE = __name__.rpartition(".")[0]

#: Module of a SGLang with one of `patches/`, whose functions call this package themselves.
SEAM = "sglang.srt.tier_seam"

#: Targets that this package has patched, or that SGLang's registry will patch.
_placed: set[str] = set()


def verify(hooks: Iterable[Hook]) -> None:
    """Raise UnsupportedSGLang unless every target exists with the expected parameters."""
    for hook in hooks:
        try:
            target = pkgutil.resolve_name(hook.target)
        except (ImportError, AttributeError) as error:
            raise UnsupportedSGLang(f"SGLang has no {hook.target}, needed to {hook.why} ({error})") from None
        found = tuple(inspect.signature(target).parameters)
        if found != hook.parameters:
            raise UnsupportedSGLang(
                f"{hook.target} takes ({', '.join(found)}) instead of ({', '.join(hook.parameters)}), "
                f"so sglang_xmem cannot {hook.why}"
            )


def verify_members(members: Iterable[str]) -> None:
    """Raise UnsupportedSGLang unless every dotted name can be resolved."""
    for member in members:
        try:
            pkgutil.resolve_name(member)
        except (ImportError, AttributeError) as error:
            raise UnsupportedSGLang(f"SGLang has no {member} ({error})") from None


def register(hooks: Iterable[Hook]) -> None:
    """Verify hooks, then register them with SGLang, which places them when all plugins are loaded.

    The registry silently skips a target that is already patched, so such a target is patched at once.

    Raises:
        UnsupportedSGLang: a target differs from the table.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = [hook for hook in hooks if hook.target not in _placed]
    verify(hooks)
    for hook in hooks:
        if hook.target in HookRegistry._patched or seam() is not None:
            _wrap(hook)
        else:
            HookRegistry.register(hook.target, pkgutil.resolve_name(hook.function), HookType(hook.kind))
        _placed.add(hook.target)


def place(hooks: Iterable[Hook]) -> None:
    """Verify hooks, then patch at once, around other plugins' hooks. Hooks that are already placed do not change.

    Raises:
        UnsupportedSGLang: a target differs from the table.
    """
    hooks = [hook for hook in hooks if hook.target not in _placed]
    verify(hooks)
    for hook in hooks:
        _wrap(hook)
        _placed.add(hook.target)


def seam() -> Any:
    """Return the module through which a SGLang with one of `patches/` calls this package; None for others."""
    try:
        return importlib.import_module(SEAM)
    except ImportError:
        return None


def _wrap(hook: Hook) -> None:
    function = pkgutil.resolve_name(hook.function)
    native = seam()
    if native is not None:
        pkgutil.resolve_name(hook.target)  # a function is known as a seam once its module is imported
        try:
            native.provide(hook.target, hook.kind, function)
        except LookupError as error:
            raise UnsupportedSGLang(f"{error}, needed to {hook.why}. Apply the patch of this SGLang version") from None
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry._apply_target(hook.target, [(HookType(hook.kind), function, None)])
    if not hasattr(pkgutil.resolve_name(hook.target), "__wrapped__"):
        raise UnsupportedSGLang(f"SGLang did not patch {hook.target}, needed to {hook.why}")

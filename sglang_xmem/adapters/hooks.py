"""Placing hooks in SGLang so that a hook that cannot be placed is an error, which SGLang by itself only logs."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_xmem.errors import UnsupportedSGLang


class Hook(NamedTuple):
    """A function of SGLang to patch.

    Attributes:
        target: dotted path.
        parameters: names of the parameters that the hook was written for, in order.
        kind: "after" (result, *args) or "around" (original, *args), as in SGLang's HookType.
        function: the hook.
        why: what the patch is for; shown where it cannot be placed.
    """

    target: str
    parameters: tuple[str, ...]
    kind: str
    function: Callable[..., Any]
    why: str


#: Targets that this package has patched.
_placed: set[str] = set()


def verify(hooks: tuple[Hook, ...]) -> None:
    """Raise UnsupportedSGLang unless every target is there with the expected parameters."""
    for hook in hooks:
        try:
            target = pkgutil.resolve_name(hook.target)
        except (ImportError, AttributeError) as error:
            raise UnsupportedSGLang(f"SGLang has no {hook.target}, needed to {hook.why} ({error})") from None
        found = tuple(inspect.signature(target).parameters)
        if found != hook.parameters:
            raise UnsupportedSGLang(
                f"{hook.target} takes ({', '.join(found)}) and not ({', '.join(hook.parameters)}), "
                f"so sglang_xmem cannot {hook.why}"
            )


def place(hooks: tuple[Hook, ...]) -> None:
    """Verify, then patch through SGLang's registry, then check that each patch is in. Placed hooks stay as they are.

    Raises:
        UnsupportedSGLang: a hook could not be placed.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    verify(hooks)
    placed = _placed & HookRegistry._patched
    new = [hook for hook in hooks if hook.target not in placed]
    for hook in new:
        # The registry patches a target once, and passes over what comes later without a word.
        if hook.target in HookRegistry._patched:
            raise UnsupportedSGLang(
                f"another plugin has patched {hook.target}, so sglang_xmem cannot {hook.why}; leave that plugin out "
                "(SGLANG_PLUGINS)"
            )
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
    HookRegistry.apply_hooks()
    for hook in hooks:
        if not hasattr(pkgutil.resolve_name(hook.target), "__wrapped__"):
            raise UnsupportedSGLang(f"SGLang did not patch {hook.target}, needed to {hook.why}")
    _placed.update(hook.target for hook in new)

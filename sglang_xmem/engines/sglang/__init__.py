"""SGLang: its flags, and HiCache's pools in a tier.

`install` runs in every process, with or without the flag. All other hooks are placed only in processes of engines with
the flag on (`launcher`, `scheduler`), by the table of the installed version (`versions`).
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys

from sglang_xmem.engines.sglang import versions
from sglang_xmem.engines.sglang.flags import ServerArgsFactory
from sglang_xmem.engines.sglang.hooks import register


def install() -> None:
    """Place the hooks that carry the options.

    Raises:
        UnsupportedSGLang: this SGLang has no table, or differs from its table.
    """
    register(versions.current().flag_hooks)
    engine = "sglang.srt.entrypoints.engine"
    if engine in sys.modules or multiprocessing.parent_process() is None:  # an engine's child otherwise: keep it light
        engine_class = importlib.import_module(engine).Engine
        if not isinstance(engine_class.server_args_class, ServerArgsFactory):
            engine_class.server_args_class = ServerArgsFactory(engine_class.server_args_class)

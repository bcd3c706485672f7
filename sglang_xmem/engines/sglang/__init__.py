"""SGLang: its flags, and HiCache's pools in a tier.

`install` runs in every process, with or without the flag. Everything else is placed in processes of engines that have
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
    """Patch what carries the options.

    Raises:
        UnsupportedSGLang: this SGLang has no table, or is not as its table says.
    """
    register(versions.current().flag_hooks)
    engine = "sglang.srt.entrypoints.engine"
    if engine in sys.modules or multiprocessing.parent_process() is None:  # else an engine's child: keep it light
        engine_class = importlib.import_module(engine).Engine
        if not isinstance(engine_class.server_args_class, ServerArgsFactory):
            engine_class.server_args_class = ServerArgsFactory(engine_class.server_args_class)

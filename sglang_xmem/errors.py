"""Errors of sglang_xmem. Each message is one sentence that names the option, its value and the way out."""

from __future__ import annotations

import sys
from typing import NoReturn

#: Exit status of a scheduler that refused to start, so that the launcher can tell it from a crash
#: (EX_CONFIG of sysexits.h).
REFUSED_EXIT_STATUS = 78


class ConfigError(ValueError):
    """A user's mistake in a flag, a keyword or the configuration; raised before anything is allocated."""


class TierUnavailable(Exception):
    """This machine cannot provide a tier, or not now; the message is a clause that says why.

    `auto` passes the tier over and tells this reason; an explicit choice turns it into a ConfigError.
    """


class CopyError(RuntimeError):
    """A page copy could not be prepared or enqueued."""


class UnsupportedSGLang(RuntimeError):
    """The installed SGLang is not one that this package can patch."""


def refuse(message: str) -> NoReturn:
    """End this process with `message` alone on stderr and status REFUSED_EXIT_STATUS.

    SystemExit passes through SGLang's `except Exception` handlers, which would print a traceback or go on.
    """
    sys.stderr.write(f"sglang_xmem: {message}\n")
    sys.stderr.flush()
    raise SystemExit(REFUSED_EXIT_STATUS)

"""The folder of what is compiled here and run later: kernels and mtierd. It is the user's own.

Whoever can put a file there has it run by the user, so folders and files are looked at before they are used. Imports
the standard library alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

CACHE_VARIABLE = "SGLANG_XMEM_CACHE_DIR"


class CacheError(RuntimeError):
    """The cache cannot be used; the message is one clause of a problem and one of a fix, without a full stop."""


def cache_dir() -> Path:
    """Make the cache folder if it is not there, for this user alone.

    Returns:
        $SGLANG_XMEM_CACHE_DIR, or sglang_xmem in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        CacheError: there is no such place, or somebody else can write there.
    """
    path = _place()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"{path} cannot be made ({error.strerror}); name a folder that can be written in {CACHE_VARIABLE}"
        ) from None
    if not is_own(path) or any(_is_open(parent) for parent in path.parents):
        raise CacheError(
            f"others can write to {path}, and what lies there is run; name a folder of your own in {CACHE_VARIABLE}, "
            "or take their rights with chmod go-w"
        )
    return path


def is_own(path: str | Path) -> bool:
    """Whether a file or folder, no link, is this user's or root's and nobody else may write to it."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return _is_own(status) and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


def read_own(path: Path) -> bytes | None:
    """Content of a regular file that passes `is_own`; None where there is none."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            return file.read() if stat.S_ISREG(status.st_mode) and _is_own(status) else None
    except OSError:
        return None


def _place() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        path = Path(chosen)
        if not path.is_absolute():
            raise CacheError(f"{CACHE_VARIABLE} is {chosen!r}, which is no absolute path; give one from /")
        return path
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))  # to be ignored where it is relative, says its specification
    if not shared.is_absolute():
        home = Path(os.path.expanduser("~"))
        if not home.is_absolute():
            raise CacheError(f"this user has no home folder; name a folder of your own in {CACHE_VARIABLE}")
        shared = home / ".cache"
    return shared / "sglang_xmem"


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0) and status.st_mode & 0o022 == 0


def _is_open(folder: Path) -> bool:
    """Whether anybody can put another folder in the place of one in `folder`."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX

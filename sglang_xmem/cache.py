"""The user's folder of compiled code: kernels and mtierd.

Anyone who can write there can run code as the user, so owners and permissions are checked before use. Imports only the
standard library.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

CACHE_VARIABLE = "SGLANG_XMEM_CACHE_DIR"


class CacheError(RuntimeError):
    """The cache cannot be used; the message is `problem; fix` without a full stop."""


def cache_dir() -> Path:
    """Create the cache folder if it does not exist, only for this user.

    Returns:
        $SGLANG_XMEM_CACHE_DIR, or sglang_xmem in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        CacheError: no folder is usable, or others can write there.
    """
    path = _place()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"{path} cannot be created ({error.strerror}); set {CACHE_VARIABLE} to a writable folder"
        ) from None
    if not is_own(path) or any(_is_open(parent) for parent in path.parents):
        raise CacheError(
            f"others can write to {path}, whose files are executed; run chmod go-w on it, or set {CACHE_VARIABLE} to a "
            "folder of your own"
        )
    return path


def is_own(path: str | Path) -> bool:
    """Whether a file or folder (not a link) belongs to this user or root, and only the owner may write to it."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return _is_own(status) and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))


def read_own(path: Path) -> bytes | None:
    """Read a regular file that passes `is_own`; None if there is none."""
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
            raise CacheError(f"{CACHE_VARIABLE} is {chosen!r}; set an absolute path")
        return path
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))  # its specification says to ignore a relative path
    if not shared.is_absolute():
        home = Path(os.path.expanduser("~"))
        if not home.is_absolute():
            raise CacheError(f"this user has no home folder; set {CACHE_VARIABLE} to a folder of your own")
        shared = home / ".cache"
    return shared / "sglang_xmem"


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0) and status.st_mode & 0o022 == 0


def _is_open(folder: Path) -> bool:
    """Whether others can replace a folder in `folder`."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX

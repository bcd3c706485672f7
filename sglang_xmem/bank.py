"""A session with mtierd's page bank: frames that this process claims, and pages that it finds, adopts and publishes.

Claims, adoptions and releases are atomic operations on a ledger that the service and all engines of a space map, so
they never wait for the service and go on without it (`mtier/native/pages.h`). Only `find` and `publish` ask it; their
callers are storage threads. A service that is gone, or does not answer in time, is a miss.

Imports neither torch nor CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import secrets
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_xmem.errors import Unavailable
from sglang_xmem.mtier.build import PAGES, BuildError, built
from sglang_xmem.mtier.client import (
    FIND,
    HOST,
    JOIN,
    LEAVE,
    PUBLISH,
    SLAB,
    Connection,
    Refused,
    Silent,
    socket_path,
    unavailable,
)
from sglang_xmem.tiers import hostmem

logger = logging.getLogger(__name__)

# native/pages_protocol.h
_PAGES_VERSION = 2
#: Its JoinRequest.
JOIN_REQUEST = struct.Struct("=IIQQ32s64sQII")
#: Pages of one message.
MAX_PAGES = 256
KEY_BYTES = 32

Frames = npt.NDArray[np.uint64]
_PLACE = np.dtype([("frame", "u8"), ("generation", "u8")])
_PUBLICATION = np.dtype([("key", "S32"), ("frame", "u8"), ("generation", "u8")])
#: Verdicts of a publication.
NEW, HAVE, STALE = range(3)


class BankSession:
    """Frames of one space, shared with all sessions of the same identity, in a slab that is mapped here.

    Frames are named by their addresses. The functions for pages may be called from any thread; after `close` they
    find, claim and publish nothing.

    Args:
        identity: 32 bytes, equal for all whose pages are equal; None: a space of this session alone.
        frame_bytes: of a frame.
        frames: that the session holds at most at one time, however many pages name them.
        label: for people.

    Raises:
        Unavailable: no service answers, or it has no memory for so many frames.
    """

    def __init__(self, identity: bytes | None, frame_bytes: int, frames: int, label: str = "") -> None:
        assert identity is None or len(identity) == KEY_BYTES
        self.frame_bytes = frame_bytes
        #: Events by name; a process may put its own counter in its place.
        self.counts: Counter[str] = Counter()
        self._gate = threading.Lock()  # storage threads may still run when the session is closed
        self._handle: int | None = None
        try:
            self._library = _library()
        except (BuildError, OSError) as error:
            raise Unavailable(str(error).rstrip(".")) from None
        asked = JOIN_REQUEST.pack(
            _PAGES_VERSION,
            identity is None,
            frame_bytes,
            frames,
            identity or b"",
            label.encode("ascii", "replace")[:63],
            secrets.randbits(64) | 1,
            HOST,
            0,
        )
        try:
            self._connection = Connection(socket_path())
            try:
                joined = self._connection.ask(JOIN, behind=asked)
                self.frames = joined.total
                try:
                    self._handle = self._library.pages_open(joined.fd, joined.total, joined.num_banks)
                finally:
                    os.close(joined.fd)
                slab = self._connection.ask(SLAB)
                try:
                    self.slab = hostmem.map_file(slab.fd, 0, slab.size)
                finally:
                    os.close(slab.fd)
            except BaseException:
                self.close()
                raise
        except (Refused, Silent) as error:
            raise unavailable(error) from None
        except OSError as error:
            raise Unavailable(f"the bank's memory cannot be mapped ({error.strerror})") from None
        if not self._handle:
            self.close()
            raise Unavailable("the bank's ledger cannot be mapped")
        self._said = False

    # ---- without the service ----

    def claim(self, count: int) -> npt.NDArray[np.int64]:
        """Addresses of `count` empty frames.

        Raises:
            RuntimeError: there are fewer, which the sum of all sessions' `frames` rules out; or the session is closed.
        """
        out = np.empty(count, np.uint64)
        with self._gate:
            if not self._handle or not self._library.pages_claim(self._handle, count, out.ctypes.data):
                raise RuntimeError(f"sglang_xmem: the bank has no {count} frames left for this engine; report this")
        return self._addresses(out)

    def release(self, addresses: npt.NDArray[np.int64]) -> None:
        """Give up frames, once for each page that held one."""
        frames = self._numbers(addresses)
        with self._gate:
            if self._handle:
                self._library.pages_release(self._handle, frames.size, frames.ctypes.data)

    def touch(self, addresses: npt.NDArray[np.int64]) -> None:
        """Note that frames are in use, first page first."""
        frames = self._numbers(addresses)
        with self._gate:
            if self._handle:
                self._library.pages_touch(self._handle, frames.size, frames.ctypes.data)

    def owned(self, addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which frames nobody else can have found, so that they may be written."""
        frames = self._numbers(addresses)
        out = np.zeros(frames.size, np.bool_)
        with self._gate:
            if self._handle:
                self._library.pages_owned(self._handle, frames.size, frames.ctypes.data, out.ctypes.data)
        return out

    def held(self) -> int:
        """How many pages of this process hold a frame."""
        with self._gate:
            return int(self._library.pages_held(self._handle)) if self._handle else 0

    def _addresses(self, frames: Frames) -> npt.NDArray[np.int64]:
        return frames.astype(np.int64) * self.frame_bytes + self.slab.address

    def _numbers(self, addresses: npt.NDArray[np.int64]) -> Frames:
        return np.ascontiguousarray((addresses - self.slab.address) // self.frame_bytes, dtype=np.uint64)

    # ---- with it ----

    def find(self, keys: Sequence[bytes]) -> int:
        """How many of the first keys' pages are there; 0 where nobody answers."""
        return int(self._find(keys).size)

    def adopt(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Hold the pages of the first keys, as many as are there.

        Returns: addresses of their frames, which `release` gives up.
        """
        places = self._find(keys)
        out = np.empty(places.size, np.uint64)
        names = b"".join(keys)
        with self._gate:
            if not self._handle or not places.size:
                return self._addresses(out[:0])
            got = self._library.pages_adopt(
                self._handle, places.size, places.ctypes.data, ctypes.c_char_p(names), out.ctypes.data
            )
        self.counts["bank:adopted"] += got
        return self._addresses(out[:got])

    def _find(self, keys: Sequence[bytes]) -> npt.NDArray[Any]:
        found = [np.empty(0, _PLACE)]
        for at in range(0, len(keys), MAX_PAGES):
            part = keys[at : at + MAX_PAGES]
            text = self._asked(FIND, len(part), b"".join(part))
            found.append(np.frombuffer(text or b"", _PLACE))
            if found[-1].size < len(part):
                break
        return np.concatenate(found)

    def publish(self, keys: Sequence[bytes], addresses: npt.NDArray[np.int64]) -> list[int]:
        """Let others find pages of this session whose bytes are in place.

        Returns: NEW, HAVE or STALE for each; STALE also where nobody answers.
        """
        frames = self._numbers(addresses)
        generations = np.empty_like(frames)
        with self._gate:
            if not self._handle:
                return [STALE] * len(keys)
            self._library.pages_generations(self._handle, frames.size, frames.ctypes.data, generations.ctypes.data)
        verdicts: list[int] = []
        for at in range(0, len(keys), MAX_PAGES):
            part = slice(at, at + MAX_PAGES)
            pages = np.empty(len(keys[part]), _PUBLICATION)
            # numpy's S type would strip zeros at the end of a key.
            pages.view(np.uint8).reshape(len(pages), -1)[:, :KEY_BYTES] = np.frombuffer(
                b"".join(keys[part]), np.uint8
            ).reshape(-1, KEY_BYTES)
            pages["frame"], pages["generation"] = frames[part], generations[part]
            verdicts += self._asked(PUBLISH, len(pages), pages.tobytes()) or bytes([STALE]) * len(pages)
        for name, verdict in (("published", NEW), ("duplicate", HAVE), ("private", STALE)):
            self.counts[f"bank:{name}"] += verdicts.count(verdict)
        return verdicts

    def _asked(self, op: int, count: int, behind: bytes) -> bytes | None:
        """The reply's text; None where there is none. Says so once in a row."""
        try:
            text = self._connection.ask(op, count, behind).text
        except (Refused, Silent) as error:
            self.counts["bank_questions:unanswered"] += 1
            if not self._said:
                lasting = "" if self._connection.alive else " Restart this engine to share pages again."
                logger.warning("sglang_xmem: pages of the bank are missed, for %s.%s", error, lasting)
            self._said = True
            return None
        if self._said:
            logger.warning("sglang_xmem: the page bank answers again")
        self._said = False
        return text

    @property
    def alive(self) -> bool:
        """Whether the service had not hung up when it was last asked."""
        return self._connection.alive

    def close(self) -> None:
        """Give up all frames; idempotent. No copy to or from them may be under way."""
        with self._gate:
            handle, self._handle = self._handle, None
            if handle:
                self._library.pages_close(handle)
        with contextlib.suppress(Refused, Silent):  # else it takes all back when this process ends
            self._connection.ask(LEAVE)
        self._connection.close()
        slab = getattr(self, "slab", None)
        if slab is not None:
            slab.close()


@functools.cache
def _library() -> Any:
    """libpages.so.

    Raises:
        BuildError, OSError: it cannot be made or loaded.
    """
    library = ctypes.CDLL(str(Path(built()) / PAGES))
    handle, number, pointer = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p
    for name, result, arguments in (
        ("pages_open", handle, (ctypes.c_int, number, ctypes.c_int)),
        ("pages_close", None, (handle,)),
        ("pages_claim", ctypes.c_int, (handle, number, pointer)),
        ("pages_adopt", number, (handle, number, pointer, pointer, pointer)),
        ("pages_release", None, (handle, number, pointer)),
        ("pages_touch", None, (handle, number, pointer)),
        ("pages_owned", None, (handle, number, pointer, pointer)),
        ("pages_generations", None, (handle, number, pointer, pointer)),
        ("pages_held", number, (handle,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library

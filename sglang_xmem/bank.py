"""A session with mtierd's page bank: claims frames, and finds, adopts and publishes pages.

Claims, adoptions and releases are atomic operations on a ledger that the service and all engines of a space map, so
they never wait for the service and work without it (`mtier/native/pages.h`). Only `find` and `publish` query it, from
storage threads. If the service is gone or does not respond in time, the result is a miss.

Imports neither torch nor CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_xmem.bank_link import Link, Wanted
from sglang_xmem.errors import Unavailable
from sglang_xmem.mtier.build import PAGES, BuildError, built
from sglang_xmem.mtier.client import (
    DAMAGED,
    DAX,
    FIND,
    GPU,
    HOST,
    LOOK,
    PUBLISH,
    SLAB,
    Refused,
    Silent,
    unavailable,
)
from sglang_xmem.mtier.gpu_slab import GpuMapping
from sglang_xmem.tiers import hostmem

#: Maximum pages per message.
MAX_PAGES = 256
#: Maximum messages with published pages that wait for the service; each has at most 12 KiB.
MAX_LATER = 4096
KEY_BYTES = 32

Frames = npt.NDArray[np.uint64]
_PLACE = np.dtype([("frame", "u8"), ("generation", "u8")])
_PUBLICATION = np.dtype([("key", "S32"), ("frame", "u8"), ("generation", "u8")])
#: Results of a publication.
NEW, HAVE, STALE = range(3)


class BankSession:
    """Frames of one space in a mapped slab, shared with all sessions of the same identity.

    Addresses identify frames. All threads may call the functions for pages; after `close` they find, claim and publish
    nothing.

    Args:
        identity: 32 bytes, equal for sessions with equal pages; None: a private space.
        frame_bytes: of a frame.
        frames: maximum number of frames that the session holds, independent of the pages that use them.
        label: for reports.
        pool_bytes: bytes of all sessions with the engine's pages, including this one; 0: only this one.
        kind: HOST, GPU or DAX memory; GPU memory is mapped for the GPU of the calling thread's CUDA context.

    Raises:
        Unavailable: no service responds, it lacks memory for the frames, or the memory cannot be mapped.
    """

    def __init__(
        self,
        identity: bytes | None,
        frame_bytes: int,
        frames: int,
        label: str = "",
        pool_bytes: int = 0,
        *,
        kind: int = HOST,
    ) -> None:
        assert identity is None or len(identity) == KEY_BYTES
        self.frame_bytes = frame_bytes
        #: Events by name; a process may replace it by its own counter.
        self.counts: Counter[str] = Counter()
        self._gate = threading.Lock()  # storage threads may still run after the session is closed
        self._handle: int | None = None
        self._closed = False
        self._slab: hostmem.Mapping | GpuMapping | None = None
        try:
            self._library = _library()
        except (BuildError, OSError) as error:
            raise Unavailable(str(error).rstrip(".")) from None
        try:
            self._link = Link(Wanted(identity, frame_bytes, frames, label, pool_bytes, kind), self._count)
            try:
                self._open(kind)
            except BaseException:
                self.close()
                raise
        except (Refused, Silent) as error:
            raise unavailable(error) from None
        except OSError as error:
            raise Unavailable(f"the bank's memory cannot be mapped ({error.strerror})") from None

    def _count(self, event: str) -> None:
        self.counts[event] += 1

    def _open(self, kind: int) -> None:
        """Join, and map ledger and slab."""
        joined = self._link.join()
        files = [joined.fd]
        try:
            self.frames = joined.total
            self._handle = self._library.pages_open(
                joined.fd, joined.available, joined.total, joined.num_banks, joined.granularity
            )
            if not self._handle:
                raise Unavailable("the bank's ledger cannot be mapped")
            slab = self._link.ask(SLAB)
            files.insert(0, slab.fd)
            self._slab = (
                GpuMapping(self._library, slab.fd, slab.size, slab.granularity)
                if kind == GPU
                else hostmem.map_file(slab.fd, slab.available, slab.size)
            )
            # On a devdax an open file marks the bytes as in use, and they survive the service anyway.
            if kind != DAX:
                self._link.keep(files)
                files = []
        finally:
            for fd in files:
                os.close(fd)

    @property
    def slab(self) -> hostmem.Mapping | GpuMapping:
        """The memory that the frames are in."""
        assert self._slab is not None
        return self._slab

    # ---- without the service ----

    def claim(self, count: int) -> npt.NDArray[np.int64]:
        """Claim `count` empty frames; return their addresses.

        Raises:
            RuntimeError: too few are free, which the sum of all sessions' `frames` rules out; or the session is closed.
        """
        out = np.empty(count, np.uint64)
        with self._gate:
            if not self._handle or not self._library.pages_claim(self._handle, count, out.ctypes.data):
                raise RuntimeError(
                    f"sglang_xmem: the bank has no {count} free frames for this engine; report this error"
                )
        return self._addresses(out)

    def release(self, addresses: npt.NDArray[np.int64]) -> None:
        """Release frames, once for each page that held one."""
        frames = self._numbers(addresses)
        with self._gate:
            if self._handle:
                self._library.pages_release(self._handle, frames.size, frames.ctypes.data)

    def touch(self, addresses: npt.NDArray[np.int64]) -> None:
        """Mark frames as used, in page order."""
        frames = self._numbers(addresses)
        with self._gate:
            if self._handle:
                self._library.pages_touch(self._handle, frames.size, frames.ctypes.data)

    def owned(self, addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Report for each frame whether it is private, and so may be written."""
        frames = self._numbers(addresses)
        out = np.zeros(frames.size, np.bool_)
        with self._gate:
            if self._handle:
                self._library.pages_owned(self._handle, frames.size, frames.ctypes.data, out.ctypes.data)
        return out

    def held(self) -> int:
        """Return how many pages of this process hold a frame."""
        with self._gate:
            return int(self._library.pages_held(self._handle)) if self._handle else 0

    def _addresses(self, frames: Frames) -> npt.NDArray[np.int64]:
        return frames.astype(np.int64) * self.frame_bytes + self.slab.address

    def _numbers(self, addresses: npt.NDArray[np.int64]) -> Frames:
        return np.ascontiguousarray((addresses - self.slab.address) // self.frame_bytes, dtype=np.uint64)

    # ---- with it ----

    def find(self, keys: Sequence[bytes]) -> int:
        """Count the leading keys whose pages are in the bank; 0 if the service does not respond."""
        return int(self._find(keys).size)

    def look(self, keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Report for each key whether its page is in the bank; all False if the service does not respond."""
        there = np.zeros(len(keys), np.bool_)
        if self._link.waits(DAMAGED):
            return there
        for at in range(0, len(keys), MAX_PAGES):
            part = keys[at : at + MAX_PAGES]
            text = self._link.text_of(LOOK, len(part), b"".join(part))
            if text is None:
                return np.zeros(len(keys), np.bool_)
            there[at : at + len(part)] = np.frombuffer(text, _PLACE)["generation"] != 0
        return there

    def adopt(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """Hold the pages of the leading keys that are in the bank.

        Returns: addresses of their frames, for `release`.
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
        if self._link.waits(DAMAGED):
            keys = ()
        found = [np.empty(0, _PLACE)]
        for at in range(0, len(keys), MAX_PAGES):
            part = keys[at : at + MAX_PAGES]
            text = self._link.text_of(FIND, len(part), b"".join(part))
            found.append(np.frombuffer(text or b"", _PLACE))
            if found[-1].size < len(part):
                break
        return np.concatenate(found)

    def publish(self, keys: Sequence[bytes], addresses: npt.NDArray[np.int64]) -> list[int]:
        """Publish pages of this session whose bytes are complete.

        If the service does not respond, the pages that the session still holds are published when it is back.

        Returns: NEW, HAVE or STALE for each; STALE if the service does not respond.
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
            text = self._link.text_of(PUBLISH, len(pages), pages.tobytes())
            answer = text or bytes([STALE]) * len(pages)
            if text is None and not self._link.lost and self._link.waiting < MAX_LATER:
                # A frame that is released in between has another generation then.
                self._link.send_later(PUBLISH, len(pages), pages.tobytes(), self._count_verdicts)
            else:
                self._count_verdicts(answer)
            verdicts += answer
        return verdicts

    def _count_verdicts(self, verdicts: bytes) -> None:
        for name, verdict in (("published", NEW), ("duplicate", HAVE), ("private", STALE)):
            self.counts[f"bank:{name}"] += verdicts.count(verdict)

    def damaged(self, addresses: npt.NDArray[np.int64]) -> None:
        """Remove pages that this session holds from the bank; holders keep their frames.

        Returns at once. The session finds nothing until the report has reached the service.
        """
        frames = self._numbers(addresses)
        places = np.empty(frames.size, _PLACE)
        generations = np.empty_like(frames)
        with self._gate:
            if not self._handle or not frames.size:
                return
            self._library.pages_generations(self._handle, frames.size, frames.ctypes.data, generations.ctypes.data)
        places["frame"], places["generation"] = frames, generations
        for at in range(0, len(places), MAX_PAGES):
            part = places[at : at + MAX_PAGES]
            self._link.send_later(DAMAGED, len(part), part.tobytes())
        self.counts["bank:damaged"] += len(places)

    def reported(self, timeout_s: float) -> bool:
        """Wait until all damaged pages are reported to the service; return whether they are."""
        deadline = time.monotonic() + timeout_s
        while self._link.waits(DAMAGED) and not self._link.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._link.waits(DAMAGED)

    @property
    def alive(self) -> bool:
        """Whether the connection was open at the last request."""
        return self._link.alive

    @property
    def lost(self) -> bool:
        """Whether the service restarted without this session's memory, so that its pages stay private."""
        return self._link.lost

    def close(self) -> None:
        """Release all frames; idempotent. No copy to or from them may be in flight."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            handle, self._handle = self._handle, None
            if handle:
                self._library.pages_close(handle)
        if self._slab is not None:
            self._slab.close()
        self._link.close()


@functools.cache
def _library() -> Any:
    """Load libpages.so.

    Raises:
        BuildError, OSError: it cannot be built or loaded.
    """
    library = ctypes.CDLL(str(Path(built()) / PAGES))
    handle, number, pointer = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p
    for name, result, arguments in (
        ("pages_open", handle, (ctypes.c_int, number, number, ctypes.c_int, number)),
        ("pages_close", None, (handle,)),
        ("pages_map_gpu", handle, (ctypes.c_int, number, number, ctypes.c_char_p)),
        ("pages_address", handle, (handle,)),
        ("pages_unmap_gpu", None, (handle,)),
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

"""A session's connection to mtierd's page bank: it joins, rejoins when the service is back, and leaves at the end.

The service may be killed, hang, or restart without the memory that the session has mapped. Every request gets a reply
or none within a time limit; a thread of the link does the rest.

Imports neither torch nor CUDA.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglang_xmem.mtier.client import (
    INVALID_ARGUMENT,
    JOIN,
    LEAVE,
    NOT_YET,
    RETURN,
    Connection,
    Refused,
    Reply,
    Silent,
    label_bytes,
    socket_path,
)

logger = logging.getLogger(__name__)

# native/pages_protocol.h
PAGES_VERSION = 5
#: Its JoinRequest.
JOIN_REQUEST = struct.Struct("=IIQQ32s64sQIIQ")
#: Seconds between attempts to reconnect; doubled after each failure of the link's own thread, up to the second number.
RETRY_S, MOST_RETRY_S = 1.0, 30.0
#: Seconds between queries whether a new space's memory is ready.
_MAKING_S = 0.05


class Wanted(NamedTuple):
    """What a session asks for: arguments of BankSession."""

    identity: bytes | None
    frame_bytes: int
    frames: int
    label: str
    pool_bytes: int
    kind: int


class Place(NamedTuple):
    """A session's constants: the slab's name, the session's number, the slab's frames and bytes."""

    slab: int
    number: int
    frames: int
    nbytes: int


class _Queued(NamedTuple):
    op: int
    items: int
    behind: bytes
    replied: Callable[[bytes], object] | None


class Link:
    """A session, over one connection at a time.

    Args:
        count: called with the name of each event.

    Raises:
        Silent: no service responds.
    """

    def __init__(self, wanted: Wanted, count: Callable[[str], object]) -> None:
        self._wanted = wanted
        self._count = count
        self._name = secrets.randbits(64) | 1
        self._place: Place | None = None
        #: Held during a reconnect; the time of the last attempt.
        self._joining = threading.Lock()
        self._tried = float("-inf")
        #: The service permanently forgot this session.
        self._lost = False
        #: The only remaining request is to leave.
        self._closed = False
        self._missing = False
        #: Descriptors of slab and ledger, for a service that restarts without them.
        self._files: Sequence[int] = ()
        #: Requests that must reach the service at some time.
        self._queued: list[_Queued] = []
        self._wake = threading.Event()
        self._connection = Connection(socket_path())
        threading.Thread(target=self._attend, name="sglang_xmem-bank", daemon=True).start()

    def join(self) -> Reply:
        """Join a space; wait until its memory is ready.

        Returns: the reply, with the ledger's descriptor.

        Raises:
            Refused, Silent: there is no session. `close` is needed anyway: the service may join it late.
        """
        joined = self._join(self._connection, again=False)
        self._place = _place_of(joined)
        return joined

    def keep(self, files: Sequence[int]) -> None:
        """Keep the memory's descriptors, for a service that restarts without them.

        Args:
            files: descriptors of slab and ledger, closed with the link.
        """
        self._files = files

    @property
    def alive(self) -> bool:
        """Whether the connection was open at the last request."""
        return self._connection.alive

    @property
    def lost(self) -> bool:
        """Whether the service restarted without this session's memory and cannot take it, so that it stays private."""
        return self._lost

    # ---- requests ----

    def ask(self, op: int, count: int = 0, behind: bytes = b"") -> Reply:
        """Send a request; if the connection is lost, repeat it over a new one. Every request may arrive twice.

        Raises:
            Refused, Silent: there is no reply.
        """
        if self._connection.alive:
            try:
                return self._connection.ask(op, count, behind)
            except (Refused, Silent):
                if self._connection.alive:
                    raise
        self._join_again()
        return self._connection.ask(op, count, behind)

    def text_of(self, op: int, count: int, behind: bytes) -> bytes | None:
        """Return the reply's text; None without a reply, which is logged once in a row."""
        if self._lost or self._closed:
            return None
        try:
            text = self.ask(op, count, behind).text
        except (Refused, Silent) as error:
            self._count("bank_questions:unanswered")
            if not self._missing:
                logger.warning("sglang_xmem: the page bank is unavailable, and its pages are misses: %s", error)
            self._missing = True
            return None
        if self._missing:
            logger.warning("sglang_xmem: the page bank is available again")
        self._missing = False
        return text

    def send_later(self, op: int, count: int, behind: bytes, replied: Callable[[bytes], object] | None = None) -> None:
        """Send a request as soon as possible, after earlier ones; return at once.

        Args:
            replied: called with the reply's text, on the link's thread.
        """
        self._queued.append(_Queued(op, count, behind, replied))
        self._wake.set()

    @property
    def waiting(self) -> int:
        """Number of requests of `send_later` that have not reached the service."""
        return len(self._queued)

    def waits(self, op: int) -> bool:
        """Whether such a request of `send_later` has not reached the service."""
        return any(each.op == op for each in tuple(self._queued))

    # ---- joining and leaving ----

    def _join(self, connection: Connection, *, again: bool) -> Reply:
        it = self._wanted
        asked = JOIN_REQUEST.pack(
            PAGES_VERSION,
            it.identity is None,
            it.frame_bytes,
            it.frames,
            it.identity or b"",
            label_bytes(it.label),
            self._name,
            it.kind,
            again,
            it.pool_bytes,
        )
        while True:
            try:
                return connection.ask(JOIN, behind=asked)
            except Refused as error:
                if error.code != NOT_YET:
                    raise
            time.sleep(_MAKING_S)

    def _join_again(self) -> None:
        """Rejoin the session over a new connection, with its state in memory: the service may have restarted.

        Raises:
            Refused, Silent: not now, or never if the service has other memory.
        """
        with self._joining:
            if self._connection.alive:  # another thread has reconnected
                return
            if self._lost or time.monotonic() - self._tried < RETRY_S:
                raise Silent("mtierd closed the connection")
            try:
                connection = Connection(socket_path())
                try:
                    self._resume(connection)
                except BaseException:
                    connection.close()
                    raise
            finally:
                self._tried = time.monotonic()
            self._connection = connection
            self._count("bank_sessions:rejoined")
            self._wake.set()  # what waits can be sent now

    def _resume(self, connection: Connection) -> None:
        """Continue the session over another connection; return the memory to a service that does not know it."""
        why = "the service does not know the session"
        try:
            try:
                joined = self._join(connection, again=True)
            except Refused as error:
                if error.code != INVALID_ARGUMENT or not self._files:
                    raise
                try:
                    connection.ask(RETURN, kind=self._wanted.kind, descriptors=self._files)
                except Refused as refused:  # another engine may have returned it
                    why = refused.words
                joined = self._join(connection, again=True)
            os.close(joined.fd)
            if self._place not in (None, _place_of(joined)):
                raise Refused(INVALID_ARGUMENT, "the service has other memory")
        except Refused as error:
            if error.code == INVALID_ARGUMENT:
                self._lose(why)
            raise

    def _lose(self, why: str) -> None:
        self._lost = True
        if self._closed:
            return
        self._count("bank_sessions:lost")
        logger.warning(
            "sglang_xmem: mtierd restarted without the memory of this engine's pages, so they are private now (%s). "
            "Restart this engine to share pages again.",
            why,
        )

    def close(self) -> None:
        """End the session; if the service does not respond, keep trying on the link's thread.

        The service keeps the session's promise until it learns of the session's end, or of the process's, which may be
        much later: an engine continues with another tier.
        """
        files, self._files = self._files, ()
        for fd in files:
            os.close(fd)
        self._closed = True
        self._leave()
        self._wake.set()

    def _leave(self) -> None:
        with contextlib.suppress(Silent):
            try:
                self.ask(LEAVE)
            except Refused as error:
                if error.code != INVALID_ARGUMENT:  # it does not know the session
                    return
            self._lost = True
        if self._lost:
            self._connection.close()

    def _attend(self) -> None:
        """Rejoin soon after a restart of the service, send what `send_later` has queued, and leave at the end.

        An engine that starts before the others have rejoined would get other memory for the same pages.
        """
        pause = RETRY_S
        while not self._lost:
            self._wake.wait(pause)
            self._wake.clear()
            if self._closed:
                self._leave()
            elif self._queued:
                self._send_queued()
            elif self._place is not None and self._connection.has_ended():
                with contextlib.suppress(Refused, Silent):
                    self._join_again()
            pause = RETRY_S if self._connection.alive else min(2 * pause, MOST_RETRY_S)

    def _send_queued(self) -> None:
        while self._queued:
            op, count, behind, replied = self._queued[0]
            text = self.text_of(op, count, behind)
            if text is None:
                return
            if replied is not None:
                replied(text)
            del self._queued[0]


def _place_of(joined: Reply) -> Place:
    return Place(joined.allocation, joined.num_banks, joined.total, joined.size)

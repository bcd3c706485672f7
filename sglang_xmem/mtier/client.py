"""A client of mtierd's socket, for the messages of the page bank. Imports only the standard library."""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from sglang_xmem.errors import Remedy, Unavailable

#: Seconds within which the service must reply: SGLang ends a process whose storage threads block for 10 s.
DEADLINE_S = 2.0
#: Seconds without requests after one without a reply; doubled each time, up to the second number.
PAUSE_S, MOST_PAUSE_S = 1.0, 30.0

# native/protocol.h and native/pages_protocol.h
_MAGIC = 0x5249544D
_PROTOCOL_VERSION = 2
_REQUEST = struct.Struct("=IHHQiIQQ")
_REPLY = struct.Struct("=IHHQiIiIQQQQQ")
_MAX_REPLY_BYTES = _REPLY.size + (64 << 10)
_REFUSED = 0
_LABEL = struct.Struct("64s")
INFO, JOIN, SLAB, FIND, PUBLISH, LEAVE = range(32, 38)
LOOK, DAMAGED, RETURN = range(39, 42)
#: MemoryKind of a slab.
HOST, GPU, DAX = 1, 2, 3

#: Reply to a session's request over a connection that has no session, or no longer has one.
_NOT_JOINED = -2
_OUT_OF_MEMORY = -3
INVALID_ARGUMENT = -4
#: Reply to a kJoin: retry shortly.
NOT_YET = -8


def socket_path() -> str:
    """Return the path of the service's socket, as in native/paths.h."""
    user = os.geteuid()
    folders = [os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"]
    usual = next((folder for folder in folders if folder and _is_own(folder)), f"/tmp/mtierd-{user}")
    return os.environ.get("MTIER_SOCKET") or f"{usual}/mtierd.sock"


def _is_own(folder: str) -> bool:
    """Whether a folder belongs to this user, and only this user may write there."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


class Refused(Exception):
    """The service refused a request."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code
        self.words = words


class Silent(Exception):
    """The service is gone, or did not respond in time; the message is a clause."""


class Reply(NamedTuple):
    """Fields as in native/protocol.h. `fd`: the received descriptor, or -1; the caller closes it."""

    num_banks: int
    total: int
    available: int
    size: int
    granularity: int
    allocation: int
    text: bytes
    fd: int


class Connection:
    """A connection to the service: one request at a time, each with a time limit.

    Raises:
        Silent: no service responds at `path`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._number = 0
        self._failures = 0
        self._quiet_until = 0.0
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(DEADLINE_S)
            self._socket.connect(path)
            peer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError as error:
            self.close()
            raise Silent(f"no mtierd responds at {path} ({error.strerror or 'timeout'})") from None
        owner = struct.unpack("3i", peer)[1]
        if owner != os.geteuid():  # anyone can create a socket in /tmp
            self.close()
            raise Silent(f"the mtierd at {path} runs as user {owner} and not as user {os.geteuid()}")

    @property
    def alive(self) -> bool:
        """Whether the connection was open at the last request."""
        return self._socket is not None

    def has_ended(self) -> bool:
        """Whether the service has closed the connection, without a request; it is not `alive` then."""
        if not self._lock.acquire(blocking=False):
            return False  # the thread with a request finds out
        try:
            if self._socket is not None:
                poll = select.poll()
                poll.register(self._socket, 0)
                if poll.poll(0):
                    self.close()
            return self._socket is None
        finally:
            self._lock.release()

    def ask(
        self, op: int, count: int = 0, behind: bytes = b"", kind: int = 0, descriptors: Sequence[int] = ()
    ) -> Reply:
        """Send a request and wait for its reply.

        Args:
            descriptors: sent with the request; the caller still owns them.

        Raises:
            Refused: the service refuses; the connection is closed if it has no session and the request needs one.
            Silent: it does not respond, or did not a moment ago.
        """
        with self._lock:
            if self._socket is None:
                raise Silent(f"mtierd at {self._path} closed the connection")
            if time.monotonic() < self._quiet_until:
                raise Silent(f"mtierd at {self._path} did not respond a moment ago")
            self._number += 1
            try:
                reply = self._exchange(self._socket, op, count, behind, kind, descriptors)
            except Refused as error:
                if error.code == _NOT_JOINED:
                    self.close()
                raise
            except TimeoutError:
                pause = min(PAUSE_S * 2**self._failures, MOST_PAUSE_S)
                self._failures += 1
                self._quiet_until = time.monotonic() + pause
                raise Silent(f"mtierd at {self._path} did not respond within {DEADLINE_S:g} s") from None
            except OSError as error:
                self.close()
                raise Silent(f"mtierd at {self._path} closed the connection ({error.strerror or error})") from None
            self._failures = 0
            return reply

    def _exchange(
        self, connection: socket.socket, op: int, count: int, behind: bytes, kind: int, descriptors: Sequence[int]
    ) -> Reply:
        end = time.monotonic() + DEADLINE_S
        connection.settimeout(DEADLINE_S)
        message = _REQUEST.pack(_MAGIC, _PROTOCOL_VERSION, op, self._number, kind, 0, count, 0) + behind
        socket.send_fds(connection, [message], list(descriptors))
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
            message, got, _, _ = socket.recv_fds(connection, _MAX_REPLY_BYTES, 1)
            fd = got[0] if got else -1
            if got:
                os.set_inheritable(fd, False)
            try:
                if len(message) < _REPLY.size:
                    raise ConnectionError("it ended")
                head = _REPLY.unpack_from(message)
                magic, version, its_op, number, code, text_bytes, num_banks, _, total, *more = head
                available, size, granule, name = more
                text = message[_REPLY.size :]
                if magic != _MAGIC or len(text) != text_bytes:
                    raise ConnectionError("it does not speak mtierd's protocol")
                if its_op == _REFUSED:
                    raise Refused(code, text.decode(errors="replace"))
                if number != self._number:
                    continue  # the late reply to an abandoned request
                if code == 0 and (version != _PROTOCOL_VERSION or its_op != op):
                    raise ConnectionError("it speaks another version of mtierd's protocol")
                if code != 0:
                    raise Refused(code, text.decode(errors="replace"))
                fd, kept = -1, fd
                return Reply(num_banks, total, available, size, granule, name, text, kept)
            finally:
                if fd >= 0:
                    os.close(fd)

    def close(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()


class BankInfo(NamedTuple):
    """The service's banks of one kind of memory.

    Attributes:
        banks: their number; `total`: their bytes.
        available: maximum bytes for one more engine.
        granularity: granule of slabs, in bytes.
        for_new: the part of `available` that pages of a new model may use.
    """

    banks: int
    total: int
    available: int
    granularity: int
    for_new: int


def bank_info(kind: int, label: str = "") -> BankInfo:
    """Ask the service for its banks of one MemoryKind.

    Args:
        label: what the engine's pages are called; empty: `available` is what engines of any model there may have.

    Raises:
        Unavailable: no service responds.
    """
    try:
        connection = Connection(socket_path())
        try:
            reply = connection.ask(INFO, behind=_LABEL.pack(label_bytes(label)) if label else b"", kind=kind)
        finally:
            connection.close()
    except (Refused, Silent) as error:
        raise unavailable(error) from None
    return BankInfo(reply.num_banks, reply.total, reply.available, reply.granularity, reply.size)


def label_bytes(label: str) -> bytes:
    """A label as messages have it, which ends with a zero."""
    return label.encode("ascii", "replace")[: _LABEL.size - 1]


def unavailable(error: Exception) -> Unavailable:
    if isinstance(error, Refused):
        full = error.code == _OUT_OF_MEMORY
        # Pages of one model may use a whole bank even if its engines are promised less.
        share = ", or a lower --share if engines serve several models" if full else ""
        fix = f"stop other engines, or give the service a larger --bank host:SIZE{share}"
        lower = [Remedy("lower_size")] if full else []
        return Unavailable(error.words, *lower, Remedy("do", value=fix))
    return Unavailable(str(error), Remedy("start_service", value="`sglang-xmem mtierd --bank host:SIZE`"))

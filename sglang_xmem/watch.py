"""A thread that nothing blocks: it detects loads and stores that do not end, and exports a session's counters.

A copy that never ends cannot be cancelled: it may write to its pages at any later time, when they belong to another
request. So a rank with an overdue copy exits with one sentence, and its supervisor restarts it.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import psutil

from sglang_xmem.errors import ConfigError

#: Environment variable: maximum seconds of a load or store, after which its rank ends; 0 for no limit.
DEADLINE_VARIABLE = "SGLANG_XMEM_DEADLINE_S"
DEADLINE_S = 30.0
#: Seconds between checks.
INTERVAL_S = 0.25
#: Exit status of a rank whose copy is overdue (EX_UNAVAILABLE of sysexits.h).
OVERDUE_EXIT_STATUS = 69


def deadline_s() -> float:
    """Read the deadline from the environment.

    Raises:
        ConfigError: its value is not a number of seconds.
    """
    text = os.environ.get(DEADLINE_VARIABLE, "")
    if not text:
        return DEADLINE_S
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{DEADLINE_VARIABLE} must be seconds >= 0 (0 = no limit), got {text!r}.")
    return value


class InFlight:
    """A load or store in flight.

    Attributes:
        nbytes: bytes to move.
        done: function that reports whether it has ended; None while it is being enqueued.
        elapsed_s: function that returns its seconds on the device after its end; None if the device does not report
            them.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.begun = time.monotonic()
        self.enqueued = self.begun
        self.nbytes = 0
        self.done: Callable[[], bool] | None = None
        self.elapsed_s: Callable[[], float] | None = None

    def seconds(self) -> float:
        """Return its duration; if the device reports none (a CPU copies synchronously), the time to enqueue it."""
        return self.enqueued - self.begun if self.elapsed_s is None else self.elapsed_s()


class Watch:
    """Checks copies in flight every INTERVAL_S.

    Args:
        deadline_s: maximum seconds of a copy; 0 for no limit.
        describe: names the tier, for the sentence.
        each_look: called every second, to export numbers; exceptions are ignored, since serving is more important.
        end: ends the process; for tests.
        finished: called for each completed copy; exceptions are ignored too.
    """

    def __init__(
        self,
        deadline_s: float,
        describe: Callable[[], str],
        each_look: Callable[[], None] | None = None,
        end: Callable[[str], None] | None = None,
        finished: Callable[[InFlight], None] | None = None,
    ) -> None:
        self._deadline_s = deadline_s
        self._describe = describe
        self._each_look = each_look
        self._end = end or end_rank
        self._finished = finished
        self._numbers = itertools.count()
        self._in_flight: dict[int, InFlight] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sglang_xmem-watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and wait for its end."""
        self._stopped.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    @contextmanager
    def over(self, what: str) -> Iterator[InFlight]:
        """Watch a copy while it is enqueued. The block may set `done`; otherwise the copy ends with the block."""
        number = next(self._numbers)
        entry = self._in_flight[number] = InFlight(what)
        try:
            yield entry
        except BaseException:
            self._in_flight.pop(number, None)
            raise
        entry.enqueued = time.monotonic()
        if entry.done is None:
            self._in_flight.pop(number, None)

    def look(self) -> None:
        """Report completed copies, and end the process if a copy is overdue."""
        now = time.monotonic()
        for number, entry in list(self._in_flight.items()):
            if entry.done is not None and entry.done():
                self._in_flight.pop(number, None)
                if self._finished is not None:
                    with suppress(Exception):
                        self._finished(entry)
            elif self._deadline_s and now - entry.begun > self._deadline_s:
                self._in_flight.pop(number, None)
                self._end(
                    f"A {entry.what} {self._describe()} did not end within {self._deadline_s:g} s, so this rank ends "
                    "and its supervisor can start it again. Look for errors of the GPUs (nvidia-smi, dmesg), or raise "
                    f"{DEADLINE_VARIABLE}."
                )

    def in_flight(self) -> Callable[[], bool]:
        """Returns: a function that reports whether all copies now in flight or being enqueued have ended."""
        entries = dict(self._in_flight)

        def have_ended() -> bool:
            for number, entry in list(entries.items()):
                if number not in self._in_flight or (entry.done is not None and entry.done()):
                    del entries[number]
            return not entries

        return have_ended

    def in_flight_bytes(self) -> int:
        """Return the bytes of all copies in flight."""
        return sum(entry.nbytes for entry in list(self._in_flight.values()))

    def _run(self) -> None:
        looks = 0
        while not self._stopped.wait(INTERVAL_S):
            self.look()
            looks += 1
            if self._each_look is not None and looks % 4 == 0:
                with suppress(Exception):
                    self._each_look()


def end_rank(message: str) -> NoReturn:
    """End this process at once with one sentence, and signal SGLang's parent, as SGLang's own watchdog does."""
    sys.stderr.write(f"sglang_xmem: {message}\n")
    sys.stderr.flush()
    with suppress(psutil.Error, OSError):
        parent = psutil.Process().parent()
        if parent is not None:
            parent.send_signal(signal.SIGQUIT)
    os._exit(OVERDUE_EXIT_STATUS)

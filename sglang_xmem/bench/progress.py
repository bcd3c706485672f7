"""Progress with time left on stderr: a bar of rich on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

#: Seconds between lines where stderr is no terminal.
EVERY_S = 15.0


class Progress:
    """Of a whole run; time left comes from the pace of steps and the time that engines took to start.

    Args:
        steps: of all engines.
    """

    def __init__(self, steps: int) -> None:
        self._steps = max(1, steps)
        self._done = 0
        self._engine = ""
        self._engine_end = 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            self._bar = _bar()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def engine(self, name: str, steps: int) -> None:
        """An engine starts."""
        self._engine, self._engine_end = name, self._done + steps
        self._show(f"{name}: starting", always=True)

    def started(self) -> None:
        """The engine serves."""
        self._show(f"{self._engine}: warming up", always=True)

    def engine_done(self) -> None:
        """All steps of the engine count as done, whatever it has done."""
        self._done = self._engine_end
        if self._bar is not None:
            self._show(self._engine)

    def step(self, doing: str, count: int = 1) -> None:
        """So many steps more are done."""
        self._done = min(self._done + count, self._engine_end)
        self._show(f"{self._engine}: {doing}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def left_s(self) -> float | None:
        """Seconds to the end at the pace so far, engine starts included; None before the first step."""
        if not self._done:
            return None
        return (time.monotonic() - self._began) / self._done * (self._steps - self._done)

    def _show(self, text: str, always: bool = False) -> None:
        left = self.left_s()
        left_text = "" if left is None else f", about {left:.0f} s left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text + left_text)
        elif always or time.monotonic() - self._said >= EVERY_S:
            self._said = time.monotonic()
            print(f"{text} ({self._done}/{self._steps}{left_text})", file=sys.stderr, flush=True)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return RichProgress(*columns, console=Console(stderr=True), transient=True)

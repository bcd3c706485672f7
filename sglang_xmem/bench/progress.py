"""Progress with time left on stderr: tqdm's bar on a terminal, a line of it now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

#: Seconds between lines where stderr is no terminal.
EVERY_S = 15.0


class _Lines:
    """stderr for tqdm where it is no terminal: what would go over a line becomes a line."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and not line.startswith("("):  # before anything has begun
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


class Progress:
    """Of a whole run.

    Args:
        steps: of each engine, in order.
    """

    def __init__(self, steps: list[int]) -> None:
        self._steps, self._engine, self._name = steps, -1, ""
        self._started = 0.0
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=sum(steps),
            file=sys.stderr if terminal else _Lines(),
            mininterval=0.5 if terminal else EVERY_S,
            leave=False,
            dynamic_ncols=terminal,
            bar_format=None if terminal else "{desc} ({n_fmt}/{total_fmt}, about {remaining} left)",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def engine(self, name: str) -> None:
        """The next engine starts; all steps of those before count as done."""
        self._engine += 1
        self._name, self._started = name, time.time()
        self._bar.n = sum(self._steps[: self._engine])
        self._bar.set_description_str(f"{name}: starting")

    def started(self) -> None:
        """The engine serves. Its start is no part of the pace that the time left comes from."""
        self._bar.start_t += time.time() - self._started
        self._bar.set_description_str(f"{self._name}: serves")

    def step(self, doing: str) -> None:
        """One more step is done."""
        self._bar.set_description_str(f"{self._name}: {doing}", refresh=False)
        self._bar.update(min(1, sum(self._steps[: self._engine + 1]) - self._bar.n))

    def say(self, text: str) -> None:
        """A line that stays."""
        self._bar.write(text, file=sys.stderr)

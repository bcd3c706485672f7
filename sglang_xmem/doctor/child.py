"""Doctor tasks that may hang, crash, print or leave a CUDA context: each in its own process, with a time limit.

The child writes one JSON object per line as soon as it has a result, so results before a kill are kept.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import IO, Any

import msgspec

from sglang_xmem.errors import ConfigError, Unavailable

#: Generators by name: module and function.
TASKS = {
    "tiers": ("sglang_xmem.doctor.tiers", "examine"),
    "bandwidth": ("sglang_xmem.doctor.bandwidth", "measure"),
}
_CONFIG_ERROR = "config_error"
_FAILED = "failed"
#: A child's first line.
_RUNS = {"runs": True}
#: Seconds for a child to start. The start cannot hang, but is slow on a busy machine.
START_LIMIT_S = 300.0


class Outcome(msgspec.Struct, frozen=True):
    """A child's results, and why it ended early: a clause, or None if it completed."""

    lines: list[dict[str, Any]]
    problem: str | None


def run_task(task: str, arguments: dict[str, Any], limit_s: float, *, total: bool = False) -> Outcome:
    """Run a task.

    Args:
        limit_s: maximum seconds between lines, counted from the end of the child's imports, which are slow on a busy
            machine.
        total: `limit_s` applies to the whole task, including the child's start.

    Raises:
        ConfigError: the task refused the user's options.
    """
    command = [sys.executable, "-m", __name__, task]
    # SGLang's plugins may print at the child's start; none of that belongs on this screen.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    errors: list[str] = []
    threads = [
        threading.Thread(target=_read_lines, args=(process.stdout, found), daemon=True),
        threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True),  # type: ignore[union-attr]
    ]
    for thread in threads:
        thread.start()
    timed_out = True
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(arguments))
            process.stdin.close()
        lines, timed_out = _collect(found, limit_s, total)
    finally:
        if timed_out:
            process.kill()
        # A process that hangs in a driver call does not end on the signal.
        for thread in threads:
            thread.join(2)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
    if lines and _CONFIG_ERROR in lines[-1]:
        raise ConfigError(lines[-1][_CONFIG_ERROR])
    if lines and _FAILED in lines[-1]:
        return Outcome(lines[:-1], lines[-1][_FAILED])
    if timed_out:
        return Outcome(lines, f"it did not respond within {limit_s:g} s")
    status = process.returncode
    return Outcome(lines, _ending(status, "".join(errors)) if status else None)


def _read_lines(file: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in file:
        lines.put(line)
    lines.put(None)


def _collect(found: queue.SimpleQueue[str | None], limit_s: float, total: bool) -> tuple[list[dict[str, Any]], bool]:
    """Collect the objects that a child wrote, without its start message; also return whether it timed out."""
    lines: list[dict[str, Any]] = []
    until = time.monotonic() + (limit_s if total else START_LIMIT_S)
    while True:
        try:
            text = found.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return lines, True
        if text is None:
            return lines, False
        if not total:
            until = time.monotonic() + limit_s
        with suppress(ValueError):  # a line truncated by the end of the process
            line = json.loads(text)
            if line != _RUNS:
                lines.append(line)


def _ending(status: int, errors: str) -> str:
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    how = f"status {status}"
    if status < 0:
        with suppress(ValueError):
            how = signal.Signals(-status).name
    return f"its process ended with {how}" + (f": {last}" if last else "")


def main() -> int:
    # Libraries print to stdout, so the lines use a duplicate of it.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)

        def write(line: dict[str, Any]) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        module, function = TASKS[sys.argv[1]]
        try:
            run, arguments = getattr(importlib.import_module(module), function), json.load(sys.stdin)
            write(_RUNS)
            for found in run(**arguments):
                write(found)
        except ConfigError as error:
            write({_CONFIG_ERROR: str(error)})
            return 2
        except Unavailable as error:
            write({_FAILED: str(error)})
            return 1
        except Exception as error:  # a line on the screen instead of a traceback
            words = " ".join(str(error).split())
            write({_FAILED: f"{type(error).__name__}: {words}" if words else type(error).__name__})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Work of the doctor that may hang, crash, print or leave a CUDA context behind: in a process of its own, on a clock.

The child writes a JSON object a line as it finds things, so what it found before it was stopped counts.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import msgspec

from sglang_xmem.errors import ConfigError, TierUnavailable

#: Generators by name: module and function.
TASKS = {
    "tiers": ("sglang_xmem.doctor.tiers", "examine"),
    "bandwidth": ("sglang_xmem.doctor.bandwidth", "measure"),
}
_CONFIG_ERROR = "config_error"
_FAILED = "failed"


class Outcome(msgspec.Struct, frozen=True):
    """What a child found, and what ended it early: a clause, None where it went through."""

    lines: list[dict[str, Any]]
    problem: str | None


def run_task(task: str, arguments: dict[str, Any], limit_s: float) -> Outcome:
    """Run a task for at most `limit_s` seconds.

    Raises:
        ConfigError: the task found the user's options to be wrong.
    """
    command = [sys.executable, "-m", __name__, task]
    # Files of SGLang's plugins and such may come in at the child's start; none of them belongs on this screen.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    problem = None
    try:
        try:
            output, errors = process.communicate(json.dumps(arguments), timeout=limit_s)
        except subprocess.TimeoutExpired:
            problem = f"it did not answer within {limit_s:g} s"
            process.kill()
            output, errors = _rest(process)
    finally:
        if process.poll() is None:
            process.kill()
    lines: list[dict[str, Any]] = []
    for text in output.splitlines():
        with suppress(ValueError):  # a line that the end of the process cut off
            lines.append(json.loads(text))
    if lines and _CONFIG_ERROR in lines[-1]:
        raise ConfigError(lines[-1][_CONFIG_ERROR])
    if lines and _FAILED in lines[-1]:
        problem = lines.pop()[_FAILED]
    elif problem is None and process.returncode:
        problem = _ending(process.returncode, errors)
    return Outcome(lines, problem)


def _rest(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a killed child had written; nothing of one that a driver's call holds against the signal."""
    try:
        return process.communicate(timeout=2)
    except subprocess.TimeoutExpired as error:
        partial = error.output or b""
        return partial.decode(errors="replace") if isinstance(partial, bytes) else partial, ""


def _ending(status: int, errors: str) -> str:
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    how = f"status {status}"
    if status < 0:
        with suppress(ValueError):
            how = signal.Signals(-status).name
    return f"its process ended with {how}" + (f": {last}" if last else "")


def main() -> int:
    # Libraries print to stdout; the lines go another way.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)

        def write(line: dict[str, Any]) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        module, function = TASKS[sys.argv[1]]
        try:
            for found in getattr(importlib.import_module(module), function)(**json.load(sys.stdin)):
                write(found)
        except ConfigError as error:
            write({_CONFIG_ERROR: str(error)})
            return 2
        except TierUnavailable as error:
            write({_FAILED: str(error)})
            return 1
        except Exception as error:  # a line on the screen in place of a traceback
            words = " ".join(str(error).split())
            write({_FAILED: f"{type(error).__name__}: {words}" if words else type(error).__name__})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a result was made by: machine, versions, commit and command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import sglang_xmem
from sglang_xmem.doctor import facts


def describe(program: str = "sglang-xmem") -> dict[str, Any]:
    """A JSON object for the head of a result that `program` made."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([program, *sys.argv[1:]]),
        "commit": os.environ.get("SGLANG_XMEM_COMMIT") or _commit(),
        "versions": facts.versions(),
        "gpus": [gpu["name"] for gpu in facts.gpu_list()[0]],
        "driver": facts.driver()["version"],
        "cpus": os.cpu_count(),
    }


def machine(gpus: list[str]) -> str:
    """A machine's GPUs for a title: "8 x NVIDIA H200", or "CPU"."""
    return ", ".join(f"{count} x {name}" for name, count in Counter(gpus).items()) or "CPU"


def _commit() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed wheel."""
    root = Path(sglang_xmem.__file__).resolve().parents[1]
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None

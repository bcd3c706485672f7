"""What a result was made by: machine, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import sglang_xmem


def describe() -> dict[str, Any]:
    """A JSON object for the head of a result."""
    versions = {"sglang_xmem": sglang_xmem.__version__, "python": platform.python_version()}
    for package in ("sglang", "torch", "triton", "cuda-bindings", "flashinfer-python", "sglang-kernel"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus: list[str] = []
    driver = None
    with suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        gpus = [
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
        driver = pynvml.nvmlSystemGetDriverVersion()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["sglang-xmem", *sys.argv[1:]]),
        "commit": os.environ.get("SGLANG_XMEM_COMMIT") or _commit(),
        "versions": versions,
        "gpus": gpus,
        "driver": driver,
        "cpus": os.cpu_count(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed wheel."""
    root = Path(sglang_xmem.__file__).resolve().parents[1]
    with suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
        return found.stdout.strip()
    return None

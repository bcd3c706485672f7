"""Fixtures and skips for all tests. Imports no torch: lint runs and collection stay fast."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import REPOSITORY


@functools.cache
def gpu_count() -> int:
    """GPUs of this machine, by the driver's own tool; asking torch would start CUDA in the test process."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([name for name in visible.split(",") if name.strip()]))


if gpu_count() == 0 and "SGLANG_USE_CPU_ENGINE" not in os.environ:
    # Without a GPU SGLang has its CPU engine or nothing; child processes inherit this. In this process the
    # environment's .pth file has looked for the variable already, so what it would have done is done here.
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    if importlib.util.find_spec("sglang_cpu") is not None:
        importlib.import_module("sglang_cpu.imports").install()

#: Signals that ended the run.
_TERMINATED: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    """SIGTERM, as `timeout` sends it, is an interrupt: servers end with the tests that started them."""

    def interrupt(number: int, frame: object) -> None:
        _TERMINATED.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    # Processes that tests start import `tests` and `scripts` too, wherever they run.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def pytest_runtest_logfinish(nodeid: str) -> None:
    """End the run where a test took the interrupt for its own, as one of a command that handles interrupts does."""
    if _TERMINATED:
        pytest.exit("terminated", returncode=pytest.ExitCode.INTERRUPTED)


#: Folders of tests in the order in which they run: what fails soonest comes first, engines after everything else.
ORDER = ("unit", "repository", "scripts", "fakes", "contracts", "emulation", "bench", "mtier", "pools", "e2e", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by ORDER, tests that start engines behind the others of their folder."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.relative_to(REPOSITORY / "tests").parts[0] if item.path.is_relative_to(REPOSITORY) else ""
        engine = item.get_closest_marker("cpu_engine") is not None
        return (engine, ORDER.index(folder) if folder in ORDER else 0)

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, with the reason in pytest's summary."""
    needed = 1 if item.get_closest_marker("gpu") else 0
    for marker in item.iter_markers("gpus"):
        needed = max(needed, marker.args[0])
    if gpu_count() < needed:
        pytest.skip(f"needs {needed} GPU(s), this machine has {gpu_count()}")
    if item.get_closest_marker("cpu_engine") and gpu_count() > 0:
        pytest.skip("runs SGLang's CPU engine, which is for machines without a GPU")


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], str]:
    """Directory of the random model that make_tiny_model.py makes of its arguments; each is made once a session."""
    directory = tmp_path_factory.mktemp("models")

    def make(arguments: Sequence[str]) -> str:
        path = directory / "_".join(("tiny", *arguments))
        if not path.exists():
            script = REPOSITORY / "scripts" / "make_tiny_model.py"
            subprocess.run([sys.executable, str(script), str(path), *arguments], check=True)
        return str(path)

    return make


@pytest.fixture(scope="session")
def tiny_model(model_of: Callable[[Sequence[str]], str]) -> Path:
    """Directory of a random model whose output depends on its prompt's prefix."""
    return Path(model_of(()))


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A folder in memory: unlike that of tmp_path's files, the CUDA driver can register what is mapped from it."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("needs tmpfs")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def cache_of_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have kernels compiled here, not found in the user's cache; a GPU's memory is free again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_XMEM_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield
    import torch

    gc.collect()
    torch.cuda.empty_cache()

"""Whether a GPU is in use by others, from what NVML says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sglang_xmem import gpus

GB = 10**9
ME = os.getpid()
STRANGER = 2**22 + 1


@pytest.mark.parametrize(
    ("processes", "used", "words"),
    [
        ({}, 5_000_000, None),
        ({}, 2 * GB, "2.00 GB in use by processes that are not visible"),
        ({STRANGER: GB}, GB, f"in use by process {STRANGER}"),
        ({STRANGER: None}, GB, f"in use by process {STRANGER}"),
        ({ME: 3 * GB}, 3 * GB, None),
        ({ME: GB}, 3 * GB, "2.00 GB in use by processes that are not visible"),
        ({ME: None}, 3 * GB, None),  # nothing says that it is not all ours
    ],
)
def test_foreign_use(
    processes: dict[int, int | None], used: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "processes", lambda gpu: processes)
    monkeypatch.setattr(gpus, "memory_bytes", lambda gpu: (140 * GB, used))
    found = gpus.foreign_use(1)
    assert found is None if words is None else found is not None and words in found


def test_children_of_a_launcher_are_another_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it plans it has no ranks yet. A rank's siblings are of its engine."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        monkeypatch.setattr(gpus, "processes", lambda gpu: {child.pid: GB})
        monkeypatch.setattr(gpus, "memory_bytes", lambda gpu: (140 * GB, GB))
        assert gpus.foreign_use(1) == f"GPU 1 is in use by process {child.pid}"
        # As its sibling asks, whose parent is this process too.
        for mark, own in (("gpus.mark_as_rank()", "True"), ("", "False")):
            code = f"from sglang_xmem import gpus; {mark}\nprint({child.pid} in gpus._own_pids())"
            asked = [sys.executable, "-c", code]
            assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == own
    finally:
        child.kill()
        child.communicate()

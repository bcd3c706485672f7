"""Whether a GPU is in use by others, from what NVML says."""

from __future__ import annotations

import os

import pytest

from sglang_xmem import gpus

GB = 10**9
ME = os.getpid()
STRANGER = 2**22 + 1


@pytest.mark.parametrize(
    ("processes", "used", "words"),
    [
        ({}, 5_000_000, None),
        ({}, 2 * GB, "2.00 GB in use by processes that cannot be seen"),
        ({STRANGER: GB}, GB, f"in use by process {STRANGER}"),
        ({STRANGER: None}, GB, f"in use by process {STRANGER}"),
        ({ME: 3 * GB}, 3 * GB, None),
        ({ME: GB}, 3 * GB, "2.00 GB in use by processes that cannot be seen"),
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

"""The doctor on real GPUs: in time, with rates that a link can have, and gone without a trace."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest

from sglang_xmem import gpus

pytestmark = pytest.mark.gpu

#: Tolerance for other processes of this machine; the doctor's own buffers are larger.
SLACK_BYTES = 100 << 20


def doctor(*arguments: str) -> tuple[dict[str, Any], float]:
    command = [sys.executable, "-m", "sglang_xmem.cli", "doctor", "--json", *arguments]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    took = time.monotonic() - began
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout), took


def test_doctor_measures_in_time_and_leaves_nothing() -> None:
    # For the doctor, a GPU on which the tests before left this process a context is in use.
    idle = [gpu for gpu in gpus.visible_gpus() if gpus.foreign_use(gpu) is None and not gpus.processes(gpu)]
    if not idle:
        pytest.skip("every GPU is in use, by this test process too; run this file alone")
    used = {gpu: gpus.memory_bytes(gpu)[1] for gpu in idle}
    found, took = doctor("--hicache-size", "1")
    print(json.dumps(found, indent=2))
    assert took < 20
    listed = {gpu["gpu"]: gpu for gpu in found["gpus"]["list"]}
    assert list(listed) == list(gpus.visible_gpus())
    for gpu in idle:
        assert listed[gpu]["not_measured"] is None
        for key in ("read_gbps", "write_gbps"):
            assert 1 < listed[gpu][key] < 1000
    for row in found["peers"]:
        if row["access"] and row["gpu"] in idle and row["peer"] in idle:
            assert row["not_measured"] is None
            for key in ("read_gbps", "write_gbps"):
                assert 1 < row[key] < 2000
    for gpu in idle:
        assert gpus.memory_bytes(gpu)[1] < used[gpu] + SLACK_BYTES
    assert found["tiers"]["takes"] is not None
    if len(idle) > 1 and found["tiers"]["found"][0]["reason"] is not None:
        assert found["tiers"]["takes"] == "peer"


def test_doctor_does_not_measure_a_gpu_in_use() -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import torch; torch.ones(1 << 28, device='cuda:0'); print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        found, _ = doctor()
        assert found["gpus"]["list"][0]["in_use"] is not None
        assert found["gpus"]["list"][0]["not_measured"] == found["gpus"]["list"][0]["in_use"]
        assert all(row["not_measured"] is not None for row in found["peers"] if 0 in (row["gpu"], row["peer"]))
    finally:
        holder.kill()
        holder.wait(30)

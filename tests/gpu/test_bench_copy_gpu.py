"""`sglang-xmem bench copy` on GPUs: every path runs, every byte is right, over each kind of peer memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import gpus
from sglang_xmem.bench.copy_jobs import RUNS_OF_PAGES

pytestmark = pytest.mark.gpu


def bench_copy(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of a run in a process of its own, so that contexts and pinned memory go with it."""
    output = folder / "copy.jsonl"
    command = [sys.executable, "-m", "sglang_xmem.cli", "bench", "copy", *arguments, "--output", str(output)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    measured = [row for row in rows if "waived" not in row]
    assert all(row["verified"] for row in measured if row["tuning"] != "candidate")
    return measured


def copies_for_others(gpu: int) -> bool:
    """Whether a process that begins now finds the GPU idle; this one's own tests may have a context there."""
    return gpus.foreign_use(gpu) is None and not gpus.processes(gpu)


def test_host_paths(tmp_path: Path) -> None:
    rows = bench_copy(tmp_path, "--quick", "--paths", "host_load,host_store")
    assert {row["path"] for row in rows} == {"host_load", "host_store"}
    assert all(0.2 < row["ratio"] < 1.2 for row in rows if row["tuning"] in ("link", "in order"))
    assert {row["tuning"] for row in rows} == {
        "shipped",
        "link",
        "in order",
        "a batch of pages",
        *(f"staged, runs of {run} pages" for run in RUNS_OF_PAGES),
    }
    assert {row["runs_on"] for row in rows} == {"rank"}
    assert (tmp_path / "copy.png").stat().st_size > 1000


@pytest.mark.gpus(2)
def test_all_paths(tmp_path: Path) -> None:
    by = "peer" if copies_for_others(1) else "rank"
    rows = bench_copy(tmp_path, "--quick")
    assert {row["path"] for row in rows} == {
        "peer_load",
        "peer_store",
        "peer_both_load",
        "peer_both_store",
        "peer_matmul",
        "peer_enqueue",
        "host_load",
        "host_store",
    }
    assert {row["memory"] for row in rows if row["path"] == "peer_load"} == {"tier", "asleep", "context"}
    assert {row["memory"] for row in rows if row["path"] == "host_load"} == {"tier", "relayed"}
    assert all(row["gbps"] > 1 for row in rows if "gbps" in row)
    shipped = [row for row in rows if row["tuning"] == "shipped" and row["path"].startswith("peer")]
    assert {row["runs_on"] for row in shipped} == {by}
    assert len({row["path"] for row in shipped}) == 6
    few = [row for row in rows if row["tuning"] == "at most 32 blocks"]
    assert {row["runs_on"] for row in few} == {by}
    assert all(row["runs_on"] == "rank" for row in rows if row not in shipped and row not in few)
    if by == "peer":  # else somebody keeps it awake
        asleep, awake = (
            next(row for row in rows if (row["path"], row["tuning"], row["memory"]) == ("peer_store", "link", memory))
            for memory in ("asleep", "tier")
        )
        assert asleep["peer_sm_mhz"] < awake["peer_sm_mhz"]


@pytest.mark.gpus(2)
def test_given_settings_by_the_peer(tmp_path: Path) -> None:
    if not copies_for_others(1):
        pytest.skip("GPU 1 is in use")
    arguments = ("--quick", "--cases", "0", "--paths", "peer_load,peer_both", "--ctas", "16,64", "--copies-on", "peer")
    rows = bench_copy(tmp_path, *arguments)
    assert [(row["path"], row["ctas"], row["runs_on"]) for row in rows] == [
        (path, ctas, "peer")
        for paths in (("peer_load",), ("peer_both_load", "peer_both_store"))
        for ctas in (16, 64)
        for path in paths
    ]


@pytest.mark.gpus(2)
def test_tune(tmp_path: Path) -> None:
    rows = bench_copy(tmp_path, "--quick", "--tune", "--cases", "0", "--paths", "peer_load,peer_store")
    assert [row["path"] for row in rows if row["tuning"] == "best"] == ["peer_load", "peer_store"]


@pytest.mark.gpus(2)
def test_triton_copies(tmp_path: Path) -> None:
    rows = bench_copy(tmp_path, "--cases", "2", "--paths", "peer_load", "--repetitions", "1", "--no-plots")
    assert any(row["kernel"].startswith("triton") for row in rows)

"""A hundred processes killed at random while they use a tier's memory; and what one leaves behind is noticed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.bench import kills
from sglang_xmem.bench.report import read_rows
from tests import REPOSITORY


def test_a_hundred_kills_leave_nothing(tmp_path: Path, build: Path) -> None:
    """In a process of its own, which forks: this one may have threads."""
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(kills.__file__), "--rounds", "100", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(output)
    assert sum(row["rounds"] for row in rows) == 100
    assert {row["state"].split(",")[0] for row in rows} == set(kills.TIERS)
    assert [row for row in rows if row["wrong"] or row["hung"] or row["left"]] == []


class Space(dict[str, Any]):
    """A space of the bank as the service describes it when all is well."""

    def __init__(self, **other: Any) -> None:
        super().__init__({"frames": 10, "free": 6, "cached": 4, "shared": 0, "pages": 4, "sessions": [], **other})


def test_a_bank_that_is_not_whole_is_noticed() -> None:
    assert kills._is_whole(Space())
    for other in ({"free": 5}, {"shared": 1, "cached": 3}, {"sessions": [{"pid": 1}]}, {"pages": 11}):
        assert not kills._is_whole(Space(**other))


def test_what_stays_is_noticed() -> None:
    """Negative control: the process that is killed has a child, leaves a file, and saw a wrong page."""
    name = Path("/dev/shm") / f"xmem_kills_{os.getpid()}"
    program = (
        "import os, subprocess, sys, time\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from scripts.bench import kills\n"
        "def work(tier, seed, report):\n"
        "    child = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"    open({str(name)!r}, 'w').write(str(child.pid))\n"
        "    os.write(report, kills.WRONG)\n"
        "    time.sleep(600)\n"
        "kills.work, kills.PATIENCE_S, kills.STATES = work, 5.0, ('copying',)\n"
        "killer = kills.Killer('dram', 0, None)\n"
        "killer._random.choices = lambda *a: ['copying']\n"
        "killer.round()\n"
        "print(killer.counts['copying']['left'], killer.counts['copying']['wrong'])\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=600)
        assert done.stdout.split() == ["2", "1"], done.stdout + done.stderr
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(name.read_text()), signal.SIGKILL)
        name.unlink(missing_ok=True)

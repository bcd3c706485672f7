"""What the command line, the doctor and the service import has to work, and at once, where torch is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "numpy", "sglang", "xmem", "cuda", "pynvml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""

MODULES = [
    "sglang_xmem.errors",
    "sglang_xmem.machine",
    "sglang_xmem.gpus",
    "sglang_xmem.tiers",
    "sglang_xmem.tiers.hostmem",
    "sglang_xmem.tiers.dram",
    "sglang_xmem.tiers.peer",
    "sglang_xmem.tiers.mtier",
    "sglang_xmem.tiers.dax",
    "sglang_xmem.copies.tuning",
    "sglang_xmem.copies.geometry",
    "sglang_xmem.copies.policy",
    "sglang_xmem.config",
    "sglang_xmem.plan",
    "sglang_xmem.mtier.daemon",
    "sglang_xmem.doctor",
    "sglang_xmem.cli",
]


@pytest.mark.parametrize("module", MODULES)
def test_importing_needs_no_torch(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{BLOCKED}\nimport {module}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_options_are_parsed_and_a_tier_is_planned_without_torch() -> None:
    script = """
from sglang_xmem.config import parse_options
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.tiers import Ranks
plan = make_plan(parse_options("dram"), Ranks(gpus=(None,)), 1 << 20, lambda nbytes: 1 << 30)
allocation = Placement(plan, 0, lambda nbytes: 1 << 30).allocate([(1 << 20, 4096)])
print(allocation.tier.name, allocation.regions[0].nbytes, tuple(allocation.policy))
"""
    done = subprocess.run([sys.executable, "-c", BLOCKED + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "dram 1048576 (None, False, ())\n"

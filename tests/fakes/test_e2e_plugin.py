"""The end-to-end tests' plugin, as far as it needs no engine: SGLang finds it, and it makes copiers lazy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

LAZY = """
import json, torch
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_xmem import copies
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.geometry import Plane, Slab
load_plugins()
tier, device = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
slabs, cpu = [Slab(tier.data_ptr(), 4, 16)], torch.device("cpu")
copier, _ = copies.make_copier("auto", slabs, cpu, link="none")
program = copier.compile([Step(Plane(device.data_ptr(), 16, 4, 0, 16, 1), 0, 0)], 1)
counters = copier.make_counters(1)
pages = Pages(torch.tensor([tier.data_ptr() + 16]), torch.tensor([2]))
copier.load(program, [pages], counters)
poisoned = device[32:48].tolist()
torch.cpu.Event().query()
print(json.dumps([copier.name, poisoned, device[32:48].tolist()]))
"""


@pytest.mark.cpu_engine
def test_lazy_copiers_are_made_where_adapters_make_copiers() -> None:
    pytest.importorskip("sglang")
    path = [str(REPOSITORY), str(REPOSITORY / "tests" / "e2e" / "plugin"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "SGLANG_XMEM_TEST_LAZY": "1"}
    # Others' plugins load much more of SGLang.
    environment["SGLANG_PLUGINS"] = "xmem_e2e"
    command = [sys.executable, "-c", LAZY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said, found = done.stdout.splitlines()[-2:]
    assert said == "xmem_e2e: lazy load: 0 of 1 parts at a wait"
    assert json.loads(found) == ["lazy", [0xFF] * 16, list(range(16, 32))]

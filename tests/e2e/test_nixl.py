# SPDX-License-Identifier: Apache-2.0
"""HiCache's L3 in files of NIXL's POSIX plugin over a tier: one engine's hit comes from what another one computed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.e2e import harness
from tests.e2e.harness import Answer, Step
from tests.e2e.kinds import KINDS

pytestmark = pytest.mark.cpu_engine

#: Files per page: K and V of pages that are written by their addresses; the latent, and the indexer's keys, which share
#: a frame with it and so go through NIXL's own buffers.
FILES = {"mha": 2, "dsa": 2}


@pytest.fixture(scope="module")
def plugin() -> dict[str, object]:
    """The backend's settings for an engine."""
    if importlib.util.find_spec("nixl") is None:
        pytest.skip("nixl and nixl-cu13 are not installed")
    create = (
        # Engines have CUDA's bindings, by whose version NIXL chooses the package to load.
        "import cuda.bindings\n"
        "from nixl._api import nixl_agent, nixl_agent_config\n"
        "nixl_agent('probe', nixl_agent_config(backends=[])).create_backend('POSIX', {})"
    )
    done = subprocess.run([sys.executable, "-c", create], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NIXL's POSIX plugin does not load here: {done.stderr.strip().splitlines()[-1]}")
    # Not every file system has direct I/O.
    return {"plugin": {"posix": {"active": True}}, "use_direct_io": False}


@pytest.mark.parametrize("name", FILES)
def test_a_hit_comes_from_another_engine_s_files(
    name: str, plugin: dict[str, object], model_of: Callable[[Sequence[str]], str], tmp_path: Path
) -> None:
    kind = KINDS[name]
    options = {
        **harness.XMEM_DRAM,
        "hicache_storage_backend": "nixl",
        "hicache_storage_backend_extra_config": json.dumps(plugin),
        "hicache_storage_prefetch_policy": "wait_complete",
    }
    spec = kind.spec(model_of(kind.model), options, {"SGLANG_HICACHE_NIXL_BACKEND_STORAGE_DIR": str(tmp_path)})

    def run(*steps: Step) -> dict[str, Answer]:
        result = harness.run(dataclasses.replace(spec, steps=steps))
        assert (result.tier, result.survivors) == ("dram", [])
        return result.answers

    pages = kind.hit // {**harness.BASE_OPTIONS, **kind.options}["page_size"]
    first = run(("ask", "cold", "A"), ("ask", "device_hit", "A"), ("await_files", str(tmp_path), pages * FILES[name]))
    assert sum(first["cold"].cached.values()) == 0
    expected = first["device_hit"]
    hit = run(("ask", "from_storage", "A"))["from_storage"]
    assert hit.cached.get("device", 0) == 0
    assert hit.cached["storage"] == kind.hit
    assert (hit.output_ids, hit.logprobs) == (expected.output_ids, expected.logprobs)

    # Negative control: other bytes in the files give another output.
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[::-1])
    other = run(("ask", "from_storage", "A"))["from_storage"]
    assert other.cached["storage"] == kind.hit
    assert (other.output_ids, other.logprobs) != (expected.output_ids, expected.logprobs)

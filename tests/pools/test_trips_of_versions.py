"""Trips of pages in the versions of SGLang that are not installed, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_xmem.engines.sglang import versions
from tests.unit.engines.other_sglang import unpacked

#: One case of each way in which versions differ: buffers of K and V, latents, indexers, states, windows, drafts.
KINDS = ("mha-16", "mla-64", "dsa-64", "gdn-16", "swa-16", "mha_packed_draft-16", "gdn_draft_sidecar-16")
#: pytest, once it is clear whose SGLang it is about to test.
RUN = "import sys, pytest, sglang; print('SGLang in', sglang.__path__[0]); sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.skipif(os.environ.get("SGLANG_USE_CPU_ENGINE") != "1", reason="builds SGLang's pools on the CPU")
@pytest.mark.parametrize("version", [version for version in versions.known() if version != versions.installed()])
def test_trips_of_another_version(version: str) -> None:
    """The pages' bytes, with the adapter's hooks on that version's classes."""
    folder = str(unpacked(version))
    chosen = " or ".join(f"back[xmem-{kind}-bfloat16" for kind in KINDS)
    done = subprocess.run(
        [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", "test_trips.py", "-k", chosen],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"SGLang in {folder}" in done.stdout
    assert f"{len(KINDS)} passed" in done.stdout

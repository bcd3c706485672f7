"""The Triton kernel in Triton's interpreter.

An environment variable chooses the interpreter before the first import of Triton, so the contract runs in a process of
its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from sglang_xmem.copies.geometry import Slab
from sglang_xmem.copies.triton import TritonPageCopier
from tests.contracts.copiers import CopierContract, Limits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter was not chosen")
class TestTriton(CopierContract):
    seeds = range(12)
    limits = Limits(units=1 << 18, pages=12, large=False)

    def make(self, slabs: Sequence[Slab], device: torch.device) -> TritonPageCopier:
        return TritonPageCopier(slabs, device, load_ctas=3, store_ctas=2)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_contract_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
    assert "5 passed" in answer.stdout, answer.stdout

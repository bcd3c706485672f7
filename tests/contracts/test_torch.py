"""The copier of CPU memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_xmem.copies.geometry import Slab
from sglang_xmem.copies.torch import TorchPageCopier
from tests.contracts.copiers import CopierContract


class TestTorch(CopierContract):
    seeds = range(150)
    reads_all_units = True

    def make(self, slabs: Sequence[Slab], device: torch.device) -> TorchPageCopier:
        return TorchPageCopier(slabs, device)

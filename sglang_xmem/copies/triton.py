"""The page copy by Triton: the same contract as the CUDA kernel's, without NVRTC and cuda-bindings.

With TRITON_INTERPRET=1 in the environment before Triton is first imported it runs on CPU planes too, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from sglang_xmem.copies.base import PageCopier

#: A tile of the kernel moves so many bytes, by so many warps: 8 accesses of 16 bytes a thread.
_TILE_BYTES = 65536
_NUM_WARPS = 16
_CTAS = 32


class TritonPageCopier(PageCopier):
    """Arguments as PageCopier's, and:

    Args:
        load_ctas, store_ctas: thread blocks of a launch at most; 0 is the default.
    """

    name = "triton"

    def __init__(
        self,
        tier_planes: Sequence[torch.Tensor],
        device_planes: Sequence[torch.Tensor],
        page_size: int,
        *,
        load_ctas: int = 0,
        store_ctas: int = 0,
    ) -> None:
        super().__init__(tier_planes, device_planes, page_size)
        # Imported on use: a machine without Triton still has the other copiers.
        import triton
        import triton.language as tl

        from sglang_xmem.kernels import page_copy_triton

        self._kernel = page_copy_triton.page_copy
        self._load_ctas, self._store_ctas = load_ctas or _CTAS, store_ctas or _CTAS
        tier = [plane.data_ptr() for plane in tier_planes]
        device = [plane.data_ptr() for plane in device_planes]
        self._tier_table = torch.tensor(tier, dtype=torch.int64, device=self._device)
        self._device_table = torch.tensor(device, dtype=torch.int64, device=self._device)
        if self._device.type == "cuda":
            # Launches may come on any stream; the tables must be there by then.
            torch.cuda.current_stream(self._device).synchronize()

        alignment = math.gcd(16, self.row_bytes, *tier, *device)
        word_bytes = min(alignment, 8)
        page_words = self.page_bytes // word_bytes
        tile_words = _TILE_BYTES // word_bytes
        block_words = min(triton.next_power_of_2(page_words), tile_words)
        self._block_pages = tile_words // block_words
        self._chunks = triton.cdiv(page_words, block_words)
        self._constants = {
            "WORD": {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[word_bytes],
            "PAGE_WORDS": page_words,
            "ALIGNMENT": alignment,
            "BLOCK_PAGES": self._block_pages,
            "BLOCK_WORDS": block_words,
        }

    def describe(self) -> str:
        return f"{self.name} (ctas: load {self._load_ctas}, store {self._store_ctas})"

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        num_pages = tier_rows.numel()
        tiles = len(planes) * self._chunks * -(-num_pages // self._block_pages)
        tier = (self._tier_table[planes.start :], tier_rows)
        device = (self._device_table[planes.start :], device_rows)
        (src_table, src_rows), (dst_table, dst_rows) = (tier, device) if load else (device, tier)
        grid = (min(tiles, self._load_ctas if load else self._store_ctas),)
        # Triton launches on the current device, which need not be that of the planes.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            self._kernel[grid](
                src_table,
                dst_table,
                len(planes),
                src_rows,
                src_rows.stride(0),
                dst_rows,
                dst_rows.stride(0),
                num_pages,
                self.row_bytes,
                num_warps=_NUM_WARPS,
                **self._constants,
            )

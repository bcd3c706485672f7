"""The page copy by Triton: the CUDA kernel's contract, without NVRTC and cuda-bindings.

If TRITON_INTERPRET=1 is set before Triton is first imported, it also runs on CPU memory, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from sglang_xmem.copies.base import PageCopier, Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.geometry import Slab, alignment_of

#: Bytes and warps of a tile: 8 accesses of 16 bytes per thread.
_TILE_BYTES = 65536
_NUM_WARPS = 16
#: Bytes per unit in a tile of several units.
_LEAST_BYTES = 512
_CTAS = 32


class TritonPageCopier(PageCopier):
    """Arguments as for PageCopier, and:

    Args:
        load_ctas, store_ctas: maximum thread blocks of a launch.
    """

    name = "triton"

    def __init__(
        self, slabs: Sequence[Slab], device: torch.device, *, load_ctas: int = _CTAS, store_ctas: int = _CTAS
    ) -> None:
        super().__init__(slabs, device)
        if load_ctas < 1 or store_ctas < 1:
            raise ValueError(f"ctas must be at least 1, not {load_ctas} to load and {store_ctas} to store")
        self.load_ctas, self.store_ctas = load_ctas, store_ctas

    def compile(self, steps: Sequence[Step], num_parts: int) -> TritonProgram:
        return TritonProgram(self, steps, num_parts)

    def describe(self) -> str:
        return f"{self.name} (ctas: load {self.load_ctas}, store {self.store_ctas})"

    def _copy(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: LayerCounters | None) -> None:
        assert isinstance(program, TritonProgram)
        if counters is not None:
            raise ValueError("the copier 'triton' has no counters")
        program.launch(pages, load=load, ctas=self.load_ctas if load else self.store_ctas)


class TritonProgram(Program):
    """A program with its table of planes and the kernel's compile-time constants."""

    def __init__(self, copier: PageCopier, steps: Sequence[Step], num_parts: int) -> None:
        super().__init__(copier, steps, num_parts)
        # Imported on use: a machine without Triton still has the other copiers.
        import triton
        import triton.language as tl

        from sglang_xmem.kernels import page_copy_triton

        self._kernel: Any = page_copy_triton.page_copy
        self._disguised = page_copy_triton.disguised
        alignment = alignment_of(copier.slabs, [step.plane for step in steps], 16)
        word_bytes = min(alignment, 8)
        tile_words = _TILE_BYTES // word_bytes
        # Small units share a tile, with some words of each: as many as the smallest unit has, but whole cache lines.
        words = [step.plane.unit_bytes // word_bytes for step in steps]
        least = min((number for number in words if 2 * number <= tile_words), default=tile_words)
        table = [
            [
                step.plane.device_address,
                step.plane.device_stride,
                step.plane.offset,
                step.plane.divisor,
                step.plane.unit_bytes // alignment,
                step.vector,
                int(2 * number > tile_words),
            ]
            for step, number in zip(steps, words, strict=True)
        ]
        self._table = torch.tensor(table, dtype=torch.int64).to(copier.device)
        if copier.device.type == "cuda":
            # Launches may use any stream, so the table must be complete.
            torch.cuda.current_stream(copier.device).synchronize()
        self._constants = {
            "WORD": {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[word_bytes],
            "ALIGNMENT": alignment,
            "TILE_WORDS": tile_words,
            "NARROW_WORDS": max(triton.next_power_of_2(least), _LEAST_BYTES // word_bytes),
            "VECTORS": self.num_vectors,
            "RECORD": page_copy_triton.RECORD_WORDS,
            "MERGED": alignment // word_bytes,
        }

    def launch(self, pages: Sequence[Pages], *, load: bool, ctas: int) -> None:
        """Enqueue a move by `ctas` thread blocks on the current stream."""
        numbers: list[int] = []
        for frames, slots in pages[: self.num_vectors]:
            numbers += (frames.data_ptr(), slots.data_ptr(), slots.stride(0), frames.numel())
        device = self.copier.device
        # Triton launches on the current device, which may differ from the pools' device.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._kernel[(ctas,)](
                self._table,
                len(self.steps),
                tuple(self._disguised(number) for number in numbers),
                LOAD=load,
                num_warps=_NUM_WARPS,
                **self._constants,
            )

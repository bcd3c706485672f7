"""The paged allocator of SGLang 0.5.21, which has only Triton kernels; later versions never call this module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Launch:
    """A function with the call syntax of a Triton kernel: kernel[grid](arguments)."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._function


def alloc_extend(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    batch_upper: int,
    page_size: int,
    *args: Any,
) -> None:
    """Give each request slots for its tokens: the rest of its last page, then free pages in order."""
    from sglang.srt.mem_cache.allocator import paged

    paged.alloc_extend_naive(prefix_lens, seq_lens, last_loc, free_pages, out_indices, page_size, out_indices.device)


def alloc_decode(
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    batch_upper: int,
    page_size: int,
    *args: Any,
) -> None:
    """Give each request a slot for one more token: the next of its page, or the first of a free one."""
    opens_page = (seq_lens - 1) % page_size == 0
    page = (torch.cumsum(opens_page, 0) - 1).clamp(min=0)
    out_indices.copy_(torch.where(opens_page, free_pages[page] * page_size, last_loc + 1))


def register() -> None:
    """Replace both kernels of 0.5.21."""
    from sglang.srt.mem_cache.allocator import paged

    paged.alloc_extend_kernel = Launch(alloc_extend)
    paged.alloc_decode_kernel = Launch(alloc_decode)

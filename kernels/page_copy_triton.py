"""The page copy in Triton: the portable variant, for a GPU (or an interpreter on the CPU) without NVRTC.

The same contract as `page_copy.cu`: plane addresses come as tables of int64 and are made pointers in the kernel, so
that memory of which torch knows nothing (a peer GPU, another process) can be named.
"""

# The parameters of a kernel have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


# Nothing may depend on what changes from call to call, or Triton would compile again in the middle of serving.
@triton.jit(
    do_not_specialize=["num_planes", "src_rows_stride", "dst_rows_stride", "num_pages"],
    do_not_specialize_on_alignment=["src_planes", "dst_planes", "src_rows", "dst_rows"],
)
def page_copy(
    src_planes,  # int64[num_planes]: base addresses
    dst_planes,
    num_planes,
    src_rows,  # int64[num_pages] with an element stride: first row of each page
    src_rows_stride,
    dst_rows,
    dst_rows_stride,
    num_pages,
    row_bytes,
    WORD: tl.constexpr,  # integer type whose size all addresses are multiples of
    PAGE_WORDS: tl.constexpr,  # words a page
    ALIGNMENT: tl.constexpr,  # bytes, 1 to 16, that all addresses are multiples of
    BLOCK_PAGES: tl.constexpr,  # a tile is BLOCK_PAGES pages times BLOCK_WORDS words of each
    BLOCK_WORDS: tl.constexpr,
):
    """A fixed number of programs walks the tiles of all planes; a tile is one masked 2-D load and store."""
    chunks: tl.constexpr = (PAGE_WORDS + BLOCK_WORDS - 1) // BLOCK_WORDS
    blocks = tl.cdiv(num_pages, BLOCK_PAGES)
    tiles_per_plane = blocks * chunks
    tile = tl.program_id(0)
    while tile < num_planes * tiles_per_plane:  # not `for`: Triton's interpreter has no range with NumPy 2.4
        plane = tile // tiles_per_plane
        block = tile % tiles_per_plane // chunks
        chunk = tile % chunks  # tiles_per_plane is a multiple of chunks

        page = (block * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)).to(tl.int64)
        page_mask = page < num_pages
        src = tl.load(src_planes + plane) + tl.load(src_rows + page * src_rows_stride, page_mask, other=0) * row_bytes
        dst = tl.load(dst_planes + plane) + tl.load(dst_rows + page * dst_rows_stride, page_mask, other=0) * row_bytes
        # The hint is lost by casts, so it comes behind them: words are merged to accesses of up to 16 bytes.
        src_pages = tl.multiple_of(src.to(tl.pointer_type(WORD), bitcast=True), [ALIGNMENT])
        dst_pages = tl.multiple_of(dst.to(tl.pointer_type(WORD), bitcast=True), [ALIGNMENT])

        words = chunk * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        mask = page_mask[:, None] & (words < PAGE_WORDS)[None, :]
        values = tl.load(src_pages[:, None] + words[None, :], mask)
        tl.store(dst_pages[:, None] + words[None, :], values, mask)
        tile += tl.num_programs(0)

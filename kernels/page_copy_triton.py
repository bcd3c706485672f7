"""The page copy in Triton: the portable variant, for a GPU (or an interpreter on the CPU) without NVRTC.

The same contract as `page_copy.cu`: the kernel converts integer addresses to pointers, so it can access memory that
torch does not manage (a peer GPU, another process).
"""

# mypy does not know the types of a kernel's parameters. mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

#: Numbers of a plane's record in the table: address of unit 0, unit stride in bytes, offset in the frame, divisor,
#: accesses of ALIGNMENT bytes per unit, vector, and whether its tiles are wide.
RECORD_WORDS = 7

#: Triton specializes on each integer of a tuple that is 1, a multiple of 16 or below 2^31, even when asked not to. So
#: numbers are encoded to be none of these.
_FAR = tl.constexpr(1 << 33)


def disguised(number: int) -> int:
    """Encode a number, 0 to 2^60, for `page_copy`'s tuple."""
    return 2 * number + 1 + (1 << 33)


@triton.jit
def _number(disguised):
    return (disguised - _FAR) >> 1


@triton.jit
def _copy_tile(
    frames,  # int64: address of the vector's frames
    slots,  # int64: address of its slots
    slots_stride,
    count,  # pages of the vector
    device,  # int64: address of unit 0
    stride,
    offset,
    divisor,
    unit_words,
    tile,  # number of the tile in its plane
    LOAD: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UNITS: tl.constexpr,  # a tile has UNITS units times WORDS words
    WORDS: tl.constexpr,
):
    """Copy one tile by one masked 2-D load and store."""
    chunks = tl.cdiv(unit_words, WORDS)
    page = tile // chunks * UNITS + tl.arange(0, UNITS).to(tl.int64)
    page_mask = page < count
    frame_pointers = frames.to(tl.pointer_type(tl.int64), bitcast=True)
    slot_pointers = slots.to(tl.pointer_type(tl.int64), bitcast=True)
    there = tl.load(frame_pointers + page, page_mask, other=0) + offset
    here = tl.load(slot_pointers + page * slots_stride, page_mask, other=0) // divisor * stride + device
    # Casts drop the hint, so it follows them: words are merged to accesses of up to 16 bytes.
    tier_units = tl.multiple_of(there.to(tl.pointer_type(WORD), bitcast=True), [ALIGNMENT])
    device_units = tl.multiple_of(here.to(tl.pointer_type(WORD), bitcast=True), [ALIGNMENT])

    words = tile % chunks * WORDS + tl.arange(0, WORDS)
    mask = page_mask[:, None] & (words < unit_words)[None, :]
    if LOAD:
        values = tl.load(tier_units[:, None] + words[None, :], mask)
        tl.store(device_units[:, None] + words[None, :], values, mask)
    else:
        values = tl.load(device_units[:, None] + words[None, :], mask)
        tl.store(tier_units[:, None] + words[None, :], values, mask)


# No constant may depend on values that change per call, or Triton would recompile while serving.
@triton.jit(
    do_not_specialize=["num_planes", "vectors"],
    do_not_specialize_on_alignment=["table"],
)
def page_copy(
    table,  # int64[num_planes, RECORD_WORDS]
    num_planes,
    vectors,  # tuple of VECTORS times four numbers, disguised: address of frames, of slots, slots_stride, pages
    LOAD: tl.constexpr,
    WORD: tl.constexpr,  # integer type whose size all addresses and sizes are multiples of
    ALIGNMENT: tl.constexpr,  # common alignment in bytes, 1 to 16
    TILE_WORDS: tl.constexpr,
    NARROW_WORDS: tl.constexpr,  # words of each unit in a tile of a plane whose tiles are not wide
    VECTORS: tl.constexpr,  # vectors that the program's planes name
    RECORD: tl.constexpr,
    MERGED: tl.constexpr,  # words of an access of ALIGNMENT bytes
):
    """Copy the tiles of all planes, plane by plane, with a fixed number of programs."""
    NARROW_UNITS: tl.constexpr = TILE_WORDS // NARROW_WORDS
    mine = tl.program_id(0).to(tl.int64)  # number in its plane of this program's next tile
    plane = 0
    while plane < num_planes:  # not `for`: Triton's interpreter has no range with NumPy 2.4
        record = table + plane * RECORD
        device = tl.load(record)
        stride = tl.load(record + 1)
        offset = tl.load(record + 2)
        divisor = tl.load(record + 3)
        # The compiler sees that it is a multiple, and with it the mask of a merged access.
        unit_words = tl.load(record + 4) * MERGED
        vector = tl.load(record + 5)
        wide = tl.load(record + 6)
        frames, slots, slots_stride, count = vectors[0], vectors[1], vectors[2], vectors[3]
        for other in tl.static_range(1, VECTORS):
            frames = tl.where(vector == other, vectors[4 * other], frames)
            slots = tl.where(vector == other, vectors[4 * other + 1], slots)
            slots_stride = tl.where(vector == other, vectors[4 * other + 2], slots_stride)
            count = tl.where(vector == other, vectors[4 * other + 3], count)
        frames, slots, slots_stride, count = _number(frames), _number(slots), _number(slots_stride), _number(count)
        if wide != 0:
            tiles = count * tl.cdiv(unit_words, TILE_WORDS)
            while mine < tiles:
                _copy_tile(
                    frames, slots, slots_stride, count, device, stride, offset, divisor, unit_words, mine,
                    LOAD, WORD, ALIGNMENT, 1, TILE_WORDS,
                )  # fmt: skip
                mine += tl.num_programs(0)
        else:
            tiles = tl.cdiv(count, NARROW_UNITS) * tl.cdiv(unit_words, NARROW_WORDS)
            while mine < tiles:
                _copy_tile(
                    frames, slots, slots_stride, count, device, stride, offset, divisor, unit_words, mine,
                    LOAD, WORD, ALIGNMENT, NARROW_UNITS, NARROW_WORDS,
                )  # fmt: skip
                mine += tl.num_programs(0)
        mine -= tiles
        plane += 1

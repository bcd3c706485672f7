// Computes checksums of pages from their units on the device, and writes them to a table in host memory or compares
// them. Compiled at run time by NVRTC, so: no #include. `unit_sums` of sglang_xmem/sums.py computes the same.
//
// A group is one pool's share of a move: `planes` planes from number `first`, and `count` pages with sums. Page i of a
// group is row rows[i] of the move's vectors, and its sum is stored at entries[i]. A warp processes an item: a unit of
// a page. The units' sums are added in `scratch`, which has two initially zero words per page of all groups: the sum,
// and the number of units in it. The warp with the last unit finishes the page.
//
// The kernel reads the device's side, not the tier's: its memory is many times faster than the link, which stays free.
//
// Macros: PIECE_BYTES (1, 2, 4, 8), which divides every address and size; THREADS.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

#ifndef PIECE_BYTES
#define PIECE_BYTES 8
#endif
#ifndef THREADS
#define THREADS 512
#endif

#define MAX_VECTORS 16

struct Plane {
    u64 device, stride;  // address of unit 0, bytes from one unit to the next
    u64 offset;          // of the unit in its frame
    u64 slot_magic;      // divides a slot by the plane's divisor: see `divide`
    u64 unit_bytes;
    u64 vector;
};

struct Vector {
    u64 slots;  // address of s64[], slots_stride elements apart
    s64 slots_stride;
};

struct Group {
    u64 rows, entries;  // addresses of s64[count]
    u64 count;
    u32 first, planes;
};

struct Work {
    Vector vectors[MAX_VECTORS];
    Group groups[MAX_VECTORS];
};

// ------------------------------------------------------------------------------- machine instructions

#ifdef PAGE_COPY_MACHINE
#include PAGE_COPY_MACHINE
#else

static __device__ __forceinline__ u64 load_index(const void *address) {
    u64 value;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(value) : "l"(address));
    return value;
}

// Not the non-coherent path, since other units of the same pools are written concurrently; each byte passes once.
static __device__ __forceinline__ u64 load_piece(u64 address) {
#if PIECE_BYTES == 8
    u64 value;
    asm("ld.global.L1::no_allocate.b64 %0, [%1];" : "=l"(value) : "l"(address));
    return value;
#elif PIECE_BYTES == 4
    return *(const u32 *)address;
#elif PIECE_BYTES == 2
    return *(const u16 *)address;
#else
    return *(const u8 *)address;
#endif
}

// Adds to a word of this GPU's memory, and returns its previous value, with acquire and release order. Host memory has
// no atomic additions over PCIe.
static __device__ __forceinline__ u64 add_to(u64 address, u64 value) {
    u64 before;
    asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;" : "=l"(before) : "l"(address), "l"(value) : "memory");
    return before;
}

static __device__ __forceinline__ void store_word(u64 address, u64 value) {
    asm volatile("st.global.b64 [%0], %1;" : : "l"(address), "l"(value) : "memory");
}

#endif

// --------------------------------------------------------------------------------------------------------------- sums

// n / divisor, with magic = ceil(2^64 / divisor), or 0 for 1.
static __device__ __forceinline__ u64 divide(u64 n, u64 magic) { return magic ? __umul64hi(n, magic) : n; }

#define PLACE 0x9E3779B97F4A7C15ull
#define BATCH 8  // words in flight per lane: 4 MiB over a whole H100, which its memory needs

// `key` is (place + 1) * PLACE.
static __device__ __forceinline__ u64 mix(u64 word, u64 key) {
    word ^= key;
    word *= 0xFF51AFD7ED558CCDull;
    word ^= word >> 32;
    word *= 0xC4CEB9FE1A85EC53ull;
    return word ^ word >> 32;
}

// A word of which only `bytes` exist, a multiple of PIECE_BYTES; the rest is zero.
static __device__ __forceinline__ u64 load_word(u64 address, u32 bytes) {
    u64 word = 0;
#pragma unroll
    for (u32 at = 0; at < 8; at += PIECE_BYTES)
        if (at < bytes) word |= load_piece(address + at) << (8 * at);
    return word;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    page_sum(const Plane *planes, u32 num_groups, u32 store, u64 scratch, u64 report, const __grid_constant__ Work work) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 stride = gridDim.x * (THREADS / 32);
    u32 number = 0;         // of the group
    u64 begin = 0;          // items of the previous groups
    u64 pages = 0;          // pages of the previous groups
    for (u64 item = blockIdx.x * (THREADS / 32) + warp;; item += stride) {
        while (number < num_groups && item - begin >= work.groups[number].count * work.groups[number].planes) {
            begin += work.groups[number].count * work.groups[number].planes;
            pages += work.groups[number].count;
            ++number;
        }
        if (number == num_groups) return;
        const Group &group = work.groups[number];
        const u32 nth = (u32)(item - begin), page = nth / group.planes;
        const Plane *plane = planes + group.first + nth % group.planes;
        const Vector &vector = work.vectors[load_index(&plane->vector)];
        const u64 row = load_index((const void *)(group.rows + 8 * page));
        const u64 slot = load_index((const void *)(vector.slots + 8 * row * vector.slots_stride));
        const u64 unit = load_index(&plane->device) + divide(slot, load_index(&plane->slot_magic)) * load_index(&plane->stride);
        const u64 offset = load_index(&plane->offset), bytes = load_index(&plane->unit_bytes);
        u64 sum = 0, at = 8 * lane, key = (offset + at + 1) * PLACE;
        for (; at + 256 * (BATCH - 1) + 8 <= bytes; at += 256 * BATCH) {
            u64 words[BATCH];
#pragma unroll
            for (u32 n = 0; n < BATCH; ++n) words[n] = load_word(unit + at + 256 * n, 8);
#pragma unroll
            for (u32 n = 0; n < BATCH; ++n, key += 256 * PLACE) sum += mix(words[n], key);
        }
        for (; at + 8 <= bytes; at += 256, key += 256 * PLACE) sum += mix(load_word(unit + at, 8), key);
        const u64 whole = bytes / 8 * 8;
        if (lane == 0 && whole < bytes) sum += mix(load_word(unit + whole, (u32)(bytes - whole)), (offset + whole + 1) * PLACE);
        for (u32 distance = 16; distance; distance /= 2) sum += __shfl_sync(~0u, sum, lane ^ distance);
        if (lane) continue;

        const u64 meeting = scratch + 16 * (pages + page);
        add_to(meeting, sum);
        if (add_to(meeting + 8, 1) + 1 < group.planes) continue;
        const u64 total = load_index((const void *)meeting), entry = total ? total : 1;
        const u64 place = load_index((const void *)(group.entries + 8 * page));
        if (store) {
            store_word(place, entry);
        } else {
            const u64 known = load_index((const void *)place);
            if (known && known != entry) {
                add_to(report, 1);
                store_word(report + 8, (u64)number << 32 | page);
            }
        }
    }
}

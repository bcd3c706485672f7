// Copies pages of the KV cache between frames of a memory tier and the arrays of any pools on the device, in one launch.
// Compiled at run time by NVRTC, so: no #include.
//
// A plane is an array on the device in which each page has one contiguous unit. A page's units of all planes are in one
// frame, at an offset that the plane fixes. Pages are passed as vectors, one per index space. Page i of a plane's
// vector is copied (`load`: to the device, otherwise to the tier) between
//   frames[i] + offset                                    the tier's side, and
//   device + slots[i * slots_stride] / divisor * stride   the device's side.
// The addresses may be local HBM, a peer GPU's HBM or pinned host memory.
//
// Both variants have the same name and signature. They run concurrently with the forward pass, so the grid is a few
// CTAs that walk all the work ("persistent"). Every *warp* processes one tile at a time with a stride of all warps of
// the grid, and no warp ever waits for another. Tiles are numbered plane after plane; a tile never crosses planes. A
// plane's number of tiles is its number of pages times a factor in the plane's record, so the host computes nothing
// that depends on both.
//
// A load is one launch for all layers, and the forward pass waits for each layer separately. Planes are sorted by the
// part of the load (a layer) that they belong to. Each warp of the grid adds 1 to `counters[p]` (if counters is not
// null) when it has completed all parts up to p, also if a part has no planes or no pages. A stream waits for the sum
// over all warps (cuStreamWaitValue32).
//
// Macros, all with defaults (PAGE_COPY_BULK chooses the variant):
//   register variant: VEC_BYTES (1, 2, 4, 8, 16), THREADS, UNROLL, STREAMING
//   bulk variant (sm_90 and newer): RINGS, STAGES, STAGE_BYTES, PENDING_STORES
//
// Correctness across streams: the caller orders this kernel by events after the writes of the source, and a kernel
// starts with an invalidated L1. Ordinary (weak) loads then see the data, local or peer. The non-coherent path
// (ld.global.nc) requires that nothing writes near these bytes while the kernel runs. That does not hold: other streams
// and the peer write other pages of the same pools, and a 32-byte sector may hold two units.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

#ifndef PAGE_COPY_BULK
#define PAGE_COPY_BULK 0
#endif

#if !PAGE_COPY_BULK
#ifndef VEC_BYTES
#define VEC_BYTES 16
#endif
#ifndef THREADS
#define THREADS 512
#endif
#ifndef UNROLL
#define UNROLL 8
#endif
#ifndef STREAMING
#define STREAMING 0
#endif
#define WARPS (THREADS / 32)
#define TILE_PIECES (32 * UNROLL)
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "the bulk variant needs sm_90 or newer"
#endif
#ifndef RINGS
#define RINGS 1
#endif
#ifndef STAGES
#define STAGES 8
#endif
#ifndef STAGE_BYTES
#define STAGE_BYTES 16384
#endif
#ifndef PENDING_STORES
#define PENDING_STORES 2
#endif
#define WARPS RINGS
#define TILE_PIECES 1
#endif

#define MAX_VECTORS 16

// One vector of pages of this launch. It is part of the launch's parameters, because a load must not upload anything.
struct Pages {
    u64 frames;        // address of s64[count]: start of each page's frame
    u64 slots;         // address of s64[count], slots_stride elements apart: first slot of each page on the device
    s64 slots_stride;
    u64 count;
};

struct Vectors {
    Pages of[MAX_VECTORS];
};

// A plane's record; the host writes it once for all launches. A unit consists of *pieces*: vectors of VEC_BYTES in the
// register variant, chunks of at most one stage in the bulk variant.
struct Plane {
    u64 device, stride;  // address of unit 0, bytes from one unit to the next
    u64 offset;          // of the unit in its frame
    u64 slot_magic;      // divides a slot by the plane's divisor: see `divide`
    u64 piece_magic;     // divides by `pieces`
    u64 shape;           // pieces of a unit (32 bits), number of the vector (16), part (16), from low to high
    u32 first, second;   // register: magic and shift of Divider(pieces); bulk: bytes of a chunk and of a unit
    u64 unused;
};

// ------------------------------------------------------------------------------- machine instructions
//
// Tests run the rest of this file on a CPU, with these written in C++ (tests/emulation/machine.h).

#ifdef PAGE_COPY_MACHINE
#include PAGE_COPY_MACHINE
#else

// Tables and vectors: volatile asm keeps these loads in place, before a long wait.
static __device__ __forceinline__ u64 load_index(const void *address) {
    u64 value;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(value) : "l"(address));
    return value;
}

static __device__ __forceinline__ void fence_writes() { asm volatile("fence.acq_rel.sys;" : : : "memory"); }

static __device__ __forceinline__ void raise_counter(u32 *counter) {
    asm volatile("red.relaxed.sys.global.add.u32 [%0], 1;" : : "l"(counter) : "memory");
}

#if !PAGE_COPY_BULK

// The compiler recomputes what depends on the value after this point, instead of keeping it in registers.
static __device__ __forceinline__ void work_out_anew(u32 &value) { asm volatile("" : "+r"(value)); }

// L1 is useless for both sides: each byte passes once. STREAMING also marks the lines evict-first in L2, which protects
// the forward pass's working set but drops what attention reads right after a load.
#if STREAMING
#define CACHE_HINT ".cs"
#else
#define CACHE_HINT ".L1::no_allocate"
#endif

#if VEC_BYTES == 16
struct Vec {
    u32 x, y, z, w;
};
static __device__ __forceinline__ void load_vec(Vec &v, u64 address) {
    asm volatile("ld.global" CACHE_HINT ".v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
}
static __device__ __forceinline__ void store_vec(u64 address, const Vec &v) {
    asm volatile("st.global" CACHE_HINT ".v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
#else
#if VEC_BYTES == 8
typedef u64 Vec;
#define VEC_TYPE ".u64"
#define VEC_REG "l"
#elif VEC_BYTES == 4
typedef u32 Vec;
#define VEC_TYPE ".u32"
#define VEC_REG "r"
#elif VEC_BYTES == 2
typedef u16 Vec;
#define VEC_TYPE ".u16"
#define VEC_REG "h"
#elif VEC_BYTES == 1
typedef u16 Vec;  // inline PTX has no 8-bit register; ld.u8 and st.u8 take a 16-bit one
#define VEC_TYPE ".u8"
#define VEC_REG "h"
#else
#error "VEC_BYTES must be 1, 2, 4, 8 or 16"
#endif
static __device__ __forceinline__ void load_vec(Vec &v, u64 address) {
    asm volatile("ld.global" CACHE_HINT VEC_TYPE " %0, [%1];" : "=" VEC_REG(v) : "l"(address));
}
static __device__ __forceinline__ void store_vec(u64 address, const Vec &v) {
    asm volatile("st.global" CACHE_HINT VEC_TYPE " [%0], %1;" : : "l"(address), VEC_REG(v) : "memory");
}
#endif

#else  // PAGE_COPY_BULK

static __device__ __forceinline__ u32 shared_address(const void *pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

static __device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

static __device__ __forceinline__ void bulk_load(u32 to, u64 from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

static __device__ __forceinline__ void bulk_store(u64 to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :
                 : "l"(to), "r"(from), "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void barrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(barrier) : "memory");
}

static __device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

static __device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }

// Waits until all but this lane's last PENDING_STORES groups have left shared memory.
static __device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(PENDING_STORES) : "memory");
}

// Waits until all of this lane's groups have arrived at their destinations.
static __device__ __forceinline__ void bulk_wait_all() {
    asm volatile("cp.async.bulk.wait_group 0;" : : : "memory");
}

#endif  // PAGE_COPY_BULK

#endif  // PAGE_COPY_MACHINE

// ------------------------------------------------------------------------------------------------ both variants

// n / divisor by magic = ceil(2^64 / divisor), or 0 for divisor 1. Exact while n * divisor < 2^64, so for slots of 40
// bits and divisors of 24.
static __device__ __forceinline__ u64 divide(u64 n, u64 magic) { return magic ? __umul64hi(n, magic) : n; }

struct Shape {
    u32 pieces, vector, part;

    __device__ __forceinline__ explicit Shape(u64 word)
        : pieces((u32)word), vector((u32)(word >> 32) & 0xffff), part((u32)(word >> 48)) {}
};

// Reports a warp's progress by the part of its next tile.
struct Progress {
    u32 *counters;
    u32 raised;  // counters that the warp has raised; none is ever due without counters

    __device__ __forceinline__ explicit Progress(u32 *counters) : counters(counters), raised(counters ? 0 : ~0u) {}

    __device__ __forceinline__ bool due(u32 part) const { return part > raised; }

    // Declares all of the warp's tiles in parts before `part` complete for its lanes. All lanes call this.
    __device__ __forceinline__ void raise(u32 part, u32 lane) {
        if (!due(part)) return;
        // Order: all lanes' writes, the barrier, the fence, each addition. So a stream that sees a counter sees the
        // writes. There is one fence for all due counters, since a fence waits until all writes in flight over the link
        // have arrived. A releasing addition is a fence too: with these, a warp with a tile in every fourth part of a
        // small load would wait five times per tile.
        __syncwarp();
        if (lane == 0) fence_writes();
        do {
            if (lane == 0) raise_counter(counters + raised);
            ++raised;
        } while (due(part));
    }
};

// Finds the planes of tiles with increasing numbers. Each lane holds the end of one of 32 planes' tiles; the warp moves
// on to the next 32 planes, already fetched, when it has passed these. Tiles are counted from the first of the current
// planes, and the caller's count is adjusted when these change. The host ensures that 32 bits suffice.
struct Walk {
    const Plane *planes;
    const Vectors &vectors;
    const u32 num_planes, lane;
    u32 block = 0;  // first of the 32 current planes; lane i has plane block + i
    u32 end = 0;    // of the tiles of this lane's plane
    u64 ahead;      // shape of plane block + 32 + lane

    __device__ __forceinline__ Walk(const Plane *planes, u32 num_planes, const Vectors &vectors, u32 lane)
        : planes(planes), vectors(vectors), num_planes(num_planes), lane(lane) {
        const u64 shape = fetch(lane);
        ahead = fetch(32 + lane);
        end = sum(lane, shape);
    }

    // Returns the plane with this tile, and the tile's number in it; num_planes if there is none. All lanes pass the
    // same tile.
    __device__ __forceinline__ u32 find(u32 &tile, u32 &in_plane) {
        while (tile >= __shfl_sync(~0u, end, 31)) {
            if (block + 32 >= num_planes) return num_planes;
            tile -= advance();
        }
        const u32 at = __popc(__ballot_sync(~0u, end <= tile));
        const u32 begin = __shfl_sync(~0u, end, at - 1);  // of lane 31 for at = 0
        in_plane = tile - (at ? begin : 0);
        return block + at;
    }

    // The same for a different tile per lane; higher lanes have higher tiles.
    __device__ __forceinline__ u32 find_each(u32 &tile, u32 &in_plane) {
        u32 plane = num_planes;
        while (true) {
            const u32 size = __shfl_sync(~0u, end, 31);
            u32 at = 0;
#pragma unroll
            for (u32 step = 16; step; step /= 2)
                if (__shfl_sync(~0u, end, at + step - 1) <= tile) at += step;
            const u32 begin = __shfl_sync(~0u, end, at - 1);
            // A lane that already has its plane counts from a later plane, below zero: its result is ignored.
            if (plane == num_planes && tile < size) {
                plane = block + at;
                in_plane = tile - (at ? begin : 0);
            }
            // The last lane's tile is the highest: done when it has its plane, or no plane has it.
            if (__shfl_sync(~0u, plane, 31) != num_planes || block + 32 >= num_planes) return plane;
            tile -= advance();
        }
    }

  private:
    __device__ __forceinline__ u64 fetch(u32 plane) const {
        return load_index(&planes[min(plane, num_planes - 1)].shape);
    }

    // Moves on to the next 32 planes; returns the number of tiles of the previous ones.
    __device__ __forceinline__ u32 advance() {
        const u32 size = __shfl_sync(~0u, end, 31);
        const u64 shape = ahead;
        block += 32;
        ahead = fetch(block + 32 + lane);
        end = sum(block + lane, shape);
        return size;
    }

    // Sum of tiles of all lanes' planes up to this lane's.
    __device__ __forceinline__ u32 sum(u32 plane, u64 word) const {
        const Shape shape(word);
        const u64 pieces = plane < num_planes ? vectors.of[shape.vector].count * shape.pieces : 0;
        u32 tiles = (u32)((pieces + TILE_PIECES - 1) / TILE_PIECES);
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            const u32 before = __shfl_up_sync(~0u, tiles, distance);
            if (lane >= distance) tiles += before;
        }
        return tiles;
    }
};

#if !PAGE_COPY_BULK

// ---------------------------------------------------------------------------------------------------- register variant
//
// A tile is 32 * UNROLL vectors of a plane's concatenated units. A lane issues UNROLL loads before its first store;
// during the loads it computes the store addresses, finds the next tile and fetches its pages.

#define BATCH (UNROLL % 4 == 0 ? 4 : 1)

// Division by a number for which the host has computed magic and shift: shift = 31 + ceil(log2(divisor)), magic =
// 2^shift / divisor + 1. Exact for 0 <= n < 2^31 and 1 <= divisor < 2^31 (Granlund, Montgomery).
struct Divider {
    u32 magic, shift;

    __device__ __forceinline__ u32 operator()(u32 n) const { return (u32)(((u64)n * magic) >> shift); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    page_copy(const Plane *planes, u32 num_planes, u32 load, u32 *counters, u32 num_parts,
              const __grid_constant__ Vectors vectors) {
    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform in the warp, for nvcc
    const u32 stride = gridDim.x * WARPS;
    u32 tile = blockIdx.x * WARPS + warp;
    Walk walk(planes, num_planes, vectors, lane);
    Progress progress(counters);

    // The next tile: its plane, and lane i's entries of its vector for the tile's i-th page. The rest of the record is
    // read later, from L1: registers limit the loads in flight.
    u32 plane, page, offset, vecs;  // offset: of the tile's first vector in its page
    u64 frame, slot;
    auto fetch = [&] {
        u32 in_plane = 0;
        plane = walk.find(tile, in_plane);
        if (plane == num_planes) return;
        const Plane *record = planes + plane;
        const u64 piece_magic = load_index(&record->piece_magic), word = load_index(&record->shape);
        const Shape shape(word);
        const Pages &pages = vectors.of[shape.vector];
        const u64 start = (u64)in_plane * TILE_PIECES;
        page = (u32)divide(start, piece_magic);
        offset = (u32)(start - (u64)page * shape.pieces);
        vecs = (u32)min(pages.count * shape.pieces - start, (u64)TILE_PIECES);
        const u64 mine = min((u64)page + lane, pages.count - 1);
        frame = load_index((const void *)(pages.frames + 8 * mine));
        slot = load_index((const void *)(pages.slots + 8 * mine * pages.slots_stride));
    };
    fetch();

    while (plane != num_planes) {
        const Plane *record = planes + plane;
        const Shape shape(load_index(&record->shape));
        progress.raise(shape.part, lane);
        const u64 device = load_index(&record->device), device_stride = load_index(&record->stride);
        const u64 slot_magic = load_index(&record->slot_magic);
        const u64 there = frame + load_index(&record->offset), here = device + divide(slot, slot_magic) * device_stride;
        const u64 src = load ? there : here, dst = load ? here : there;
        const u64 division = load_index(&record->first);
        const Divider nth_of = {(u32)division, (u32)(division >> 32)};
        const u32 this_plane = plane, this_page = page, this_vecs = shape.pieces;
        u32 mine = offset + lane;
        const u32 last = offset + vecs - 1;
        tile += stride;

        Vec data[UNROLL];
        if (offset + TILE_PIECES <= this_vecs) {
            // The whole tile is in one page: one base address, constant offsets.
            const u64 from = __shfl_sync(~0u, src, 0) + (u64)mine * VEC_BYTES;
            const u64 to = __shfl_sync(~0u, dst, 0) + (u64)mine * VEC_BYTES;
#pragma unroll
            for (u32 u = 0; u < UNROLL; ++u) load_vec(data[u], from + u * 32 * VEC_BYTES);
            fetch();
#pragma unroll
            for (u32 u = 0; u < UNROLL; ++u) store_vec(to + u * 32 * VEC_BYTES, data[u]);
        } else if (31 * this_vecs > TILE_PIECES - 2) {
            // A tile has at most 32 pages: lane i holds the addresses of the i-th. Loads past the plane's end repeat
            // its last vector; only their stores are skipped.
#pragma unroll
            for (u32 u = 0; u < UNROLL; ++u) {
                const u32 n = min(mine + u * 32, last), nth = nth_of(n);
                load_vec(data[u], __shfl_sync(~0u, src, nth) + (u64)(n - nth * this_vecs) * VEC_BYTES);
            }
            fetch();
            work_out_anew(mine);
#pragma unroll
            for (u32 u = 0; u < UNROLL; ++u) {
                const u32 n = min(mine + u * 32, last), nth = nth_of(n);
                const u64 to = __shfl_sync(~0u, dst, nth) + (u64)(n - nth * this_vecs) * VEC_BYTES;
                if (mine + u * 32 <= last) store_vec(to, data[u]);
            }
        } else {
            // Tiny units: every lane fetches the pages of its own vectors, a batch before the first use. `on_tier`
            // selects the tier's side; each side reads the plane's record, from L1.
            auto addresses = [&](u32 on_tier, const u32 batch, u64(&address)[BATCH]) {
                work_out_anew(on_tier);  // otherwise nvcc duplicates this code per direction
                const Plane *record = planes + this_plane;
                const Pages &pages = vectors.of[Shape(load_index(&record->shape)).vector];
                const u64 vector = on_tier ? pages.frames : pages.slots;
                const u64 vector_stride = on_tier ? 8 : 8 * pages.slots_stride;
                const u64 base = load_index(on_tier ? &record->offset : &record->device);
                const u64 magic = on_tier ? 0 : load_index(&record->slot_magic);
                const u64 factor = on_tier ? 1 : load_index(&record->stride);
#pragma unroll
                for (u32 b = 0; b < BATCH; ++b) {
                    const u32 nth = nth_of(min(mine + (batch + b) * 32, last));
                    address[b] = load_index((const void *)(vector + (u64)(this_page + nth) * vector_stride));
                }
#pragma unroll
                for (u32 b = 0; b < BATCH; ++b) {
                    const u32 n = min(mine + (batch + b) * 32, last);
                    address[b] = base + divide(address[b], magic) * factor + (n - nth_of(n) * this_vecs) * VEC_BYTES;
                }
            };
#pragma unroll
            for (u32 batch = 0; batch < UNROLL; batch += BATCH) {
                u64 from[BATCH];
                addresses(load, batch, from);
#pragma unroll
                for (u32 b = 0; b < BATCH; ++b) load_vec(data[batch + b], from[b]);
            }
            fetch();
            work_out_anew(mine);
#pragma unroll
            for (u32 batch = 0; batch < UNROLL; batch += BATCH) {
                u64 to[BATCH];
                addresses(!load, batch, to);
#pragma unroll
                for (u32 b = 0; b < BATCH; ++b)
                    if (mine + (batch + b) * 32 <= last) store_vec(to[b], data[batch + b]);
            }
        }
    }
    progress.raise(num_parts, lane);
}

#else  // PAGE_COPY_BULK

// -------------------------------------------------------------------------------------------------------- bulk variant
//
// Every warp owns a ring of STAGES buffers of STAGE_BYTES in shared memory. A stage is filled by a bulk copy that counts
// its bytes on the stage's mbarrier, and emptied by another; no data passes registers, and lane 0 issues both.
// PENDING_STORES stages may have a store in flight while the other STAGES - PENDING_STORES have a load in flight. Needs
// addresses and sizes that are multiples of 16 on both sides.
//
// A tile is one stage: a unit, or a chunk of a larger one. Each small unit is a bulk copy; if most units are small, the
// host selects the register variant.
//
// Each of the 32 lanes computes the addresses of one of the next 32 tiles, a block of 32 ahead: reading the vectors
// takes as long as a stage's copy, so a warp that read them tile by tile could not saturate a link.

#if STAGE_BYTES % 128 != 0 || PENDING_STORES < 0 || PENDING_STORES >= STAGES || STAGES > 32
#error "STAGE_BYTES must be a multiple of 128, PENDING_STORES less than STAGES, and STAGES at most 32"
#endif

extern "C" __global__ void __launch_bounds__(32 * RINGS, 1)
    page_copy(const Plane *planes, u32 num_planes, u32 load, u32 *counters, u32 num_parts,
              const __grid_constant__ Vectors vectors) {
    extern __shared__ __align__(128) u8 rings[];  // RINGS * STAGES stages, then as many barriers

    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const u32 ring = shared_address(rings) + warp * (STAGES * STAGE_BYTES);
    const u32 barrier = shared_address(rings) + RINGS * STAGES * STAGE_BYTES + warp * (STAGES * 8);
    if (lane == 0) {
        for (u32 s = 0; s < STAGES; ++s) barrier_init(barrier + 8 * s);
        fence_barrier_init();
    }
    __syncwarp();

    const u32 stride = gridDim.x * RINGS;
    u32 tile = blockIdx.x * RINGS + warp + lane * stride;  // this lane's of the next block of 32
    Walk walk(planes, num_planes, vectors, lane);
    Progress progress(counters);

    // A lane's tile in one word: its size in 16-byte units (16 bits; 0: no tile), and its part.
    auto bytes_of = [](u32 what) { return (what & 0xffff) * 16; };
    auto part_of = [](u32 what) { return what >> 16; };

    // Lane i's tile of the block after the one being loaded; frame and slot may still be in flight.
    u64 frame = 0, slot = 0, in_frame = 0, in_device = 0, device_stride = 0, slot_magic = 0;
    u32 what_next = 0;
    auto fetch = [&] {
        u32 in_plane = 0;
        const u32 plane = walk.find_each(tile, in_plane);
        tile += 32 * stride;
        what_next = num_parts << 16;
        if (plane == num_planes) return;
        const Plane *record = planes + plane;
        const u64 piece_magic = load_index(&record->piece_magic), word = load_index(&record->shape);
        const u64 sizes = load_index(&record->first);
        in_device = load_index(&record->device);
        in_frame = load_index(&record->offset);
        device_stride = load_index(&record->stride);
        slot_magic = load_index(&record->slot_magic);
        const Shape shape(word);
        const Pages &pages = vectors.of[shape.vector];
        const u64 page = divide(in_plane, piece_magic);
        frame = load_index((const void *)(pages.frames + 8 * page));
        slot = load_index((const void *)(pages.slots + 8 * page * pages.slots_stride));
        const u32 chunk = (u32)sizes, unit_bytes = (u32)(sizes >> 32);
        const u32 begin = (in_plane - (u32)page * shape.pieces) * chunk;
        in_device += begin;
        in_frame += begin;
        what_next = shape.part << 16 | min(chunk, unit_bytes - begin) / 16;
    };

    // Lane i's tile of the block being loaded, and of the block being stored. Loads are at most STAGES tiles ahead, so
    // the two are the same block or adjacent ones.
    u64 from = 0, to_next = 0, to = 0;
    u32 what_in = 0, what_out = 0;
    auto rotate = [&] {
        const u64 there = frame + in_frame, here = in_device + divide(slot, slot_magic) * device_stride;
        from = load ? there : here;
        to_next = load ? here : there;
        what_in = what_next;
        fetch();
    };

    u32 loaded = 0, load_slot = 0;
    bool more = true;
    auto load_next = [&] {
        if (loaded % 32 == 0) rotate();
        const u64 address = __shfl_sync(~0u, from, loaded % 32);
        const u32 bytes = bytes_of(__shfl_sync(~0u, what_in, loaded % 32));
        if (bytes == 0) {
            more = false;
            return;
        }
        if (lane == 0) {
            barrier_expect(barrier + 8 * load_slot, bytes);
            bulk_load(ring + load_slot * STAGE_BYTES, address, bytes, barrier + 8 * load_slot);
        }
        load_slot = load_slot + 1 == STAGES ? 0 : load_slot + 1;
        ++loaded;
    };

    fetch();
    // Streams that wait for parts without a tile of this warp need not wait for its first loads.
    progress.raise(part_of(__shfl_sync(~0u, what_next, 0)), lane);
    while (more && loaded < STAGES - PENDING_STORES) load_next();

    u32 slot_out = 0, phase = 0;
    for (u32 stored = 0; stored < loaded; ++stored) {
        if (stored % 32 == 0) {
            to = to_next;
            what_out = what_in;
        }
        const u64 address = __shfl_sync(~0u, to, stored % 32);
        const u32 what = __shfl_sync(~0u, what_out, stored % 32);
        if (progress.due(part_of(what))) {
            bulk_wait_all();
            progress.raise(part_of(what), lane);
        }
        if (lane == 0) {
            barrier_wait(barrier + 8 * slot_out, phase);
            bulk_store(address, ring + slot_out * STAGE_BYTES, bytes_of(what));
            bulk_commit();
            // load_slot was last emptied PENDING_STORES tiles ago: those bytes must have left shared memory.
            bulk_wait_read();
        }
        __syncwarp();
        if (more) load_next();
        if (++slot_out == STAGES) {
            slot_out = 0;
            phase ^= 1;
        }
    }
    // Neither shared memory, the kernel's end nor the counters may outrun the copies.
    bulk_wait_all();
    progress.raise(num_parts, lane);
}

#endif  // PAGE_COPY_BULK

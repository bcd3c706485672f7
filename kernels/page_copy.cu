// Copies pages of the KV cache between two sets of planes. Compiled at run time by NVRTC, so: no #include.
//
// A plane is an array of rows; a page is some consecutive rows of one plane. Page p of plane q is copied
//   from src_planes[q] + src_rows[p * src_rows_stride] * row_bytes
//   to   dst_planes[q] + dst_rows[p * dst_rows_stride] * row_bytes,   page_bytes bytes.
// The addresses may be local HBM, a peer GPU's HBM or pinned host memory; row strides count elements.
//
// Both variants have the same name and signature. They run beside the forward pass, so the grid is a few CTAs that
// walk all the work ("persistent"): every *warp* takes tiles, tile by tile, `all warps of the grid` apart, and no
// warp ever waits for another. A tile never crosses planes.
//
// A load is one launch for all layers, and the forward pass wants to know layer by layer what is in place: `counters[i]`
// (if counters is not null) rises by 1 for each warp of the grid when it is done with planes below
// (i + 1) * planes_per_counter. A stream waits for the value that all warps make (cuStreamWaitValue32).
//
// Macros, all with defaults (PAGE_COPY_BULK chooses the variant):
//   register variant: VEC_BYTES (1, 2, 4, 8, 16), THREADS, UNROLL, STREAMING
//   bulk variant (sm_90 and newer): RINGS, STAGES, STAGE_BYTES, PENDING_STORES
//
// Correctness across streams: the caller orders this kernel by events behind whoever wrote the source, and a kernel
// starts with a clean L1. Ordinary (weak) loads then see the data, local or peer. The non-coherent path (ld.global.nc)
// would promise that nobody writes near these bytes while the kernel runs, which we cannot promise: other pages of the
// same pools are written meanwhile by other streams and by the peer, and a 32-byte sector may hold two rows.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

#ifndef PAGE_COPY_BULK
#define PAGE_COPY_BULK 0
#endif

// Index tables: volatile asm keeps these loads where they are written, which is before a long wait, not behind it.
static __device__ __forceinline__ u64 load_index(const void *address) {
    u64 value;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(value) : "l"(address));
    return value;
}

// Position of a warp in the (plane, tile) space. A step adds the same number of tiles each time, so it is a two-digit
// addition with carry, without a division. 32 bits do: a tile has at least 32 bytes, and no plane has 64 GiB of them.
struct Cursor {
    u32 plane, tile;

    __device__ __forceinline__ void step(u32 planes, u32 tiles, u32 tiles_per_plane) {
        plane += planes;
        tile += tiles;
        if (tile >= tiles_per_plane) {
            tile -= tiles_per_plane;
            plane += 1;
        }
    }
};

// Tells how far a warp is, by the plane of its next tile.
struct Progress {
    u32 *counters;
    u32 planes_per_counter;
    u32 boundary;  // a tile of this plane or a later one is due to raise a counter

    __device__ __forceinline__ Progress(u32 *counters, u32 planes_per_counter)
        : counters(counters), planes_per_counter(planes_per_counter), boundary(counters ? planes_per_counter : ~0u) {}

    __device__ __forceinline__ bool due(u32 plane) const { return plane >= boundary; }

    // All of the warp's tiles in planes before `plane` are in place, as their lanes see. All lanes call this.
    __device__ __forceinline__ void raise(u32 plane, u32 lane) {
        if (!due(plane)) return;
        // Each lane's writes before the counter's, for everyone: a stream does not wait on a multiprocessor.
        __threadfence_system();
        __syncwarp();
        do {
            if (lane == 0)
                asm volatile("red.release.sys.global.add.u32 [%0], 1;"
                             :
                             : "l"(counters + boundary / planes_per_counter - 1)
                             : "memory");
            boundary += planes_per_counter;
        } while (due(plane));
    }
};

#if !PAGE_COPY_BULK

// ---------------------------------------------------------------------------------------------------- register variant
//
// A tile is 32 * UNROLL vectors of a plane's pages laid end to end. A lane loads UNROLL vectors before it stores the
// first one; while those loads fly it computes the store addresses and fetches the next tile's indices.

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

// L1 is of no use to either side: each byte passes once. STREAMING marks the lines evict-first in L2 too, which spares
// the forward pass's working set but drops what attention is about to read after a load.
#if STREAMING
#define CACHE_HINT ".cs"
#else
#define CACHE_HINT ".L1::no_allocate"
#endif

#define WARPS (THREADS / 32)
#define TILE_VECS (32 * UNROLL)
#define BATCH (UNROLL % 4 == 0 ? 4 : 1)

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

// Division by a number fixed for the launch, exact for 0 <= n < 2^31 and 1 <= divisor < 2^31 (Granlund, Montgomery).
struct Divider {
    u32 magic, shift;

    __device__ __forceinline__ explicit Divider(u32 divisor) {
        const u32 ceil_log2 = divisor > 1 ? 32 - __clz(divisor - 1) : 0;
        shift = 31 + ceil_log2;
        magic = (u32)((1ULL << shift) / divisor + 1);
    }
    __device__ __forceinline__ u32 operator()(u32 n) const { return (u32)(((u64)n * magic) >> shift); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    page_copy(const u64 *src_planes, const u64 *dst_planes, int num_planes, const s64 *src_rows, s64 src_rows_stride,
              const s64 *dst_rows, s64 dst_rows_stride, s64 num_pages, s64 row_bytes, s64 page_bytes, u32 *counters,
              s64 planes_per_counter) {
    if (num_pages <= 0) return;
    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells nvcc: same in the warp
    const u32 page_vecs = (u32)(page_bytes / VEC_BYTES), row_size = (u32)row_bytes, pages = (u32)num_pages;
    const u64 plane_vecs = (u64)pages * page_vecs;
    const u32 tiles_per_plane = (u32)((plane_vecs + TILE_VECS - 1) / TILE_VECS);

    const u32 stride = gridDim.x * WARPS, first = blockIdx.x * WARPS + warp;
    const u32 step_planes = stride / tiles_per_plane, step_tiles = stride % tiles_per_plane;
    Cursor at = {first / tiles_per_plane, first % tiles_per_plane};
    Progress progress(counters, (u32)planes_per_counter);
    progress.raise(min(at.plane, (u32)num_planes), lane);
    if (at.plane >= (u32)num_planes) return;

    const Divider by_page(page_vecs);
    // Do a tile's pages always fit the warp's lanes? Then lane i holds the addresses of the tile's i-th page.
    const bool lanes_hold_pages = (page_vecs - 1 + TILE_VECS - 1) / page_vecs < 32;

    // What lane i needs of the tile at hand: its plane's bases, and the rows of the tile's i-th page.
    u32 page = (u32)((u64)at.tile * TILE_VECS / page_vecs);
    u64 src_plane = load_index(src_planes + at.plane), dst_plane = load_index(dst_planes + at.plane);
    u64 src_row = load_index(src_rows + min(page + lane, pages - 1) * src_rows_stride);
    u64 dst_row = load_index(dst_rows + min(page + lane, pages - 1) * dst_rows_stride);

    while (true) {
        const u64 this_src_plane = src_plane, this_dst_plane = dst_plane;
        const u64 src = src_plane + src_row * row_size, dst = dst_plane + dst_row * row_size;
        const u64 start = (u64)at.tile * TILE_VECS;
        const u32 offset = (u32)(start - (u64)page * page_vecs);  // of the tile's first vector in its page

        at.step(step_planes, step_tiles, tiles_per_plane);
        const bool more = at.plane < (u32)num_planes;
        const u32 next_page = (u32)((u64)at.tile * TILE_VECS / page_vecs);
        auto fetch_next = [&] {
            if (!more) return;
            src_plane = load_index(src_planes + at.plane);
            dst_plane = load_index(dst_planes + at.plane);
            src_row = load_index(src_rows + min(next_page + lane, pages - 1) * src_rows_stride);
            dst_row = load_index(dst_rows + min(next_page + lane, pages - 1) * dst_rows_stride);
        };

        Vec data[UNROLL];
        if (offset + TILE_VECS <= page_vecs) {
            // The whole tile lies in one page: one base address, constant offsets.
            const u32 within = (offset + lane) * VEC_BYTES;
            const u64 from = __shfl_sync(~0u, src, 0) + within, to = __shfl_sync(~0u, dst, 0) + within;
#pragma unroll
            for (u32 u = 0; u < UNROLL; ++u) load_vec(data[u], from + u * 32 * VEC_BYTES);
            fetch_next();
#pragma unroll
            for (u32 u = 0; u < UNROLL; ++u) store_vec(to + u * 32 * VEC_BYTES, data[u]);
        } else {
            // Loads past the plane's end repeat its last vector; only their stores are left out.
            const u32 mine = offset + lane, last = offset + (u32)min(plane_vecs - start, (u64)TILE_VECS) - 1;
            if (lanes_hold_pages) {
#pragma unroll
                for (u32 u = 0; u < UNROLL; ++u) {
                    const u32 n = min(mine + u * 32, last), nth = by_page(n);
                    load_vec(data[u], __shfl_sync(~0u, src, nth) + (n - nth * page_vecs) * VEC_BYTES);
                }
                fetch_next();
#pragma unroll
                for (u32 u = 0; u < UNROLL; ++u) {
                    const u32 n = min(mine + u * 32, last), nth = by_page(n);
                    const u64 to = __shfl_sync(~0u, dst, nth) + (n - nth * page_vecs) * VEC_BYTES;
                    if (mine + u * 32 <= last) store_vec(to, data[u]);
                }
            } else {
                // Tiny pages: every lane fetches the rows of its own vectors, a batch of them before the first use.
                auto fetch_rows = [&](const s64 *rows, const s64 rows_stride, const u32 batch, u64(&row)[BATCH]) {
#pragma unroll
                    for (u32 b = 0; b < BATCH; ++b) {
                        const u32 nth = by_page(min(mine + (batch + b) * 32, last));
                        row[b] = load_index(rows + (page + nth) * rows_stride);
                    }
                };
#pragma unroll
                for (u32 batch = 0; batch < UNROLL; batch += BATCH) {
                    u64 row[BATCH];
                    fetch_rows(src_rows, src_rows_stride, batch, row);
#pragma unroll
                    for (u32 b = 0; b < BATCH; ++b) {
                        const u32 n = min(mine + (batch + b) * 32, last), nth = by_page(n);
                        load_vec(data[batch + b],
                                 this_src_plane + row[b] * row_size + (n - nth * page_vecs) * VEC_BYTES);
                    }
                }
                fetch_next();
#pragma unroll
                for (u32 batch = 0; batch < UNROLL; batch += BATCH) {
                    u64 row[BATCH];
                    fetch_rows(dst_rows, dst_rows_stride, batch, row);
#pragma unroll
                    for (u32 b = 0; b < BATCH; ++b) {
                        const u32 n = min(mine + (batch + b) * 32, last), nth = by_page(n);
                        const u64 to = this_dst_plane + row[b] * row_size + (n - nth * page_vecs) * VEC_BYTES;
                        if (mine + (batch + b) * 32 <= last) store_vec(to, data[batch + b]);
                    }
                }
            }
        }
        progress.raise(min(at.plane, (u32)num_planes), lane);
        if (!more) return;
        page = next_page;
    }
}

#else  // PAGE_COPY_BULK

// -------------------------------------------------------------------------------------------------------- bulk variant
//
// Every warp owns a ring of STAGES buffers of STAGE_BYTES in shared memory. A stage is filled by bulk copies that count
// their bytes on its mbarrier, and emptied by bulk copies of the issuing lane's bulk group; no data passes registers.
// PENDING_STORES stages may be on their way out while the other STAGES - PENDING_STORES are on their way in.
// Needs 16-byte aligned addresses and row_bytes and page_bytes that are multiples of 16.
//
// A tile is one stage's worth: a chunk of a page larger than a stage, or else as many whole pages as fit.

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

#if STAGE_BYTES % 128 != 0 || PENDING_STORES < 0 || PENDING_STORES >= STAGES
#error "STAGE_BYTES must be a multiple of 128 and PENDING_STORES less than STAGES"
#endif

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

extern "C" __global__ void __launch_bounds__(32 * RINGS, 1)
    page_copy(const u64 *src_planes, const u64 *dst_planes, int num_planes, const s64 *src_rows, s64 src_rows_stride,
              const s64 *dst_rows, s64 dst_rows_stride, s64 num_pages, s64 row_bytes, s64 page_bytes, u32 *counters,
              s64 planes_per_counter) {
    extern __shared__ __align__(128) u8 rings[];
    __shared__ __align__(8) u64 barriers[RINGS * STAGES];

    const u32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (num_pages <= 0) return;

    // Pieces: the units of one bulk copy. Chunks of a large page are made equal, up to 128 bytes.
    const u32 page_size = (u32)page_bytes;
    u32 chunk = page_size, chunks_per_page = 1, pieces_per_tile = 1;
    if (page_size > STAGE_BYTES) {
        const u32 fewest = (page_size + STAGE_BYTES - 1) / STAGE_BYTES;
        chunk = ((page_size + fewest - 1) / fewest + 127) / 128 * 128;
        chunks_per_page = (page_size + chunk - 1) / chunk;
    } else {
        pieces_per_tile = STAGE_BYTES / page_size;
    }
    const u32 plane_pieces = (u32)num_pages * chunks_per_page;
    const u32 tiles_per_plane = (plane_pieces + pieces_per_tile - 1) / pieces_per_tile;

    const u32 stride = gridDim.x * RINGS, first = blockIdx.x * RINGS + warp;
    const u32 step_planes = stride / tiles_per_plane, step_tiles = stride % tiles_per_plane;
    Cursor out = {first / tiles_per_plane, first % tiles_per_plane};  // next tile to store
    Cursor in = out;                                                  // next tile to load
    Progress progress(counters, (u32)planes_per_counter);
    // The tile at `out` is next: what was due before it is done, once this lane's bulk copies have not only left shared
    // memory but arrived.
    auto report = [&] {
        const u32 plane = min(out.plane, (u32)num_planes);
        if (!progress.due(plane)) return;
        asm volatile("cp.async.bulk.wait_group 0;" : : : "memory");
        progress.raise(plane, lane);
    };
    report();
    if (out.plane >= (u32)num_planes) return;

    const u32 ring = shared_address(rings) + warp * (STAGES * STAGE_BYTES);
    const u32 barrier = shared_address(barriers) + warp * (STAGES * 8);
    if (lane == 0) {
        for (u32 s = 0; s < STAGES; ++s)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(barrier + 8 * s) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
        asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
    }
    __syncwarp();

    if (pieces_per_tile == 1) {
        // Large pages: a tile is one bulk copy, which lane 0 issues. All 32 lanes work out addresses, each that of one
        // of the next 32 tiles, and a block of 32 ahead: reading the index tables takes as long as a stage's copy, so
        // a warp that read them tile by tile could not keep a link busy.
        const u64 total = (u64)num_planes * tiles_per_plane;
        const u32 count = (u32)((total - first + stride - 1) / stride);  // first < total: out.plane < num_planes
        struct Ahead {
            const u64 *planes;
            const s64 *rows;
            u64 plane, row, address;  // plane and row of the block after the one at hand
            u32 chunk, bytes;
        };
        auto fetch = [&](Ahead &side, const s64 rows_stride, u32 k) {
            const u64 tile = first + (u64)min(k, count - 1) * stride;
            const u32 at_plane = (u32)(tile / tiles_per_plane), in_plane = (u32)(tile % tiles_per_plane);
            side.plane = load_index(side.planes + at_plane);
            side.row = load_index(side.rows + in_plane / chunks_per_page * rows_stride);
            side.chunk = in_plane % chunks_per_page;
        };
        auto rotate = [&](Ahead &side, const s64 rows_stride, u32 k) {
            side.address = side.plane + side.row * (u32)row_bytes + side.chunk * chunk;
            side.bytes = min(chunk, page_size - side.chunk * chunk);
            fetch(side, rows_stride, k + 32 + lane);
        };
        Ahead from = {src_planes, src_rows, 0, 0, 0, 0, 0}, to = {dst_planes, dst_rows, 0, 0, 0, 0, 0};
        fetch(from, src_rows_stride, lane);
        fetch(to, dst_rows_stride, lane);

        u32 loaded = 0, load_slot = 0;
        auto load_next = [&] {
            if (loaded % 32 == 0) rotate(from, src_rows_stride, loaded);
            const u64 address = __shfl_sync(~0u, from.address, loaded % 32);
            const u32 bytes = __shfl_sync(~0u, from.bytes, loaded % 32);
            if (lane == 0) {
                barrier_expect(barrier + 8 * load_slot, bytes);
                bulk_load(ring + load_slot * STAGE_BYTES, address, bytes, barrier + 8 * load_slot);
            }
            load_slot = load_slot + 1 == STAGES ? 0 : load_slot + 1;
            ++loaded;
        };
        while (loaded < min(count, (u32)(STAGES - PENDING_STORES))) load_next();

        u32 slot = 0, phase = 0;
        for (u32 stored = 0; stored < count; ++stored) {
            if (stored % 32 == 0) rotate(to, dst_rows_stride, stored);
            const u64 address = __shfl_sync(~0u, to.address, stored % 32);
            const u32 bytes = __shfl_sync(~0u, to.bytes, stored % 32);
            if (lane == 0) {
                barrier_wait(barrier + 8 * slot, phase);
                bulk_store(address, ring + slot * STAGE_BYTES, bytes);
                asm volatile("cp.async.bulk.commit_group;" : : : "memory");
                // load_slot was last emptied PENDING_STORES tiles ago: those bytes must have left shared memory.
                asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(PENDING_STORES) : "memory");
            }
            __syncwarp();
            if (loaded < count) load_next();
            if (++slot == STAGES) {
                slot = 0;
                phase ^= 1;
            }
            out.step(step_planes, step_tiles, tiles_per_plane);
            report();
        }
        asm volatile("cp.async.bulk.wait_group 0;" : : : "memory");
        return;
    }

    // Pieces of a tile: number, bytes of one, and a piece's address in the planes.
    auto pieces_of = [&](const Cursor &at) {
        return min(pieces_per_tile, plane_pieces - at.tile * pieces_per_tile);
    };
    auto chunk_of = [&](const Cursor &at) { return chunks_per_page == 1 ? 0 : at.tile % chunks_per_page; };
    auto bytes_of = [&](const Cursor &at) { return min(chunk, page_size - chunk_of(at) * chunk); };
    auto address_of = [&](const u64 *planes, const s64 *rows, s64 rows_stride, const Cursor &at, u32 piece) {
        const u32 page = chunks_per_page == 1 ? at.tile * pieces_per_tile + piece : at.tile / chunks_per_page;
        const u64 plane = load_index(planes + at.plane), row = load_index(rows + page * rows_stride);
        return plane + row * (u32)row_bytes + chunk_of(at) * chunk;
    };
    // The first piece's address of each lane is an argument, because it is fetched ahead of a wait.
    auto first_address = [&](const u64 *planes, const s64 *rows, s64 rows_stride, const Cursor &at) {
        return lane < pieces_of(at) ? address_of(planes, rows, rows_stride, at, lane) : 0;
    };
    auto fill = [&](const Cursor &at, u32 slot, u64 address) {
        const u32 pieces = pieces_of(at), bytes = bytes_of(at);
        if (lane == 0) barrier_expect(barrier + 8 * slot, pieces * bytes);
        __syncwarp();
        for (u32 piece = lane; piece < pieces; piece += 32) {
            if (piece != lane) address = address_of(src_planes, src_rows, src_rows_stride, at, piece);
            bulk_load(ring + slot * STAGE_BYTES + piece * bytes, address, bytes, barrier + 8 * slot);
        }
    };

    u32 in_slot = 0, out_slot = 0, parity = 0;
    for (u32 s = 0; s < STAGES - PENDING_STORES && in.plane < (u32)num_planes; ++s) {
        fill(in, in_slot, first_address(src_planes, src_rows, src_rows_stride, in));
        in_slot = in_slot + 1 == STAGES ? 0 : in_slot + 1;
        in.step(step_planes, step_tiles, tiles_per_plane);
    }

    while (out.plane < (u32)num_planes) {
        const u32 pieces = pieces_of(out), bytes = bytes_of(out);
        u64 to = first_address(dst_planes, dst_rows, dst_rows_stride, out);
        const bool more = in.plane < (u32)num_planes;
        const u64 from = more ? first_address(src_planes, src_rows, src_rows_stride, in) : 0;

        barrier_wait(barrier + 8 * out_slot, parity);
        for (u32 piece = lane; piece < pieces; piece += 32) {
            if (piece != lane) to = address_of(dst_planes, dst_rows, dst_rows_stride, out, piece);
            bulk_store(to, ring + out_slot * STAGE_BYTES + piece * bytes, bytes);
        }
        // Every lane commits each time, an empty group if need be, so that all lanes count the same groups.
        asm volatile("cp.async.bulk.commit_group;" : : : "memory");

        if (more) {
            // in_slot was last emptied PENDING_STORES tiles ago: wait until those bytes have left shared memory.
            asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(PENDING_STORES) : "memory");
            __syncwarp();
            fill(in, in_slot, from);
            in_slot = in_slot + 1 == STAGES ? 0 : in_slot + 1;
            in.step(step_planes, step_tiles, tiles_per_plane);
        }
        out.step(step_planes, step_tiles, tiles_per_plane);
        if (++out_slot == STAGES) {
            out_slot = 0;
            parity ^= 1;
        }
        report();
    }
    // Shared memory and the kernel's end may not outrun the copies.
    asm volatile("cp.async.bulk.wait_group 0;" : : : "memory");
}

#endif  // PAGE_COPY_BULK

// Brings this rank the pages of a load that its siblings load: ranks of tensor parallelism whose pools hold the same bytes
// in the same slots, as those of MLA do. Each rank loads one share of the pages from the tier over its own PCIe link
// (page_copy.cu) and fetches the others from its siblings' pools over NVLink.
// Compiled at run time by NVRTC, so: no #include.
//
// A rank has a ring of entries in its GPU memory, which its siblings read. For each shared load, `page_announce` resets an
// entry's counters and publishes the load's number and a digest of its slots; page_copy then raises the counters as parts
// of its share come into place. `page_fetch` reads a sibling's page once that sibling has announced the same load, by
// number and digest, and its counter says that the part is in place. A sibling that does not come in time, or loads
// something else, is given up for the rest of the load: its share comes out of the tier's frames. So ranks agree on
// nothing before a load, none waits for another without end, and a page never comes from another load's slots.
//
// A sibling's slots keep their bytes while others fetch them: SGLang unlocks loaded pages when all ranks have them
// (`loading_check` takes the minimum of the ranks' completed loads).
//
// Macros: VEC_BYTES (1, 2, 4, 8, 16), which divides every address and size; THREADS.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

#ifndef VEC_BYTES
#define VEC_BYTES 16
#endif
#ifndef THREADS
#define THREADS 512
#endif
#define WARPS (THREADS / 32)
#define UNROLL 8
#define CHUNK (32 * UNROLL * VEC_BYTES)  // bytes of a unit that a warp copies at a time

#define MAX_VECTORS 16
#define MAX_RANKS 8

struct Pages {
    u64 frames;        // address of s64[count]: where each page's frame begins
    u64 slots;         // address of s64[count], slots_stride elements apart: first slot of each page on the device
    s64 slots_stride;
    u64 count;
};

struct Vectors {
    Pages of[MAX_VECTORS];
};

struct Plane {
    u64 device, stride;      // address of unit 0 in this rank's pool, bytes from one unit to the next
    u64 offset;              // of the unit in its frame
    u64 slot_magic;          // divides a slot by the plane's divisor: see `divide`
    u64 unit_bytes;
    u64 place;               // number of the vector (low 32 bits), part (high)
    u64 there[MAX_RANKS];    // address of unit 0 in each rank's pool
};

struct Entry {
    u64 number;         // of the load, from 1; written last
    u64 digest;         // of the load's slots
    u64 raises;         // what each counter reaches
    u64 sum, arrived;   // used while it is being written; zero before and after
    u32 counters[1];    // one per part
};

struct Siblings {
    u64 entries[MAX_RANKS];  // of this load; this rank's own too
    u64 missed[MAX_RANKS];   // of each, a word of host memory that is set to the load's number if it is given up
    u64 number;
    u64 patience;            // nanoseconds
    u32 count, me;
};

// ------------------------------------------------------------------------------- the machine's instructions, and no more

#ifdef PAGE_COPY_MACHINE
#include PAGE_COPY_MACHINE
#else

static __device__ __forceinline__ u64 load_index(const void *address) {
    u64 value;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(value) : "l"(address));
    return value;
}

// What another GPU wrote before it wrote this word is seen behind it.
static __device__ __forceinline__ u64 read_flag(const u64 *address) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

static __device__ __forceinline__ u32 read_counter(const u32 *address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

static __device__ __forceinline__ void write_flag(u64 *address, u64 value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(address), "l"(value) : "memory");
}

static __device__ __forceinline__ void reset_counter(u32 *counter) {
    asm volatile("st.global.u32 [%0], 0;" : : "l"(counter) : "memory");
}

static __device__ __forceinline__ void store_word(u64 address, u64 value) {
    asm volatile("st.global.b64 [%0], %1;" : : "l"(address), "l"(value) : "memory");
}

static __device__ __forceinline__ u64 add_to(u64 address, u64 value) {
    u64 before;
    asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;" : "=l"(before) : "l"(address), "l"(value) : "memory");
    return before;
}

static __device__ __forceinline__ void fence_writes() { asm volatile("fence.acq_rel.sys;" : : : "memory"); }

static __device__ __forceinline__ void raise_counter(u32 *counter) {
    asm volatile("red.relaxed.sys.global.add.u32 [%0], 1;" : : "l"(counter) : "memory");
}

static __device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

#if VEC_BYTES == 16
struct Vec {
    u32 x, y, z, w;
};
static __device__ __forceinline__ void load_vec(Vec &v, u64 address) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
}
static __device__ __forceinline__ void store_vec(u64 address, const Vec &v) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
#else
#if VEC_BYTES == 8
typedef u64 Vec;
#elif VEC_BYTES == 4
typedef u32 Vec;
#elif VEC_BYTES == 2
typedef u16 Vec;
#elif VEC_BYTES == 1
typedef u8 Vec;
#else
#error "VEC_BYTES must be 1, 2, 4, 8 or 16"
#endif
static __device__ __forceinline__ void load_vec(Vec &v, u64 address) { v = *(const volatile Vec *)address; }
static __device__ __forceinline__ void store_vec(u64 address, const Vec &v) { *(volatile Vec *)address = v; }
#endif

#endif  // PAGE_COPY_MACHINE

// ------------------------------------------------------------------------------------------------------------ announce

// n / divisor, with magic = ceil(2^64 / divisor), or 0 for 1.
static __device__ __forceinline__ u64 divide(u64 n, u64 magic) { return magic ? __umul64hi(n, magic) : n; }

// Two loads with the same pages in another order, or in other vectors, differ.
static __device__ __forceinline__ u64 mix(u64 word, u64 key) {
    word ^= (key + 1) * 0x9E3779B97F4A7C15ull;
    word *= 0xFF51AFD7ED558CCDull;
    word ^= word >> 32;
    word *= 0xC4CEB9FE1A85EC53ull;
    return word ^ word >> 32;
}

// Writes the entry of load `number`: `kind` stands for everything but the slots on which siblings have to agree.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    page_announce(Entry *entry, u32 num_parts, u64 number, u64 kind, u64 raises, const __grid_constant__ Vectors vectors) {
    const u32 lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32, warps = gridDim.x * WARPS;
    for (u32 part = 32 * warp + lane; part < num_parts; part += 32 * warps) reset_counter(entry->counters + part);
    u64 sum = warp == 0 && lane == 0 ? kind : 0;
    for (u32 v = 0; v < MAX_VECTORS; ++v) {
        const Pages &pages = vectors.of[v];
        for (u64 i = 32 * warp + lane; i < pages.count; i += 32 * warps)
            sum += mix(load_index((const void *)(pages.slots + 8 * i * pages.slots_stride)), (u64)v << 48 | i);
    }
    for (u32 distance = 16; distance; distance /= 2) sum += __shfl_sync(~0u, sum, lane ^ distance);
    __syncwarp();
    if (lane) return;
    fence_writes();
    add_to((u64)&entry->sum, sum);
    if (add_to((u64)&entry->arrived, 1) + 1 < warps) return;
    store_word((u64)&entry->digest, load_index(&entry->sum));
    store_word((u64)&entry->raises, raises);
    store_word((u64)&entry->sum, 0);
    store_word((u64)&entry->arrived, 0);
    fence_writes();
    write_flag(&entry->number, number);
}

// --------------------------------------------------------------------------------------------------------------- fetch

// How far each rank is with its share, as this warp knows it: lane q knows rank q's.
struct Gate {
    const Siblings &siblings;
    const u32 lane, num_parts;
    bool met = false, gone = false;  // announced the same load; given up
    u32 seen = 0;                    // parts in place
    u32 raises = 0;

    __device__ __forceinline__ Gate(const Siblings &siblings, u32 num_parts, u32 lane)
        : siblings(siblings), lane(lane), num_parts(num_parts) {}

    // Waits until rank q's share of a part is in its pool; false if q is given up, which this rank never is. The same
    // arguments in all lanes, which all call this.
    __device__ __forceinline__ bool open(u32 q, u32 part) {
        u64 begun = 0;  // to wait
        while (true) {
            if (__shfl_sync(~0u, seen, q) > part) return true;
            if (__shfl_sync(~0u, (u32)gone, q)) return false;
            if (lane == q) {
                if (!begun) begun = nanoseconds();
                look(part, begun);
            }
            __syncwarp();
        }
    }

  private:
    __device__ __forceinline__ void look(u32 part, u64 begun) {
        const Entry *entry = (const Entry *)siblings.entries[lane];
        if (!met && read_flag(&entry->number) == siblings.number) {
            const Entry *own = (const Entry *)siblings.entries[siblings.me];
            met = load_index(&entry->digest) == load_index(&own->digest);
            raises = (u32)load_index(&entry->raises);
            gone = !met;
        }
        while (met && seen < num_parts && read_counter(entry->counters + seen) == raises) ++seen;
        if (seen <= part && lane != siblings.me && nanoseconds() - begun > siblings.patience) gone = true;
        if (gone) store_word(siblings.missed[lane], siblings.number);
    }
};

// First page of rank q's share of a vector; what does not divide goes to different ranks from different vectors.
static __device__ __forceinline__ u32 share(u32 pages, u32 vector, u32 q, u32 ranks) {
    return (pages * q + vector % ranks) / ranks;
}

// counters[p] rises by 1 per warp of the grid when parts up to p are in place in this rank's pool, its own share included.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    page_fetch(const Plane *planes, u32 num_planes, u32 num_parts, u32 *counters,
               const __grid_constant__ Siblings siblings, const __grid_constant__ Vectors vectors) {
    const u32 lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32, warps = gridDim.x * WARPS;
    Gate gate(siblings, num_parts, lane);
    u32 raised = 0;
    auto raise = [&](u32 part) {
        if (part <= raised) return;
        gate.open(siblings.me, part - 1);
        __syncwarp();
        if (lane == 0) fence_writes();
        for (; raised < part; ++raised)
            if (lane == 0) raise_counter(counters + raised);
    };
    for (u32 number = 0; number < num_planes; ++number) {
        const Plane *plane = planes + number;
        const u64 place = load_index(&plane->place);
        const u32 v = (u32)place, part = (u32)(place >> 32), ranks = siblings.count;
        raise(part);
        const Pages &pages = vectors.of[v];
        const u32 count = (u32)pages.count;
        const u32 own = share(count, v, siblings.me, ranks), owned = share(count, v, siblings.me + 1, ranks) - own;
        const u64 unit_bytes = load_index(&plane->unit_bytes);
        const u32 chunks = (u32)((unit_bytes + CHUNK - 1) / CHUNK);
        const u64 items = (u64)(count - owned) * chunks;
        // Each plane begins with another warp, so that small loads do not all fall to the same few.
        for (u64 item = (warp + 7 * number) % warps; item < items; item += warps) {
            const u32 nth = (u32)(item / chunks), page = nth < own ? nth : nth + owned;
            const u64 begin = (u64)(item % chunks) * CHUNK;
            u32 q = 0;
            while (page >= share(count, v, q + 1, ranks)) ++q;
            const bool there = gate.open(q, part);
            const u64 slot = load_index((const void *)(pages.slots + 8 * page * pages.slots_stride));
            const u64 unit = divide(slot, load_index(&plane->slot_magic)) * load_index(&plane->stride);
            const u64 source = there ? load_index(&plane->there[q]) + unit
                                     : load_index((const void *)(pages.frames + 8 * page)) + load_index(&plane->offset);
            const u64 from = source + begin, to = load_index(&plane->device) + unit + begin;
            const u32 vecs = (u32)(min(unit_bytes - begin, (u64)CHUNK) / VEC_BYTES);
            Vec data[UNROLL];
#pragma unroll
            for (u32 u = 0; u < UNROLL; ++u)
                if (u * 32 + lane < vecs) load_vec(data[u], from + (u * 32 + lane) * VEC_BYTES);
#pragma unroll
            for (u32 u = 0; u < UNROLL; ++u)
                if (u * 32 + lane < vecs) store_vec(to + (u * 32 + lane) * VEC_BYTES, data[u]);
        }
    }
    raise(num_parts);
}

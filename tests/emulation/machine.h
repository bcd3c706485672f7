// A GPU for the kernels, on a CPU: what they use of CUDA C++, and their PTX instructions, in C++.
//
// Every lane is a coroutine. Lanes meet at each instruction of the whole warp (shuffle, ballot, __syncwarp), where all 32
// have to arrive at the same one; warps run alternately in random order. Bulk copies happen as late as the kernel
// allows, or at any time before: a stage that is filled again too soon, or a counter that is raised too soon, is seen.

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(bytes)
#define __launch_bounds__(...)

struct Index {
    u32 x;
};
static Index threadIdx, blockIdx, gridDim;
u8 rings[1];  // stands for the block's shared memory, of which the kernel uses 32-bit addresses alone

namespace machine {

struct Copy {
    u64 global;
    u32 shared, bytes, barrier;
};

struct Barrier {
    long missing = 0;  // bytes expected and not arrived
    u32 phase = 0, arrivals = 0;
};

struct Store : Copy {
    std::vector<u8> data;  // once it has left shared memory
    bool read = false;
};

struct Block {
    u32 number;
    std::vector<u8> shared;
    std::vector<Barrier> barriers;  // one for each 8 bytes of shared memory
    std::deque<Copy> loads;
};

struct Warp;

struct Lane {
    ucontext_t context;
    std::unique_ptr<u8[]> stack;
    bool done = false;
    const char *at = nullptr;       // instruction of the whole warp that it waits at
    std::deque<std::vector<Store>> groups;  // committed
    std::vector<Store> open;
};

struct Warp {
    Block *block;
    u32 number;
    Lane lanes[32];
    u64 values[2][32];
    u32 round = 0;
    bool unfenced = false;  // something was written since the last fence
};

static ucontext_t scheduler;
static Warp *warp;
static u32 lane_number;
static std::mt19937_64 chance;
static std::string failure;
static void (*raised)(u32 *counter);
static u64 looks;  // at what other GPUs write

struct Range {
    u64 begin, bytes;
};
static std::vector<Range> readable, writable;  // concatenated

static Lane &lane() { return warp->lanes[lane_number]; }

static void fail(const std::string &why) {
    failure = "block " + std::to_string(warp->block->number) + " warp " + std::to_string(warp->number) + " lane " +
              std::to_string(lane_number) + ": " + why;
    setcontext(&scheduler);
}

// Fails unless the bytes are within one of the ranges.
static void check(std::vector<Range> &ranges, u64 address, u64 bytes, const char *what) {
    for (size_t i = 0; i < ranges.size(); ++i)
        if (address >= ranges[i].begin && address + bytes <= ranges[i].begin + ranges[i].bytes) {
            std::swap(ranges[i], ranges[i / 2]);  // the next access is likely to be there too
            return;
        }
    char text[80];
    std::snprintf(text, sizeof text, "%s of %llu bytes at %#llx, which is nowhere", what, bytes, address);
    fail(text);
}

// All lanes' values, once all lanes of the warp have come here.
static const u64 *meet(const char *name, u64 value) {
    const u32 round = warp->round;
    warp->values[round % 2][lane_number] = value;
    lane().at = name;
    swapcontext(&lane().context, &scheduler);
    return warp->values[round % 2];
}

static void land(Block &block, const Copy &copy) {
    std::memcpy(&block.shared[copy.shared], (const void *)copy.global, copy.bytes);
    Barrier &barrier = block.barriers[copy.barrier / 8];
    barrier.missing -= copy.bytes;
    if (barrier.missing == 0 && barrier.arrivals) {
        barrier.arrivals = 0;
        barrier.phase += 1;
    }
}

static void read(Store &store) {
    if (store.read) return;
    const u8 *from = &warp->block->shared[store.shared];
    store.data.assign(from, from + store.bytes);
    store.read = true;
}

static void write(Store &store) {
    read(store);
    std::memcpy((void *)store.global, store.data.data(), store.bytes);
    warp->unfenced = true;
}

// Completes some of the operations in flight.
static void pass_time() {
    Block &block = *warp->block;
    while (!block.loads.empty() && chance() % 4 == 0) {
        const size_t which = chance() % block.loads.size();
        land(block, block.loads[which]);
        block.loads.erase(block.loads.begin() + which);
    }
    for (auto &group : lane().groups)
        for (auto &store : group)
            if (chance() % 8 == 0) read(store);
}

}  // namespace machine

static u32 __shfl_sync(u32, u32 value, u32 source) { return (u32)machine::meet("shfl", value)[source % 32]; }
static u64 __shfl_sync(u32, u64 value, u32 source) { return machine::meet("shfl64", value)[source % 32]; }
static u32 __shfl_up_sync(u32, u32 value, u32 distance) {
    const u32 mine = machine::lane_number;
    const u64 *values = machine::meet("shfl_up", value);
    return (u32)values[mine >= distance ? mine - distance : mine];
}
static u32 __ballot_sync(u32, bool value) {
    const u64 *values = machine::meet("ballot", value);
    u32 bits = 0;
    for (u32 i = 0; i < 32; ++i) bits |= (u32)values[i] << i;
    return bits;
}
static void __syncwarp() { machine::meet("syncwarp", 0); }
static u32 __popc(u32 value) { return (u32)__builtin_popcount(value); }
static u64 __umul64hi(u64 a, u64 b) { return (u64)(((unsigned __int128)a * b) >> 64); }
static u32 min(u32 a, u32 b) { return a < b ? a : b; }
static u64 min(u64 a, u64 b) { return a < b ? a : b; }

static u64 load_index(const void *address) {
    if ((u64)address % 8) machine::fail("a misaligned read of a table");
    machine::check(machine::readable, (u64)address, 8, "a read of a table");
    return *(const u64 *)address;
}
static void fence_writes() { machine::warp->unfenced = false; }
static void raise_counter(u32 *counter) {
    if (machine::warp->unfenced) machine::fail("a counter that is raised with writes before it that no fence follows");
    machine::raised(counter);
}

static u64 add_to(u64 address, u64 value) {
    machine::check(machine::writable, address, 8, "an addition");
    u64 &word = *(u64 *)address;
    word += value;
    return word - value;
}
static void store_word(u64 address, u64 value) {
    machine::check(machine::writable, address, 8, "a store of a word");
    *(u64 *)address = value;
}

#ifdef CHUNK  // page_fetch.cu

// Time passes with each look at what other GPUs write, and with it what they do: `raised` is called with null.
static u64 nanoseconds() { return 1000 * machine::looks; }
static void look_at(const void *address, u32 bytes) {
    machine::check(machine::readable, (u64)address, bytes, "a look at another rank's entry");
    machine::raised(nullptr);
    if (++machine::looks > 30000) machine::fail("a wait that nothing ends");
}
static u64 read_flag(const u64 *address) {
    look_at(address, 8);
    return *address;
}
static u32 read_counter(const u32 *address) {
    look_at(address, 4);
    return *address;
}
static void write_flag(u64 *address, u64 value) {
    if (machine::warp->unfenced) machine::fail("a flag that is written with writes before it that no fence follows");
    machine::check(machine::writable, (u64)address, 8, "a flag");
    *address = value;
}
static void reset_counter(u32 *counter) {
    machine::check(machine::writable, (u64)counter, 4, "a reset of a counter");
    machine::warp->unfenced = true;
    *counter = 0;
}

#endif

#ifdef PIECE_BYTES  // page_sum.cu

static u64 load_piece(u64 address) {
    if (address % PIECE_BYTES) machine::fail("a misaligned load");
    machine::check(machine::readable, address, PIECE_BYTES, "a load");
    u64 value = 0;
    std::memcpy(&value, (const void *)address, PIECE_BYTES);
    return value;
}

#endif

#if !PAGE_COPY_BULK

static void work_out_anew(u32 &) {}

struct Vec {
    u8 bytes[VEC_BYTES];
};
static void load_vec(Vec &v, u64 address) {
    if (address % VEC_BYTES) machine::fail("a misaligned load");
    machine::check(machine::readable, address, VEC_BYTES, "a load");
    std::memcpy(&v, (const void *)address, VEC_BYTES);
}
static void store_vec(u64 address, const Vec &v) {
    if (address % VEC_BYTES) machine::fail("a misaligned store");
    machine::check(machine::writable, address, VEC_BYTES, "a store");
    std::memcpy((void *)address, &v, VEC_BYTES);
    machine::warp->unfenced = true;
}

#else

static u32 shared_address(const void *) { return 0; }
static void barrier_init(u32 barrier) { machine::warp->block->barriers[barrier / 8] = {}; }
static void fence_barrier_init() {}

static void barrier_expect(u32 address, u32 bytes) {
    machine::Barrier &barrier = machine::warp->block->barriers[address / 8];
    if (barrier.arrivals) machine::fail("a stage is filled while it is being filled");
    barrier.arrivals = 1;
    barrier.missing += bytes;
}

static void barrier_wait(u32 address, u32 parity) {
    machine::Block &block = *machine::warp->block;
    for (size_t i = 0; i < block.loads.size();)
        if (block.loads[i].barrier == address) {
            machine::land(block, block.loads[i]);
            block.loads.erase(block.loads.begin() + i);
        } else {
            ++i;
        }
    // The phase of this parity is complete: the current one has the other parity.
    if (block.barriers[address / 8].phase % 2 == parity) machine::fail("a wait that nothing ends");
}

static void check_bulk(u64 global, u32 shared, u32 bytes) {
    if (global % 16 || shared % 16 || bytes % 16 || bytes == 0 || bytes > STAGE_BYTES)
        machine::fail("a bulk copy of wrong size or alignment");
}
static void bulk_load(u32 to, u64 from, u32 bytes, u32 barrier) {
    check_bulk(from, to, bytes);
    machine::check(machine::readable, from, bytes, "a bulk load");
    machine::pass_time();
    machine::warp->block->loads.push_back({from, to, bytes, barrier});
}
static void bulk_store(u64 to, u32 from, u32 bytes) {
    check_bulk(to, from, bytes);
    machine::check(machine::writable, to, bytes, "a bulk store");
    machine::Store store;
    store.global = to, store.shared = from, store.bytes = bytes, store.barrier = 0;
    machine::lane().open.push_back(store);
}
static void bulk_commit() {
    machine::lane().groups.push_back(std::move(machine::lane().open));
    machine::lane().open.clear();
    machine::pass_time();
}
static void bulk_wait_read() {
    auto &groups = machine::lane().groups;
    for (size_t i = 0; i + PENDING_STORES < groups.size(); ++i)
        for (auto &store : groups[i]) machine::read(store);
}
static void bulk_wait_all() {
    auto &groups = machine::lane().groups;
    for (auto &group : groups)
        for (auto &store : group) machine::write(store);
    groups.clear();
}

#endif

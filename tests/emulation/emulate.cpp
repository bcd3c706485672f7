// Runs a kernel, KERNEL_NAME of the file KERNEL, on a CPU: a library with one function, `emulate`, for
// tests/emulation/emulated.py.

#include KERNEL

#include <type_traits>
#include <utility>

namespace machine {

static void **launch;  // addresses of the kernel's parameters

template <class... Types, size_t... Numbers>
static void call(void (*kernel)(Types...), std::index_sequence<Numbers...>) {
    kernel(*(std::remove_const_t<Types> *)launch[Numbers]...);
}

template <class... Types>
static void call(void (*kernel)(Types...)) {
    call(kernel, std::index_sequence_for<Types...>());
}

static void run_lane() {
    call(KERNEL_NAME);
    Lane &mine = lane();
    if (!mine.groups.empty() || !mine.open.empty()) fail("the kernel ends before its bulk copies");
    mine.done = true;
    mine.at = "end";
    setcontext(&scheduler);
}

static void resume(Warp &next, u32 number) {
    warp = &next;
    lane_number = number;
    threadIdx.x = next.number * 32 + number;
    blockIdx.x = next.block->number;
    swapcontext(&scheduler, &next.lanes[number].context);
}

}  // namespace machine

// Returns null, or what the kernel did wrong. `parameters` is what cuLaunchKernel is given; `ranges` are pairs of an
// address and a number of bytes, the first `num_written` of which the kernel may write and all of which it may read.
extern "C" const char *emulate(u32 grid, u32 threads, u32 shared_bytes, void **parameters, u64 seed,
                               void (*raised)(u32 *), const u64 *ranges, u32 num_written, u32 num_ranges) {
    using namespace machine;
    launch = parameters;
    machine::raised = raised;
    readable.clear();
    writable.clear();
    for (u32 i = 0; i < num_ranges; ++i) {
        readable.push_back({ranges[2 * i], ranges[2 * i + 1]});
        if (i < num_written) writable.push_back(readable.back());
    }
    chance.seed(seed);
    failure.clear();
    looks = 0;
    gridDim.x = grid;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Warp>> warps;
    const size_t stack_bytes = 128 << 10;
    for (u32 b = 0; b < grid; ++b) {
        blocks.emplace_back(new Block);
        blocks[b]->number = b;
        blocks[b]->shared.assign(shared_bytes, 0xEE);
        blocks[b]->barriers.resize(shared_bytes / 8);
        for (u32 w = 0; w < threads / 32; ++w) {
            warps.emplace_back(new Warp);
            warps.back()->block = blocks[b].get();
            warps.back()->number = w;
            for (Lane &made : warps.back()->lanes) {
                made.stack.reset(new u8[stack_bytes]);
                getcontext(&made.context);
                made.context.uc_stack.ss_sp = made.stack.get();
                made.context.uc_stack.ss_size = stack_bytes;
                made.context.uc_link = &scheduler;
                makecontext(&made.context, run_lane, 0);
            }
        }
    }
    while (!warps.empty()) {
        const size_t which = chance() % warps.size();
        Warp &next = *warps[which];
        for (u32 i = 0; i < 32; ++i) {
            resume(next, i);
            if (!failure.empty()) return failure.c_str();
        }
        for (u32 i = 1; i < 32; ++i)
            if (std::strcmp(next.lanes[i].at, next.lanes[0].at) != 0) {
                failure = std::string("lanes part: one is at ") + next.lanes[0].at + ", one at " + next.lanes[i].at;
                return failure.c_str();
            }
        next.round += 1;
        if (next.lanes[0].done) warps.erase(warps.begin() + which);
    }
    for (auto &block : blocks)
        if (!block->loads.empty()) failure = "the kernel ends before its loads";
    return failure.empty() ? nullptr : failure.c_str();
}

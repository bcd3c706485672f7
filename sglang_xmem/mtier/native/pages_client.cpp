// libpages.so: an engine's operations on the frames of its session, for Python. They do not use the service, and only
// mapping and unmapping block.

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "mapping.h"
#include "pages.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace mtier::pages;

struct Session {
    // `start`, `size`: the mapping with the ledger.
    Session(void *start, std::uint64_t size, void *ledger, std::uint64_t frames, int number)
        : memory(start), nbytes(size), holding(Ledger(ledger, frames), number) {}
    ~Session() { ::munmap(memory, nbytes); }

    void *memory;
    std::size_t nbytes;
    Holding holding;
};

}  // namespace

// Maps the ledger at `offset` of `fd`, which the caller closes; mappings are aligned to `granule`. nullptr on failure.
EXPORT Session *pages_open(int fd, std::uint64_t offset, std::uint64_t frames, int number, std::uint64_t granule) {
    std::uint64_t start = offset / granule * granule;
    std::uint64_t nbytes = (offset - start + Ledger::bytes_for(frames) + granule - 1) / granule * granule;
    void *memory = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(start));
    if (memory == MAP_FAILED) return nullptr;
    try {
        return new Session(memory, nbytes, static_cast<char *>(memory) + (offset - start), frames, number);
    } catch (const std::bad_alloc &) {
        ::munmap(memory, nbytes);
        return nullptr;
    }
}

// Maps a slab of GPU memory for the GPU of the calling thread's CUDA context. nullptr with a clause in `why` (at most
// 512 characters) on failure.
EXPORT mtier::Mapping *pages_map_gpu(int fd, std::uint64_t bytes, std::uint64_t alignment, char *why) {
    mtier::Mapping mapping;
    std::string words;
    if (mtier::map_gpu_memory(fd, bytes, alignment, &mapping, &words) != mtier::kSuccess) {
        words.resize(std::min<std::size_t>(words.size(), 511));
        std::memcpy(why, words.c_str(), words.size() + 1);
        return nullptr;
    }
    return new mtier::Mapping(mapping);
}

EXPORT void *pages_address(const mtier::Mapping *mapping) { return mapping->address; }

// Waits for the context of the mapping.
EXPORT void pages_unmap_gpu(mtier::Mapping *mapping) {
    mtier::unmap(*mapping);
    delete mapping;
}

EXPORT void pages_close(Session *session) { delete session; }

// Claims `n` frames: 1 on success, 0 without any claim.
EXPORT int pages_claim(Session *session, std::uint64_t n, std::uint64_t *out) {
    return session->holding.claim(n, out) ? 1 : 0;
}

// Adopts leading places of `n`; returns their number, and their frames in `out`.
EXPORT std::uint64_t pages_adopt(Session *session, std::uint64_t n, const Place *places, const Key *keys,
                                 std::uint64_t *out) {
    std::uint64_t i = 0;
    for (; i < n && session->holding.adopt(places[i].frame, places[i].generation, keys[i]); ++i) {
        out[i] = places[i].frame;
    }
    session->holding.touch(i, out);
    return i;
}

EXPORT void pages_release(Session *session, std::uint64_t n, const std::uint64_t *frames) {
    session->holding.release(n, frames);
}

EXPORT void pages_touch(Session *session, std::uint64_t n, const std::uint64_t *frames) {
    session->holding.touch(n, frames);
}

// Sets 1 for each frame that the session may write, otherwise 0.
EXPORT void pages_owned(Session *session, std::uint64_t n, const std::uint64_t *frames, std::uint8_t *out) {
    for (std::uint64_t i = 0; i < n; ++i) out[i] = session->holding.owns(frames[i]) ? 1 : 0;
}

EXPORT void pages_generations(Session *session, std::uint64_t n, const std::uint64_t *frames, std::uint64_t *out) {
    for (std::uint64_t i = 0; i < n; ++i) out[i] = session->holding.generation(frames[i]);
}

EXPORT std::uint64_t pages_held(Session *session) { return session->holding.count(); }

// Mapping and unmapping of grants in a client: one pair of functions per kind of memory.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <string>

#include "channel.h"
#include "cuda_driver.h"
#include "host_memory.h"
#include "protocol.h"
#include "text.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace mtier {

constexpr std::uint64_t kPopulateStep = 256 << 20;
constexpr std::uint64_t kSpare = 4 << 20;  // for page tables and the process's own work

struct Mapping {
    MemoryKind kind = MemoryKind::kNone;
    void *address = nullptr;
    std::uint64_t size = 0;
    cuda::Context context = nullptr;  // of GPU memory: the caller's context
};

// Whether a grant's numbers are valid, so that they cannot overflow later.
inline bool is_sound(const Reply &reply, std::uint64_t bytes, int fd) {
    std::uint64_t granule = reply.granularity;
    return fd >= 0 && granule >= 4096 && (granule & (granule - 1)) == 0 && granule <= (1ULL << 40) &&
           reply.size >= bytes && reply.size != 0 && reply.size <= (1ULL << 62) && reply.size % granule == 0;
}

// Maps `bytes` of `fd` at an address aligned to `alignment`, every page present. Returns a code with a clause in `why`.
inline Code map_host_file(int fd, std::uint64_t bytes, std::uint64_t alignment, Mapping *out, std::string *why) {
    struct stat info;
    if (::fstat(fd, &info) != 0 || info.st_size < 0 || static_cast<std::uint64_t>(info.st_size) < bytes) {
        *why = "the service granted a file that is smaller than the grant";  // touching it would raise SIGBUS
        return kServerError;
    }
    // Otherwise its size could change later.
    int seals = ::fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
        *why = "the service granted a file that may shrink";
        return kServerError;
    }
    auto failed = [&](void *start, std::uint64_t size) {
        *why = words_of(errno) + "; free host memory or request less";
        if (start != MAP_FAILED) ::munmap(start, size);
        return kMallocError;
    };
    void *reserved = ::mmap(nullptr, bytes + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return failed(MAP_FAILED, 0);
    auto start = reinterpret_cast<std::uintptr_t>(reserved);
    std::uintptr_t aligned = (start + alignment - 1) & ~(alignment - 1);
    void *place = reinterpret_cast<void *>(aligned);
    void *address = ::mmap(place, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (address == MAP_FAILED) return failed(reserved, bytes + alignment);
    if (aligned > start) ::munmap(reserved, aligned - start);
    ::munmap(reinterpret_cast<void *>(aligned + bytes), start + alignment - aligned);
    ::madvise(address, bytes, MADV_HUGEPAGE);  // a hint
    // A forked child would keep the memory after this process has ended.
    ::madvise(address, bytes, MADV_DONTFORK);
    // Missing memory must be an error of this call, not a later SIGBUS, nor SIGKILL at the container's limit. Other
    // processes allocate too, so it is populated step by step.
    for (std::uint64_t done = 0; done < bytes; done += kPopulateStep) {
        std::uint64_t available = HostMemory::available(), left = bytes - done;
        if (available < left + left / 256 + kSpare) {
            *why = "this process can have " + amount(available) + " more of host memory, and " + amount(left) +
                   " are missing; free host memory, raise the container's limit, or request less";
            ::munmap(address, bytes);
            return kMallocError;
        }
        auto *from = static_cast<char *>(address) + done;
        // Kernels before 5.14 do not support the request.
        if (::madvise(from, std::min(left, kPopulateStep), MADV_POPULATE_WRITE) != 0 && errno != EINVAL) {
            return failed(address, bytes);
        }
    }
    *out = {MemoryKind::kHostFile, address, bytes, nullptr};
    return kSuccess;
}

// Maps GPU memory for the GPU of the calling thread's CUDA context.
inline Code map_gpu_memory(int fd, std::uint64_t bytes, std::uint64_t alignment, Mapping *out, std::string *why) {
    const cuda::Driver *driver = cuda::Driver::get(why);
    if (driver == nullptr) return kEmptyCudaContext;
    cuda::Context context = nullptr;
    cuda::Device gpu = 0;
    cuda::Result result = driver->CtxGetCurrent(&context);
    if (result == cuda::kOk) {
        result = context == nullptr ? cuda::kErrorInvalidContext : driver->CtxGetDevice(&gpu);
    }
    if (result == cuda::kErrorInvalidContext || result == cuda::kErrorNotInitialized) {
        *why = "the bank is GPU memory and this thread has no CUDA context; select a GPU first, as with cudaSetDevice";
        return kEmptyCudaContext;
    }
    if (result != cuda::kOk) {
        *why = driver->failed("cuCtxGetDevice", result);
        return kMallocError;
    }
    cuda::Handle handle = 0;
    // The driver takes the descriptor itself instead of a pointer.
    result = driver->MemImportFromShareableHandle(&handle, reinterpret_cast<void *>(static_cast<std::intptr_t>(fd)),
                                                  cuda::kFileDescriptor);
    if (result != cuda::kOk) {
        *why = driver->failed("cuMemImportFromShareableHandle", result) +
               "; check that CUDA_VISIBLE_DEVICES of this process does not hide the bank's GPU";
        return kMallocError;
    }
    cuda::Address address = 0;
    const char *call = "cuMemAddressReserve";
    bool reserved = false, mapped = false;
    result = driver->MemAddressReserve(&address, bytes, alignment, 0, 0);
    if (result == cuda::kOk) {
        reserved = true;
        call = "cuMemMap";
        result = driver->MemMap(address, bytes, 0, handle, 0);
    }
    if (result == cuda::kOk) {
        mapped = true;
        call = "cuMemSetAccess";
        cuda::Access access{{cuda::kOnDevice, gpu}, cuda::kReadWrite};
        result = driver->MemSetAccess(address, bytes, &access, 1);
    }
    // From here on the mapping keeps the memory.
    cuda::Result released = driver->MemRelease(handle);
    if (result == cuda::kOk && released != cuda::kOk) {
        call = "cuMemRelease";
        result = released;
    }
    if (result != cuda::kOk) {
        *why = driver->failed(call, result) + "; check that GPU " + std::to_string(gpu) +
               " has peer access to the bank's GPU";
        if (mapped) driver->MemUnmap(address, bytes);
        if (reserved) driver->MemAddressFree(address, bytes);
        return kMallocError;
    }
    *out = {MemoryKind::kGpuMemory, reinterpret_cast<void *>(static_cast<std::uintptr_t>(address)), bytes, context};
    return kSuccess;
}

inline void unmap_gpu_memory(const Mapping &mapping) {
    std::string why;
    const cuda::Driver *driver = cuda::Driver::get(&why);
    if (driver == nullptr) return;
    // As in cudaFree: waits for the context's work with the memory first, since a copy to unmapped memory would fail
    // the context. A destroyed context has no more work.
    if (driver->CtxPushCurrent(mapping.context) == cuda::kOk) {
        driver->CtxSynchronize();
        cuda::Context popped = nullptr;
        driver->CtxPopCurrent(&popped);
    }
    auto address = static_cast<cuda::Address>(reinterpret_cast<std::uintptr_t>(mapping.address));
    driver->MemUnmap(address, mapping.size);
    driver->MemAddressFree(address, mapping.size);
}

// Maps a grant of `bytes` or more for reading and writing. Returns a code with a clause in `why`.
inline Code map_grant(const Reply &reply, std::uint64_t bytes, int fd, Mapping *out, std::string *why) {
    if (is_sound(reply, bytes, fd)) {
        switch (reply.kind) {
            case MemoryKind::kHostFile:
                return map_host_file(fd, reply.size, reply.granularity, out, why);
            case MemoryKind::kGpuMemory:
                return map_gpu_memory(fd, reply.size, reply.granularity, out, why);
            case MemoryKind::kDevice:
            case MemoryKind::kNone:
                break;
        }
    }
    *why = "the service granted a kind of memory that this library does not support; build both from one release";
    return kServerError;
}

inline void unmap(const Mapping &mapping) {
    if (mapping.kind == MemoryKind::kGpuMemory) {
        unmap_gpu_memory(mapping);
    } else {
        ::munmap(mapping.address, mapping.size);
    }
}

}  // namespace mtier

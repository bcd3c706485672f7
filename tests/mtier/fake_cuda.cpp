// A CUDA driver without a GPU: what mtierd and libmtier.so call of libcuda.so.1, over files in memory. Strict where the
// driver is strict, so that a wrong order or size of calls is an error here too.
//
// FAKE_CUDA_GPUS, FAKE_CUDA_MEMORY: number of GPUs (2), and bytes of each (256 MiB), also the limit per process.
// FAKE_CUDA_CONTEXT: ordinal of the GPU whose context is current in every thread at first; none without it.
// FAKE_CUDA_CALLS: a file that receives a line, such as "retain 1", where a GPU's primary context is retained or released
// and where a piece of its memory is created or destroyed. It outlives the process.
// FAKE_CUDA_FAULT: a file; while it holds "CALL CODE", such as "cuMemMap 999", that call fails with that code, or takes
// that many milliseconds if the code is negative.
//
// New memory holds what a client before may have left there: bytes 0xA5.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr int kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kInvalidDevice = 101;
constexpr int kInvalidContext = 201, kInvalidHandle = 400, kNotSupported = 801;
constexpr std::uint64_t kGranule = 2 << 20;

struct Location {
    int type, id;
};
struct Properties {
    int type, handle_types;
    Location location;
    void *win32;
    unsigned char flags[8];
};
struct Access {
    Location location;
    int flags;
};

struct Memory {
    int fd;
    std::uint64_t size;
    int gpu;  // -1: imported
};
struct Reservation {
    std::uint64_t size;
};
struct Mapped {
    std::uint64_t size;
    int fd;
};

std::mutex lock;
bool initialized = false;
int synchronized = 0;
unsigned long long next_handle = 0x1000;
std::map<unsigned long long, Memory> memories;
std::map<std::uint64_t, Reservation> reservations;
std::map<std::uint64_t, Mapped> mappings;
std::map<int, int> retained;

std::uint64_t number(const char *name, std::uint64_t otherwise) {
    const char *text = std::getenv(name);
    return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

int gpus() { return static_cast<int>(number("FAKE_CUDA_GPUS", 2)); }
std::uint64_t memory() { return number("FAKE_CUDA_MEMORY", 256 << 20); }

// A context's address is its GPU's ordinal and one.
thread_local std::vector<std::uintptr_t> contexts{number("FAKE_CUDA_CONTEXT", UINT64_MAX) + 1};

int fault(const char *call) {
    const char *path = std::getenv("FAKE_CUDA_FAULT");
    std::FILE *file = path == nullptr ? nullptr : std::fopen(path, "r");
    if (file == nullptr) return kOk;
    char name[64] = "";
    int code = kOk;
    bool hit = std::fscanf(file, "%63s %d", name, &code) == 2 && std::strcmp(name, call) == 0;
    std::fclose(file);
    if (hit && code < 0) ::usleep(static_cast<useconds_t>(-code) * 1000);
    return hit && code > 0 ? code : kOk;
}

void record(const char *what, int gpu) {
    const char *path = std::getenv("FAKE_CUDA_CALLS");
    std::FILE *file = path == nullptr ? nullptr : std::fopen(path, "a");
    if (file == nullptr) return;
    std::fprintf(file, "%s %d\n", what, gpu);
    std::fclose(file);
}

// 0 if the call may proceed.
int enter(const char *call) {
    if (int code = fault(call)) return code;
    return initialized || number("FAKE_CUDA_CONTEXT", UINT64_MAX) != UINT64_MAX ? kOk : kNotInitialized;
}

bool valid(const Properties *p) {
    return p->type == 1 && p->handle_types == 1 && p->location.type == 1 && p->location.id >= 0 &&
           p->location.id < gpus() && p->win32 == nullptr;
}

}  // namespace

#define FAKE extern "C" __attribute__((visibility("default"))) int
#define ENTER(call)                                \
    std::lock_guard<std::mutex> guard(lock);       \
    if (int refused = enter(call)) return refused

// For tests: what is live in this process, and how often a context was waited for.
FAKE fake_cuda_live(int what) {
    std::lock_guard<std::mutex> guard(lock);
    std::size_t counts[] = {memories.size(), reservations.size(), mappings.size()};
    return what < 3 ? static_cast<int>(counts[what]) : synchronized;
}

// The calling thread's context: a GPU's, or none with -1.
FAKE fake_cuda_select(int gpu) {
    initialized = true;
    contexts.assign(1, static_cast<std::uintptr_t>(gpu + 1));
    return 0;
}

FAKE cuInit(unsigned flags) {
    std::lock_guard<std::mutex> guard(lock);
    if (int code = fault("cuInit")) return code;
    initialized = true;
    return flags == 0 ? kOk : kInvalidValue;
}

FAKE cuGetErrorString(int code, const char **text) {
    *text = code == kOutOfMemory ? "out of memory" : "a failure";
    return kOk;
}

FAKE cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount");
    *count = gpus();
    return kOk;
}

FAKE cuDeviceGet(int *device, int ordinal) {
    ENTER("cuDeviceGet");
    *device = ordinal;
    return ordinal >= 0 && ordinal < gpus() ? kOk : kInvalidDevice;
}

FAKE cuDeviceGetAttribute(int *value, int attribute, int) {
    ENTER("cuDeviceGetAttribute");
    *value = static_cast<int>(number("FAKE_CUDA_ATTRIBUTES", 1));
    return attribute == 102 || attribute == 103 ? kOk : kInvalidValue;
}

FAKE cuDeviceGetPCIBusId(char *name, int length, int device) {
    ENTER("cuDeviceGetPCIBusId");
    std::snprintf(name, static_cast<std::size_t>(length), "0000:%02X:00.0", device + 1);
    return kOk;
}

FAKE cuDeviceTotalMem_v2(std::size_t *bytes, int) {
    ENTER("cuDeviceTotalMem");
    *bytes = memory();
    return kOk;
}

FAKE cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER("cuDevicePrimaryCtxRetain");
    if (device < 0 || device >= gpus()) return kInvalidDevice;
    *context = reinterpret_cast<void *>(static_cast<std::uintptr_t>(device + 1));
    ++retained[device];
    record("retain", device);
    return kOk;
}

FAKE cuDevicePrimaryCtxRelease_v2(int device) {
    std::lock_guard<std::mutex> guard(lock);
    if (retained[device] == 0) return kInvalidContext;
    --retained[device];
    record("release", device);
    return fault("cuDevicePrimaryCtxRelease");
}

FAKE cuCtxGetCurrent(void **context) {
    ENTER("cuCtxGetCurrent");
    *context = contexts.empty() ? nullptr : reinterpret_cast<void *>(contexts.back());
    return kOk;
}

FAKE cuCtxGetDevice(int *device) {
    ENTER("cuCtxGetDevice");
    if (contexts.empty() || contexts.back() == 0) return kInvalidContext;
    *device = static_cast<int>(contexts.back()) - 1;
    return kOk;
}

FAKE cuCtxPushCurrent_v2(void *context) {
    ENTER("cuCtxPushCurrent");
    if (context == nullptr) return kInvalidContext;
    contexts.push_back(reinterpret_cast<std::uintptr_t>(context));
    return kOk;
}

FAKE cuCtxPopCurrent_v2(void **context) {
    ENTER("cuCtxPopCurrent");
    if (contexts.empty()) return kInvalidContext;
    *context = reinterpret_cast<void *>(contexts.back());
    contexts.pop_back();
    return kOk;
}

FAKE cuCtxSynchronize() {
    ENTER("cuCtxSynchronize");
    if (contexts.empty() || contexts.back() == 0) return kInvalidContext;
    ++synchronized;
    return kOk;
}

FAKE cuMemGetAllocationGranularity(std::size_t *granule, const Properties *p, int) {
    ENTER("cuMemGetAllocationGranularity");
    *granule = number("FAKE_CUDA_GRANULE", kGranule);
    return valid(p) ? kOk : kInvalidValue;
}

FAKE cuMemCreate(unsigned long long *handle, std::size_t size, const Properties *p, unsigned long long flags) {
    ENTER("cuMemCreate");
    if (!valid(p) || flags != 0 || size == 0 || size % kGranule != 0) return kInvalidValue;
    std::uint64_t used = size;
    for (const auto &[_, each] : memories) used += each.gpu == p->location.id ? each.size : 0;
    if (used > memory()) return kOutOfMemory;
    int fd = ::memfd_create("fake-gpu", MFD_CLOEXEC);
    if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(size)) != 0) return kOutOfMemory;
    void *bytes = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED) return kOutOfMemory;
    std::memset(bytes, 0xA5, size);
    ::munmap(bytes, size);
    *handle = ++next_handle;
    memories[*handle] = {fd, size, p->location.id};
    record("create", p->location.id);
    return kOk;
}

FAKE cuMemRelease(unsigned long long handle) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = memories.find(handle);
    if (found == memories.end()) return kInvalidHandle;
    ::close(found->second.fd);
    if (found->second.gpu >= 0) record("destroy", found->second.gpu);
    memories.erase(found);
    return fault("cuMemRelease");
}

FAKE cuMemExportToShareableHandle(void *out, unsigned long long handle, int type, unsigned long long flags) {
    ENTER("cuMemExportToShareableHandle");
    auto found = memories.find(handle);
    if (found == memories.end() || type != 1 || flags != 0) return kInvalidValue;
    *static_cast<int *>(out) = ::dup(found->second.fd);
    return kOk;
}

FAKE cuMemImportFromShareableHandle(unsigned long long *handle, void *descriptor, int type) {
    ENTER("cuMemImportFromShareableHandle");
    int fd = static_cast<int>(reinterpret_cast<std::intptr_t>(descriptor));
    char name[64] = "", link[64];
    std::snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    if (type != 1 || ::readlink(link, name, sizeof(name) - 1) < 0 || std::strstr(name, "fake-gpu") == nullptr) {
        return kInvalidValue;
    }
    off_t size = ::lseek(fd, 0, SEEK_END);
    *handle = ++next_handle;
    memories[*handle] = {::dup(fd), static_cast<std::uint64_t>(size), -1};
    return kOk;
}

FAKE cuMemAddressReserve(std::uint64_t *out, std::size_t size, std::size_t alignment, std::uint64_t, unsigned long long) {
    ENTER("cuMemAddressReserve");
    if (size == 0 || size % kGranule != 0 || (alignment & (alignment - 1)) != 0) return kInvalidValue;
    if (size > (1ULL << 46) || alignment > (1ULL << 46)) return kOutOfMemory;
    void *start = ::mmap(nullptr, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return kOutOfMemory;
    auto first = reinterpret_cast<std::uintptr_t>(start);
    std::uintptr_t aligned = (first + alignment - 1) & ~(alignment - 1);
    if (aligned > first) ::munmap(start, aligned - first);
    ::munmap(reinterpret_cast<void *>(aligned + size), first + alignment - aligned);
    *out = aligned;
    reservations[aligned] = {size};
    return kOk;
}

FAKE cuMemAddressFree(std::uint64_t address, std::size_t size) {
    ENTER("cuMemAddressFree");
    auto found = reservations.find(address);
    if (found == reservations.end() || found->second.size != size || mappings.count(address) != 0) return kInvalidValue;
    ::munmap(reinterpret_cast<void *>(address), size);
    reservations.erase(found);
    return kOk;
}

FAKE cuMemMap(std::uint64_t address, std::size_t size, std::size_t offset, unsigned long long handle, unsigned long long) {
    ENTER("cuMemMap");
    auto found = memories.find(handle);
    auto place = reservations.find(address);
    if (found == memories.end() || offset != 0 || size != found->second.size || place == reservations.end() ||
        place->second.size != size || mappings.count(address) != 0) {
        return kInvalidValue;
    }
    mappings[address] = {size, ::dup(found->second.fd)};
    return kOk;
}

FAKE cuMemSetAccess(std::uint64_t address, std::size_t size, const Access *access, std::size_t count) {
    ENTER("cuMemSetAccess");
    auto found = mappings.find(address);
    if (found == mappings.end() || found->second.size != size || count != 1 || access->flags != 3 ||
        access->location.type != 1 || access->location.id < 0 || access->location.id >= gpus()) {
        return kInvalidValue;
    }
    void *place = reinterpret_cast<void *>(address);
    void *mapped = ::mmap(place, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, found->second.fd, 0);
    if (mapped == MAP_FAILED) return kOutOfMemory;
    ::madvise(place, size, MADV_DONTFORK);
    return kOk;
}

FAKE cuMemsetD8_v2(std::uint64_t address, unsigned char value, std::size_t size) {
    ENTER("cuMemsetD8");
    auto found = mappings.find(address);
    if (found == mappings.end() || found->second.size != size) return kInvalidValue;
    if (contexts.empty() || contexts.back() == 0) return kInvalidContext;
    std::memset(reinterpret_cast<void *>(address), value, size);
    return kOk;
}

FAKE cuMemUnmap(std::uint64_t address, std::size_t size) {
    ENTER("cuMemUnmap");
    auto found = mappings.find(address);
    if (found == mappings.end() || found->second.size != size) return kInvalidValue;
    void *place = reinterpret_cast<void *>(address);
    ::mmap(place, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    ::close(found->second.fd);
    mappings.erase(found);
    return kOk;
}

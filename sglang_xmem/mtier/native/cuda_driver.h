// The CUDA driver calls that GPU banks need, loaded from libcuda.so.1 at run time: building and serving host banks
// needs neither a CUDA toolkit nor a driver. Types are as in CUDA's cuda.h, whose binary interface is stable.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdlib>
#include <string>

namespace mtier::cuda {

using Result = int;
using Device = int;
using Context = struct ContextTag *;
using Address = unsigned long long;
using Handle = unsigned long long;

constexpr Result kOk = 0;
constexpr Result kErrorOutOfMemory = 2;
constexpr Result kErrorNotInitialized = 3;
constexpr Result kErrorInvalidContext = 201;

constexpr int kPinned = 1;               // CU_MEM_ALLOCATION_TYPE_PINNED
constexpr int kFileDescriptor = 1;       // CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
constexpr int kOnDevice = 1;             // CU_MEM_LOCATION_TYPE_DEVICE
constexpr int kReadWrite = 3;            // CU_MEM_ACCESS_FLAGS_PROT_READWRITE
constexpr int kRecommended = 1;          // CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
constexpr int kHasVirtualMemory = 102;   // CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
constexpr int kHasFileDescriptors = 103; // CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED

struct Location {
    int type;
    int id;
};

struct AllocationProperties {
    int type;
    int handle_types;
    Location location;
    void *win32;
    unsigned char compression;
    unsigned char gpu_direct_rdma;
    unsigned short usage;
    unsigned char reserved[4];
};

struct Access {
    Location location;
    int flags;
};

static_assert(sizeof(AllocationProperties) == 32 && sizeof(Access) == 12);

// Memory of `device` that can be exported as a file descriptor.
inline AllocationProperties properties(Device device) {
    AllocationProperties wanted{};
    wanted.type = kPinned;
    wanted.handle_types = kFileDescriptor;
    wanted.location = {kOnDevice, device};
    return wanted;
}

class Driver {
  public:
    // The driver of this process, loaded at the first call; nullptr with a clause in `why` without one. Tests build
    // with MTIER_TESTING, and set $MTIER_CUDA_LIBRARY to another library. Not thread-safe.
    static const Driver *get(std::string *why) {
        static Driver driver;
        if (driver.library_ == nullptr && !driver.load(why)) return nullptr;
        return &driver;
    }

    // "cuMemCreate failed with CUDA error 2: out of memory"
    std::string failed(const char *call, Result result) const {
        const char *words = nullptr;
        if (GetErrorString(result, &words) != kOk || words == nullptr) words = "unknown error";
        return std::string(call) + " failed with CUDA error " + std::to_string(result) + ": " + words;
    }

    Result (*Init)(unsigned) = nullptr;
    Result (*GetErrorString)(Result, const char **) = nullptr;
    Result (*DeviceGetCount)(int *) = nullptr;
    Result (*DeviceGet)(Device *, int) = nullptr;
    Result (*DeviceGetAttribute)(int *, int, Device) = nullptr;
    Result (*DeviceGetPCIBusId)(char *, int, Device) = nullptr;
    Result (*DeviceTotalMem)(std::size_t *, Device) = nullptr;
    Result (*DevicePrimaryCtxRetain)(Context *, Device) = nullptr;
    Result (*DevicePrimaryCtxRelease)(Device) = nullptr;
    Result (*CtxGetCurrent)(Context *) = nullptr;
    Result (*CtxGetDevice)(Device *) = nullptr;
    Result (*CtxPushCurrent)(Context) = nullptr;
    Result (*CtxPopCurrent)(Context *) = nullptr;
    Result (*CtxSynchronize)() = nullptr;
    Result (*MemGetAllocationGranularity)(std::size_t *, const AllocationProperties *, int) = nullptr;
    Result (*MemCreate)(Handle *, std::size_t, const AllocationProperties *, unsigned long long) = nullptr;
    Result (*MemRelease)(Handle) = nullptr;
    Result (*MemExportToShareableHandle)(void *, Handle, int, unsigned long long) = nullptr;
    Result (*MemImportFromShareableHandle)(Handle *, void *, int) = nullptr;
    Result (*MemAddressReserve)(Address *, std::size_t, std::size_t, Address, unsigned long long) = nullptr;
    Result (*MemAddressFree)(Address, std::size_t) = nullptr;
    Result (*MemMap)(Address, std::size_t, std::size_t, Handle, unsigned long long) = nullptr;
    Result (*MemUnmap)(Address, std::size_t) = nullptr;
    Result (*MemSetAccess)(Address, std::size_t, const Access *, std::size_t) = nullptr;
    Result (*MemsetD8)(Address, unsigned char, std::size_t) = nullptr;

  private:
    Driver() = default;

    bool load(std::string *why) {
        std::string path = "libcuda.so.1";
#ifdef MTIER_TESTING
        const char *chosen = std::getenv("MTIER_CUDA_LIBRARY");
        if (chosen != nullptr && *chosen != '\0') path = chosen;
#endif
        void *library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            *why = "this machine has no NVIDIA driver (" + std::string(::dlerror()) + ")";
            return false;
        }
        const char *missing = nullptr;
        auto find = [&](auto *function, const char *name) {
            void *found = ::dlsym(library, name);
            if (found == nullptr) missing = name;
            *reinterpret_cast<void **>(function) = found;
        };
        find(&Init, "cuInit");
        find(&GetErrorString, "cuGetErrorString");
        find(&DeviceGetCount, "cuDeviceGetCount");
        find(&DeviceGet, "cuDeviceGet");
        find(&DeviceGetAttribute, "cuDeviceGetAttribute");
        find(&DeviceGetPCIBusId, "cuDeviceGetPCIBusId");
        find(&DeviceTotalMem, "cuDeviceTotalMem_v2");
        find(&DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
        find(&DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
        find(&CtxGetCurrent, "cuCtxGetCurrent");
        find(&CtxGetDevice, "cuCtxGetDevice");
        find(&CtxPushCurrent, "cuCtxPushCurrent_v2");
        find(&CtxPopCurrent, "cuCtxPopCurrent_v2");
        find(&CtxSynchronize, "cuCtxSynchronize");
        find(&MemGetAllocationGranularity, "cuMemGetAllocationGranularity");
        find(&MemCreate, "cuMemCreate");
        find(&MemRelease, "cuMemRelease");
        find(&MemExportToShareableHandle, "cuMemExportToShareableHandle");
        find(&MemImportFromShareableHandle, "cuMemImportFromShareableHandle");
        find(&MemAddressReserve, "cuMemAddressReserve");
        find(&MemAddressFree, "cuMemAddressFree");
        find(&MemMap, "cuMemMap");
        find(&MemUnmap, "cuMemUnmap");
        find(&MemSetAccess, "cuMemSetAccess");
        find(&MemsetD8, "cuMemsetD8_v2");
        if (missing != nullptr) {
            *why = path + " has no " + missing + "; install a driver for CUDA 12 or newer";
            ::dlclose(library);
            return false;
        }
        library_ = library;
        return true;
    }

    void *library_ = nullptr;
};

}  // namespace mtier::cuda

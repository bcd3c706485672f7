// Banks of memory that mtierd grants, one class per kind of memory. A bank allocates and frees memory; the ledger
// accounts for owners and free capacity. Each bank has its own thread, its only user (bank_thread.h).
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "cuda_driver.h"
#include "descriptor.h"
#include "protocol.h"
#include "text.h"

namespace mtier {

constexpr int kMaxRestAfterMs = 3600 * 1000;

// The result of an allocation.
struct Made {
    int fd = -1;            // for the client, to be closed once it is sent; -1: failed, see `why`
    std::string why;        // a clause
    bool may_pass = false;  // a retry may succeed shortly
};

class Bank {
  public:
    // `total` is rounded down to whole granules; `granularity` is a power of two.
    Bank(std::uint64_t total, std::uint64_t granularity)
        : total_(total / granularity * granularity), granularity_(granularity) {}
    virtual ~Bank() = default;
    Bank(const Bank &) = delete;
    Bank &operator=(const Bank &) = delete;

    // Constant; any thread may call them.
    virtual MemoryKind kind() const = 0;
    // What the memory is, for the log: "host memory".
    virtual std::string describe() const = 0;
    // A short name for labels and the ledger: "host".
    virtual std::string label() const = 0;
    // Members of a JSON object: "\"kind\": \"host\"".
    virtual std::string json() const = 0;
    std::uint64_t total() const { return total_; }
    std::uint64_t granularity() const { return granularity_; }
    // Rounds `bytes` up to whole granules; 0 on overflow.
    std::uint64_t rounded(std::uint64_t bytes) const {
        return bytes > UINT64_MAX - (granularity_ - 1) ? 0 : (bytes + granularity_ - 1) & ~(granularity_ - 1);
    }

    // Allocates `bytes` (whole granules) of zeroed memory, named `id`.
    virtual Made create(std::uint64_t bytes, std::uint64_t id) = 0;
    // Frees the memory of `id` if no client has it. True if it is free, or is not this bank's. `given_up`: its client
    // has freed it, or has ended.
    virtual bool settle(std::uint64_t id, bool given_up) = 0;
    // Releases the memory of `id` even if a client has it.
    virtual void forget(std::uint64_t id) = 0;
    // Reserves the name `id` for memory that an earlier service allocated and that is still in use.
    virtual void resume(std::uint64_t) {}

    // Milliseconds until the next call of rest_if_due(); -1: no call.
    virtual int rest_in_ms() const { return -1; }
    virtual void rest_if_due() {}

  private:
    const std::uint64_t total_;
    const std::uint64_t granularity_;
};

// Shared host memory, one anonymous file per allocation, so the bank cannot fragment. The service keeps its own
// descriptor, which shows whether another process still has the file: a client may free memory, or exit, while a
// descriptor or a mapping that it passed on is still in use.
class HostBank : public Bank {
  public:
    using Bank::Bank;

    ~HostBank() override {
        for (const auto &[id, fd] : files_) ::close(fd);
    }

    MemoryKind kind() const override { return MemoryKind::kHostFile; }
    std::string describe() const override { return "host memory"; }
    std::string label() const override { return "host"; }
    std::string json() const override { return "\"kind\": \"host\""; }

    Made create(std::uint64_t bytes, std::uint64_t id) override {
        auto entry = files_.emplace(id, -1).first;  // reserved first, so that nothing can fail after the file exists
        Descriptor file = sealed_file("mtier", bytes);
        // Two open files: the client gets its own, and the kernel counts open files.
        int own = file.get() >= 0 ? file.reopened() : -1;
        int sent = own >= 0 ? file.reopened() : -1;
        Made result;
        if (sent < 0) {
            result.why = words_of(errno);
            result.may_pass = errno == EMFILE || errno == ENFILE || errno == ENOMEM;
            if (own >= 0) ::close(own);
            files_.erase(entry);
        } else {
            entry->second = own;
            result.fd = sent;
        }
        return result;
    }

    bool settle(std::uint64_t id, bool given_up) override {
        auto found = files_.find(id);
        if (found == files_.end()) return given_up;
        // The kernel grants a write lease only if no one else has the file open or mapped.
        if (::fcntl(found->second, F_SETLEASE, F_WRLCK) != 0 && !(errno == EINVAL && given_up)) return false;
        forget(id);
        return true;
    }

    void forget(std::uint64_t id) override {
        auto found = files_.find(id);
        if (found == files_.end()) return;
        ::close(found->second);
        files_.erase(found);
    }

  private:
    std::unordered_map<std::uint64_t, int> files_;
};

// HBM of one GPU. An allocation is one piece of physical memory of CUDA's virtual memory management, passed as a file
// descriptor. Physical memory consists of granules, so the bank cannot fragment, and an allocation of any size is one
// descriptor.
//
// Allocating memory needs no CUDA context, but a GPU without any context runs at idle clocks and serves its memory to
// other GPUs at a lower rate. So the bank holds the GPU's primary context while any of its memory is allocated, and for
// a few seconds longer, since making a context is slow and a client may allocate and free repeatedly. A GPU whose bank
// is unused looks idle to others. The context is used only to clear memory.
//
// The driver reclaims memory when the service has released it and no client maps it any more; a process's mappings end
// with it. The driver does not report mappings, so the bank trusts a client that frees memory. The driver does not
// guarantee that memory is zeroed, so the bank clears it.
class GpuBank : public Bank {
  public:
    // nullptr with a clause in `why` if the GPU cannot serve `bytes`. `rest_after`: how long the context stays after
    // the last allocation is freed.
    static std::unique_ptr<GpuBank> open(int gpu, std::uint64_t bytes, std::uint64_t granularity,
                                         std::chrono::milliseconds rest_after, std::string *why) {
        constexpr const char *kFix = "; check the driver with nvidia-smi, or give host:BYTES for host memory";
        const cuda::Driver *driver = cuda::Driver::get(why);
        if (driver == nullptr) {
            *why += kFix;
            return nullptr;
        }
        int count = 0;
        cuda::Device device = 0;
        std::size_t memory = 0, granule = 0;
        int has_memory = 0, has_descriptors = 0;
        char pci[32] = "";
        const char *call = nullptr;
        cuda::Result result = cuda::kOk;
        auto tried = [&](const char *name, cuda::Result status) {
            call = name;
            result = status;
            return status == cuda::kOk;
        };
        if (!tried("cuInit", driver->Init(0)) || !tried("cuDeviceGetCount", driver->DeviceGetCount(&count))) {
            *why = driver->failed(call, result) + kFix;
            return nullptr;
        }
        if (gpu >= count) {
            *why = "GPU " + std::to_string(gpu) + " does not exist; this process sees " + std::to_string(count) +
                   ", counted from 0, so name one of these";
            return nullptr;
        }
        cuda::AllocationProperties wanted = cuda::properties(gpu);
        if (!tried("cuDeviceGet", driver->DeviceGet(&device, gpu)) ||
            !tried("cuDeviceGetAttribute", driver->DeviceGetAttribute(&has_memory, cuda::kHasVirtualMemory, device)) ||
            !tried("cuDeviceGetAttribute",
                   driver->DeviceGetAttribute(&has_descriptors, cuda::kHasFileDescriptors, device)) ||
            !tried("cuDeviceGetPCIBusId", driver->DeviceGetPCIBusId(pci, sizeof(pci), device)) ||
            !tried("cuDeviceTotalMem", driver->DeviceTotalMem(&memory, device))) {
            *why = driver->failed(call, result) + kFix;
            return nullptr;
        }
        if (has_memory == 0 || has_descriptors == 0) {
            *why = "GPU " + std::to_string(gpu) + " cannot share memory as file descriptors; use another GPU";
            return nullptr;
        }
        if (!tried("cuMemGetAllocationGranularity",
                   driver->MemGetAllocationGranularity(&granule, &wanted, cuda::kRecommended))) {
            *why = driver->failed(call, result) + kFix;
            return nullptr;
        }
        if (granule == 0 || (granule & (granule - 1)) != 0) {
            *why = "GPU " + std::to_string(gpu) + " has granules of " + std::to_string(granule) + " bytes, which is "
                   "not a power of two; use another GPU";
            return nullptr;
        }
        granularity = std::max<std::uint64_t>(granularity, granule);
        if (bytes > memory || bytes < granularity) {
            *why = "GPU " + std::to_string(gpu) + " has " + std::to_string(memory) + " bytes in granules of " +
                   std::to_string(granularity) + "; give a size in between";
            return nullptr;
        }
        return std::unique_ptr<GpuBank>(new GpuBank(*driver, gpu, device, pci, bytes, granularity, rest_after));
    }

    ~GpuBank() override {
        for (const auto &[id, handle] : handles_) {
            if (handle != 0) driver_.MemRelease(handle);
        }
        rest();
    }

    MemoryKind kind() const override { return MemoryKind::kGpuMemory; }
    std::string describe() const override { return "memory of GPU " + std::to_string(gpu_) + " (" + pci_ + ")"; }
    std::string label() const override { return "gpu:" + pci_; }
    std::string json() const override {
        return "\"kind\": \"gpu\", \"gpu\": " + std::to_string(gpu_) + ", \"pci\": \"" + pci_ + "\"";
    }

    Made create(std::uint64_t bytes, std::uint64_t id) override {
        cuda::AllocationProperties wanted = cuda::properties(gpu_);
        // Reserved first, so that nothing can fail after a handle or a context exists.
        auto entry = handles_.emplace(id, 0).first;
        Made made;
        // Before the memory, which could leave no space for the context.
        cuda::Result result = awake_ ? cuda::kOk : driver_.DevicePrimaryCtxRetain(&context_, device_);
        const char *call = "cuDevicePrimaryCtxRetain";
        awake_ = result == cuda::kOk;
        cuda::Handle handle = 0;
        if (result == cuda::kOk) {
            call = "cuMemCreate";
            result = driver_.MemCreate(&handle, bytes, &wanted, 0);
        }
        // The driver reclaims the memory of a dead client shortly after its process has ended.
        made.may_pass = result == cuda::kErrorOutOfMemory;
        if (result == cuda::kOk) {
            entry->second = handle;
            result = clear(handle, bytes, &call);
        }
        if (result == cuda::kOk) {
            call = "cuMemExportToShareableHandle";
            result = driver_.MemExportToShareableHandle(&made.fd, handle, cuda::kFileDescriptor, 0);
        }
        if (result != cuda::kOk || made.fd < 0) {
            made.fd = -1;
            made.why = driver_.failed(call, result);
            forget(id);
        }
        return made;
    }

    bool settle(std::uint64_t id, bool given_up) override {
        if (given_up) forget(id);
        return given_up;
    }

    void forget(std::uint64_t id) override {
        auto found = handles_.find(id);
        if (found == handles_.end()) return;
        if (found->second != 0) driver_.MemRelease(found->second);
        handles_.erase(found);
        rests_at_ = Clock::now() + rest_after_;
        rest_if_due();
    }

    // The memory belongs to every holder of its descriptor; the GPU keeps its clocks while it may be in use.
    void resume(std::uint64_t id) override {
        handles_.emplace(id, 0);
        awake_ = awake_ || driver_.DevicePrimaryCtxRetain(&context_, device_) == cuda::kOk;
    }

    int rest_in_ms() const override {
        if (!awake_ || !handles_.empty()) return -1;
        auto left = std::chrono::ceil<std::chrono::milliseconds>(rests_at_ - Clock::now()).count();
        return static_cast<int>(std::clamp<std::int64_t>(left, 0, kMaxRestAfterMs));
    }

    void rest_if_due() override {
        if (rest_in_ms() == 0) rest();
    }

  private:
    using Clock = std::chrono::steady_clock;

    GpuBank(const cuda::Driver &driver, int gpu, cuda::Device device, std::string pci, std::uint64_t total,
            std::uint64_t granularity, std::chrono::milliseconds rest_after)
        : Bank(total, granularity),
          driver_(driver),
          gpu_(gpu),
          device_(device),
          pci_(std::move(pci)),
          rest_after_(rest_after) {}

    // Fills memory with zeros, since it may hold a previous client's data. Sets `call` to the name of a failed call.
    cuda::Result clear(cuda::Handle handle, std::uint64_t bytes, const char **call) {
        cuda::Result result = cuda::kOk;
        auto tried = [&](const char *name, cuda::Result status) {
            *call = name;
            result = status;
            return status == cuda::kOk;
        };
        if (!tried("cuCtxPushCurrent", driver_.CtxPushCurrent(context_))) return result;
        cuda::Address address = 0;
        cuda::Access access{{cuda::kOnDevice, device_}, cuda::kReadWrite};
        bool reserved = tried("cuMemAddressReserve", driver_.MemAddressReserve(&address, bytes, granularity(), 0, 0));
        bool mapped = reserved && tried("cuMemMap", driver_.MemMap(address, bytes, 0, handle, 0));
        if (mapped && tried("cuMemSetAccess", driver_.MemSetAccess(address, bytes, &access, 1)) &&
            tried("cuMemsetD8", driver_.MemsetD8(address, 0, bytes))) {
            tried("cuCtxSynchronize", driver_.CtxSynchronize());
        }
        if (mapped) driver_.MemUnmap(address, bytes);
        if (reserved) driver_.MemAddressFree(address, bytes);
        cuda::Context popped = nullptr;
        driver_.CtxPopCurrent(&popped);
        return result;
    }

    void rest() {
        if (awake_) driver_.DevicePrimaryCtxRelease(device_);
        awake_ = false;
    }

    const cuda::Driver &driver_;
    const int gpu_;
    const cuda::Device device_;
    const std::string pci_;
    const std::chrono::milliseconds rest_after_;
    std::unordered_map<std::uint64_t, cuda::Handle> handles_;
    cuda::Context context_ = nullptr;
    bool awake_ = false;          // the context is held
    Clock::time_point rests_at_;  // if no memory is allocated
};

}  // namespace mtier

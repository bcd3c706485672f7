// Banks of memory that mtierd hands out. Each kind of memory is one class; the accounting is common to all.
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

#include "channel.h"
#include "cuda_driver.h"
#include "protocol.h"

namespace mtier {

constexpr int kMaxRestAfterMs = 3600 * 1000;

// What became of an allocation.
struct Grant {
    int fd = -1;           // for the client, to be closed once it is sent; -1: `why` says what is wrong
    std::string why;       // a clause
    bool may_pass = false; // the same call may succeed in a moment
    std::string note;      // for the log, granted or not; mostly empty
};

class Bank {
  public:
    // `total` is cut to whole granules; `granularity` is a power of two.
    Bank(std::uint64_t total, std::uint64_t granularity)
        : total_(total / granularity * granularity), available_(total_), granularity_(granularity) {}
    virtual ~Bank() = default;
    Bank(const Bank &) = delete;
    Bank &operator=(const Bank &) = delete;

    virtual MemoryKind kind() const = 0;
    // What the memory is, for the log: "host memory".
    virtual std::string describe() const = 0;
    // The same as members of a JSON object: "\"kind\": \"host\"".
    virtual std::string json() const = 0;

    std::uint64_t total() const { return total_; }
    std::uint64_t available() const { return available_; }
    std::uint64_t granularity() const { return granularity_; }
    std::size_t allocations() const { return sizes_.size(); }

    // Milliseconds until the bank wants a call of rest_if_due(); -1 where it does not.
    virtual int rest_in_ms() const { return -1; }
    virtual void rest_if_due() {}

    // `bytes` in whole granules; 0 where that many cannot be counted.
    std::uint64_t rounded(std::uint64_t bytes) const {
        return bytes > UINT64_MAX - (granularity_ - 1) ? 0 : (bytes + granularity_ - 1) & ~(granularity_ - 1);
    }

    // Grants `bytes` (whole granules, no more than available()) under the name `id`.
    Grant allocate(std::uint64_t bytes, std::uint64_t id) {
        sizes_.emplace(id, bytes);
        Grant grant;
        try {
            grant = create(bytes, id);
        } catch (...) {
            sizes_.erase(id);
            destroy(id);
            throw;
        }
        if (grant.fd >= 0) {
            available_ -= bytes;
        } else {
            sizes_.erase(id);
        }
        return grant;
    }

    // Takes `id` back. Memory that a client still maps stays with it until it unmaps or ends, and counts as free here.
    void release(std::uint64_t id) {
        auto found = sizes_.find(id);
        if (found == sizes_.end()) return;
        available_ += found->second;
        sizes_.erase(found);
        destroy(id);
    }

  protected:
    virtual Grant create(std::uint64_t bytes, std::uint64_t id) = 0;
    // Also of what create() could not make, and of names that it does not know.
    virtual void destroy(std::uint64_t id) = 0;

  private:
    const std::uint64_t total_;
    std::uint64_t available_;
    const std::uint64_t granularity_;
    std::unordered_map<std::uint64_t, std::uint64_t> sizes_;
};

// Shared host memory, one anonymous file an allocation. The service keeps no descriptor, so the kernel has the pages
// back when the client unmaps them or ends, and there are no holes between allocations that could fragment the bank.
class HostBank : public Bank {
  public:
    using Bank::Bank;

    MemoryKind kind() const override { return MemoryKind::kHostFile; }
    std::string describe() const override { return "host memory"; }
    std::string json() const override { return "\"kind\": \"host\""; }

  protected:
    Grant create(std::uint64_t bytes, std::uint64_t) override {
        int fd = ::memfd_create("mtier", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0) return {-1, words_of(errno), false, ""};
        // Of fixed size: a client cannot take more than was granted, nor lose what it maps.
        if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
            ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
            int error = errno;
            ::close(fd);
            return {-1, words_of(error), false, ""};
        }
        return {fd, "", false, ""};
    }

    void destroy(std::uint64_t) override {}
};

// HBM of one GPU, one piece of CUDA virtual memory management's physical memory an allocation, handed out as a file
// descriptor. Physical memory is put together from granules, so there are no holes that could fragment the bank, and
// one allocation is one descriptor however large it is.
//
// None of this needs a CUDA context, but a GPU on which no process has one rests and serves its memory to others at a
// lower rate. So the bank holds the GPU's primary context while any of its memory is out, and for a moment longer, since
// making one takes a while and a client may allocate and free over and over: a GPU whose bank is not used looks idle to
// others. Nothing is done in the context, and it is current in no thread.
//
// The driver has the memory back when the service has released it and no client maps it any more: a client that dies
// loses its own mappings with its process, and the service releases when the connection ends.
class GpuBank : public Bank {
  public:
    // nullptr with a clause in `why` where the GPU cannot serve `bytes`.
    // `rest_after`: how long the context stays when no memory is out.
    static std::unique_ptr<GpuBank> open(int gpu, std::uint64_t bytes, std::uint64_t granularity,
                                         std::chrono::milliseconds rest_after, std::string *why) {
        constexpr const char *kWayOut = "; look at the driver with nvidia-smi, or give host:BYTES for host memory";
        const cuda::Driver *driver = cuda::Driver::get(why);
        if (driver == nullptr) {
            *why += kWayOut;
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
            *why = driver->failed(call, result) + kWayOut;
            return nullptr;
        }
        if (gpu >= count) {
            *why = "there is no GPU " + std::to_string(gpu) + "; this process sees " + std::to_string(count) +
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
            *why = driver->failed(call, result) + kWayOut;
            return nullptr;
        }
        if (has_memory == 0 || has_descriptors == 0) {
            *why = "GPU " + std::to_string(gpu) + " cannot share memory as file descriptors; use another GPU";
            return nullptr;
        }
        if (!tried("cuMemGetAllocationGranularity",
                   driver->MemGetAllocationGranularity(&granule, &wanted, cuda::kRecommended))) {
            *why = driver->failed(call, result) + kWayOut;
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
        for (const auto &[id, handle] : handles_) driver_.MemRelease(handle);
        rest();
    }

    MemoryKind kind() const override { return MemoryKind::kGpuMemory; }
    std::string describe() const override { return "memory of GPU " + std::to_string(gpu_) + " (" + pci_ + ")"; }
    std::string json() const override {
        return "\"kind\": \"gpu\", \"gpu\": " + std::to_string(gpu_) + ", \"pci\": \"" + pci_ + "\"";
    }

    int rest_in_ms() const override {
        if (!awake_ || !handles_.empty()) return -1;
        auto left = std::chrono::ceil<std::chrono::milliseconds>(rests_at_ - Clock::now()).count();
        return static_cast<int>(std::clamp<std::int64_t>(left, 0, kMaxRestAfterMs));
    }

    void rest_if_due() override {
        if (rest_in_ms() == 0) rest();
    }

  protected:
    Grant create(std::uint64_t bytes, std::uint64_t id) override {
        cuda::AllocationProperties wanted = cuda::properties(gpu_);
        // Reserved first, so that nothing can fail once there is a handle or a context to lose.
        auto entry = handles_.emplace(id, 0).first;
        Grant grant;
        // Before the memory, which could leave the context no room. Asked for once, not with each allocation: where it
        // cannot be had, asking may take as long as making it.
        if (handles_.size() == 1 && !awake_) grant.note = wake();
        cuda::Handle handle = 0;
        cuda::Result result = driver_.MemCreate(&handle, bytes, &wanted, 0);
        if (result != cuda::kOk) {
            // The memory of a client that has just died is the driver's again a moment after its connection ends.
            grant.may_pass = result == cuda::kErrorOutOfMemory;
            grant.why = driver_.failed("cuMemCreate", result);
        } else {
            entry->second = handle;
            result = driver_.MemExportToShareableHandle(&grant.fd, handle, cuda::kFileDescriptor, 0);
            if (result != cuda::kOk || grant.fd < 0) {
                grant.fd = -1;
                grant.why = driver_.failed("cuMemExportToShareableHandle", result);
            }
        }
        if (grant.fd < 0) destroy(id);
        return grant;
    }

    void destroy(std::uint64_t id) override {
        auto found = handles_.find(id);
        if (found == handles_.end()) return;
        if (found->second != 0) driver_.MemRelease(found->second);
        handles_.erase(found);
        rests_at_ = Clock::now() + rest_after_;
        rest_if_due();
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

    // Holds the GPU's primary context; the driver counts holders, such as another bank of this GPU. Returns words for
    // the log where that fails for the first time: the memory is as good, only slower to reach.
    std::string wake() {
        cuda::Context context = nullptr;
        cuda::Result result = driver_.DevicePrimaryCtxRetain(&context, device_);
        awake_ = result == cuda::kOk;
        if (awake_ || told_) return "";
        told_ = true;
        return "copies may be slower, since GPU " + std::to_string(gpu_) + " rests where no process has a CUDA " +
               "context: " + driver_.failed("cuDevicePrimaryCtxRetain", result);
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
    bool awake_ = false;          // the context is held
    Clock::time_point rests_at_;  // where no memory is out
    bool told_ = false;
};

}  // namespace mtier

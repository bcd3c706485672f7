// Banks of memory that mtierd hands out. Each kind of memory is one class; the accounting is common to all.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <unordered_map>

#include "protocol.h"

namespace mtier {

class Bank {
  public:
    // `total` is cut to whole granules; `granularity` is a power of two.
    Bank(std::uint64_t total, std::uint64_t granularity)
        : total_(total / granularity * granularity), available_(total_), granularity_(granularity) {}
    virtual ~Bank() = default;
    Bank(const Bank &) = delete;
    Bank &operator=(const Bank &) = delete;

    virtual const char *name() const = 0;
    virtual MemoryKind kind() const = 0;

    std::uint64_t total() const { return total_; }
    std::uint64_t available() const { return available_; }
    std::uint64_t granularity() const { return granularity_; }
    std::size_t allocations() const { return sizes_.size(); }

    // `bytes` in whole granules; 0 where that many cannot be counted.
    std::uint64_t rounded(std::uint64_t bytes) const {
        return bytes > UINT64_MAX - (granularity_ - 1) ? 0 : (bytes + granularity_ - 1) & ~(granularity_ - 1);
    }

    // Grants `bytes` (whole granules, no more than available()) under the name `id`. Returns a file descriptor for the
    // client, to be closed once it is sent; -1 with errno where the system has no such memory.
    int allocate(std::uint64_t bytes, std::uint64_t id) {
        sizes_.emplace(id, bytes);
        int fd = create(bytes, id);
        if (fd >= 0) {
            available_ -= bytes;
        } else {
            int error = errno;
            sizes_.erase(id);
            errno = error;
        }
        return fd;
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
    virtual int create(std::uint64_t bytes, std::uint64_t id) = 0;
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

    const char *name() const override { return "host"; }
    MemoryKind kind() const override { return MemoryKind::kHostFile; }

  protected:
    int create(std::uint64_t bytes, std::uint64_t) override {
        int fd = ::memfd_create("mtier", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0) return -1;
        // Of fixed size: a client cannot take more than was granted, nor lose what it maps.
        if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
            ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
            int error = errno;
            ::close(fd);
            errno = error;
            return -1;
        }
        return fd;
    }

    void destroy(std::uint64_t) override {}
};

}  // namespace mtier

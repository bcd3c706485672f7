// Owning file descriptors, and memory in a file of fixed size.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>

namespace mtier {

class Descriptor {
  public:
    explicit Descriptor(int fd = -1) : fd_(fd) {}
    Descriptor(Descriptor &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Descriptor &operator=(Descriptor &&other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Descriptor() {
        if (fd_ >= 0) ::close(fd_);
    }
    int get() const { return fd_; }
    int release() { return std::exchange(fd_, -1); }
    // Duplicates it, to be sent; -1 on failure.
    int duplicate() const { return ::fcntl(fd_, F_DUPFD_CLOEXEC, 0); }
    // Opens the same memory as a separate open file, with its own locks and leases. -1 with errno.
    int reopened() const { return ::open(("/proc/self/fd/" + std::to_string(fd_)).c_str(), O_RDWR | O_CLOEXEC); }

  private:
    int fd_;
};

// The descriptors that came with a message.
using Descriptors = std::array<Descriptor, 2>;

// Whether a file is memory that nobody can shrink.
inline bool is_sealed(const Descriptor &file) {
    int seals = ::fcntl(file.get(), F_GET_SEALS);
    return seals >= 0 && (seals & F_SEAL_SHRINK) != 0;
}

// Creates zeroed host memory of fixed size: a client can neither grow it nor lose mapped pages. -1 with errno.
inline Descriptor sealed_file(const char *name, std::uint64_t bytes) {
    Descriptor file(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
    bool made = file.get() >= 0 && ::ftruncate(file.get(), static_cast<off_t>(bytes)) == 0 &&
                ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
    return made ? std::move(file) : Descriptor();
}

}  // namespace mtier

// Populates memory of a file before it is mapped, so that pinning it later is fast.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "descriptor.h"
#include "host_memory.h"
#include "text.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace mtier {

// Threads that work in small steps, and stop before a control group's limit. The file's contents do not change.
class Populating {
  public:
    // `fd`: the caller's descriptor; not used after the constructor returns.
    Populating(int fd, std::uint64_t bytes) : bytes_(bytes) {
        address_ = static_cast<char *>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
        if (address_ == MAP_FAILED) {
            stop(words_of(errno));
            return;
        }
        ::madvise(address_, bytes, MADV_HUGEPAGE);  // a hint
        unsigned threads = std::clamp(std::thread::hardware_concurrency() / 2, 1U, kMostThreads);
        running_ = threads;
        for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
    }
    Populating(const Populating &) = delete;
    Populating &operator=(const Populating &) = delete;
    ~Populating() {
        stopping_ = true;
        for (std::thread &thread : threads_) thread.join();
        if (address_ != MAP_FAILED) ::munmap(address_, bytes_);
    }

    std::uint64_t bytes() const { return bytes_; }
    std::uint64_t present() const { return present_; }
    // Whether all threads have ended.
    bool ended() const { return running_ == 0; }
    // Why it ended early: a clause; empty if all is populated.
    std::string why() const {
        std::lock_guard<std::mutex> turn(lock_);
        return why_;
    }

  private:
    static constexpr std::uint64_t kStep = 2 << 20, kStepsBetweenLooks = 32, kSpare = 32 << 20;
    static constexpr unsigned kMostThreads = 4;

    void run() {
        for (std::uint64_t steps = 0; !stopping_; ++steps) {
            std::uint64_t at = next_.fetch_add(kStep);
            if (at >= bytes_) break;
            if (steps % kStepsBetweenLooks == 0) {
                std::uint64_t available = HostMemory::available();
                if (available < kSpare) {
                    stop("this machine, or the container's limit, has " + amount(available) + " left");
                    break;
                }
            }
            std::uint64_t size = std::min(kStep, bytes_ - at);
            if (::madvise(address_ + at, size, MADV_POPULATE_WRITE) != 0) {
                stop(errno == EINVAL ? "this needs Linux 5.14" : words_of(errno));
                break;
            }
            present_ += size;
        }
        --running_;
    }

    void stop(std::string why) {
        std::lock_guard<std::mutex> turn(lock_);
        stopping_ = true;
        if (why_.empty()) why_ = std::move(why);
    }

    const std::uint64_t bytes_;
    char *address_;
    std::atomic<std::uint64_t> next_{0}, present_{0};
    std::atomic<unsigned> running_{0};
    std::atomic<bool> stopping_{false};
    mutable std::mutex lock_;
    std::string why_;
    std::vector<std::thread> threads_;
};

}  // namespace mtier

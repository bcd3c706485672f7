// A client's process, held by a pidfd, which is never reused, unlike a process id.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "text.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace mtier {

class Process {
  public:
    // The process at the other end of `socket`, with the kernel's `pid`: 0 if it is in a PID namespace that is not
    // visible here.
    static std::shared_ptr<Process> of_peer(int socket, pid_t pid) {
        int fd = -1;
        socklen_t length = sizeof(fd);
        if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &length) != 0) {  // before Linux 6.5
            fd = open_pid(pid);
            // While the peer still holds its end, its id has not been reused.
            pollfd entry{socket, 0, 0};
            if (fd >= 0 && (::poll(&entry, 1, 0) != 0 || gone(fd))) {
                ::close(fd);
                fd = -1;
            }
        }
        return std::make_shared<Process>(pid, fd, key_of(pid, fd));
    }

    // The process that an earlier service identified by `key`; nullptr if it is gone. A process that cannot be looked
    // up has no pidfd.
    static std::shared_ptr<Process> of_key(pid_t pid, const std::string &key) {
        if (pid == 0) return std::make_shared<Process>(pid, -1, key);
        int fd = open_pid(pid);
        if (fd < 0 || gone(fd) || key_of(pid, fd) != key) {
            if (fd >= 0) ::close(fd);
            return nullptr;
        }
        return std::make_shared<Process>(pid, fd, key);
    }

    Process(pid_t pid, int fd, std::string key) : pid_(pid), fd_(fd), key_(std::move(key)) {}
    Process(const Process &) = delete;
    Process &operator=(const Process &) = delete;
    ~Process() {
        if (fd_ >= 0) ::close(fd_);
    }

    pid_t pid() const { return pid_; }
    int fd() const { return fd_; }  // readable once the process has ended; -1 if the kernel does not provide it
    // Unique for the process until the machine reboots.
    const std::string &key() const { return key_; }
    // "process 123"
    std::string name() const {
        return pid_ != 0 ? "process " + std::to_string(pid_) : "process " + key_ + " of another PID namespace";
    }
    bool gone() const { return fd_ >= 0 && gone(fd_); }
    // Moves the pidfd from another object of the same process.
    void know(Process &other) { fd_ = std::exchange(other.fd_, -1); }

  private:
    static constexpr long kPidfs = 0x50494446;

    static int open_pid(pid_t pid) {
        return pid > 0 ? static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)) : -1;
    }

    static bool gone(int fd) {
        pollfd entry{fd, POLLIN, 0};
        return ::poll(&entry, 1, 0) > 0;
    }

    static std::string key_of(pid_t pid, int fd) {
        struct statfs filesystem;
        struct stat info;
        // Unique inode numbers per process exist since Linux 6.9.
        if (fd >= 0 && ::fstatfs(fd, &filesystem) == 0 && filesystem.f_type == kPidfs && ::fstat(fd, &info) == 0) {
            return "i" + std::to_string(info.st_ino);
        }
        std::string started = start_of(pid);
        if (!started.empty()) return "p" + std::to_string(pid) + "." + started;
        static std::uint64_t unknown = 0;
        return "u" + std::to_string(::getpid()) + "." + std::to_string(++unknown);
    }

    // Start time in ticks since boot; empty if /proc does not have the process.
    static std::string start_of(pid_t pid) {
        std::string path = "/proc/" + std::to_string(pid) + "/stat";
        std::FILE *file = pid > 0 ? std::fopen(path.c_str(), "re") : nullptr;
        if (file == nullptr) return "";
        char text[1024];
        text[std::fread(text, 1, sizeof(text) - 1, file)] = '\0';
        std::fclose(file);
        // After the name in parentheses, which may contain anything: state is field 3, the start time is field 22.
        const char *at = std::strrchr(text, ')');
        for (int field = 2; at != nullptr && field < 22; ++field) at = std::strchr(at + 1, ' ');
        return at == nullptr ? "" : std::to_string(std::strtoull(at, nullptr, 10));
    }

    const pid_t pid_;
    int fd_;
    const std::string key_;
};

}  // namespace mtier

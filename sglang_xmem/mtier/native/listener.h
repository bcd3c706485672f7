// The service's socket, and the lock next to it, which distinguishes a running service from the remains of a killed
// one.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <optional>
#include <string>
#include <thread>

#include "channel.h"
#include "paths.h"
#include "text.h"

namespace mtier {

class Listener {
  public:
    Listener() = default;
    Listener(const Listener &) = delete;
    Listener &operator=(const Listener &) = delete;
    ~Listener() { remove(); }

    void remove() {
        if (fd_ >= 0) {
            ::close(fd_);
            remove_if_own(path_, socket_);
        }
        let_go_of_lock();
        if (folder_ >= 0) ::close(folder_);
        fd_ = folder_ = -1;
    }

    int fd() const { return fd_; }

    // Takes the lock, so that this service owns the files next to the socket; returns a sentence if another has it.
    std::optional<std::string> lock(const std::string &path) {
        sockaddr_un address;
        if (!fill_address(path, &address)) return "the socket's path " + path + " is too long; give a shorter --socket";
        path_ = path;
        lock_path_ = path + ".lock";
        std::string folder = own_temporary_folder();
        if (path.rfind(folder + "/", 0) == 0) {
            if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
                return folder + " cannot be created (" + words_of(errno) + "); give another --socket";
            }
            if (!is_own_folder(folder)) {
                return folder + " belongs to another user, or others may write there; give a --socket elsewhere";
            }
            // Cleaners of temporary folders skip locked ones.
            folder_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            ::flock(folder_, LOCK_SH | LOCK_NB);
        }
        // A killed service may still exist for a moment.
        for (auto until = std::chrono::steady_clock::now() + kLeaveTaking;;) {
            std::optional<std::string> refused = take_lock();
            // A running service's lock may have been removed.
            if (!refused && answers(address)) refused = another();
            if (!refused || std::chrono::steady_clock::now() > until) return refused;
            let_go_of_lock();
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
    }

    // Returns a sentence if the socket cannot be created.
    std::optional<std::string> listen() {
        sockaddr_un address;
        fill_address(path_, &address);
        struct stat info;
        if (::lstat(path_.c_str(), &info) == 0) {
            if (!S_ISSOCK(info.st_mode)) return path_ + " exists and is not a socket; give another --socket";
            if (::unlink(path_.c_str()) != 0) {
                return "the socket " + path_ + " of a dead service cannot be removed (" + words_of(errno) +
                       "); give another --socket";
            }
        }
        int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        mode_t before = ::umask(0177);
        bool bound = fd >= 0 && ::bind(fd, reinterpret_cast<sockaddr *>(&address), sizeof(address)) == 0;
        int error = errno;
        ::umask(before);
        if (!bound || ::listen(fd, 64) != 0) {
            if (bound) error = errno;
            if (fd >= 0) ::close(fd);
            return "a socket cannot be created at " + path_ + " (" + words_of(error) + "); give another --socket";
        }
        fd_ = fd;
        ::lstat(path_.c_str(), &socket_);
        return std::nullopt;
    }

  private:
    static constexpr std::chrono::milliseconds kLeaveTaking{2000};

    void let_go_of_lock() {
        if (lock_ < 0) return;
        remove_if_own(lock_path_, locked_);
        ::close(lock_);
        lock_ = -1;
    }

    static bool same(const struct stat &one, const struct stat &other) {
        return one.st_ino == other.st_ino && one.st_dev == other.st_dev;
    }

    // Another service may have created its own there since.
    static void remove_if_own(const std::string &path, const struct stat &own) {
        struct stat there;
        if (::lstat(path.c_str(), &there) == 0 && same(own, there)) ::unlink(path.c_str());
    }

    static bool answers(const sockaddr_un &address) {
        int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        int failed = ::connect(fd, reinterpret_cast<const sockaddr *>(&address), sizeof(address));
        bool there = failed == 0 || errno == EAGAIN;  // or its connection queue is full
        if (fd >= 0) ::close(fd);
        return there;
    }

    std::string another() const { return "another mtierd serves " + path_ + "; stop it, or give another --socket"; }

    std::optional<std::string> take_lock() {
        for (;;) {
            int fd = ::open(lock_path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
            if (fd < 0) return lock_path_ + " cannot be opened (" + words_of(errno) + "); give another --socket";
            if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
                ::close(fd);
                return another();
            }
            struct stat there;
            // A service that has just ended may have removed the locked file.
            if (::fstat(fd, &locked_) == 0 && ::lstat(lock_path_.c_str(), &there) == 0 && same(locked_, there)) {
                lock_ = fd;
                return std::nullopt;
            }
            ::close(fd);
        }
    }

    std::string path_, lock_path_;
    struct stat socket_ {}, locked_ {};
    int fd_ = -1;
    int lock_ = -1;
    int folder_ = -1;
};

}  // namespace mtier

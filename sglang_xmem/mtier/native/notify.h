// Notifications to systemd (Type=notify, WatchdogSec) on the socket in NOTIFY_SOCKET.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>

namespace mtier {

class Notify {
  public:
    // Does nothing without systemd.
    void send(const std::string &word) const {
        const char *path = std::getenv("NOTIFY_SOCKET");
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::size_t length = path == nullptr ? 0 : std::strlen(path);
        if (length == 0 || length >= sizeof(address.sun_path)) return;
        std::memcpy(address.sun_path, path, length);
        if (path[0] == '@') address.sun_path[0] = '\0';
        int fd = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) return;
        auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length);
        ::sendto(fd, word.data(), word.size(), MSG_NOSIGNAL, reinterpret_cast<sockaddr *>(&address), size);
        ::close(fd);
    }

    // Interval of the watchdog; 0 without one.
    std::chrono::milliseconds beat() const {
        const char *wanted = std::getenv("WATCHDOG_USEC");
        const char *pid = std::getenv("WATCHDOG_PID");
        if (wanted == nullptr || (pid != nullptr && std::strtol(pid, nullptr, 10) != ::getpid())) return {};
        return std::chrono::milliseconds(std::strtoull(wanted, nullptr, 10) / 2000);
    }
};

}  // namespace mtier

// A client of the service's socket: connects, sends a request, waits for its reply, always within a time limit.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "protocol.h"
#include "text.h"

namespace mtier {

// False if the path is too long for a socket.
inline bool fill_address(const std::string &path, sockaddr_un *address) {
    *address = {};
    address->sun_family = AF_UNIX;
    if (path.size() >= sizeof(address->sun_path)) return false;
    std::memcpy(address->sun_path, path.c_str(), path.size() + 1);
    return true;
}

class Deadline {
  public:
    explicit Deadline(int milliseconds) : end_(Clock::now() + std::chrono::milliseconds(milliseconds)) {}

    // Milliseconds left; 0 after the deadline.
    int left() const {
        auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count();
        return left > 0 ? static_cast<int>(left) : 0;
    }

  private:
    using Clock = std::chrono::steady_clock;
    Clock::time_point end_;
};

class Channel {
  public:
    Channel() = default;
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;
    ~Channel() { close(); }

    void close() {
        int fd = fd_.exchange(-1);
        if (fd >= 0) ::close(fd);
    }

    // Whether the service still holds its end: between calls a healthy service sends nothing.
    bool alive() const {
        pollfd entry{fd_.load(), POLLIN, 0};
        return entry.fd >= 0 && ::poll(&entry, 1, 0) <= 0;
    }

    // `error` gets a sentence for every code except kSuccess.
    Code connect(const std::string &path, const Deadline &deadline, std::string *error) {
        close();
        sockaddr_un address;
        if (!fill_address(path, &address)) {
            *error = "the service's socket path is too long: " + path + "; set MTIER_SOCKET to a shorter one";
            return kServiceUnavailable;
        }
        int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) {
            *error = "a socket cannot be created: " + words_of(errno);
            return kFailure;
        }
        fd_ = fd;
        while (::connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof(address)) != 0) {
            if ((errno == EAGAIN || errno == EINTR) && deadline.left() > 0) {  // its connection queue is full
                std::this_thread::sleep_for(std::chrono::milliseconds(5));
                continue;
            }
            *error = "no mtierd responds at " + path + " (" + words_of(errno) +
                     "); start one with sglang-xmem mtierd, or set MTIER_SOCKET to the socket of a running one";
            close();
            return kServiceUnavailable;
        }
        ucred owner{};
        socklen_t length = sizeof(owner);
        // Anyone can create a socket in /tmp, and memory from another user is readable by that user.
        if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &owner, &length) != 0 || owner.uid != geteuid()) {
            *error = "the service at " + path + " runs as user " + std::to_string(owner.uid) + " and not as user " +
                     std::to_string(geteuid()) + "; start your own with sglang-xmem mtierd";
            close();
            return kServiceUnavailable;
        }
        return kSuccess;
    }

    // Sends `request` and waits for its reply. Any transport failure closes the channel.
    //
    // Returns the code of the reply or of a transport failure. `text` gets the reply's text or the failure's message.
    // `received` gets the received file descriptor, or -1.
    Code exchange(Request request, const Deadline &deadline, Reply *reply, std::string *text, int *received) {
        *received = -1;
        request.magic = kMagic;
        request.version = kVersion;
        request.id = ++last_id_;
        bool ended = false;  // it may have sent a reason before it closed
        while (::send(fd_, &request, sizeof(request), MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof(request))) {
            if (errno == EINTR) continue;
            ended = errno == EPIPE || errno == ECONNRESET;
            if (ended) break;
            if (errno != EAGAIN) return lost(text, words_of(errno));
            if (!wait(POLLOUT, deadline)) return silent(text);
        }
        std::vector<char> buffer(sizeof(Reply) + kMaxTextBytes);
        for (;;) {
            if (!wait(POLLIN, deadline)) return silent(text);
            ssize_t n = receive(&buffer, received);
            if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
            if (n < 0 && errno == ECONNRESET && !ended) {
                ended = true;
                continue;
            }
            if (n == 0) return lost(text, "it closed the connection");
            if (n < 0) return lost(text, words_of(errno));
            if (!parse(request, buffer, static_cast<std::size_t>(n), reply)) {
                if (*received >= 0) ::close(*received);
                *received = -1;
                close();
                *text = "the service sent a reply that this library does not support; build both from one release";
                return kServerError;
            }
            text->assign(buffer.data() + sizeof(Reply), reply->text_bytes);
            if (reply->op != request.op) close();
            return static_cast<Code>(reply->code);
        }
    }

    // For a forked child, whose copy of the socket would keep its parent's memory after the parent's end.
    void close_in_child() { close(); }

  private:
    bool wait(short events, const Deadline &deadline) const {
        for (;;) {
            pollfd entry{fd_.load(), events, 0};
            int left = deadline.left();
            int ready = ::poll(&entry, 1, left);
            if (ready > 0) return true;
            if (ready == 0 || left == 0) return false;
        }
    }

    // As recvmsg; accepts at most one file descriptor.
    ssize_t receive(std::vector<char> *buffer, int *received) {
        iovec part{buffer->data(), buffer->size()};
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof(control);
        ssize_t n = ::recvmsg(fd_, &message, MSG_CMSG_CLOEXEC);
        if (n < 0) return n;
        for (cmsghdr *c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
            if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int))) {
                std::memcpy(received, CMSG_DATA(c), sizeof(int));
            }
        }
        return n;
    }

    static bool parse(const Request &request, const std::vector<char> &buffer, std::size_t n, Reply *reply) {
        if (n < sizeof(Reply)) return false;
        std::memcpy(reply, buffer.data(), sizeof(Reply));
        if (reply->magic != kMagic || reply->version != kVersion) return false;
        if (reply->text_bytes != n - sizeof(Reply)) return false;
        if (reply->op == static_cast<std::uint16_t>(Op::kRefused)) return reply->code == kServiceUnavailable;
        return reply->op == request.op && reply->id == request.id && reply->code <= kSuccess &&
               reply->code >= kMallocError;
    }

    Code lost(std::string *text, const std::string &why) {
        close();
        *text = "the connection to mtierd is lost (" + why + "); restart the service if it is gone";
        return kServiceUnavailable;
    }

    Code silent(std::string *text) {
        close();
        *text = "mtierd does not respond in time; check its process, or set MTIER_TIMEOUT_MS to wait longer";
        return kServerError;
    }

    std::atomic<int> fd_{-1};
    std::uint64_t last_id_ = 0;
};

}  // namespace mtier

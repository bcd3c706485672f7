// Connections: admission, one request per connection at a time, and no waiting for a client that does not read. The
// Handler interprets requests.
#pragma once

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "descriptor.h"
#include "log.h"
#include "loop.h"
#include "processes.h"
#include "protocol.h"
#include "text.h"

namespace mtier {

// A handler's view of a connection. Numbers are not reused.
struct Peer {
    std::uint64_t number;
    std::shared_ptr<Process> process;
};

struct Answer {
    Code code = kSuccess;
    std::string text;
    Reply fields{};  // the request's own fields; Connections fills in the head
    int fd = -1;     // sent with the reply, then closed

    static Answer error(Code code, std::string words) {
        Answer answer;
        answer.code = code;
        answer.text = std::move(words);
        return answer;
    }
};

class Handler {
  public:
    virtual ~Handler() = default;
    // Empty if the answer follows later, by Connections::answer(). `behind`: the data after the request; empty below
    // kFirstPagesOp. `sent`: the descriptors that came with it; those that are not moved from are closed.
    virtual std::optional<Answer> handle(const Peer &peer, const Request &request, std::string_view behind,
                                         Descriptors &sent) = 0;
    // The kernel refuses to send a descriptor now. Returns the answer to send instead, without one.
    virtual Answer not_sent(const Peer &peer, const Reply &reply, const std::string &why) = 0;
    // Whether to keep a connection without requests.
    virtual bool keeps(const Peer &peer) = 0;
    virtual void closed(const Peer &peer) = 0;
};

class Connections {
  public:
    Connections(Loop &loop, Log &log, Processes &processes, Handler &handler)
        : loop_(loop), log_(log), processes_(processes), handler_(handler) {
        // A descriptor that was passed on survives its process, and would act for it.
        processes_.when_gone([this](const Process &process) {
            for (auto it = connections_.begin(); it != connections_.end();) {
                auto each = it++;
                if (each->second.peer.process->key() == process.key()) drop(each);
            }
        });
    }
    Connections(const Connections &) = delete;
    Connections &operator=(const Connections &) = delete;
    ~Connections() {
        for (auto &[number, each] : connections_) {
            if (each.unsent && each.unsent->fd >= 0) ::close(each.unsent->fd);
            ::close(each.fd);
        }
    }

    void listen(int listener) {
        loop_.watch(listener, POLLIN, [this, listener](short) {
            if (accept_all(listener)) return;
            // The system has no free descriptor; an immediate retry would fail too.
            loop_.change(listener, 0);
            loop_.after(std::chrono::milliseconds(100), [this, listener] { loop_.change(listener, POLLIN); });
        });
        loop_.after(kIdle / 2, [this] { close_idle(); });
    }

    // Answers a request that handle() left open. False if the connection is gone; the answer's descriptor is then
    // closed.
    bool answer(std::uint64_t number, Answer answer) {
        auto found = connections_.find(number);
        if (found == connections_.end()) {
            if (answer.fd >= 0) ::close(answer.fd);
            return false;
        }
        found->second.busy = false;
        return reply(found, std::move(answer));
    }

    std::size_t size() const { return connections_.size(); }

  private:
    static constexpr std::size_t kMaxConnections = 256;
    static constexpr std::size_t kMaxOfProcess = 16;
    static constexpr std::size_t kMaxUnknown = 64;  // for all processes that the kernel does not distinguish
    static constexpr int kTurn = 16;                // connections accepted per round
    static constexpr std::chrono::milliseconds kIdle{30'000};
    static constexpr std::chrono::milliseconds kUnreadPause{10};

    struct Connection {
        Connection(int fd, Peer peer) : fd(fd), peer(std::move(peer)) {}

        int fd;
        Peer peer;
        Request request{};  // the latest one
        bool busy = false;  // the handler has it
        std::optional<Answer> unsent;
        bool granted = false;        // the last answer had a descriptor
        std::uint64_t mistakes = 0;  // the first one is logged
        Loop::Clock::time_point used = Loop::Clock::now();
    };
    using Client = std::map<std::uint64_t, Connection>::iterator;

    bool accept_all(int listener) {
        for (int n = 0; n < kTurn; ++n) {
            int fd = ::accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd < 0) return errno != EMFILE && errno != ENFILE && errno != ENOMEM && errno != ENOBUFS;
            admit(fd);
        }
        return true;
    }

    void admit(int fd) {
        ucred peer{};
        socklen_t length = sizeof(peer);
        if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0 || peer.uid != ::geteuid()) {
            log_.often(Often::kRefusedConnection, "refused process %d of user %u", static_cast<int>(peer.pid),
                       peer.uid);
            ::close(fd);
            return;
        }
        std::shared_ptr<Process> process = processes_.shared(Process::of_peer(fd, peer.pid));
        std::size_t of_process = 0;
        bool unknown = process->fd() < 0;
        for (const auto &[number, each] : connections_) {
            const Process &other = *each.peer.process;
            of_process += other.key() == process->key() || (unknown && other.fd() < 0 && other.pid() == process->pid());
        }
        if (of_process >= (unknown && process->pid() == 0 ? kMaxUnknown : kMaxOfProcess)) {
            return refuse(fd, process->name() + " has " + std::to_string(of_process) + " connections; close some");
        }
        if (connections_.size() >= kMaxConnections && !drop_longest_idle()) {
            return refuse(fd, std::to_string(kMaxConnections) + " clients hold memory; stop one");
        }
        std::uint64_t number = ++last_;
        connections_.emplace(number, Connection(fd, {number, std::move(process)}));
        loop_.watch(fd, POLLIN, [this, number](short events) { attend(number, events); });
    }

    // Sends the reason before it closes.
    void refuse(int fd, const std::string &why) {
        log_.often(Often::kRefusedConnection, "refused a connection: %s", why.c_str());
        Reply reply{};
        reply.magic = kMagic;
        reply.version = kVersion;
        reply.op = static_cast<std::uint16_t>(Op::kRefused);
        reply.code = kServiceUnavailable;
        std::string words = "mtierd accepts no more connections: " + why;
        reply.text_bytes = static_cast<std::uint32_t>(words.size());
        std::string message(reinterpret_cast<const char *>(&reply), sizeof(reply));
        message += words;
        if (::send(fd, message.data(), message.size(), MSG_NOSIGNAL) < 0) {
            log_.often(Often::kRefusedConnection, "and the reason could not be sent: %s", words_of(errno).c_str());
        }
        ::close(fd);
    }

    bool is_idle(const Connection &each) { return !each.busy && !each.unsent && !handler_.keeps(each.peer); }

    bool drop_longest_idle() {
        Client longest = connections_.end();
        for (Client it = connections_.begin(); it != connections_.end(); ++it) {
            if (is_idle(it->second) && (longest == connections_.end() || it->second.used < longest->second.used)) {
                longest = it;
            }
        }
        if (longest == connections_.end()) return false;
        drop(longest);
        return true;
    }

    // A client without memory reconnects when it needs something.
    void close_idle() {
        for (Client it = connections_.begin(); it != connections_.end();) {
            Client each = it++;
            if (Loop::Clock::now() - each->second.used > kIdle && is_idle(each->second)) drop(each);
        }
        loop_.after(kIdle / 2, [this] { close_idle(); });
    }

    void attend(std::uint64_t number, short events) {
        Client client = connections_.find(number);
        if (client == connections_.end()) return;
        Connection &connection = client->second;
        if (connection.unsent) {
            if ((events & (POLLHUP | POLLERR | POLLNVAL)) != 0) return drop(client);
            flush(client);
            return;
        }
        if (connection.busy) {  // only its end matters
            if ((events & (POLLHUP | POLLERR | POLLNVAL)) != 0) drop(client);
            return;
        }
        if (connection.granted && (events & (POLLHUP | POLLERR)) == 0 && is_unread(connection.fd)) {
            // The kernel limits descriptors in flight per user, so a client that does not read its own would block the
            // others. A new request shows that the client has read; there is no event for that.
            loop_.change(connection.fd, 0);
            loop_.after(kUnreadPause, [this, number] {
                Client again = connections_.find(number);
                if (again != connections_.end()) loop_.change(again->second.fd, POLLIN);
            });
            return;
        }
        connection.granted = false;
        alignas(Request) char buffer[kMaxRequestBytes];
        iovec part{buffer, sizeof(buffer)};
        constexpr std::size_t kMost = std::tuple_size_v<Descriptors>;
        alignas(cmsghdr) char control[CMSG_SPACE(kMost * sizeof(int))];
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control;  // the kernel closes descriptors that do not fit
        message.msg_controllen = sizeof(control);
        ssize_t got = ::recvmsg(connection.fd, &message, MSG_CMSG_CLOEXEC);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        // An empty message looks like the end; both end the connection.
        if (got <= 0) return drop(client);
        connection.used = Loop::Clock::now();
        Descriptors sent;
        for (cmsghdr *c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
            if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
            for (std::size_t i = 0; i < std::min(kMost, (c->cmsg_len - CMSG_LEN(0)) / sizeof(int)); ++i) {
                int number = -1;
                std::memcpy(&number, CMSG_DATA(c) + i * sizeof(int), sizeof(number));
                sent[i] = Descriptor(number);
            }
        }
        take(client, buffer, static_cast<std::size_t>(got), (message.msg_flags & MSG_TRUNC) != 0, sent);
    }

    void take(Client client, const char *buffer, std::size_t got, bool truncated, Descriptors &sent) {
        Connection &connection = client->second;
        Request &request = connection.request;
        request = {};
        std::memcpy(&request, buffer, std::min(got, sizeof(request)));
        std::optional<Answer> answer;
        std::string_view behind(buffer + sizeof(request), got < sizeof(request) ? 0 : got - sizeof(request));
        if (truncated || got < sizeof(request) || (!behind.empty() && request.op < kFirstPagesOp) ||
            request.magic != kMagic || request.reserved != 0) {
            answer = Answer::error(kInvalidArgument, "the message is not a request of mtierd's protocol");
        } else if (request.version != kVersion) {
            answer = Answer::error(kServerError, "the message has another protocol version; build libmtier.so and "
                                                 "mtierd from one release");
        } else {
            try {
                connection.busy = true;
                answer = handler_.handle(connection.peer, request, behind, sent);
            } catch (const std::bad_alloc &) {
                answer = Answer::error(kServerError, "the service itself is out of memory");
            }
            if (!answer) return loop_.change(connection.fd, POLLHUP);
        }
        connection.busy = false;
        if (answer->code == kInvalidArgument && ++connection.mistakes == 1) {
            log_.often(Often::kMistake, "%s: %s", connection.peer.process->name().c_str(), answer->text.c_str());
        }
        reply(client, std::move(*answer));
    }

    bool reply(Client client, Answer answer) {
        Reply &head = answer.fields;
        head.magic = kMagic;
        head.version = kVersion;
        head.op = client->second.request.op;
        head.id = client->second.request.id;
        head.code = answer.code;
        answer.text.resize(std::min(answer.text.size(), kMaxTextBytes));
        head.text_bytes = static_cast<std::uint32_t>(answer.text.size());
        client->second.unsent = std::move(answer);
        return flush(client);
    }

    // Sends pending data. Returns whether the connection still exists.
    bool flush(Client client) {
        Connection &connection = client->second;
        Answer &answer = *connection.unsent;
        iovec parts[2] = {{&answer.fields, sizeof(answer.fields)}, {answer.text.data(), answer.text.size()}};
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
        msghdr header{};
        header.msg_iov = parts;
        header.msg_iovlen = 2;
        if (answer.fd >= 0) {
            header.msg_control = control;
            header.msg_controllen = sizeof(control);
            cmsghdr *c = CMSG_FIRSTHDR(&header);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof(int));
            std::memcpy(CMSG_DATA(c), &answer.fd, sizeof(int));
        }
        if (::sendmsg(connection.fd, &header, MSG_NOSIGNAL) < 0) {
            int error = errno;
            if (error == EAGAIN || error == EINTR) {
                loop_.change(connection.fd, POLLOUT);
                return true;
            }
            bool shortage = error == ETOOMANYREFS || error == ENOBUFS || error == ENOMEM;
            if (answer.fd >= 0 && shortage) {
                ::close(answer.fd);
                return reply(client, handler_.not_sent(connection.peer, answer.fields, words_of(error)));
            }
            drop(client);
            return false;
        }
        connection.granted = answer.fd >= 0;
        if (answer.fd >= 0) ::close(answer.fd);
        connection.unsent.reset();
        loop_.change(connection.fd, POLLIN);
        return true;
    }

    static bool is_unread(int fd) {
        int bytes = 0;
        return ::ioctl(fd, SIOCOUTQ, &bytes) == 0 && bytes > 0;
    }

    void drop(Client client) {
        Connection gone = std::move(client->second);
        connections_.erase(client);
        if (gone.unsent && gone.unsent->fd >= 0) ::close(gone.unsent->fd);
        loop_.forget(gone.fd);
        ::close(gone.fd);
        handler_.closed(gone.peer);
    }

    Loop &loop_;
    Log &log_;
    Processes &processes_;
    Handler &handler_;
    std::map<std::uint64_t, Connection> connections_;
    std::uint64_t last_ = 0;
};

}  // namespace mtier

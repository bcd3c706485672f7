// GET /metrics over HTTP on the loopback address, for Prometheus. One short answer per connection, and a time limit.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "loop.h"
#include "text.h"

namespace mtier {

class Metrics {
  public:
    Metrics(Loop &loop, std::function<std::string()> text) : loop_(loop), text_(std::move(text)) {}
    Metrics(const Metrics &) = delete;
    Metrics &operator=(const Metrics &) = delete;
    ~Metrics() {
        for (const auto &[number, client] : clients_) ::close(client.fd);
        if (listener_ >= 0) ::close(listener_);
    }

    // `port`: 0 for any free port. Returns a sentence if it is unavailable.
    std::optional<std::string> listen(std::uint16_t port) {
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        address.sin_port = htons(port);
        socklen_t length = sizeof(address);
        int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        int on = 1;
        if (fd >= 0) ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
        if (fd < 0 || ::bind(fd, reinterpret_cast<sockaddr *>(&address), length) != 0 || ::listen(fd, 16) != 0 ||
            ::getsockname(fd, reinterpret_cast<sockaddr *>(&address), &length) != 0) {
            std::string why = words_of(errno);
            if (fd >= 0) ::close(fd);
            return "--metrics " + std::to_string(port) + " cannot be served on 127.0.0.1 (" + why +
                   "); give another port, or 0 for any";
        }
        listener_ = fd;
        port_ = ntohs(address.sin_port);
        loop_.watch(fd, POLLIN, [this](short) { admit(); });
        return std::nullopt;
    }

    int port() const { return port_; }

  private:
    static constexpr std::size_t kMaxClients = 8;
    static constexpr std::size_t kMaxRequest = 4096;
    static constexpr std::chrono::milliseconds kPatience{2000};
    struct Client {
        int fd;
        std::string request, answer;
    };

    void admit() {
        int fd = ::accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            loop_.change(listener_, 0);  // no free descriptor
            loop_.after(kPatience, [this] { loop_.change(listener_, POLLIN); });
            return;
        }
        if (clients_.size() >= kMaxClients) {
            ::close(fd);
            return;
        }
        std::uint64_t number = ++last_;
        clients_.emplace(number, Client{fd, "", ""});
        loop_.watch(fd, POLLIN, [this, number](short) { attend(number); });
        loop_.after(kPatience, [this, number] { drop(number); });
    }

    void attend(std::uint64_t number) {
        Client &client = clients_.at(number);
        if (client.answer.empty()) {
            char buffer[1024];
            ssize_t n = ::recv(client.fd, buffer, sizeof(buffer), 0);
            if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
            if (n <= 0) return drop(number);
            client.request.append(buffer, static_cast<std::size_t>(n));
            if (client.request.size() > kMaxRequest) return drop(number);
            if (client.request.find("\r\n\r\n") == std::string::npos) return;
            client.answer = answer(client.request);
            loop_.change(client.fd, POLLOUT);
        }
        ssize_t n = ::send(client.fd, client.answer.data(), client.answer.size(), MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (n < 0 || static_cast<std::size_t>(n) == client.answer.size()) return drop(number);
        client.answer.erase(0, static_cast<std::size_t>(n));
    }

    std::string answer(const std::string &request) const {
        bool found = request.rfind("GET /metrics ", 0) == 0;
        std::string body = found ? text_() : "only /metrics exists\n";
        return std::string("HTTP/1.1 ") + (found ? "200 OK" : "404 Not Found") +
               "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: " +
               std::to_string(body.size()) + "\r\nConnection: close\r\n\r\n" + body;
    }

    void drop(std::uint64_t number) {
        auto found = clients_.find(number);
        if (found == clients_.end()) return;
        loop_.forget(found->second.fd);
        ::close(found->second.fd);
        clients_.erase(found);
    }

    Loop &loop_;
    const std::function<std::string()> text_;
    std::map<std::uint64_t, Client> clients_;
    std::uint64_t last_ = 0;
    int listener_ = -1;
    int port_ = 0;
};

}  // namespace mtier

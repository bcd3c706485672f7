// The process that survives the service: it holds the service's socket and the descriptors that must survive it,
// restarts it when it ends without a stop signal, and does nothing else that could fail.
//
// The service is a forked child without exec, so it inherits all descriptors. It sends new ones over a socket pair; the
// keeper has a descriptor as soon as it is sent, even if the service ends right after the call. Memory with a
// descriptor in the keeper survives: host memory, and GPU memory by the driver's descriptors, for which the keeper
// needs no CUDA. When the keeper ends, for any reason, the service ends too.
#pragma once

#include <poll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "descriptor.h"
#include "notify.h"
#include "stops.h"
#include "text.h"

namespace mtier {

constexpr std::size_t kMaxKeptName = 200;

// The service's view: descriptors that it finds and leaves.
class Kept {
  public:
    // `found`: descriptors from earlier services.
    Kept(int keeper, std::map<std::string, Descriptor> found, unsigned restarts)
        : keeper_(keeper), found_(std::move(found)), restarts_(restarts) {}

    // Number of restarts of the service.
    unsigned restarts() const { return restarts_; }

    std::vector<std::string> found(std::string_view prefix) const {
        std::vector<std::string> names;
        for (const auto &[name, fd] : found_) {
            if (std::string_view(name).substr(0, prefix.size()) == prefix) names.push_back(name);
        }
        return names;
    }
    // Returns the descriptor of that name, once; -1 if there is none.
    Descriptor take(const std::string &name) {
        auto node = found_.extract(name);
        return node.empty() ? Descriptor() : std::move(node.mapped());
    }

    // Leaves a copy of a descriptor for the next service. False if that fails now.
    bool leave(const std::string &name, int fd) { return send('+', name, fd); }
    void remove(const std::string &name) { send('-', name, -1); }
    void ready() { send('r', "", -1); }
    void beat() { send('b', "", -1); }

  private:
    // Non-blocking: the keeper may be stopped.
    bool send(char what, std::string_view name, int fd) {
        std::string message = what + std::string(name.substr(0, kMaxKeptName));
        iovec part{message.data(), message.size()};
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
        msghdr header{};
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        if (fd >= 0) {
            header.msg_control = control;
            header.msg_controllen = sizeof(control);
            cmsghdr *c = CMSG_FIRSTHDR(&header);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof(int));
            std::memcpy(CMSG_DATA(c), &fd, sizeof(int));
        }
        return ::sendmsg(keeper_.get(), &header, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
    }

    Descriptor keeper_;
    std::map<std::string, Descriptor> found_;
    const unsigned restarts_;
};

class Keeper {
  public:
    // Runs `serve` in a child until a regular end. Returns the exit status.
    int run(const std::function<int(Kept &)> &serve) {
        sigset_t handled;
        sigemptyset(&handled);
        add_stops(&handled);
        sigaddset(&handled, SIGCHLD);
        sigset_t before;
        ::sigprocmask(SIG_BLOCK, &handled, &before);
        Descriptor signals(::signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK));
        if (signals.get() < 0) return complain("waiting for signals failed: " + words_of(errno));
        signals_ = signals.get();
        std::chrono::milliseconds pause = kFirstPause;
        unsigned in_vain = 0;  // consecutive failed starts
        for (unsigned starts = 0;; ++starts) {
            int ends[2];
            if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
                return complain("sockets cannot be created: " + words_of(errno));
            }
            Descriptor own(ends[0]), its(ends[1]);
            std::fflush(nullptr);
            pid_t keeper = ::getpid();
            pid_t service = ::fork();
            if (service < 0) return complain("a process cannot be created: " + words_of(errno));
            if (service == 0) {
                ::prctl(PR_SET_PDEATHSIG, SIGKILL);
                if (::getppid() != keeper) std::_Exit(1);  // the keeper has already ended
                ::sigprocmask(SIG_SETMASK, &before, nullptr);
                own = Descriptor();
                signals = Descriptor();
                std::exit(child(serve, its.release(), starts));  // skips the keeper's destructors
            }
            its = Descriptor();
            ready_ = false;
            auto begun = Clock::now();
            int status = attend(service, own.get());
            bool as_it_should = WIFEXITED(status) && WEXITSTATUS(status) == 0;
            if (stopping_ || as_it_should || (starts == 0 && !ready_)) {
                return WIFEXITED(status) ? WEXITSTATUS(status) : complain("the service " + words_for(status));
            }
            in_vain = ready_ ? 0 : in_vain + 1;
            if (in_vain == kMostInVain) return complain("the service " + words_for(status) + " at every start");
            if (in_vain == kTrust && !kept_.empty()) {
                complain("the service cannot start with the old state, which is dropped now");
                kept_.clear();
            }
            if (Clock::now() - begun > kLong) pause = kFirstPause;
            complain("the service " + words_for(status) + " and is restarted");
            if (rest(pause)) return 1;
            pause = std::min(pause * 2, kLongestPause);
        }
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds kTurn{1000}, kFirstPause{20}, kLongestPause{5000};
    static constexpr std::chrono::seconds kLong{60};
    static constexpr std::chrono::milliseconds kSilence{30'000}, kPatience{10'000};  // the second: after a stop signal
    static constexpr unsigned kTrust = 3, kMostInVain = 8;

    // For a service with a stuck main loop.
    static std::chrono::milliseconds patience() {
#ifdef MTIER_TESTING
        if (const char *chosen = std::getenv("MTIER_SILENCE_MS")) {
            return std::chrono::milliseconds(std::strtol(chosen, nullptr, 10));
        }
#endif
        return kSilence;
    }

    int child(const std::function<int(Kept &)> &serve, int end, unsigned restarts) {
        Kept kept(end, std::move(kept_), restarts);
        try {
            return serve(kept);
        } catch (const std::exception &error) {
            return complain(error.what());
        }
    }

    static int complain(const std::string &sentence) {
        // A full pipe must not block the process that watches the service.
        pollfd out{STDERR_FILENO, POLLOUT, 0};
        if (::poll(&out, 1, 0) == 1 && (out.revents & POLLOUT) != 0) {
            std::fprintf(stderr, "mtierd: %s.\n", sentence.c_str());
        }
        return 1;
    }

    static std::string words_for(int status) {
        if (WIFSIGNALED(status)) return "was ended by signal " + std::to_string(WTERMSIG(status));
        return "ended with status " + std::to_string(WEXITSTATUS(status));
    }

    // Serves the service's requests until its end. Returns its status.
    int attend(pid_t service, int end) {
        std::chrono::milliseconds silent{0}, stopping{0};
        for (;;) {
            auto before = Clock::now();
            pollfd entries[] = {{end, POLLIN, 0}, {signals_, POLLIN, 0}};
            auto most = notify_.beat().count() == 0 ? kTurn : std::min(kTurn, notify_.beat());
            ::poll(entries, 2, static_cast<int>(most.count()));
            // This process itself may have been stopped.
            auto turn = std::min(most, std::chrono::ceil<std::chrono::milliseconds>(Clock::now() - before));
            silent = drain(end) ? std::chrono::milliseconds(0) : silent + turn;
            if (has_to_stop() && !stopping_) {
                stopping_ = true;
                notify_.send("STOPPING=1");
                ::kill(service, SIGTERM);
            }
            if (stopping_) stopping += turn;
            if (stopping > kPatience || silent > patience()) ::kill(service, SIGKILL);
            beat();
            int status = 0;
            if (::waitpid(service, &status, WNOHANG) == service) {
                drain(end);
                return status;
            }
            // Its socket is closed shortly before it has ended, so that is not an event to wait for.
            if ((entries[0].revents & POLLHUP) != 0) ::usleep(1000);
        }
    }

    // Handles the service's messages. False if there was none.
    bool drain(int end) {
        bool any = false;
        for (;;) {
            char name[kMaxKeptName + 2];
            iovec part{name, sizeof(name)};
            alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
            msghdr message{};
            message.msg_iov = &part;
            message.msg_iovlen = 1;
            message.msg_control = control;
            message.msg_controllen = sizeof(control);
            ssize_t n = ::recvmsg(end, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
            if (n <= 0) return any;
            any = true;
            Descriptor fd;
            for (cmsghdr *c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
                int number = -1;
                std::memcpy(&number, CMSG_DATA(c), sizeof(number));
                fd = Descriptor(number);
            }
            std::string which(name + 1, static_cast<std::size_t>(n - 1));
            if (name[0] == '+' && fd.get() >= 0) kept_[which] = std::move(fd);
            if (name[0] == '-') kept_.erase(which);
            if (name[0] == 'r') {
                ready_ = true;
                notify_.send("READY=1");
            }
        }
    }

    // Notifies systemd's watchdog that this process is alive; this process itself watches the service.
    void beat() {
        if (notify_.beat().count() == 0 || Clock::now() - beat_at_ < notify_.beat()) return;
        beat_at_ = Clock::now();
        notify_.send("WATCHDOG=1");
    }

    bool has_to_stop() const {
        signalfd_siginfo info{};
        bool found = false;
        while (::read(signals_, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
            found = found || info.ssi_signo != SIGCHLD;
        }
        return found;
    }

    // True if a stop signal arrived.
    bool rest(std::chrono::milliseconds pause) const {
        for (auto end = Clock::now() + pause; Clock::now() < end;) {
            pollfd entry{signals_, POLLIN, 0};
            ::poll(&entry, 1, static_cast<int>(std::min<std::int64_t>(pause.count(), kTurn.count())));
            if (has_to_stop()) return true;
        }
        return false;
    }

    Notify notify_;
    std::map<std::string, Descriptor> kept_;
    int signals_ = -1;
    bool stopping_ = false;
    bool ready_ = false;
    Clock::time_point beat_at_{};
};

}  // namespace mtier

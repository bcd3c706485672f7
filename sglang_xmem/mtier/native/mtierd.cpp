// mtierd: owns banks of memory and hands them out to processes of its own user over a Unix socket.
//
// One thread, one poll loop. A client is a connection: what it has allocated is its own, and comes back when the
// connection ends, however it ends. Nothing that a client sends or leaves unread may stop the service or make it wait.

#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>

#include <algorithm>
#include <cinttypes>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <ctime>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "answer.h"
#include "bank.h"
#include "channel.h"
#include "pages_service.h"
#include "protocol.h"

namespace {

using namespace mtier;

constexpr std::size_t kMaxConnections = 256;
// Of one client; each costs the service some memory of its own.
constexpr std::size_t kMaxAllocations = 1 << 16;
// Messages of one client that are handled before the next client has its turn.
constexpr int kTurn = 16;
constexpr int kAcceptPauseMs = 100;
constexpr int kStatusTimeoutMs = 5000;
constexpr std::uint64_t kDefaultGranularity = 2 << 20;
constexpr std::uint64_t kDefaultRestAfterMs = 5000;

// The latest lines, for mTierGetLogs, and all of them on stderr. Holds numbers and the service's own words, never a
// client's.
class Log {
  public:
    __attribute__((format(printf, 2, 3))) void line(const char *format, ...) {
        char words[512];
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(words, sizeof(words), format, arguments);
        va_end(arguments);
        char when[32];
        std::time_t now = std::time(nullptr);
        std::tm parts{};
        gmtime_r(&now, &parts);
        std::strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ ", &parts);
        lines_.push_back(when + std::string(words) + "\n");
        bytes_ += lines_.back().size();
        while (bytes_ > kMaxTextBytes) {
            bytes_ -= lines_.front().size();
            lines_.pop_front();
        }
        // A terminal that is held, or a pipe that nobody reads, must not hold the one thread that serves everybody.
        pollfd out{STDERR_FILENO, POLLOUT, 0};
        if (poll(&out, 1, 0) == 1 && (out.revents & POLLOUT) != 0) std::fputs(lines_.back().c_str(), stderr);
    }

    // The newest whole lines that fit into `bytes`.
    std::string tail(std::uint64_t bytes) const {
        std::size_t total = 0;
        auto first = lines_.end();
        while (first != lines_.begin() && total + std::prev(first)->size() <= bytes) total += (--first)->size();
        std::string text;
        for (; first != lines_.end(); ++first) text += *first;
        return text;
    }

  private:
    std::deque<std::string> lines_;
    std::size_t bytes_ = 0;
};

struct BankOption {
    std::optional<int> gpu;  // none: host memory
    std::uint64_t bytes;
    std::string text;
};

struct Options {
    std::string socket;
    std::vector<BankOption> banks;
    std::uint64_t quota = 0;  // 0: none
    std::uint64_t granularity = kDefaultGranularity;
    std::uint64_t rest_after_ms = kDefaultRestAfterMs;
    std::uint64_t share = 100;  // percent
    bool status = false;
    bool flush = false;
};

struct Allocation {
    std::size_t bank;
    std::uint64_t size;
};

struct Message {
    std::string bytes;
    int fd = -1;  // goes along and is closed then
};

struct Connection {
    int fd;
    pid_t pid;
    std::uint64_t bytes = 0;
    std::uint64_t mistakes = 0;  // the first one goes into the log
    std::unordered_map<std::uint64_t, Allocation> allocations;
    // What the client has not made room for; nothing more is read from it until this is gone.
    std::optional<Message> unsent;
};

// Slabs of the page bank from a bank of host memory, which grants to clients too.
class SlabsOfBank : public pages::SlabSource {
  public:
    explicit SlabsOfBank(Bank *bank) : bank_(bank) {}
    std::uint64_t total() const override { return bank_->total(); }
    std::uint64_t available() const override { return bank_->available(); }
    std::uint64_t granularity() const override { return bank_->granularity(); }
    int make(std::uint64_t bytes, std::uint64_t name, std::string *why) override {
        Grant grant = bank_->allocate(bytes, name);
        *why = grant.why;
        return grant.fd;
    }
    void give_back(std::uint64_t name) override { bank_->release(name); }

    static std::vector<std::unique_ptr<pages::SlabSource>> of(const std::vector<std::unique_ptr<Bank>> &banks) {
        std::vector<std::unique_ptr<pages::SlabSource>> sources;
        for (const auto &bank : banks) {
            if (bank->kind() == MemoryKind::kHostFile) sources.push_back(std::make_unique<SlabsOfBank>(bank.get()));
        }
        return sources;
    }

  private:
    Bank *bank_;
};

class Service {
  public:
    Service(std::vector<std::unique_ptr<Bank>> banks, std::uint64_t quota, unsigned share)
        : quota_(quota), banks_(std::move(banks)),
          pages_(SlabsOfBank::of(banks_), share, [this](const std::string &words) { note(words); }) {
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            log_.line("bank %zu: %s, %" PRIu64 " bytes in granules of %" PRIu64, i, banks_[i]->describe().c_str(),
                      banks_[i]->total(), banks_[i]->granularity());
        }
    }

    ~Service() {
        while (!connections_.empty()) drop(connections_.begin(), "the service stops");
    }

    // Serves until a signal arrives on `signals`.
    void run(int listener, int signals) {
        std::vector<pollfd> entries;
        std::vector<std::list<Connection>::iterator> order;
        bool accept_paused = false;
        for (;;) {
            int accepting = accept_paused ? -1 : listener;
            entries.assign({{signals, POLLIN, 0}, {accepting, POLLIN, 0}, {pages_.watched(), POLLIN, 0}});
            order.clear();
            for (auto it = connections_.begin(); it != connections_.end(); ++it) {
                entries.push_back({it->fd, static_cast<short>(it->unsent ? POLLOUT : POLLIN), 0});
                order.push_back(it);
            }
            int wait_ms = accept_paused ? kAcceptPauseMs : -1;
            for (const auto &bank : banks_) {
                int rest_ms = bank->rest_in_ms();
                if (rest_ms >= 0 && (wait_ms < 0 || rest_ms < wait_ms)) wait_ms = rest_ms;
            }
            int ready = ::poll(entries.data(), entries.size(), wait_ms);
            accept_paused = false;
            if (ready < 0) continue;
            for (const auto &bank : banks_) bank->rest_if_due();
            if (entries[0].revents != 0) {
                signalfd_siginfo info{};
                if (::read(signals, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
                    log_.line("stopping on %s", info.ssi_signo == SIGINT ? "SIGINT" : "SIGTERM");
                }
                return;
            }
            if (entries[2].revents != 0) pages_.reap();
            for (std::size_t i = 0; i < order.size(); ++i) {
                if (entries[i + 3].revents != 0) attend(order[i], entries[i + 3].revents);
            }
            if (entries[1].revents != 0) accept_paused = !accept_all(listener);
        }
    }

    void note(const std::string &words) { log_.line("%s", words.c_str()); }

  private:
    using Client = std::list<Connection>::iterator;

    // False where the system has no descriptor left, which the next attempt at once would not change.
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
        if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0 || peer.uid != geteuid()) {
            log_.line("refused process %d of user %u", static_cast<int>(peer.pid), peer.uid);
            ::close(fd);
        } else if (connections_.size() >= kMaxConnections) {
            log_.line("refused process %d: there are %zu connections", static_cast<int>(peer.pid), kMaxConnections);
            ::close(fd);
        } else {
            connections_.push_back(Connection{});
            connections_.back().fd = fd;
            connections_.back().pid = peer.pid;
        }
    }

    void attend(Client client, short events) {
        if (client->unsent) {
            if ((events & (POLLHUP | POLLERR | POLLNVAL)) != 0) return drop(client, "it has ended");
            if (!flush(client)) return;
            if (client->unsent) return;
        }
        for (int n = 0; n < kTurn && !client->unsent; ++n) {
            alignas(Request) char buffer[pages::kMaxRequestBytes];
            iovec part{buffer, sizeof(buffer)};
            msghdr message{};  // without room for descriptors: the kernel closes any that a client sends
            message.msg_iov = &part;
            message.msg_iovlen = 1;
            ssize_t got = ::recvmsg(client->fd, &message, 0);
            if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
            if (got < 0) return drop(client, "reading from it failed");
            // An empty message reads like the end; both end the connection.
            if (got == 0) return drop(client, "it has ended");
            if (!answer(client, buffer, static_cast<std::size_t>(got), (message.msg_flags & MSG_TRUNC) != 0)) return;
        }
    }

    // Returns whether the connection is still there.
    bool answer(Client client, const char *buffer, std::size_t got, bool truncated) {
        Request request{};
        std::memcpy(&request, buffer, std::min(got, sizeof(request)));
        Answer answer;
        std::string_view behind(buffer + sizeof(request), got < sizeof(request) ? 0 : got - sizeof(request));
        if (truncated || got < sizeof(request) || (!behind.empty() && !pages::PageService::serves(request)) ||
            request.magic != kMagic || request.reserved != 0) {
            answer = Answer::error(kInvalidArgument, "the message is not a request of mtierd's protocol");
        } else if (request.version != kVersion) {
            answer = Answer::error(kServerError, "the message is of another protocol version; build libmtier.so and "
                                                 "mtierd from one release");
        } else {
            try {
                answer = pages::PageService::serves(request) ? pages_.serve(client->fd, client->pid, request, behind)
                                                      : serve(client, request);
            } catch (const std::bad_alloc &) {
                answer = Answer::error(kServerError, "the service is out of memory of its own");
            }
        }
        if (answer.code == kInvalidArgument && ++client->mistakes == 1) {
            log_.line("process %d: %s", static_cast<int>(client->pid), answer.text.c_str());
        }
        Reply reply = answer.fields;
        reply.magic = kMagic;
        reply.version = kVersion;
        reply.op = request.op;
        reply.id = request.id;
        reply.code = answer.code;
        answer.text.resize(std::min(answer.text.size(), kMaxTextBytes));
        reply.text_bytes = static_cast<std::uint32_t>(answer.text.size());
        client->unsent = Message{std::string(reinterpret_cast<const char *>(&reply), sizeof(reply)) + answer.text,
                                 answer.fd};
        return flush(client);
    }

    // Sends what waits. Returns whether the connection is still there.
    bool flush(Client client) {
        Message &message = *client->unsent;
        iovec part{message.bytes.data(), message.bytes.size()};
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
        msghdr header{};
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        if (message.fd >= 0) {
            header.msg_control = control;
            header.msg_controllen = sizeof(control);
            cmsghdr *c = CMSG_FIRSTHDR(&header);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof(int));
            std::memcpy(CMSG_DATA(c), &message.fd, sizeof(int));
        }
        if (::sendmsg(client->fd, &header, MSG_NOSIGNAL) < 0) {
            if (errno == EAGAIN || errno == EINTR) return true;
            drop(client, "writing to it failed");
            return false;
        }
        if (message.fd >= 0) ::close(message.fd);
        client->unsent.reset();
        return true;
    }

    Answer serve(Client client, const Request &request) {
        switch (static_cast<Op>(request.op)) {
            case Op::kHello:
                return {};
            case Op::kStatus: {
                Answer answer;
                answer.fields.num_banks = static_cast<std::int32_t>(banks_.size());
                for (const auto &bank : banks_) {
                    std::uint64_t least = answer.fields.total == 0 ? bank->total() : answer.fields.total;
                    answer.fields.total = std::min(least, bank->total());
                }
                return answer;
            }
            case Op::kBankStatus: {
                if (!has_bank(request.bank)) return unknown_bank(request.bank);
                const Bank &bank = *banks_[static_cast<std::size_t>(request.bank)];
                Answer answer;
                answer.fields.total = bank.total();
                // Whole granules, so that an allocation of what is available succeeds.
                answer.fields.available =
                    std::min(bank.available(), quota_left(*client) / bank.granularity() * bank.granularity());
                return answer;
            }
            case Op::kMalloc:
                return allocate(client, request);
            case Op::kFree: {
                auto found = client->allocations.find(request.allocation);
                if (found == client->allocations.end()) {
                    return Answer::error(kInvalidArgument, "the client has no such allocation");
                }
                give_back(client, found);
                return {};
            }
            case Op::kLogs: {
                Answer answer;
                answer.text = log_.tail(request.size);
                return answer;
            }
            case Op::kResetAll:
                log_.line("process %d resets all banks", static_cast<int>(client->pid));
                for (Client each = connections_.begin(); each != connections_.end(); ++each) take_all(each);
                return {};
            case Op::kReport: {
                Answer answer;
                answer.text = report();
                return answer;
            }
        }
        return Answer::error(kInvalidArgument, "the request is of no known kind");
    }

    Answer allocate(Client client, const Request &request) {
        if (!has_bank(request.bank)) return unknown_bank(request.bank);
        if (request.size == 0) return Answer::error(kInvalidArgument, "an allocation of 0 bytes was asked for");
        auto index = static_cast<std::size_t>(request.bank);
        Bank &bank = *banks_[index];
        std::string words;
        std::uint64_t size = bank.rounded(request.size);
        if (size == 0 || size > bank.available()) {
            append(&words, "bank %d has %" PRIu64 " of %" PRIu64 " bytes available and %" PRIu64 " were asked for",
                   request.bank, bank.available(), bank.total(), request.size);
            return Answer::error(kOutOfMemory, words);
        }
        if (size > quota_left(*client)) {
            append(&words, "process %d may have %" PRIu64 " bytes, has %" PRIu64 " and asked for %" PRIu64
                           "; start the service with a larger --quota",
                   static_cast<int>(client->pid), quota_, bytes_of(client->pid), request.size);
            return Answer::error(kOutOfMemory, words);
        }
        if (client->allocations.size() >= kMaxAllocations) {
            append(&words, "a client may have %zu allocations", kMaxAllocations);
            return Answer::error(kOutOfMemory, words);
        }
        std::uint64_t id = ++last_allocation_;
        auto [entry, inserted] = client->allocations.emplace(id, Allocation{index, size});
        Grant grant;
        try {
            grant = bank.allocate(size, id);
        } catch (const std::bad_alloc &) {
            client->allocations.erase(entry);
            throw;
        }
        if (!grant.note.empty()) log_.line("bank %d: %s", request.bank, grant.note.c_str());
        if (grant.fd < 0) {
            client->allocations.erase(entry);
            append(&words, "bank %d could not make %" PRIu64 " bytes: %s", request.bank, size, grant.why.c_str());
            log_.line("%s", words.c_str());
            Answer answer = Answer::error(kMallocError, words);
            if (grant.may_pass) answer.fields.kind = bank.kind();
            return answer;
        }
        Answer answer;
        answer.fd = grant.fd;
        client->bytes += size;
        answer.fields.kind = bank.kind();
        answer.fields.size = size;
        answer.fields.granularity = bank.granularity();
        answer.fields.allocation = id;
        log_.line("process %d has %" PRIu64 " bytes of bank %d", static_cast<int>(client->pid), size, request.bank);
        return answer;
    }

    bool has_bank(std::int32_t bank) const { return bank >= 0 && static_cast<std::size_t>(bank) < banks_.size(); }

    Answer unknown_bank(std::int32_t bank) const {
        std::string words;
        append(&words, "there is no bank %d; the service has %zu, counted from 0", bank, banks_.size());
        return Answer::error(kInvalidArgument, words);
    }

    // Of all connections of a process: its quota is one, however often it connects.
    std::uint64_t bytes_of(pid_t pid) const {
        std::uint64_t bytes = 0;
        for (const Connection &each : connections_) bytes += each.pid == pid ? each.bytes : 0;
        return bytes;
    }

    std::uint64_t quota_left(const Connection &client) const {
        if (quota_ == 0) return UINT64_MAX;
        std::uint64_t used = bytes_of(client.pid);
        return used < quota_ ? quota_ - used : 0;
    }

    void give_back(Client client, std::unordered_map<std::uint64_t, Allocation>::iterator allocation) {
        client->bytes -= allocation->second.size;
        banks_[allocation->second.bank]->release(allocation->first);
        client->allocations.erase(allocation);
    }

    void take_all(Client client) {
        while (!client->allocations.empty()) give_back(client, client->allocations.begin());
    }

    void drop(Client client, const char *why) {
        if (!client->allocations.empty()) {
            log_.line("process %d is gone (%s): %" PRIu64 " bytes in %zu allocations come back",
                      static_cast<int>(client->pid), why, client->bytes, client->allocations.size());
        }
        take_all(client);
        if (client->unsent && client->unsent->fd >= 0) ::close(client->unsent->fd);
        pages_.disconnected(client->fd);
        ::close(client->fd);
        connections_.erase(client);
    }

    // JSON of banks and of the clients that hold memory or are connected.
    std::string report() const {
        std::string text;
        append(&text, "{\"pid\": %d, \"quota\": %" PRIu64 ", \"banks\": [", static_cast<int>(getpid()), quota_);
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            const Bank &bank = *banks_[i];
            append(&text, "%s{\"bank\": %zu, %s", i == 0 ? "" : ", ", i, bank.json().c_str());
            append(&text, ", \"total\": %" PRIu64 ", \"available\": %" PRIu64, bank.total(), bank.available());
            append(&text, ", \"granularity\": %" PRIu64 ", \"allocations\": %zu}", bank.granularity(),
                   bank.allocations());
        }
        text += "], \"clients\": [";
        bool first = true;
        for (const Connection &each : connections_) {
            append(&text, "%s{\"pid\": %d, \"bytes\": %" PRIu64 ", \"allocations\": %zu}", first ? "" : ", ",
                   static_cast<int>(each.pid), each.bytes, each.allocations.size());
            first = false;
        }
        return text + "], " + pages_.json() + "}";
    }

    const std::uint64_t quota_;
    Log log_;
    std::vector<std::unique_ptr<Bank>> banks_;
    pages::PageService pages_;
    std::list<Connection> connections_;
    std::uint64_t last_allocation_ = 0;
};

int complain(const std::string &sentence) {
    std::fprintf(stderr, "mtierd: %s.\n", sentence.c_str());
    return 1;
}

// The service's socket, and the lock beside it that tells a running service from what a killed one left behind.
class Listener {
  public:
    ~Listener() {
        if (fd_ >= 0) {
            ::close(fd_);
            ::unlink(path_.c_str());
        }
        if (lock_ >= 0) {
            ::unlink(lock_path_.c_str());
            ::close(lock_);
        }
    }

    int fd() const { return fd_; }

    // Returns a sentence where the socket cannot be had.
    std::optional<std::string> open(const std::string &path) {
        sockaddr_un address;
        if (!fill_address(path, &address)) return "the socket's path " + path + " is too long; give a shorter --socket";
        path_ = path;
        lock_path_ = path + ".lock";
        if (auto refused = take_lock()) return refused;
        struct stat info;
        if (::lstat(path.c_str(), &info) == 0) {
            if (!S_ISSOCK(info.st_mode)) return path + " is there and is not a socket; give another --socket";
            if (::unlink(path.c_str()) != 0) {
                return "the socket " + path + " of a dead service cannot be removed (" + words_of(errno) + ")";
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
            return "no socket can be made at " + path + " (" + words_of(error) + "); give another --socket";
        }
        fd_ = fd;
        return std::nullopt;
    }

  private:
    std::optional<std::string> take_lock() {
        for (;;) {
            int fd = ::open(lock_path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
            if (fd < 0) {
                return lock_path_ + " cannot be opened (" + words_of(errno) + "); give another --socket";
            }
            if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
                ::close(fd);
                return "another mtierd serves " + path_ + "; stop it, or give another --socket";
            }
            struct stat mine, there;
            // A service that has just ended may have removed the file that is locked here.
            if (::fstat(fd, &mine) == 0 && ::stat(lock_path_.c_str(), &there) == 0 && mine.st_ino == there.st_ino &&
                mine.st_dev == there.st_dev) {
                lock_ = fd;
                return std::nullopt;
            }
            ::close(fd);
        }
    }

    std::string path_, lock_path_;
    int fd_ = -1;
    int lock_ = -1;
};

bool parse_number(const std::string &text, std::uint64_t *value) {
    if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos) return false;
    *value = std::strtoull(text.c_str(), nullptr, 10);
    return true;
}

// "host:BYTES" or "gpu:ORDINAL:BYTES"
bool parse_bank(const std::string &text, BankOption *bank) {
    bank->text = text;
    std::size_t size = text.rfind(':');
    if (size == std::string::npos || !parse_number(text.substr(size + 1), &bank->bytes)) return false;
    if (bank->bytes == 0) return false;
    std::string place = text.substr(0, size);
    if (place == "host") return true;
    std::uint64_t gpu = 0;
    if (place.rfind("gpu:", 0) != 0 || !parse_number(place.substr(4), &gpu) || gpu > 1023) return false;
    bank->gpu = static_cast<int>(gpu);
    return true;
}

// Returns a sentence where the arguments are wrong.
std::optional<std::string> parse(int argc, char **argv, Options *options) {
    for (int i = 1; i < argc; ++i) {
        std::string name = argv[i];
        if (name == "--status") {
            options->status = true;
            continue;
        }
        if (name == "--flush") {
            options->flush = true;
            continue;
        }
        if (name != "--bank" && name != "--socket" && name != "--quota" && name != "--granularity" &&
            name != "--rest-after" && name != "--share") {
            return "the option " + name + " is not known; known: --bank host:BYTES, --bank gpu:ORDINAL:BYTES, "
                   "--socket PATH, --quota BYTES, --granularity BYTES, --rest-after MILLISECONDS, --share PERCENT, "
                   "--status, --flush";
        }
        if (++i == argc) return name + " has no value";
        std::string value = argv[i];
        if (name == "--socket") {
            options->socket = value;
            continue;
        }
        if (name == "--bank") {
            BankOption bank;
            if (!parse_bank(value, &bank)) {
                return "--bank is " + value + "; give host:BYTES or gpu:ORDINAL:BYTES, in numbers";
            }
            options->banks.push_back(bank);
            continue;
        }
        if (name == "--rest-after") {
            if (!parse_number(value, &options->rest_after_ms) || options->rest_after_ms > kMaxRestAfterMs) {
                return name + " is " + value + "; give milliseconds, at most an hour";
            }
            continue;
        }
        if (name == "--share") {
            if (!parse_number(value, &options->share) || options->share < 1 || options->share > 100) {
                return name + " is " + value + "; give percent of a bank, 1 to 100";
            }
            continue;
        }
        std::uint64_t bytes = 0;
        if (!parse_number(value, &bytes)) return name + " is " + value + "; give a number of bytes";
        (name == "--quota" ? options->quota : options->granularity) = bytes;
    }
    std::uint64_t granule = options->granularity;
    if (granule < 4096 || granule > (1ULL << 30) || (granule & (granule - 1)) != 0) {
        return "--granularity is " + std::to_string(granule) + "; give a power of two from 4096 bytes to 1 GiB";
    }
    for (const BankOption &bank : options->banks) {
        if (bank.bytes < granule) {
            return "--bank " + bank.text + " is smaller than the granularity of " + std::to_string(granule) + " bytes";
        }
    }
    return std::nullopt;
}

// Asks a running service for one thing, and prints the text of its answer if there is one.
int ask(const std::string &path, std::uint16_t op) {
    Channel channel;
    Deadline deadline(kStatusTimeoutMs);
    Request request{};
    request.op = op;
    Reply reply;
    std::string text;
    int fd = -1;
    Code code = channel.connect(path, deadline, &text);
    if (code == kSuccess) code = channel.exchange(request, deadline, &reply, &text, &fd);
    if (fd >= 0) ::close(fd);
    if (code != kSuccess) return complain(text);
    if (!text.empty()) std::printf("%s\n", text.c_str());
    return 0;
}

int run(int argc, char **argv) {
    Options options;
    if (auto wrong = parse(argc, argv, &options)) return complain(*wrong);
    if (options.socket.empty()) options.socket = socket_path();
    if (options.status) return ask(options.socket, static_cast<std::uint16_t>(Op::kReport));
    if (options.flush) return ask(options.socket, static_cast<std::uint16_t>(pages::PagesOp::kForget));
    if (options.banks.empty()) return complain("there is no bank to serve; give --bank host:BYTES");

    // Before the socket is there, so that no signal can end the process and leave it behind.
    sigset_t stops;
    sigemptyset(&stops);
    sigaddset(&stops, SIGTERM);
    sigaddset(&stops, SIGINT);
    ::sigprocmask(SIG_BLOCK, &stops, nullptr);
    int signals = ::signalfd(-1, &stops, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0) return complain("signals cannot be waited for: " + words_of(errno));
    rlimit files{};
    if (::getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        ::setrlimit(RLIMIT_NOFILE, &files);
    }
    std::vector<std::unique_ptr<Bank>> banks;
    for (const BankOption &bank : options.banks) {
        if (!bank.gpu) {
            banks.push_back(std::make_unique<HostBank>(bank.bytes, options.granularity));
            continue;
        }
        std::string why;
        std::chrono::milliseconds rest_after(options.rest_after_ms);
        auto made = GpuBank::open(*bank.gpu, bank.bytes, options.granularity, rest_after, &why);
        if (made == nullptr) return complain("--bank " + bank.text + " cannot be served: " + why);
        banks.push_back(std::move(made));
    }
    Listener listener;
    if (auto refused = listener.open(options.socket)) return complain(*refused);
    Service service(std::move(banks), options.quota, static_cast<unsigned>(options.share));
    service.note("serving " + options.socket);
    service.run(listener.fd(), signals);
    ::close(signals);
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception &error) {
        return complain(error.what());
    }
}

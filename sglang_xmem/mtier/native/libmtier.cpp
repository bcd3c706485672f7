// libmtier.so: the C interface of X-Mem's client library over mtierd's socket. All functions may be called from any
// thread; calls of one process are serialized.

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "channel.h"
#include "mapping.h"
#include "paths.h"
#include "protocol.h"

#define MTIER_API extern "C" __attribute__((visibility("default")))

struct mTierStatus {
    int status;
    int num_banks;
    std::uint64_t bank_size;
};

struct mTierBankStatus {
    int bank_id;
    std::uint64_t total_memory;
    std::uint64_t available_memory;
};

namespace {

using namespace mtier;

constexpr int kDefaultTimeoutMs = 5000;
// How long to retry for memory that a dead client's process may still hold, and the first pause between attempts.
constexpr int kReclaimMs = 2000;
constexpr int kFirstPauseMs = 50;

thread_local std::string last_error = "no error";

Code fail(Code code, std::string words) {
    last_error = std::move(words);
    return code;
}

int timeout_ms() {
    const char *text = std::getenv("MTIER_TIMEOUT_MS");
    long value = text == nullptr ? 0 : std::strtol(text, nullptr, 10);
    return value > 0 && value <= 3'600'000 ? static_cast<int>(value) : kDefaultTimeoutMs;
}

Request request_of(Op op) {
    Request request{};
    request.op = static_cast<std::uint16_t>(op);
    return request;
}

// This process's lease and its connection. They exist only while the process has memory of the service, or memory to
// give back: a process that only queries, such as a launcher, does not stay a client.
class Client {
  public:
    Code init() {
        std::lock_guard<std::mutex> guard(mutex_);
        initialized_ = true;
        Code code = connected(Deadline(timeout_ms()));
        if (code != kSuccess) initialized_ = false;
        close_if_unused();
        return code;
    }

    Code status(mTierStatus *out) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (out == nullptr) return fail(kInvalidArgument, "mTierGetStatus: the result's address is null");
        Reply reply;
        Code code = call(request_of(Op::kStatus), &reply);
        if (code == kSuccess) *out = {0, reply.num_banks, reply.total};
        close_if_unused();
        return code;
    }

    Code bank_status(int bank, mTierBankStatus *out) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (out == nullptr) return fail(kInvalidArgument, "mTierGetBankStatus: the result's address is null");
        Request request = request_of(Op::kBankStatus);
        request.bank = bank;
        Reply reply;
        Code code = call(request, &reply);
        if (code == kSuccess) *out = {bank, reply.total, reply.available};
        close_if_unused();
        return code;
    }

    Code allocate(int bank, std::size_t bytes, void **out) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (out == nullptr) return fail(kInvalidArgument, "mTierMalloc: the result's address is null");
        *out = nullptr;
        Code code = map_new(bank, bytes, out);
        close_if_unused();
        return code;
    }

    Code release(void *address) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (!initialized_) return not_initialized();
        auto found = allocations_.find(address);
        if (found == allocations_.end()) {
            return fail(kInvalidArgument, "mTierFree: the address is not from mTierMalloc, or is already free");
        }
        Allocation allocation = found->second;
        unmap(allocation.mapping);
        allocations_.erase(found);
        Code code = give_back(allocation.id, allocation.lease);
        close_if_unused();
        return code;
    }

    Code logs(char *buffer, std::size_t bytes, std::size_t *used) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (buffer == nullptr || bytes == 0) return fail(kInvalidArgument, "mTierGetLogs: the buffer is empty");
        Request request = request_of(Op::kLogs);
        request.size = std::min<std::size_t>(bytes - 1, kMaxTextBytes);
        Reply reply;
        std::string text;
        Code code = call(request, &reply, &text);
        close_if_unused();
        if (code != kSuccess) return code;
        std::size_t n = std::min(text.size(), bytes - 1);
        std::memcpy(buffer, text.data(), n);
        buffer[n] = '\0';
        if (used != nullptr) *used = n;
        return kSuccess;
    }

    Code reset_all() {
        std::lock_guard<std::mutex> guard(mutex_);
        Reply reply;
        Code code = call(request_of(Op::kResetAll), &reply);
        close_if_unused();
        return code;
    }

    void close_in_child() { channel_.close_in_child(); }

  private:
    struct Allocation {
        Mapping mapping;
        std::uint64_t id;
        std::uint64_t lease;
    };

    static Code not_initialized() {
        return fail(kNotInitialized, "mTierInit has not succeeded in this process; a forked child must call it itself");
    }

    Code map_new(int bank, std::size_t bytes, void **out) {
        Request request = request_of(Op::kMalloc);
        request.bank = bank;
        request.size = bytes;
        Reply reply{};
        int fd = -1;
        Code code = granted(request, &reply, &fd);
        if (code != kSuccess) return code;
        Mapping mapping;
        std::string why;
        try {
            code = map_grant(reply, bytes, fd, &mapping, &why);
            if (code == kSuccess) {
                allocations_.emplace(mapping.address, Allocation{mapping, reply.allocation, lease_});
            }
        } catch (const std::bad_alloc &) {
            if (mapping.address != nullptr) unmap(mapping);
            if (fd >= 0) ::close(fd);
            give_back(reply.allocation, lease_);
            throw;
        }
        if (fd >= 0) ::close(fd);
        if (code != kSuccess) {
            give_back(reply.allocation, lease_);
            return fail(code, "mapping " + std::to_string(reply.size) + " bytes of bank " + std::to_string(bank) +
                                  " failed: " + why);
        }
        // Memory without a confirmed kKeep is dropped: the service may count it as free.
        code = keep(reply.allocation);
        if (code != kSuccess) {
            std::string words = last_error;
            unmap(mapping);
            allocations_.erase(mapping.address);
            give_back(reply.allocation, lease_);
            return fail(code, words);
        }
        *out = mapping.address;
        return kSuccess;
    }

    Code keep(std::uint64_t id) {
        if (!channel_.alive()) return fail(kServiceUnavailable, "the connection to mtierd is lost; retry the call");
        Request request = request_of(Op::kKeep);
        request.allocation = id;
        Reply reply;
        return call(request, &reply);
    }

    // Connects if there is no live connection: resumes the lease, or gets a new one from a service that does not know
    //     it.
    Code connected(const Deadline &deadline) {
        if (!initialized_) return not_initialized();
        if (channel_.alive()) return kSuccess;
        std::string words;
        Code code = channel_.connect(socket_path(), deadline, &words);
        if (code == kSuccess) {
            Request request = request_of(Op::kHello);
            request.allocation = lease_;
            Reply reply;
            int fd = -1;
            code = channel_.exchange(request, deadline, &reply, &words, &fd);
            if (fd >= 0) ::close(fd);
            if (code == kSuccess) {
                lease_ = reply.allocation;
            } else {
                channel_.close();
            }
        }
        if (code != kSuccess) return fail(code, words);
        return pay(deadline);
    }

    // Frees pending allocations over a live connection.
    Code pay(const Deadline &deadline) {
        std::string words;
        while (!owed_.empty()) {
            auto [id, lease] = owed_.back();
            Request request = request_of(Op::kFree);
            request.allocation = id;
            Reply reply;
            int fd = -1;
            // A service that does not know the lease has nothing to free.
            Code code = lease == lease_ ? channel_.exchange(request, deadline, &reply, &words, &fd) : kSuccess;
            if (fd >= 0) ::close(fd);
            // Already freed: the reply was lost, or an mTierResetAll came first.
            if (code != kSuccess && code != kInvalidArgument) return fail(code, words);
            owed_.pop_back();
        }
        return kSuccess;
    }

    void close_if_unused() {
        if (allocations_.empty() && owed_.empty()) channel_.close();
    }

    // A complete call. `text` and `fd` may be null: text is then used only for errors, and a descriptor is closed.
    Code call(const Request &request, Reply *reply, std::string *text = nullptr, int *fd = nullptr) {
        Deadline deadline(timeout_ms());
        Code code = connected(deadline);
        if (code != kSuccess) return code;
        std::string words;
        int received = -1;
        code = channel_.exchange(request, deadline, reply, &words, &received);
        if (fd != nullptr) {
            *fd = received;
        } else if (received >= 0) {
            ::close(received);
        }
        if (code != kSuccess) return fail(code, words);
        if (text != nullptr) *text = std::move(words);
        return kSuccess;
    }

    // A kMalloc call, retried while the service answers that the memory may be free shortly.
    Code granted(const Request &request, Reply *reply, int *fd) {
        Deadline patience(kReclaimMs);
        for (int pause = kFirstPauseMs;; pause *= 2) {
            Code code = call(request, reply, nullptr, fd);
            if (code == kSuccess) return code;
            if (*fd >= 0) ::close(*fd);
            *fd = -1;
            if (code != kMallocError || reply->kind == MemoryKind::kNone || patience.left() == 0) return code;
            std::this_thread::sleep_for(std::chrono::milliseconds(std::min(pause, patience.left())));
        }
    }

    // Now, or when the service is reachable again.
    Code give_back(std::uint64_t id, std::uint64_t lease) {
        owed_.emplace_back(id, lease);
        Deadline deadline(timeout_ms());
        return channel_.alive() ? pay(deadline) : connected(deadline);
    }

    std::mutex mutex_;
    Channel channel_;
    bool initialized_ = false;
    std::uint64_t lease_ = 0;  // the service's id of this client
    std::unordered_map<void *, Allocation> allocations_;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> owed_;  // allocations to free, with their leases
};

// Never destroyed: threads may call until the process ends, which frees everything.
std::atomic<Client *> instance{nullptr};

// A thread that does not exist in the child may hold the lock, so the child starts with a new client.
void renew_in_child() {
    Client *inherited = instance.exchange(nullptr);
    if (inherited == nullptr) return;
    inherited->close_in_child();
    instance = new (std::nothrow) Client;
}

__attribute__((constructor)) void start() {
    instance = new (std::nothrow) Client;
    pthread_atfork(nullptr, nullptr, renew_in_child);
}

template <typename Function>
int guarded(Function function) {
    try {
        Client *client = instance;
        return client != nullptr ? function(*client) : static_cast<int>(kFailure);
    } catch (const std::exception &error) {
        return fail(kFailure, std::string("libmtier: ") + error.what());
    }
}

}  // namespace

MTIER_API int mTierInit() {
    return guarded([](Client &client) { return client.init(); });
}

MTIER_API int mTierGetStatus(mTierStatus *status) {
    return guarded([=](Client &client) { return client.status(status); });
}

MTIER_API int mTierGetBankStatus(int bank, mTierBankStatus *status) {
    return guarded([=](Client &client) { return client.bank_status(bank, status); });
}

MTIER_API int mTierMalloc(int bank, std::size_t bytes, void **address) {
    return guarded([=](Client &client) { return client.allocate(bank, bytes, address); });
}

MTIER_API int mTierFree(void *address) {
    return guarded([=](Client &client) { return client.release(address); });
}

MTIER_API int mTierGetLogs(char *buffer, std::size_t bytes, std::size_t *used) {
    return guarded([=](Client &client) { return client.logs(buffer, bytes, used); });
}

MTIER_API int mTierResetAll() {
    return guarded([](Client &client) { return client.reset_all(); });
}

// The message of the calling thread's last error; valid until its next call.
MTIER_API const char *mTierGetLastError() { return last_error.c_str(); }

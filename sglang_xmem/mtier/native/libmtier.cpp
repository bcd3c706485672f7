// libmtier.so: the C interface of X-Mem's client library over mtierd's socket. All functions may be called from any
// thread; calls of one process go to the service one after the other.

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <unordered_map>

#include "channel.h"
#include "mapping.h"
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
// How long memory is asked for that a dead client's process may still hold, and the first pause between two attempts.
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

// This process's connection and what it has allocated over it.
class Client {
  public:
    Code init() {
        std::lock_guard<std::mutex> guard(mutex_);
        initialized_ = true;
        Code code = connected(Deadline(timeout_ms()));
        if (code != kSuccess) initialized_ = false;
        return code;
    }

    Code status(mTierStatus *out) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (out == nullptr) return fail(kInvalidArgument, "mTierGetStatus: the result's address is null");
        Reply reply;
        Code code = call(request_of(Op::kStatus), &reply);
        if (code == kSuccess) *out = {0, reply.num_banks, reply.total};
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
        return code;
    }

    Code allocate(int bank, std::size_t bytes, void **out) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (out == nullptr) return fail(kInvalidArgument, "mTierMalloc: the result's address is null");
        *out = nullptr;
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
                allocations_.emplace(mapping.address, Allocation{mapping, reply.allocation, session_});
            }
        } catch (const std::bad_alloc &) {
            if (mapping.address != nullptr) unmap(mapping);
            if (fd >= 0) ::close(fd);
            give_back(reply.allocation);
            throw;
        }
        if (fd >= 0) ::close(fd);
        if (code != kSuccess) {
            give_back(reply.allocation);
            return fail(code, "mapping " + std::to_string(reply.size) + " bytes of bank " + std::to_string(bank) +
                                  " failed: " + why);
        }
        *out = mapping.address;
        return kSuccess;
    }

    Code release(void *address) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (!initialized_) return not_initialized();
        auto found = allocations_.find(address);
        if (found == allocations_.end()) {
            return fail(kInvalidArgument, "mTierFree: the address is not one that mTierMalloc gave, or is free already");
        }
        Allocation allocation = found->second;
        allocations_.erase(found);
        unmap(allocation.mapping);
        Code code = connected(Deadline(timeout_ms()));
        if (code != kSuccess) return code;
        // What an ended connection had was taken back with it.
        if (allocation.session != session_) return kSuccess;
        code = give_back(allocation.id);
        return code == kInvalidArgument ? kSuccess : code;  // somebody's mTierResetAll was first
    }

    Code logs(char *buffer, std::size_t bytes, std::size_t *used) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (buffer == nullptr || bytes == 0) return fail(kInvalidArgument, "mTierGetLogs: there is no buffer");
        Request request = request_of(Op::kLogs);
        request.size = std::min<std::size_t>(bytes - 1, kMaxTextBytes);
        Reply reply;
        std::string text;
        Code code = call(request, &reply, &text);
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
        return call(request_of(Op::kResetAll), &reply);
    }

    void close_in_child() { channel_.close_in_child(); }

  private:
    struct Allocation {
        Mapping mapping;
        std::uint64_t id;
        std::uint64_t session;
    };

    static Code not_initialized() {
        return fail(kNotInitialized, "mTierInit has not succeeded in this process; a forked child calls it for itself");
    }

    // Connects if there is no live connection: at first, and after the service was started anew.
    Code connected(const Deadline &deadline) {
        if (!initialized_) return not_initialized();
        if (channel_.alive()) return kSuccess;
        std::string words;
        Code code = channel_.connect(socket_path(), deadline, &words);
        if (code == kSuccess) {
            ++session_;
            Reply reply;
            int fd = -1;
            code = channel_.exchange(request_of(Op::kHello), deadline, &reply, &words, &fd);
            if (fd >= 0) ::close(fd);
            if (code != kSuccess) channel_.close();
        }
        return code == kSuccess ? kSuccess : fail(code, words);
    }

    // A whole call. `text` and `fd` may be null: text then serves errors alone, and a descriptor is closed.
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

    // A kMalloc call, repeated while the service's answer is that the memory may be free again in a moment.
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

    Code give_back(std::uint64_t id) {
        Request request = request_of(Op::kFree);
        request.allocation = id;
        Reply reply;
        return call(request, &reply);
    }

    std::mutex mutex_;
    Channel channel_;
    bool initialized_ = false;
    std::uint64_t session_ = 0;
    std::unordered_map<void *, Allocation> allocations_;
};

// Never destroyed: threads may call until the process ends, and its end gives everything back.
std::atomic<Client *> instance{nullptr};

// The lock may be held by a thread that the child does not have, so the child starts with a client of its own.
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

// The words of the calling thread's last error; valid until its next call.
MTIER_API const char *mTierGetLastError() { return last_error.c_str(); }

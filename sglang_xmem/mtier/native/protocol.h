// What libmtier.so and mtierd say to each other: one request and one reply a message over a SOCK_SEQPACKET Unix socket.
// Both ends run on one machine and are built together, so the structures go over as they lie in memory. A message is a
// whole structure (or one with a whole number of others behind it, see pages_protocol.h) or it is refused; nothing has
// to be put together from parts.
//
// A client's allocations belong to its lease, and a lease to a process. A client that has lost its connection says
// kHello with its lease's number on a new one and has its allocations again, also of a service that was started anew.
// What kMalloc grants is the client's for good once it has said kKeep. What it has not said kKeep for when it comes
// back with kHello, it says that it does not have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace mtier {

constexpr std::uint32_t kMagic = 0x5249544d;  // "MTIR"
constexpr std::uint16_t kVersion = 2;

// Text that may stand behind a reply: an error's words, the log, the report.
constexpr std::size_t kMaxTextBytes = 64 << 10;

enum class Op : std::uint16_t {
    kRefused = 0,  // of a reply alone, to no request: the service does not take the connection
    kHello = 1,
    kStatus = 2,
    kBankStatus = 3,
    kMalloc = 4,
    kFree = 5,
    kLogs = 6,
    kResetAll = 7,
    kReport = 8,
    kKeep = 9,
};

// What is asked with this and above is in pages_protocol.h, and has more behind the request.
constexpr std::uint16_t kFirstPagesOp = 32;
constexpr std::size_t kMaxRequestBytes = 16 << 10;

// The C interface's return codes; replies carry them too.
enum Code : std::int32_t {
    kSuccess = 0,
    kFailure = -1,
    kNotInitialized = -2,
    kOutOfMemory = -3,
    kInvalidArgument = -4,
    kServiceUnavailable = -5,
    kEmptyCudaContext = -6,
    kServerError = -7,
    kMallocError = -8,
};

// What the file descriptor behind a kMalloc reply is, and so how a client maps it.
enum class MemoryKind : std::uint32_t {
    kNone = 0,
    kHostFile = 1,   // a sealed memfd: mmap it shared
    kGpuMemory = 2,  // the CUDA driver's: import it as a POSIX file descriptor
    kDevice = 3,     // of the page bank alone: a range of a devdax, mmap it shared
};

struct Request {
    std::uint32_t magic;
    std::uint16_t version;
    std::uint16_t op;
    std::uint64_t id;          // comes back in the reply
    std::int32_t bank;         // kBankStatus, kMalloc
    std::uint32_t reserved;    // 0
    std::uint64_t size;        // kMalloc: bytes; kLogs: bytes of text wanted at most
    std::uint64_t allocation;  // kFree, kKeep: what kMalloc's reply named; kHello: the lease to have again, or 0
};

struct Reply {
    std::uint32_t magic;
    std::uint16_t version;
    std::uint16_t op;
    std::uint64_t id;
    std::int32_t code;
    std::uint32_t text_bytes;  // behind this structure, without a terminating zero
    std::int32_t num_banks;    // kStatus
    MemoryKind kind;           // kMalloc; with kMallocError: of a bank whose memory may be free again in a moment
    std::uint64_t total;       // kStatus: the smallest bank's bytes; kBankStatus: this bank's
    std::uint64_t available;   // kBankStatus
    std::uint64_t size;        // kMalloc: bytes granted, whole granules
    std::uint64_t granularity; // kMalloc: alignment of the address to map at
    std::uint64_t allocation;  // kMalloc: its name in kKeep and kFree; kHello: the lease, a new one where it is another
};

static_assert(sizeof(Request) == 40 && std::is_trivially_copyable_v<Request>);
static_assert(sizeof(Reply) == 72 && std::is_trivially_copyable_v<Reply>);

}  // namespace mtier

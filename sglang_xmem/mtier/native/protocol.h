// The protocol of libmtier.so and mtierd: one request or reply per message over a SOCK_SEQPACKET Unix socket. Both ends
// run on one machine and are built together, so messages are the structures' bytes. A message is a complete structure
// (or one followed by a whole number of others, see pages_protocol.h), or it is refused; messages are never partial.
//
// A client's allocations belong to its lease, and a lease to a process. After a lost connection a client sends kHello
// with its lease's number on a new one and resumes its allocations, also with a restarted service. A grant of kMalloc
// is final once the client has sent kKeep. By sending kHello, a client gives up grants without kKeep.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace mtier {

constexpr std::uint32_t kMagic = 0x5249544d;  // "MTIR"
constexpr std::uint16_t kVersion = 2;

// Maximum text after a reply: an error message, the log, the report.
constexpr std::size_t kMaxTextBytes = 64 << 10;

enum class Op : std::uint16_t {
    kRefused = 0,  // an unsolicited reply: the service refuses the connection
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

// Ops from here on are in pages_protocol.h, and have data after the request.
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

// The kind of a kMalloc reply's file descriptor, which determines how a client maps it.
enum class MemoryKind : std::uint32_t {
    kNone = 0,
    kHostFile = 1,   // a sealed memfd: mmap it shared
    kGpuMemory = 2,  // the CUDA driver's: import it as a POSIX file descriptor
    kDevice = 3,     // only of the page bank: a range of a devdax, mmap it shared
};

struct Request {
    std::uint32_t magic;
    std::uint16_t version;
    std::uint16_t op;
    std::uint64_t id;          // returned in the reply
    std::int32_t bank;         // kBankStatus, kMalloc
    std::uint32_t reserved;    // 0
    std::uint64_t size;        // kMalloc: bytes; kLogs: maximum bytes of text
    std::uint64_t allocation;  // kFree, kKeep: from kMalloc's reply; kHello: the lease to resume, or 0
};

struct Reply {
    std::uint32_t magic;
    std::uint16_t version;
    std::uint16_t op;
    std::uint64_t id;
    std::int32_t code;
    std::uint32_t text_bytes;  // after this structure, without a terminating zero
    std::int32_t num_banks;    // kStatus
    MemoryKind kind;           // kMalloc; with kMallocError: of a bank whose memory may be free shortly
    std::uint64_t total;       // kStatus: the smallest bank's bytes; kBankStatus: this bank's
    std::uint64_t available;   // kBankStatus
    std::uint64_t size;        // kMalloc: bytes granted, whole granules
    std::uint64_t granularity; // kMalloc: alignment of the address to map at
    std::uint64_t allocation;  // kMalloc: its id for kKeep and kFree; kHello: the lease, which may be a new one
};

static_assert(sizeof(Request) == 40 && std::is_trivially_copyable_v<Request>);
static_assert(sizeof(Reply) == 72 && std::is_trivially_copyable_v<Reply>);

}  // namespace mtier

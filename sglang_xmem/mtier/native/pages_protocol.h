// The messages of the page bank on mtierd's socket, in addition to those of the C interface: a Request with one of
// these `op`s, followed by the op's data. Replies are as for other requests, with the result as their text.
#pragma once

#include "pages.h"
#include "protocol.h"

namespace mtier::pages {

// In kJoin, which refuses a client of another version.
constexpr std::uint32_t kPagesVersion = 5;
// Maximum keys, or pages, per message.
constexpr std::size_t kMaxPages = 256;
// Bytes of a frame at least: each has 64 of the ledger too, which no bank's account knows.
constexpr std::uint64_t kLeastFrameBytes = 256;

enum class PagesOp : std::uint16_t {
    // `bank`: a MemoryKind. Behind it: nothing, or a label as in JoinRequest. Reply: num_banks (of that memory), total
    // (their bytes), available (bytes that one more engine may ask for at most: of that label's pages, or of whichever
    // are there where none is given, or of pages that are not there yet), size (of these, bytes for pages that are not
    // there yet), granularity (what a slab's size is a multiple of).
    kInfo = 32,
    // Data: JoinRequest. Reply: the ledger's descriptor, and its offset there in `available`; num_banks: the
    // session's number; total: frames of the space; size: bytes of its slab; allocation: the space's unique epoch;
    // granularity: alignment of mappings of the descriptor. A connection has one session. Its frames survive the
    // connection, and are reclaimed when the process has ended or sends kLeave.
    //
    // kMallocError: the slab is being made or cleared; retry until it is done.
    //
    // A client that lost its connection sends kJoin on a new one, with the same `session` and `again` 1. If the reply
    // has the epoch, number, frames and bytes of the first one, the client keeps its ledger, slab, pins and frames,
    // including claims and releases in between. The descriptor is then of memory that it already maps.
    // kInvalidArgument: the service does not know the session. The client may return the memory (kReturn) and retry.
    // Otherwise its slab is private permanently: it may use its frames and claim more, but finds and publishes nothing.
    //
    // The latest connection that joins has the session. The requests below are refused with kNotInitialized over any
    // other; the client then joins again over a new connection.
    kJoin = 33,
    // Reply: the slab's descriptor, and its offset there in `available`; size: its bytes; kind; granularity.
    kSlab = 34,
    // Data: `size` keys. Reply: as text a Place for each leading key that is in the bank.
    kFind = 35,
    // Data: `size` Publications. Reply: as text a Verdict for each.
    kPublish = 36,
    // The client no longer uses its frames.
    kLeave = 37,
    // Removes all pages of all spaces.
    kForget = 38,
    // Data: `size` keys. Reply: as text a Place for each, with generation 0 if it is not in the bank.
    kLook = 39,
    // Data: `size` Places that the session holds. Removes their damaged pages; holders keep the frames.
    kDamaged = 40,
    // `bank`: a MemoryKind. With two descriptors that an earlier service sent, of the slab and of the ledger. If that
    // service and its keeper have ended, this service takes over the space as after a restart, with its pages and the
    // sessions of live processes. Refused if another service has the memory, if it is not from a bank like one of this
    // service or exceeds its free bytes, or if engines have other memory for the same pages by now.
    kReturn = 41,
};

struct JoinRequest {
    std::uint32_t version;
    std::uint32_t is_private;  // 1: a private space of this session, dropped with it; `space` is ignored
    std::uint64_t frame_bytes;
    std::uint64_t frames;  // maximum that the session will hold
    Key space;
    char label[64];         // for reports; zero-terminated
    std::uint64_t session;  // the client's random number, not 0: identifies the session in every kJoin
    MemoryKind kind;        // of the slab
    std::uint32_t again;    // 1: only resume the process's existing session
    // Bytes of all spaces of the client's pages, including this one: a new space gets the same fraction of a bank's
    // share.
    std::uint64_t pool_bytes;
};

struct Publication {
    Key key;
    Place place;
};

static_assert(sizeof(JoinRequest) == 144 && sizeof(Publication) == 48 && sizeof(Place) == 16);
static_assert(sizeof(Request) + kMaxPages * sizeof(Publication) <= kMaxRequestBytes);

}  // namespace mtier::pages

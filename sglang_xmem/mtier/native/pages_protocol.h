// The messages of the page bank, on mtierd's socket, next to those of the C interface: a Request whose `op` is one of
// these, and behind it what the op says. Replies are as the others, with what was asked for as their text.
#pragma once

#include "pages.h"
#include "protocol.h"

namespace mtier::pages {

// In kJoin. A client of another version is refused there, before it can misread anything.
constexpr std::uint32_t kPagesVersion = 4;
// Keys, or pages, of one message.
constexpr std::size_t kMaxPages = 256;

enum class PagesOp : std::uint16_t {
    // `bank`: a MemoryKind. Behind it: nothing, or a label as in JoinRequest. Reply: num_banks (of that memory), total
    // (their bytes), available (bytes that one more engine may ask for at most: of that label's pages, or of whichever
    // are there where none is given, or of pages that are not there yet), size (of these, bytes for pages that are not
    // there yet), granularity (what a slab's size is a multiple of).
    kInfo = 32,
    // Behind it: JoinRequest. Reply: the ledger's descriptor, and where it begins there in `available`; num_banks: the
    // session's number; total: frames of the space; size: bytes of its slab; allocation: the space's epoch, which no
    // other space ever has; granularity: mappings of the descriptor begin and end at its multiples. A connection has one
    // session; what that holds outlives the connection, and comes back when the process has ended or says kLeave.
    //
    // kMallocError: the slab is being made or cleared; ask again in a moment, for as long as it takes.
    //
    // A client that lost its connection says kJoin on a new one, with the same `session` and `again` 1. Where the reply
    // has the epoch, number, frames and bytes of the first one, it has what it had: same ledger, same slab, all of its
    // pins and frames; whatever it claimed or released meanwhile counts. The descriptor is then of what it maps already.
    // kInvalidArgument: the service knows no such session. The client's slab is then its own alone, for good: it may go
    // on with the frames that it has and claim more, and finds and publishes nothing.
    kJoin = 33,
    // Reply: the slab's descriptor, and where it begins there in `available`; size: its bytes; kind; granularity.
    kSlab = 34,
    // Behind it: `size` keys. Reply: as text a Place for each of the first of them that are there.
    kFind = 35,
    // Behind it: `size` times a Publication. Reply: as text a Verdict for each.
    kPublish = 36,
    // The client touches none of its frames any more.
    kLeave = 37,
    // Every page of every space is found no more.
    kForget = 38,
    // Behind it: `size` keys. Reply: as text a Place for each of them, of generation 0 for one that is not there.
    kLook = 39,
    // Behind it: `size` Places that the session holds. Their pages are damaged: they are found no more, and stay with
    // those who hold them.
    kDamaged = 40,
};

struct JoinRequest {
    std::uint32_t version;
    std::uint32_t is_private;  // 1: a space for this session alone, which goes with it; `space` is not looked at
    std::uint64_t frame_bytes;
    std::uint64_t frames;  // that the session will hold at most
    Key space;
    char label[64];         // for people; ends with a zero
    std::uint64_t session;  // a random number of the client's, not 0: the session's name in every kJoin
    MemoryKind kind;        // of the slab
    std::uint32_t again;    // 1: only as the session that the process has already
    // Of all spaces that the client's pages are spread over, this one's included: a new space gets as much of a bank's
    // share as it has of these.
    std::uint64_t pool_bytes;
};

struct Publication {
    Key key;
    Place place;
};

static_assert(sizeof(JoinRequest) == 144 && sizeof(Publication) == 48 && sizeof(Place) == 16);
static_assert(sizeof(Request) + kMaxPages * sizeof(Publication) <= kMaxRequestBytes);

}  // namespace mtier::pages

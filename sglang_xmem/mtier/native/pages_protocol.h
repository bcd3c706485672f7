// The messages of the page bank, on mtierd's socket, next to those of the C interface: a Request whose `op` is one of
// these, and behind it what the op says. Replies are as the others, with what was asked for as their text.
#pragma once

#include "pages.h"
#include "protocol.h"

namespace mtier::pages {

// In kJoin. A client of another version is refused there, before it can misread anything.
constexpr std::uint32_t kPagesVersion = 1;
// Keys, or pages, of one message.
constexpr std::size_t kMaxPages = 256;

enum class PagesOp : std::uint16_t {
    // Reply: num_banks (with host memory), total (their bytes), available (bytes that one more session may ask for).
    kInfo = 32,
    // Behind it: JoinRequest. Reply: the ledger's descriptor; num_banks: the session's number; total: frames of the
    // space; size: bytes of its slab. A connection has one session; what that holds outlives the connection, and comes
    // back when the process has ended or says kLeave.
    kJoin = 33,
    // Reply: the slab's descriptor; size: its bytes.
    kSlab = 34,
    // Behind it: `size` keys. Reply: as text a Place for each of the first of them that are there.
    kFind = 35,
    // Behind it: `size` times a Publication. Reply: as text a Verdict for each.
    kPublish = 36,
    // The client touches none of its frames any more.
    kLeave = 37,
    // Every page of every space is found no more.
    kForget = 38,
};

struct JoinRequest {
    std::uint32_t version;
    std::uint32_t is_private;  // 1: a space for this session alone, which goes with it; `space` is not looked at
    std::uint64_t frame_bytes;
    std::uint64_t frames;  // that the session will hold at most
    Key space;
    char label[64];  // for people; ends with a zero
};

struct Publication {
    Key key;
    Place place;
};

static_assert(sizeof(JoinRequest) == 120 && sizeof(Publication) == 48 && sizeof(Place) == 16);
static_assert(sizeof(Request) + kMaxPages * sizeof(Publication) <= kMaxRequestBytes);

}  // namespace mtier::pages

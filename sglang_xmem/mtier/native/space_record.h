// The record before a space's ledger: the space and its sessions, for the next service.
//
// Only the service writes and maps it; engines map the ledger. The head never changes, and a session's entry has a
// checksum that is written last and cleared first. So the next service cannot misread an entry of a killed service:
// entries with a wrong checksum do not exist.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <type_traits>

#include "pages.h"
#include "protocol.h"

namespace mtier::pages {

// Unique for the running system; memory that survives services does not survive a reboot.
inline std::string boot_id() {
    std::string id;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
    return id;
}

// Copies text into a field, zero-terminated.
template <std::size_t kBytes>
void put_text(char (&field)[kBytes], const std::string &text) {
    std::memset(field, 0, kBytes);
    std::memcpy(field, text.data(), std::min(text.size(), kBytes - 1));
}

// Whether a field is zero-terminated, so that it can be read as text.
template <std::size_t kBytes>
bool is_text(const char (&field)[kBytes]) {
    return std::memchr(field, 0, kBytes) != nullptr;
}

// A label's printable form for logs and JSON.
inline std::string printable(const char *label) {
    std::string text = label;
    for (char &c : text) {
        if (c < ' ' || c > '~' || c == '"' || c == '\\') c = '_';
    }
    return text.empty() ? "-" : text;
}

struct SpaceHead {
    std::uint64_t magic;
    std::uint64_t epoch;
    Key key;
    char label[64];
    char bank[64];  // its label
    char boot[64];
    std::uint64_t frame_bytes, frames, slab_bytes;
    MemoryKind kind;
    std::uint32_t is_private;
    std::uint64_t sum;

    static constexpr std::uint64_t kMagic = 0x3153'4547'4150'544dULL;  // with the layout's version
    std::uint64_t right_sum() const { return sum_of(this, offsetof(SpaceHead, sum), kMagic); }
    // Engines can write here, although they must not: a correct checksum shows only that the head is complete.
    bool is_sound() const {
        return magic == kMagic && sum == right_sum() && is_text(label) && printable(label) == label && is_text(bank) &&
               is_text(boot) && boot_id() == boot && frame_bytes != 0 && frames != 0 &&
               frames <= slab_bytes / frame_bytes;
    }
};

struct SessionLine {
    std::uint64_t id;
    std::uint64_t quota;
    std::int64_t pid;
    char process[72];  // its key
    std::uint64_t sum;  // 0: no session

    std::uint64_t right_sum(int bit) const {
        return sum_of(this, offsetof(SessionLine, sum), static_cast<std::uint64_t>(bit) + 1) | 1;
    }
};

struct SpaceRecord {
    SpaceHead head;
    alignas(64) SessionLine sessions[kSessions];

    void write(int bit, std::uint64_t id, std::uint64_t quota, std::int64_t pid, const std::string &process) {
        SessionLine &line = sessions[bit];
        line.id = id;
        line.quota = quota;
        line.pid = pid;
        put_text(line.process, process);
        seal(line, line.right_sum(bit));
    }
    void erase(int bit) { seal(sessions[bit], 0); }
    bool has(int bit) const {
        const SessionLine &line = sessions[bit];
        return line.sum != 0 && line.sum == line.right_sum(bit) && is_text(line.process);
    }

  private:
    // Earlier writes are visible before the checksum, even if this process is killed.
    static void seal(SessionLine &line, std::uint64_t sum) {
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        __atomic_store_n(&line.sum, sum, __ATOMIC_SEQ_CST);
    }
};

// Offset of the ledger: whole pages on every machine.
constexpr std::uint64_t kLedgerOffset = 64 << 10;

static_assert(sizeof(SpaceRecord) <= kLedgerOffset && std::is_trivially_copyable_v<SpaceRecord>);
static_assert(offsetof(SpaceHead, sum) % 8 == 0 && offsetof(SessionLine, sum) % 8 == 0);

inline std::uint64_t control_bytes(std::uint64_t frames) { return kLedgerOffset + Ledger::bytes_for(frames); }

}  // namespace mtier::pages

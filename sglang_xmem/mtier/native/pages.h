// Page frames that engines share: their holders and contents. No I/O, so it can be tested separately.
//
// A *space* has frames of one size. Its *ledger* is in memory that the service and every engine of the space map:
// engines claim, pin and release frames there by atomic operations, without a reply of the service, even if it is dead.
// The *index* maps pages to frames; it is private to the service, and one thread writes it.
//
// A frame is free, owned by the session that fills it, or valid. The bytes and key of a valid frame do not change until
// a session takes it while it is unpinned. Every change of the owner increments the frame's generation, so that older
// entries are recognizable.
//
// The ledger survives the service, and the next service rebuilds its index from it: a valid frame has its key in the
// ledger, and a seal, a checksum of both that is written before the frame becomes valid. A frame without a correct seal
// has no page.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace mtier::pages {

constexpr int kSessions = 64;  // per space: one bit of a frame's pins each

struct Key {
    std::array<std::uint8_t, 32> bytes;
    bool operator==(const Key &other) const { return bytes == other.bytes; }
};

// Keys are SHA-256 digests: every part is uniformly distributed.
struct KeyHash {
    std::size_t operator()(const Key &key) const {
        std::size_t part;
        std::memcpy(&part, key.bytes.data(), sizeof(part));
        return part;
    }
};

constexpr std::uint64_t kGenerations = 1ULL << 48;

enum class Phase : std::uint64_t { kFree = 0, kOwned = 1, kValid = 2, kEvicting = 3 };

// The contents of a frame's state word.
struct State {
    Phase phase;
    int session;               // of kOwned and kEvicting, otherwise 0
    std::uint64_t generation;  // below kGenerations

    static State of(std::uint64_t word) {
        return {static_cast<Phase>(word & 3), static_cast<int>((word >> 2) & 63), word >> 16};
    }
    std::uint64_t word() const {
        return static_cast<std::uint64_t>(phase) | static_cast<std::uint64_t>(session) << 2 | generation << 16;
    }
};

struct alignas(64) Frame {
    std::atomic<std::uint64_t> state;
    std::atomic<std::uint64_t> pins;  // bit s: session s holds it
    std::atomic<std::uint64_t> used;  // last use, by the ledger's clock
    std::atomic<std::uint64_t> seal;  // of a valid frame in the index; the service writes it and the key
    Key key;                          // of a valid frame; written by the service before it is valid
};

struct alignas(64) LedgerHead {
    std::atomic<std::uint64_t> clock;
    std::atomic<std::int64_t> free;  // approximate number of free frames: a killed session may leave it wrong
    std::atomic<std::uint64_t> evicted;  // evicted pages
};

static_assert(sizeof(Frame) == 64 && sizeof(LedgerHead) == 64);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

// A checksum of whole words; a change of any word changes it.
inline std::uint64_t sum_of(const void *memory, std::size_t bytes, std::uint64_t sum) {
    const char *at = static_cast<const char *>(memory);
    for (const char *end = at + bytes; at < end; at += sizeof(std::uint64_t)) {
        std::uint64_t word = 0;
        std::memcpy(&word, at, sizeof(word));
        sum = (sum ^ word) * 0x9E3779B97F4A7C15ULL;  // odd, so the step is invertible, as is the next one
        sum ^= sum >> 32;
    }
    return sum;
}

// A view of a ledger in memory that the caller keeps. Zeroed memory is a ledger with all frames free, except for their
// count.
class Ledger {
  public:
    Ledger(void *memory, std::uint64_t frames)
        : head_(static_cast<LedgerHead *>(memory)), frames_(reinterpret_cast<Frame *>(head_ + 1)), count_(frames) {}

    static std::uint64_t bytes_for(std::uint64_t frames) { return sizeof(LedgerHead) + frames * sizeof(Frame); }

    std::uint64_t frames() const { return count_; }
    State state(std::uint64_t frame) const { return State::of(frames_[frame].state.load()); }
    std::uint64_t pins(std::uint64_t frame) const { return frames_[frame].pins.load(); }
    std::uint64_t used(std::uint64_t frame) const { return frames_[frame].used.load(); }
    std::uint64_t evicted() const { return head_->evicted.load(); }

    // ---- for sessions ----

    // Takes up to `n` frames for `session`: free ones, then the least recently used of a sample of unpinned valid ones.
    // `*hand` is the caller's next position.
    std::uint64_t claim(int session, std::uint64_t n, std::uint64_t *out, std::uint64_t *hand) {
        std::uint64_t got = 0;
        // Another session may be taking a frame, or putting it back, at the same time.
        for (int pass = 0; pass < kPasses && got < n; ++pass) got += sweep(session, n - got, out + got, hand);
        return got;
    }

    // Pins a frame if it is still valid with that generation and key.
    bool pin(int session, std::uint64_t frame, std::uint64_t generation, const Key &key) {
        Frame &it = frames_[frame];
        it.pins.fetch_or(bit(session));
        if (is_valid(frame, generation) && it.key == key) return true;
        it.pins.fetch_and(~bit(session));
        return false;
    }

    // Whether a frame that the session has pinned has this generation and key.
    bool holds(std::uint64_t frame, std::uint64_t generation, const Key &key) const {
        return is_valid(frame, generation) && frames_[frame].key == key;
    }

    // Releases a frame: a valid one stays for others, an owned one becomes free.
    void drop(int session, std::uint64_t frame) {
        Frame &it = frames_[frame];
        std::uint64_t word = it.state.load();
        it.pins.fetch_and(~bit(session));
        free_owned(session, frame, word);
    }

    // Marks frames as used now, the first one last: a page is useless without its predecessors.
    void touch(std::uint64_t n, const std::uint64_t *frames) {
        std::uint64_t latest = head_->clock.fetch_add(n) + n;
        for (std::uint64_t i = 0; i < n; ++i) frames_[frames[i]].used.store(latest - i, std::memory_order_relaxed);
    }

    // The two steps of taking an unpinned valid frame. A session that ends between them leaves the frame kEvicting and
    // unchanged.
    bool begin_evict(int session, std::uint64_t frame) {
        Frame &it = frames_[frame];
        std::uint64_t word = it.state.load();
        State state = State::of(word);
        if (state.phase != Phase::kValid || it.pins.load() != 0) return false;
        return it.state.compare_exchange_strong(word, State{Phase::kEvicting, session, state.generation}.word());
    }

    bool finish_evict(int session, std::uint64_t frame) {
        Frame &it = frames_[frame];
        std::uint64_t generation = state(frame).generation;
        // A pin sets its bit and then reads the state; this sets the state and then reads the bits. So at least one
        // sees the other.
        if (it.pins.load() != 0) {
            it.state.store(State{Phase::kValid, 0, generation}.word());
            return false;
        }
        it.pins.fetch_or(bit(session));
        it.state.store(State{Phase::kOwned, session, generation + 1}.word());
        head_->evicted.fetch_add(1, std::memory_order_relaxed);
        return true;
    }

    // ---- for the service ----

    struct Use {
        std::uint64_t free = 0;
        std::uint64_t cached = 0;  // valid and unpinned
        std::uint64_t shared = 0;  // held by several sessions
        std::uint64_t pages = 0;   // in the index
        std::array<std::uint64_t, kSessions> held{};
    };

    Use use() const {
        Use use;
        for (std::uint64_t frame = 0; frame < count_; ++frame) {
            std::uint64_t holders = pins(frame);
            Phase phase = state(frame).phase;
            use.free += phase == Phase::kFree ? 1 : 0;
            use.cached += phase == Phase::kValid && holders == 0 ? 1 : 0;
            use.shared += (holders & (holders - 1)) != 0 ? 1 : 0;
            use.pages += phase == Phase::kValid && frames_[frame].seal.load() != 0 ? 1 : 0;
            for (; holders != 0; holders &= holders - 1) ++use.held[static_cast<std::size_t>(__builtin_ctzll(holders))];
        }
        return use;
    }

    void begin() { head_->free.store(static_cast<std::int64_t>(count_)); }

    bool is_valid(std::uint64_t frame, std::uint64_t generation) const {
        State now = state(frame);
        return now.phase == Phase::kValid && now.generation == generation;
    }

    // Makes a session's frame valid. False if the session no longer owns it.
    bool publish(int session, std::uint64_t frame, std::uint64_t generation, const Key &key) {
        if (generation >= kGenerations) return false;  // does not fit into a state word
        std::uint64_t word = State{Phase::kOwned, session, generation}.word();
        if (frames_[frame].state.load() != word) return false;
        // If the session releases the frame now, the key is ignored: only this function makes a frame valid.
        frames_[frame].key = key;
        frames_[frame].seal.store(seal_of(frame, generation, key));
        return frames_[frame].state.compare_exchange_strong(word, State{Phase::kValid, 0, generation}.word());
    }

    // The key and generation of a page that an earlier service published.
    std::optional<std::pair<Key, std::uint64_t>> published(std::uint64_t frame) const {
        State now = state(frame);
        if (now.phase != Phase::kValid) return std::nullopt;
        Key key = frames_[frame].key;
        if (frames_[frame].seal.load() != seal_of(frame, now.generation, key)) return std::nullopt;
        return std::make_pair(key, now.generation);
    }

    // Hides a frame's current page from later services.
    void unseal(std::uint64_t frame) { frames_[frame].seal.store(0); }

    // Reclaims all frames of a session whose process has ended.
    void fence(int session) {
        std::int64_t free = 0;
        for (std::uint64_t frame = 0; frame < count_; ++frame) {
            Frame &it = frames_[frame];
            it.pins.fetch_and(~bit(session));
            std::uint64_t word = it.state.load();
            State state = State::of(word);
            if (state.phase == Phase::kEvicting && state.session == session) {
                it.state.store(State{Phase::kValid, 0, state.generation}.word());
            }
            free_owned(session, frame, word);
            free += this->state(frame).phase == Phase::kFree ? 1 : 0;
        }
        head_->free.store(free);
    }

  private:
    static constexpr int kPasses = 64;

    static std::uint64_t bit(int session) { return 1ULL << session; }

    static std::uint64_t seal_of(std::uint64_t frame, std::uint64_t generation, const Key &key) {
        return sum_of(key.bytes.data(), key.bytes.size(), (generation << 1 | 1) ^ frame << 48) | 1;  // never 0
    }

    void free_owned(int session, std::uint64_t frame, std::uint64_t word) {
        State state = State::of(word);
        if (state.phase != Phase::kOwned || state.session != session) return;
        // A late message may have published it: then it is valid and unpinned.
        std::uint64_t freed = State{Phase::kFree, 0, state.generation + 1}.word();
        if (frames_[frame].state.compare_exchange_strong(word, freed)) head_->free.fetch_add(1);
    }

    bool take_free(int session, std::uint64_t frame) {
        Frame &it = frames_[frame];
        std::uint64_t word = it.state.load();
        State state = State::of(word);
        if (state.phase != Phase::kFree) return false;
        std::uint64_t owned = State{Phase::kOwned, session, state.generation + 1}.word();
        if (!it.state.compare_exchange_strong(word, owned)) return false;
        it.pins.fetch_or(bit(session));
        head_->free.fetch_sub(1);
        return true;
    }

    std::uint64_t sweep(int session, std::uint64_t n, std::uint64_t *out, std::uint64_t *hand) {
        std::uint64_t got = 0;
        const std::uint64_t enough = 4 * n + 64;
        std::vector<std::pair<std::uint64_t, std::uint64_t>> candidates;  // last use, frame
        for (std::uint64_t looked = 0; looked < count_ && got < n; ++looked) {
            if (candidates.size() >= enough && head_->free.load() <= 0) break;
            std::uint64_t frame = *hand;
            *hand = frame + 1 < count_ ? frame + 1 : 0;
            if (take_free(session, frame)) {
                out[got++] = frame;
            } else if (state(frame).phase == Phase::kValid && pins(frame) == 0) {
                candidates.emplace_back(used(frame), frame);
            }
        }
        if (got == n) return got;
        std::sort(candidates.begin(), candidates.end());
        for (auto each = candidates.begin(); each != candidates.end() && got < n; ++each) {
            if (begin_evict(session, each->second) && finish_evict(session, each->second)) out[got++] = each->second;
        }
        return got;
    }

    LedgerHead *head_;
    Frame *frames_;
    std::uint64_t count_;
};

// A session's frames, for a process with several threads: several pages may hold a frame, and its pin is cleared with
// the last one.
class Holding {
  public:
    Holding(Ledger ledger, int session)
        : ledger_(ledger), session_(session), held_(ledger.frames()),
          hand_(ledger.frames() * static_cast<std::uint64_t>(session) / kSessions) {}

    // Takes `n` empty frames, or none. True on success.
    bool claim(std::uint64_t n, std::uint64_t *out) {
        std::lock_guard<std::mutex> turn(lock_);
        std::uint64_t got = ledger_.claim(session_, n, out, &hand_);
        for (std::uint64_t i = 0; i < got; ++i) ++held_[out[i]];
        count_ += got;
        if (got == n) return true;
        for (std::uint64_t i = 0; i < got; ++i) let_go(out[i]);
        return false;
    }

    // Adopts a frame that the service named, if it still holds that page.
    bool adopt(std::uint64_t frame, std::uint64_t generation, const Key &key) {
        if (!has(frame)) return false;
        std::lock_guard<std::mutex> turn(lock_);
        bool there = held_[frame] > 0 ? ledger_.holds(frame, generation, key)
                                      : ledger_.pin(session_, frame, generation, key);
        if (!there) return false;
        ++held_[frame];
        ++count_;
        return true;
    }

    void release(std::uint64_t n, const std::uint64_t *frames) {
        std::lock_guard<std::mutex> turn(lock_);
        for (std::uint64_t i = 0; i < n; ++i) let_go(frames[i]);
    }

    void touch(std::uint64_t n, const std::uint64_t *frames) {
        if (std::all_of(frames, frames + n, [this](std::uint64_t frame) { return has(frame); })) {
            ledger_.touch(n, frames);
        }
    }

    // Whether the frame is private, so that it may be written.
    bool owns(std::uint64_t frame) const {
        if (!has(frame)) return false;
        State state = ledger_.state(frame);
        return state.phase == Phase::kOwned && state.session == session_;
    }

    // 0, which means no page, if the frame does not exist.
    std::uint64_t generation(std::uint64_t frame) const { return has(frame) ? ledger_.state(frame).generation : 0; }

    // Pages that hold a frame.
    std::uint64_t count() const {
        std::lock_guard<std::mutex> turn(lock_);
        return count_;
    }

  private:
    // Frame numbers come from messages and from callers' addresses, so any may be invalid.
    bool has(std::uint64_t frame) const { return frame < ledger_.frames(); }

    void let_go(std::uint64_t frame) {
        if (!has(frame) || held_[frame] == 0) return;
        --count_;
        if (--held_[frame] == 0) ledger_.drop(session_, frame);
    }

    Ledger ledger_;
    const int session_;
    mutable std::mutex lock_;
    std::vector<std::uint32_t> held_;
    std::uint64_t count_ = 0;
    std::uint64_t hand_;
};

enum class Verdict : std::uint8_t {
    kNew = 0,    // others can now find the page
    kHave = 1,   // the bank already had it; the session's copy stays private
    kStale = 2,  // the session does not own the frame
};

struct Place {
    std::uint64_t frame;
    std::uint64_t generation;
};

// The pages and frames of one space. The generation reveals an entry whose frame has a new owner.
class Index {
  public:
    explicit Index(std::uint64_t frames) : key_of_(frames) {}

    std::optional<Place> find(const Ledger &ledger, const Key &key) {
        auto found = places_.find(key);
        if (found == places_.end()) return std::nullopt;
        if (ledger.is_valid(found->second.frame, found->second.generation)) return found->second;
        places_.erase(found);
        return std::nullopt;
    }

    Verdict publish(Ledger *ledger, int session, const Key &key, Place place) {
        if (place.frame >= ledger->frames()) return Verdict::kStale;
        if (find(*ledger, key)) return Verdict::kHave;
        std::optional<Key> &before = key_of_[place.frame];
        if (before) {
            auto old = places_.find(*before);
            if (old != places_.end() && old->second.frame == place.frame && !find(*ledger, *before)) before.reset();
        }
        if (!ledger->publish(session, place.frame, place.generation, key)) return Verdict::kStale;
        places_[key] = place;
        before = key;
        return Verdict::kNew;
    }

    // Removes a page, also for later services; its holders keep the frame. False if it was not in the index.
    bool forget(Ledger *ledger, Place place) {
        if (place.frame >= key_of_.size() || !key_of_[place.frame]) return false;
        auto found = places_.find(*key_of_[place.frame]);
        if (found == places_.end() || found->second.frame != place.frame ||
            found->second.generation != place.generation) {
            return false;
        }
        places_.erase(found);
        ledger->unseal(place.frame);
        return true;
    }

    // Removes all pages, also for later services; holders keep pinned frames.
    void forget(Ledger *ledger) {
        places_.clear();
        for (std::uint64_t frame = 0; frame < ledger->frames(); ++frame) ledger->unseal(frame);
    }

    // Restores the pages that earlier services published.
    void restore(const Ledger &ledger) {
        for (std::uint64_t frame = 0; frame < ledger.frames(); ++frame) {
            auto page = ledger.published(frame);
            if (page && places_.emplace(page->first, Place{frame, page->second}).second) key_of_[frame] = page->first;
        }
    }

    std::size_t size() const { return places_.size(); }

  private:
    std::unordered_map<Key, Place, KeyHash> places_;
    std::vector<std::optional<Key>> key_of_;
};

}  // namespace mtier::pages

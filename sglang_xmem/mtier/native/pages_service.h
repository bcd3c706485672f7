// The page bank: handlers of the messages in pages_protocol.h, for mtierd's one thread.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <functional>
#include <iterator>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "connections.h"
#include "pages.h"
#include "pages_protocol.h"
#include "processes.h"
#include "text.h"

namespace mtier::pages {

// A descriptor that is closed.
class Descriptor {
  public:
    explicit Descriptor(int fd = -1) : fd_(fd) {}
    Descriptor(Descriptor &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Descriptor &operator=(Descriptor &&other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Descriptor() {
        if (fd_ >= 0) ::close(fd_);
    }
    int get() const { return fd_; }
    // Another one of the same, to be sent; -1 where there is none to be had.
    int duplicate() const { return ::fcntl(fd_, F_DUPFD_CLOEXEC, 0); }

  private:
    int fd_;
};

// A bank of host memory, as far as slabs come from it.
class SlabSource {
  public:
    virtual ~SlabSource() = default;
    virtual std::uint64_t total() const = 0;
    virtual std::uint64_t available() const = 0;
    virtual std::uint64_t granularity() const = 0;
    // Whole granules, no more than available(), which are missing from it until they are given back.
    virtual void take(std::uint64_t bytes) = 0;
    virtual void give_back(std::uint64_t bytes) = 0;
};

class PageService : public Handler {
  public:
    using Note = std::function<void(const std::string &)>;

    // `share`: percent of a bank that one space gets where its engines ask for less.
    PageService(Processes &processes, std::vector<std::unique_ptr<SlabSource>> banks, unsigned share, Note note)
        : banks_(std::move(banks)), share_(share), note_(std::move(note)) {
        processes.when_gone([this](const Process &process) {
            for (auto it = sessions_.begin(); it != sessions_.end();) {
                auto each = it++;
                if (each->second.process->key() == process.key()) end(each, "its process has ended");
            }
        });
    }

    std::optional<Answer> handle(const Peer &peer, const Request &request, std::string_view behind) override {
        switch (static_cast<PagesOp>(request.op)) {
            case PagesOp::kInfo:
                return behind.empty() ? info() : not_so();
            case PagesOp::kJoin:
                return behind.size() == sizeof(JoinRequest) ? join(peer, behind) : not_so();
            case PagesOp::kForget:
                if (!behind.empty()) return not_so();
                note_(peer.process->name() + " makes the bank forget all pages");
                for (auto &[key, space] : spaces_) space->index.forget();
                return Answer{};
            default:
                break;
        }
        auto session = session_of(peer);
        if (session == sessions_.end()) return Answer::error(kInvalidArgument, "the connection has joined no space");
        Space &space = *session->second.space;
        switch (static_cast<PagesOp>(request.op)) {
            case PagesOp::kSlab: {
                if (!behind.empty()) return not_so();
                Answer answer;
                answer.fd = space.slab.duplicate();
                if (answer.fd < 0) return no_descriptor();
                session->second.mapped = true;
                answer.fields.size = space.slab_bytes;
                answer.fields.kind = MemoryKind::kHostFile;
                return answer;
            }
            case PagesOp::kFind:
            case PagesOp::kLook:
                return find(space, request.size, behind, static_cast<PagesOp>(request.op) == PagesOp::kLook);
            case PagesOp::kDamaged:
                return damaged(session->second, request.size, behind);
            case PagesOp::kPublish:
                return publish(session->second, request.size, behind);
            case PagesOp::kLeave:
                if (!behind.empty()) return not_so();
                joined_.erase(peer.number);
                end(session, "it leaves");
                return Answer{};
            default:
                return Answer::error(kInvalidArgument, "the request is of no known kind");
        }
    }

    Answer not_sent(const Peer &peer, const Reply &, const std::string &why) override {
        auto session = session_of(peer);
        joined_.erase(peer.number);
        // One that has its memory already may ask again.
        if (session != sessions_.end() && !session->second.mapped) end(session, "its memory could not be sent");
        return Answer::error(kServerError, "the memory's descriptor cannot be sent now: " + why);
    }

    bool keeps(const Peer &peer) override { return session_of(peer) != sessions_.end(); }

    // The session stays: the process may live, and use what it has pinned.
    void closed(const Peer &peer) override { joined_.erase(peer.number); }

    // A member of the report's JSON object.
    std::string json() const {
        std::string text = "\"spaces\": [";
        const char *between = "";
        for (const auto &[key, space] : spaces_) {
            append(&text, "%s{\"label\": \"%s\", \"private\": %s", between, space->label.c_str(),
                   space->is_private ? "true" : "false");
            append(&text, ", \"bank\": %zu, \"frames\": %" PRIu64 ", \"frame_bytes\": %" PRIu64, space->bank,
                   space->ledger.frames(), space->frame_bytes);
            Ledger::Use use = space->ledger.use();
            append(&text, ", \"free\": %" PRIu64 ", \"cached\": %" PRIu64, use.free, use.cached);
            append(&text, ", \"shared\": %" PRIu64, use.shared);
            append(&text, ", \"pages\": %zu, \"published\": %" PRIu64 ", \"had\": %" PRIu64, space->index.size(),
                   space->verdicts[0], space->verdicts[1]);
            append(&text, ", \"stale\": %" PRIu64 ", \"damaged\": %" PRIu64, space->verdicts[2], space->damaged);
            append(&text, ", \"found\": %" PRIu64 ", \"sessions\": [", space->found);
            const char *comma = "";
            for (const auto &[id, session] : sessions_) {
                if (session.space != space.get()) continue;
                append(&text, "%s{\"pid\": %d, \"frames\": %" PRIu64 ", \"held\": %" PRIu64, comma,
                       static_cast<int>(session.process->pid()), session.quota,
                       use.held[static_cast<std::size_t>(session.bit)]);
                append(&text, ", \"published\": %" PRIu64, session.published);
                append(&text, ", \"connected\": %s}", is_connected(id) ? "true" : "false");
                comma = ", ";
            }
            text += "]}";
            between = ", ";
        }
        return text + "]";
    }

  private:
    struct Space {
        Space(void *memory, std::uint64_t frames) : ledger(memory, frames), index(frames) {}
        ~Space() { ::munmap(memory, Ledger::bytes_for(ledger.frames())); }
        Space(const Space &) = delete;
        Space &operator=(const Space &) = delete;

        const std::uint64_t epoch = random_number();
        std::string label;
        bool is_private = false;
        std::size_t bank = 0;
        std::uint64_t frame_bytes = 0;
        std::uint64_t slab_bytes = 0;
        Descriptor slab, control;
        void *memory = nullptr;  // of the ledger
        Ledger ledger;
        Index index;
        std::uint64_t bits = 0;      // sessions
        std::uint64_t promised = 0;  // frames, to all of them
        std::uint64_t last_join = 0;
        std::uint64_t verdicts[3] = {};
        std::uint64_t found = 0;
        std::uint64_t damaged = 0;
    };

    struct Session {
        Space *space;
        int bit;
        std::uint64_t quota;
        std::shared_ptr<Process> process;
        std::uint64_t published = 0;
        bool mapped = false;  // it has asked for its slab, and may hold frames
    };
    using Sessions = std::unordered_map<std::uint64_t, Session>;

    Sessions::iterator session_of(const Peer &peer) {
        auto found = joined_.find(peer.number);
        return found == joined_.end() ? sessions_.end() : sessions_.find(found->second);
    }

    static Answer not_so() {
        return Answer::error(kInvalidArgument, "the message is not of the size that its kind has");
    }
    static Answer no_descriptor() { return Answer::error(kServerError, "the service has no descriptor left"); }

    bool is_connected(std::uint64_t id) const {
        return std::any_of(joined_.begin(), joined_.end(), [id](const auto &each) { return each.second == id; });
    }

    Answer info() const {
        Answer answer;
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            const SlabSource &bank = *banks_[i];
            ++answer.fields.num_banks;
            answer.fields.total += bank.total();
            // What is not promised, whether pages of the past lie there or not.
            std::uint64_t open = bank.available();
            for (const auto &[key, space] : spaces_) {
                if (space->bank != i || space->is_private) continue;
                open += space->slab_bytes - space->promised * space->frame_bytes;
            }
            answer.fields.available = std::max(answer.fields.available, open);
        }
        return answer;
    }

    Answer join(const Peer &peer, std::string_view behind) {
        JoinRequest asked;
        std::memcpy(&asked, behind.data(), sizeof(asked));
        if (asked.version != kPagesVersion) {
            return Answer::error(kServerError, "the client and the service speak other versions of the page bank's "
                                               "messages; start both from one release");
        }
        if (asked.frame_bytes == 0 || asked.frame_bytes > (1ULL << 40) || asked.frames == 0 ||
            asked.frames > (1ULL << 32) || asked.is_private > 1 || asked.label[sizeof(asked.label) - 1] != '\0' ||
            asked.session == 0 || asked.again > 1) {
            return Answer::error(kInvalidArgument, "a session of a size that no bank has was asked for");
        }
        if (joined_.count(peer.number) != 0) {
            return Answer::error(kInvalidArgument, "the connection has joined a space already");
        }
        auto known = sessions_.find(asked.session);
        if (known != sessions_.end() && known->second.process->key() == peer.process->key()) {
            return answer_as(peer, known);
        }
        if (asked.again == 1 || known != sessions_.end()) {
            return Answer::error(kInvalidArgument, "the service does not know the session");
        }
        if (peer.process->fd() < 0) {
            return Answer::error(kServerError, "the service cannot watch the client's process; let both see each other "
                                               "(one PID namespace, or Linux 6.5)");
        }
        if (asked.kind != MemoryKind::kHostFile) {
            return Answer::error(kOutOfMemory, "the service has no bank of that memory");
        }
        if (asked.is_private == 1) asked.space = private_key(asked.session);
        std::string why;
        Space *space = space_for(asked, &why);
        if (space == nullptr) return Answer::error(kOutOfMemory, why);
        int bit = 0;
        while ((space->bits >> bit & 1) != 0) ++bit;
        auto session = sessions_.emplace(asked.session, Session{space, bit, asked.frames, peer.process}).first;
        space->bits |= 1ULL << bit;
        space->promised += asked.frames;
        space->last_join = ++joins_;
        std::string words;
        append(&words, "%s joins %s with %" PRIu64, peer.process->name().c_str(), space->label.c_str(), asked.frames);
        append(&words, " of %" PRIu64 " frames of %" PRIu64 " bytes", space->ledger.frames(), space->frame_bytes);
        note_(words);
        Answer answer = answer_as(peer, session);
        if (answer.fd < 0) end(session, "no descriptor was left for it");
        return answer;
    }

    // The connection is the session's from now on.
    Answer answer_as(const Peer &peer, Sessions::iterator session) {
        const Space &space = *session->second.space;
        Answer answer;
        answer.fd = space.control.duplicate();
        if (answer.fd < 0) return no_descriptor();
        for (auto it = joined_.begin(); it != joined_.end();) {
            it = it->second == session->first ? joined_.erase(it) : std::next(it);
        }
        joined_[peer.number] = session->first;
        answer.fields.num_banks = session->second.bit;
        answer.fields.total = space.ledger.frames();
        answer.fields.size = space.slab_bytes;
        answer.fields.kind = MemoryKind::kHostFile;
        answer.fields.allocation = space.epoch;
        return answer;
    }

    // A space of that session's alone.
    static Key private_key(std::uint64_t session) {
        Key key{};
        std::memcpy(key.bytes.data(), &session, sizeof(session));
        return key;
    }

    static std::uint64_t random_number() {
        std::uint64_t number = 0;
        while (number == 0) {
            if (::getrandom(&number, sizeof(number), 0) != sizeof(number)) throw std::bad_alloc();
        }
        return number;
    }

    // The space that is asked for, with enough frames for one session more; nullptr with a sentence.
    Space *space_for(const JoinRequest &asked, std::string *why) {
        auto found = spaces_.find(asked.space);
        if (found != spaces_.end()) {
            Space &space = *found->second;
            if (space.frame_bytes != asked.frame_bytes) {
                append(why, "the space has frames of %" PRIu64 " bytes, and %" PRIu64 " were asked for",
                       space.frame_bytes, asked.frame_bytes);
                return nullptr;
            }
            std::uint64_t frames = space.ledger.frames();
            if (space.bits == UINT64_MAX) {
                append(why, "%d ranks share these pages, which is as many as can", kSessions);
                return nullptr;
            }
            if (asked.frames <= frames - space.promised) return &space;
            if (space.promised != 0) {
                append(why, "the pool needs %.2f GB", static_cast<double>(asked.frames * space.frame_bytes) / 1e9);
                append(why, " and %.2f GB of the %.2f GB that the bank has for this model are promised to no other",
                       static_cast<double>((frames - space.promised) * space.frame_bytes) / 1e9,
                       static_cast<double>(frames * space.frame_bytes) / 1e9);
                return nullptr;
            }
            drop(asked.space);  // too small, and nobody uses it
        }
        return create(asked, why);
    }

    Space *create(const JoinRequest &asked, std::string *why) {
        std::uint64_t needed = asked.frames > UINT64_MAX / asked.frame_bytes ? UINT64_MAX
                                                                             : asked.frames * asked.frame_bytes;
        std::uint64_t most = 0;
        for (bool may_drop = false;; may_drop = true) {
            for (std::size_t i = 0; i < banks_.size(); ++i) {
                const SlabSource &bank = *banks_[i];
                most = std::max(most, bank.available());
                if (needed > bank.available()) continue;  // which is in whole granules
                std::uint64_t granule = bank.granularity();
                std::uint64_t least = (needed + granule - 1) / granule * granule;
                double part = static_cast<double>(needed) / static_cast<double>(std::max(needed, asked.pool_bytes));
                auto share = static_cast<std::uint64_t>(static_cast<double>(bank.total() * share_ / 100) * part);
                share = share / granule * granule;
                std::uint64_t bytes = asked.is_private == 1 ? least
                                                            : std::max(least, std::min(share, bank.available()));
                return open(asked, i, bytes, why);
            }
            if (may_drop && !drop_idle()) break;
        }
        append(why, "the pool needs %.2f GB and the bank has %.2f GB for it", static_cast<double>(needed) / 1e9,
               static_cast<double>(most) / 1e9);
        return nullptr;
    }

    Space *open(const JoinRequest &asked, std::size_t bank, std::uint64_t bytes, std::string *why) {
        Descriptor slab = sealed_file("mtier", bytes);
        std::uint64_t frames = bytes / asked.frame_bytes;
        std::uint64_t size = Ledger::bytes_for(frames);
        Descriptor control = sealed_file("mtier-pages", size);
        void *memory = MAP_FAILED;
        if (slab.get() >= 0 && control.get() >= 0) {
            memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, control.get(), 0);
        }
        if (memory == MAP_FAILED) {
            *why = "the service could not make a slab: " + words_of(errno);
            return nullptr;
        }
        banks_[bank]->take(bytes);
        auto space = std::make_unique<Space>(memory, frames);
        space->label = printable(asked.label);
        space->is_private = asked.is_private == 1;
        space->bank = bank;
        space->frame_bytes = asked.frame_bytes;
        space->slab_bytes = bytes;
        space->slab = std::move(slab);
        space->control = std::move(control);
        space->memory = memory;
        space->ledger.begin();
        return (spaces_[asked.space] = std::move(space)).get();
    }

    // Of fixed size: a client cannot take more than that, nor lose what it maps.
    static Descriptor sealed_file(const char *name, std::uint64_t bytes) {
        Descriptor file(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
        bool made = file.get() >= 0 && ::ftruncate(file.get(), static_cast<off_t>(bytes)) == 0 &&
                    ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
        return made ? std::move(file) : Descriptor();
    }

    static std::string printable(const char *label) {
        std::string text = label;
        for (char &c : text) {
            if (c < ' ' || c > '~' || c == '"' || c == '\\') c = '_';
        }
        return text.empty() ? "-" : text;
    }

    void drop(const Key &key) {
        auto found = spaces_.find(key);
        banks_[found->second->bank]->give_back(found->second->slab_bytes);
        spaces_.erase(found);
    }

    // Drops the space that nobody has used for the longest time. False where all are in use.
    bool drop_idle() {
        auto oldest = spaces_.end();
        for (auto it = spaces_.begin(); it != spaces_.end(); ++it) {
            if (it->second->promised != 0) continue;
            if (oldest == spaces_.end() || it->second->last_join < oldest->second->last_join) oldest = it;
        }
        if (oldest == spaces_.end()) return false;
        note_("the pages of " + oldest->second->label + " make place for another model's");
        drop(Key(oldest->first));
        return true;
    }

    void end(Sessions::iterator session, const char *why) {
        Space *space = session->second.space;
        space->ledger.fence(session->second.bit);
        space->bits &= ~(1ULL << session->second.bit);
        space->promised -= session->second.quota;
        note_(session->second.process->name() + " is no session of " + space->label + " any more (" + why + ")");
        sessions_.erase(session);
        if (!space->is_private) return;
        for (auto it = spaces_.begin(); it != spaces_.end(); ++it) {
            if (it->second.get() == space) return drop(Key(it->first));
        }
    }

    // `all`: also of those behind one that is not there.
    static Answer find(Space &space, std::uint64_t count, std::string_view behind, bool all) {
        if (count > kMaxPages || behind.size() != count * sizeof(Key)) return not_so();
        Answer answer;
        for (std::uint64_t i = 0; i < count; ++i) {
            Key key;
            std::memcpy(&key, behind.data() + i * sizeof(Key), sizeof(key));
            std::optional<Place> place = space.index.find(space.ledger, key);
            if (!place && !all) break;
            space.found += place ? 1 : 0;
            Place it = place.value_or(Place{0, 0});
            answer.text.append(reinterpret_cast<const char *>(&it), sizeof(it));
        }
        return answer;
    }

    static Answer publish(Session &session, std::uint64_t count, std::string_view behind) {
        if (count > kMaxPages || behind.size() != count * sizeof(Publication)) return not_so();
        Space &space = *session.space;
        Answer answer;
        for (std::uint64_t i = 0; i < count; ++i) {
            Publication page;
            std::memcpy(&page, behind.data() + i * sizeof(page), sizeof(page));
            Verdict verdict = space.index.publish(&space.ledger, session.bit, page.key, page.place);
            answer.text.push_back(static_cast<char>(verdict));
            ++space.verdicts[static_cast<int>(verdict)];
            session.published += verdict == Verdict::kNew ? 1 : 0;
        }
        return answer;
    }

    Answer damaged(const Session &session, std::uint64_t count, std::string_view behind) {
        if (count > kMaxPages || behind.size() != count * sizeof(Place)) return not_so();
        Space &space = *session.space;
        std::uint64_t forgotten = 0;
        for (std::uint64_t i = 0; i < count; ++i) {
            Place place;
            std::memcpy(&place, behind.data() + i * sizeof(place), sizeof(place));
            if (place.frame >= space.ledger.frames()) return Answer::error(kInvalidArgument, "there is no such frame");
            forgotten += space.index.forget(place) ? 1 : 0;
        }
        space.damaged += forgotten;
        std::string words;
        append(&words, "%s finds %" PRIu64 " pages of ", session.process->name().c_str(), forgotten);
        note_(words + space.label + " damaged; they are found no more");
        return Answer{};
    }

    std::vector<std::unique_ptr<SlabSource>> banks_;
    const unsigned share_;
    Note note_;
    std::unordered_map<Key, std::unique_ptr<Space>, KeyHash> spaces_;
    Sessions sessions_;
    std::unordered_map<std::uint64_t, std::uint64_t> joined_;  // connection -> session
    std::uint64_t joins_ = 0;
};

}  // namespace mtier::pages

// The page bank: handlers of the messages in pages_protocol.h, for mtierd's one thread.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cinttypes>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "connections.h"
#include "keeper.h"
#include "pages.h"
#include "pages_protocol.h"
#include "processes.h"
#include "slabs.h"
#include "space_record.h"
#include "text.h"

namespace mtier::pages {

class PageService : public Handler {
  public:
    using Note = std::function<void(const std::string &)>;

    // `share`: percentage of a bank for one space beyond its engines' requests.
    PageService(Processes &processes, Kept &kept, std::vector<std::unique_ptr<SlabSource>> banks, unsigned share,
                Note note)
        : processes_(processes), kept_(kept), banks_(std::move(banks)), share_(share), note_(std::move(note)) {
        restore();
        processes.when_gone([this](const Process &process) {
            for (auto it = sessions_.begin(); it != sessions_.end();) {
                auto each = it++;
                if (each->second.process->key() == process.key()) end(each, "its process has ended");
            }
        });
    }

    std::optional<Answer> handle(const Peer &peer, const Request &request, std::string_view behind,
                                 Descriptors &sent) override {
        switch (static_cast<PagesOp>(request.op)) {
            case PagesOp::kInfo:
                if (!behind.empty() && behind.size() != sizeof(JoinRequest::label)) return not_so();
                return info(static_cast<MemoryKind>(request.bank), behind);
            case PagesOp::kJoin:
                return behind.size() == sizeof(JoinRequest) ? join(peer, behind) : not_so();
            case PagesOp::kReturn:
                return behind.empty() ? take_over(peer, static_cast<MemoryKind>(request.bank), sent) : not_so();
            case PagesOp::kForget:
                if (!behind.empty()) return not_so();
                note_(peer.process->name() + " makes the bank forget all pages");
                for (auto &[key, space] : spaces_) space->index.forget(&space->ledger);
                return Answer{};
            default:
                break;
        }
        auto session = session_of(peer);
        if (session == sessions_.end()) return Answer::error(kNotInitialized, "the connection has joined no space");
        Space &space = *session->second.space;
        switch (static_cast<PagesOp>(request.op)) {
            case PagesOp::kSlab: {
                if (!behind.empty()) return not_so();
                Answer answer;
                answer.fd = space.slab->memory.to_send();
                if (answer.fd < 0) return no_descriptor();
                session->second.mapped = true;
                answer.fields.size = space.slab->memory.bytes;
                answer.fields.available = space.slab->memory.offset;
                answer.fields.kind = banks_[space.bank]->kind();
                answer.fields.granularity = banks_[space.bank]->granularity();
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

    Answer not_sent(const Peer &peer, const Reply &reply, const std::string &why) override {
        auto session = session_of(peer);
        // Otherwise the session may retry, or leave.
        if (static_cast<PagesOp>(reply.op) == PagesOp::kJoin && session != sessions_.end()) {
            joined_.erase(peer.number);
            if (!session->second.mapped) end(session, "its memory could not be sent");
        }
        return Answer::error(kServerError, "the memory's descriptor cannot be sent now: " + why);
    }

    bool keeps(const Peer &peer) override { return session_of(peer) != sessions_.end(); }

    // The session stays: the process may be alive and use its pinned frames.
    void closed(const Peer &peer) override { joined_.erase(peer.number); }

    // Manages memory that is populated ahead of engines.
    void tend() {
        for (const auto &bank : banks_) bank->tend();
        for (const auto &bank : banks_) {
            const Populating *ahead = bank->ahead();
            std::string why = ahead == nullptr ? "" : ahead->why();
            std::string &said = said_[bank->name()];
            if (!why.empty() && said != why) {
                note_("bank " + bank->name() + " has " + amount(ahead->present()) + " of " + amount(ahead->bytes()) +
                      " populated and stops: " + why + "; engines wait for the rest, make the bank smaller");
            }
            said = why;
        }
    }

    // Members of the report's JSON object, in about `most` bytes; sessions that do not fit are omitted.
    std::string json(std::size_t most) const {
        std::string text = "\"open\": [";
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            append(&text, "%s{\"bank\": %zu, \"bytes\": %" PRIu64 "}", i == 0 ? "" : ", ", i, open_of(i).others);
        }
        text += "], \"ahead\": [";
        for (const auto &bank : banks_) {
            const Populating *ahead = bank->ahead();
            if (ahead == nullptr) continue;
            append(&text, "%s{\"bank\": \"%s\", \"bytes\": %" PRIu64, text.back() == '[' ? "" : ", ",
                   bank->name().c_str(), ahead->bytes());
            append(&text, ", \"present\": %" PRIu64 ", \"ended\": %s, \"why\": \"%s\"}", ahead->present(),
                   ahead->ended() ? "true" : "false", ahead->why().c_str());
        }
        text += "], \"devices\": [";
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            const SlabSource &bank = *banks_[i];
            if (bank.kind() != MemoryKind::kDevice) continue;
            append(&text, "%s{\"bank\": %zu, \"name\": \"%s\"", text.back() == '[' ? "" : ", ", i,
                   bank.name().c_str());
            append(&text, ", \"total\": %" PRIu64 ", \"available\": %" PRIu64 "}", bank.total(),
                   bank.available(kUsualFrameBytes));
        }
        text += "], \"spaces\": [";
        const char *between = "";
        for (const auto &[key, space] : spaces_) {
            if (text.size() + 2 * kRowBytes > most) break;
            append(&text, "%s{\"label\": \"%s\", \"private\": %s", between, space->head().label,
                   space->head().is_private != 0 ? "true" : "false");
            append(&text, ", \"bank\": %zu, \"frames\": %" PRIu64 ", \"frame_bytes\": %" PRIu64, space->bank,
                   space->ledger.frames(), space->head().frame_bytes);
            Ledger::Use use = space->ledger.use();
            append(&text, ", \"promised\": %" PRIu64 ", \"free\": %" PRIu64 ", \"cached\": %" PRIu64, space->promised,
                   use.free, use.cached);
            append(&text, ", \"shared\": %" PRIu64 ", \"evicted\": %" PRIu64, use.shared, space->ledger.evicted());
            append(&text, ", \"pages\": %" PRIu64 ", \"published\": %" PRIu64 ", \"had\": %" PRIu64, use.pages,
                   space->verdicts[0], space->verdicts[1]);
            append(&text, ", \"stale\": %" PRIu64 ", \"damaged\": %" PRIu64, space->verdicts[2], space->damaged);
            append(&text, ", \"found\": %" PRIu64 ", \"restored\": %zu", space->found, space->restored);
            text += ", \"sessions\": [";
            const char *comma = "";
            for (const auto &[id, session] : sessions_) {
                if (session.space != space.get() || text.size() + kRowBytes > most) continue;
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

    // Samples of metrics in Prometheus's text format; of spaces by bank and model.
    std::string metrics() const {
        std::string text = "# HELP mtierd_bank_open_bytes Bytes for pages of a model that the bank does not have yet.\n"
                           "# TYPE mtierd_bank_open_bytes gauge\n";
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            append(&text, "mtierd_bank_open_bytes{bank=\"%zu\"} %" PRIu64 "\n", i, open_of(i).others);
        }
        std::map<std::pair<std::size_t, std::string>, std::array<std::uint64_t, std::size(kMetrics)>> values;
        for (const auto &[key, space] : spaces_) {
            auto &of = values[{space->bank, space->head().label}];
            Ledger::Use use = space->ledger.use();
            std::uint64_t frame = space->head().frame_bytes;
            const std::uint64_t its[] = {space->ledger.frames() * frame, space->promised * frame, use.shared * frame,
                                         use.cached * frame,             use.free * frame,        use.pages,
                                         space->verdicts[0],             space->verdicts[1],      space->found,
                                         space->damaged,                 space->ledger.evicted()};
            static_assert(std::size(its) == std::size(kMetrics));
            for (std::size_t i = 0; i < std::size(its); ++i) of[i] += its[i];
        }
        for (std::size_t i = 0; i < std::size(kMetrics); ++i) {
            const Metric &it = kMetrics[i];
            append(&text, "# HELP mtierd_pages_%s %s\n# TYPE mtierd_pages_%s %s\n", it.name, it.help, it.name, it.type);
            for (const auto &[labels, of] : values) {
                append(&text, "mtierd_pages_%s{bank=\"%zu\",model=\"%s\"} %" PRIu64 "\n", it.name, labels.first,
                       labels.second.c_str(), of[i]);
            }
        }
        return text;
    }

  private:
    // The default for requests without a kind.
    static constexpr std::uint64_t kUsualFrameBytes = 4096;
    // Of a space, or of a session, in json().
    static constexpr std::size_t kRowBytes = 600;

    struct Metric {
        const char *name, *type, *help;
    };
    static constexpr Metric kMetrics[] = {
        {"capacity_bytes", "gauge", "Bytes of frames for the model's pages."},
        {"promised_bytes", "gauge", "Of these, bytes promised to engines."},
        {"shared_bytes", "gauge", "Bytes of frames that several engines hold."},
        {"cached_bytes", "gauge", "Bytes of frames with pages that no engine holds."},
        {"free_bytes", "gauge", "Bytes of empty frames."},
        {"findable", "gauge", "Pages that engines can find."},
        {"published_total", "counter", "Pages that engines stored and others can find."},
        {"duplicate_total", "counter", "Pages that engines stored and the bank had already."},
        {"found_total", "counter", "Pages that engines asked for and found."},
        {"damaged_total", "counter", "Pages that were found damaged."},
        {"evicted_total", "counter", "Pages that made place for others."},
    };

    struct Space {
        // `memory`: the mapped record and ledger of the slab; unmapped with this.
        Space(std::size_t bank, std::shared_ptr<Slab> its, void *memory, std::uint64_t frames)
            : bank(bank),
              slab(std::move(its)),
              record(static_cast<SpaceRecord *>(memory)),
              ledger(static_cast<char *>(memory) + kLedgerOffset, frames),
              index(frames) {}
        ~Space() { ::munmap(record, slab->control.mapped(control_bytes(ledger.frames()))); }
        Space(const Space &) = delete;
        Space &operator=(const Space &) = delete;

        const SpaceHead &head() const { return record->head; }

        const std::size_t bank;
        const std::shared_ptr<Slab> slab;
        SpaceRecord *const record;
        Ledger ledger;
        Index index;
        std::uint64_t bits = 0;      // sessions
        std::uint64_t promised = 0;  // frames, to all of them
        std::uint64_t last_join = 0;
        std::uint64_t verdicts[3] = {};
        std::uint64_t found = 0;
        std::uint64_t damaged = 0;
        std::size_t restored = 0;  // pages restored at the service's start
    };

    struct Session {
        Space *space;
        int bit;
        std::uint64_t quota;
        std::shared_ptr<Process> process;
        std::uint64_t published = 0;
        bool mapped = false;  // it has requested its slab, and may hold frames
    };
    using Sessions = std::unordered_map<std::uint64_t, Session>;

    Sessions::iterator session_of(const Peer &peer) {
        auto found = joined_.find(peer.number);
        return found == joined_.end() ? sessions_.end() : sessions_.find(found->second);
    }

    static Answer not_so() {
        return Answer::error(kInvalidArgument, "the message has the wrong size for its kind");
    }
    static Answer no_descriptor() { return Answer::error(kServerError, "the service has no free descriptor"); }

    bool is_connected(std::uint64_t id) const {
        return std::any_of(joined_.begin(), joined_.end(), [id](const auto &each) { return each.second == id; });
    }

    // Bytes of a bank that engines may still ask for.
    struct Open {
        std::uint64_t others = 0;                    // for pages that are not there yet
        std::map<std::string, std::uint64_t> there;  // by label, for models whose memory others cannot get
    };

    Open open_of(std::size_t bank) const {
        Open open;
        open.others = banks_[bank]->available(kUsualFrameBytes);
        for (const auto &[key, made] : making_) {
            bool is_idle = made.bank == bank && made.slab->state == Slab::State::kReady;
            if (is_idle) open.others += made.slab->memory.bytes;
        }
        for (const auto &[key, space] : spaces_) {
            if (space->bank != bank) continue;
            if (space->promised == 0) {
                open.others += space->slab->memory.bytes;  // pages of the past make place
            } else if (space->head().is_private == 0) {
                open.there[space->head().label] +=
                    (space->ledger.frames() - space->promised) * space->head().frame_bytes;
            }
        }
        return open;
    }

    Answer info(MemoryKind kind, std::string_view label) const {
        Answer answer;
        char text[sizeof(JoinRequest::label) + 1] = {};
        std::memcpy(text, label.data(), label.size());
        const std::string asked = printable(text);
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            const SlabSource &bank = *banks_[i];
            if (bank.kind() != kind) continue;
            ++answer.fields.num_banks;
            answer.fields.total += bank.total();
            answer.fields.granularity = std::max(answer.fields.granularity, bank.granularity());
            Open open = open_of(i);
            answer.fields.size = std::max(answer.fields.size, open.others);
            for (const auto &[its, bytes] : open.there) {
                if (!label.empty() && its != asked) continue;
                answer.fields.available = std::max(answer.fields.available, bytes);
            }
        }
        answer.fields.available = std::max(answer.fields.available, answer.fields.size);
        return answer;
    }

    Answer join(const Peer &peer, std::string_view behind) {
        JoinRequest asked;
        std::memcpy(&asked, behind.data(), sizeof(asked));
        if (asked.version != kPagesVersion) {
            return Answer::error(kServerError, "the client and the service use different versions of the page bank's "
                                               "messages; start both from one release");
        }
        if (asked.frame_bytes < kLeastFrameBytes || asked.frame_bytes > (1ULL << 40) || asked.frames == 0 ||
            asked.frames > (1ULL << 32) || asked.is_private > 1 || asked.label[sizeof(asked.label) - 1] != '\0' ||
            asked.session == 0 || asked.again > 1) {
            return Answer::error(kInvalidArgument, "the requested session size exceeds every bank");
        }
        if (joined_.count(peer.number) != 0) {
            return Answer::error(kInvalidArgument, "the connection has already joined a space");
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
        if (std::none_of(banks_.begin(), banks_.end(), [&](auto &bank) { return bank->kind() == asked.kind; })) {
            return Answer::error(kOutOfMemory, "the service has no bank of that memory");
        }
        if (asked.is_private == 1) asked.space = private_key(asked.session);
        std::string why;
        Space *space = space_for(asked, &why);
        if (space == nullptr && why.empty()) {
            return Answer::error(kMallocError, "the bank's memory is being prepared");
        }
        if (space == nullptr) return Answer::error(kOutOfMemory, why);
        int bit = 0;
        while ((space->bits >> bit & 1) != 0) ++bit;
        space->last_join = ++joins_;
        space->record->write(bit, asked.session, asked.frames, peer.process->pid(), peer.process->key());
        kept_.leave(name_of(*peer.process), peer.process->fd());
        auto session = admit(*space, asked.session, bit, asked.frames, peer.process);
        std::string words;
        append(&words, "%s joins %s with %" PRIu64, peer.process->name().c_str(), space->head().label, asked.frames);
        append(&words, " of %" PRIu64 " frames of %" PRIu64 " bytes", space->ledger.frames(), space->head().frame_bytes);
        note_(words);
        Answer answer = answer_as(peer, session);
        if (answer.fd < 0) end(session, "there was no free descriptor for it");
        return answer;
    }

    // Binds the connection to the session, unless a later one has it: a client has one at a time, and may have given
    // this one up before the service accepted it.
    Answer answer_as(const Peer &peer, Sessions::iterator session) {
        const Space &space = *session->second.space;
        for (const auto &[number, id] : joined_) {
            if (id == session->first && number > peer.number) {
                return Answer::error(kInvalidArgument, "a later connection has the session");
            }
        }
        Answer answer;
        answer.fd = space.slab->control.to_send();
        if (answer.fd < 0) return no_descriptor();
        for (auto it = joined_.begin(); it != joined_.end();) {
            it = it->second == session->first ? joined_.erase(it) : std::next(it);
        }
        joined_[peer.number] = session->first;
        answer.fields.num_banks = session->second.bit;
        answer.fields.total = space.ledger.frames();
        answer.fields.size = space.slab->memory.bytes;
        answer.fields.available = space.slab->control.offset + kLedgerOffset;
        answer.fields.kind = banks_[space.bank]->kind();
        answer.fields.granularity = banks_[space.bank]->mapping_granule();
        answer.fields.allocation = space.slab->id;
        return answer;
    }

    // A private space of that session.
    static Key private_key(std::uint64_t session) {
        Key key{};
        std::memcpy(key.bytes.data(), &session, sizeof(session));
        return key;
    }

    // The requested space, with enough frames for one more session. nullptr with a sentence, or without one while it is
    // being made.
    Space *space_for(const JoinRequest &asked, std::string *why) {
        auto found = spaces_.find(asked.space);
        if (found != spaces_.end()) {
            Space &space = *found->second;
            if (space.head().frame_bytes != asked.frame_bytes) {
                append(why, "the space has frames of %" PRIu64 " bytes, but %" PRIu64 " were requested",
                       space.head().frame_bytes, asked.frame_bytes);
                return nullptr;
            }
            if (banks_[space.bank]->kind() != asked.kind) {
                *why = "the pages are in another kind of the service's memory; set the same for all engines of a model";
                return nullptr;
            }
            std::uint64_t frames = space.ledger.frames();
            if (space.bits == UINT64_MAX) {
                append(why, "%d ranks share these pages, which is the maximum", kSessions);
                return nullptr;
            }
            if (asked.frames <= frames - space.promised) return &space;
            if (space.promised != 0) {
                append(why, "the pool needs %.2f GB", static_cast<double>(asked.frames * asked.frame_bytes) / 1e9);
                append(why, " and %.2f GB of the %.2f GB that the bank has for this model are promised to no other",
                       static_cast<double>((frames - space.promised) * asked.frame_bytes) / 1e9,
                       static_cast<double>(frames * asked.frame_bytes) / 1e9);
                return nullptr;
            }
            drop(asked.space);  // too small, and unused
        }
        auto begun = making_.find(asked.space);
        if (begun == making_.end()) {
            if (!begin(asked, why)) return nullptr;
            begun = making_.find(asked.space);
        }
        banks_[begun->second.bank]->advance(*begun->second.slab);
        if (begun->second.slab->state == Slab::State::kMaking) return nullptr;
        Making made = std::move(begun->second);
        making_.erase(begun);
        if (made.slab->state == Slab::State::kFailed) {
            *why = "the service could not allocate a slab: " + made.slab->why;
            return nullptr;
        }
        Space *space = open(made, why);
        // Another session may have requested another size.
        return space == nullptr || made.asked.frame_bytes == asked.frame_bytes ? space : space_for(asked, why);
    }

    // Starts to allocate a slab for a space. False with a sentence if no bank has the memory.
    bool begin(const JoinRequest &asked, std::string *why) {
        std::uint64_t needed = asked.frames > UINT64_MAX / asked.frame_bytes ? UINT64_MAX
                                                                             : asked.frames * asked.frame_bytes;
        std::uint64_t most = 0;
        for (bool may_drop = false;; may_drop = true) {
            for (std::size_t i = 0; i < banks_.size(); ++i) {
                SlabSource &bank = *banks_[i];
                if (bank.kind() != asked.kind) continue;
                std::uint64_t available = bank.available(asked.frame_bytes);
                most = std::max(most, available);
                if (needed > available) continue;  // available is in whole granules
                std::uint64_t granule = bank.granularity();
                std::uint64_t least = (needed + granule - 1) / granule * granule;
                double part = static_cast<double>(needed) / static_cast<double>(std::max(needed, asked.pool_bytes));
                auto share = static_cast<std::uint64_t>(static_cast<double>(bank.total() * share_ / 100) * part);
                share = share / granule * granule;
                std::uint64_t bytes = asked.is_private == 1 ? least
                                                            : std::max(least, std::min(share, available));
                Making &making = making_[asked.space];
                making = {i, asked, nullptr};
                making.slab = bank.make(bytes, control_bytes(bytes / asked.frame_bytes));
                return true;
            }
            if (may_drop && !drop_idle()) break;
        }
        append(why, "the pool needs %.2f GB, but the bank has %.2f GB for it", static_cast<double>(needed) / 1e9,
               static_cast<double>(most) / 1e9);
        return false;
    }

    struct Making {
        std::size_t bank = 0;
        JoinRequest asked{};
        std::shared_ptr<Slab> slab;
    };

    // Makes the space of a ready slab. nullptr with a sentence.
    Space *open(const Making &made, std::string *why) {
        Slab &slab = *made.slab;
        std::uint64_t frames = slab.memory.bytes / made.asked.frame_bytes;
        void *memory = map(slab, frames);
        if (memory == MAP_FAILED) {
            *why = "the service could not map a ledger: " + words_of(errno);
            banks_[made.bank]->discard(slab);
            return nullptr;
        }
        SpaceHead head{};
        head.magic = SpaceHead::kMagic;
        head.epoch = slab.id;
        head.key = made.asked.space;
        put_text(head.label, printable(made.asked.label));
        put_text(head.bank, banks_[made.bank]->name());
        put_text(head.boot, boot_id());
        head.frame_bytes = made.asked.frame_bytes;
        head.frames = frames;
        head.slab_bytes = slab.memory.bytes;
        head.kind = banks_[made.bank]->kind();
        head.is_private = made.asked.is_private;
        head.sum = head.right_sum();
        auto space = std::make_unique<Space>(made.bank, made.slab, memory, frames);
        space->ledger.begin();
        space->record->head = head;
        return (spaces_[head.key] = std::move(space)).get();
    }

    static void *map(const Slab &slab, std::uint64_t frames) {
        return slab.control.map(control_bytes(frames));
    }

    // ---- state of earlier services ----

    void restore() {
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            for (const std::shared_ptr<Slab> &slab : banks_[i]->left()) restore(i, slab);
        }
        for (const std::string &name : kept_.found("")) kept_.remove(name);  // partial or unused state
    }

    // Takes over memory of a service that has ended, from an engine.
    Answer take_over(const Peer &peer, MemoryKind kind, const Descriptors &sent) {
        std::string why = "it has no bank of this kind of memory";
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            if (banks_[i]->kind() != kind) continue;
            std::shared_ptr<Slab> slab = banks_[i]->take_over(sent[0], sent[1], &why);
            if (slab == nullptr) continue;
            std::optional<SpaceHead> head = read_head(slab->control);
            auto there = head ? spaces_.find(head->key) : spaces_.end();
            if (there != spaces_.end() && there->second->promised == 0) drop(head->key);  // unused
            if (restore(i, slab)) {
                note_(peer.process->name() + " returned the memory of its pages");
                return Answer{};
            }
            why = "engines have other memory for these pages by now";
        }
        return Answer::error(kOutOfMemory, "the service cannot take the memory back: " + why);
    }

    // False if the slab is unusable.
    bool restore(std::size_t bank, const std::shared_ptr<Slab> &slab) {
        std::optional<SpaceHead> head = read_head(slab->control);
        void *memory = head && spaces_.count(head->key) == 0 ? map(*slab, head->frames) : MAP_FAILED;
        if (memory == MAP_FAILED) {
            banks_[bank]->discard(*slab);
            return false;
        }
        Space &space = *(spaces_[head->key] = std::make_unique<Space>(bank, slab, memory, head->frames));
        for (int bit = 0; bit < kSessions; ++bit) {
            const SessionLine &line = space.record->sessions[bit];
            bool is_there = space.record->has(bit) && !slab->deserted &&
                            line.quota <= space.ledger.frames() - space.promised;
            std::shared_ptr<Process> process = is_there ? process_of(line) : nullptr;
            if (process == nullptr || process->gone() || sessions_.count(line.id) != 0) {
                space.ledger.fence(bit);
                space.record->erase(bit);
                continue;
            }
            if (process->fd() >= 0) kept_.leave(name_of(*process), process->fd());
            admit(space, line.id, bit, line.quota, process)->second.mapped = true;
        }
        space.index.restore(space.ledger);
        space.restored = space.index.size();
        std::string words;
        append(&words, "restored %zu pages of %s, and %d sessions", space.restored, space.head().label,
               __builtin_popcountll(space.bits));
        note_(words);
        if (space.promised == 0 && head->is_private != 0) drop(head->key);
        return true;
    }

    // The process of a session's record; nullptr if it has ended. A process of unknown state has no pidfd, and keeps
    // its session until it reconnects.
    std::shared_ptr<Process> process_of(const SessionLine &line) {
        auto pid = static_cast<pid_t>(line.pid);
        Descriptor fd = kept_.take(name_of(pid, line.process));
        std::shared_ptr<Process> process = fd.get() >= 0 ? std::make_shared<Process>(pid, fd.release(), line.process)
                                                         : Process::of_key(pid, line.process);
        return process == nullptr ? nullptr : processes_.shared(process);
    }

    Sessions::iterator admit(Space &space, std::uint64_t id, int bit, std::uint64_t quota,
                             std::shared_ptr<Process> process) {
        space.bits |= 1ULL << bit;
        space.promised += quota;
        return sessions_.emplace(id, Session{&space, bit, quota, std::move(process)}).first;
    }

    static std::string name_of(pid_t pid, const std::string &key) {
        return "process " + std::to_string(pid) + " " + key;
    }
    static std::string name_of(const Process &process) { return name_of(process.pid(), process.key()); }

    void drop(const Key &key) {
        auto found = spaces_.find(key);
        banks_[found->second->bank]->discard(*found->second->slab);
        spaces_.erase(found);
    }

    // Drops the least recently used unused space. False if all are in use.
    bool drop_idle() {
        for (auto it = making_.begin(); it != making_.end(); ++it) {  // its requester has stopped asking
            banks_[it->second.bank]->advance(*it->second.slab);
            if (it->second.slab->state == Slab::State::kMaking) continue;
            if (it->second.slab->state == Slab::State::kReady) banks_[it->second.bank]->discard(*it->second.slab);
            making_.erase(it);
            return true;
        }
        auto oldest = spaces_.end();
        for (auto it = spaces_.begin(); it != spaces_.end(); ++it) {
            if (it->second->promised != 0) continue;
            if (oldest == spaces_.end() || it->second->last_join < oldest->second->last_join) oldest = it;
        }
        if (oldest == spaces_.end()) return false;
        note_("the pages of " + std::string(oldest->second->head().label) + " are evicted for another model's");
        drop(Key(oldest->first));
        return true;
    }

    void end(Sessions::iterator session, const char *why) {
        Space *space = session->second.space;
        space->ledger.fence(session->second.bit);
        space->record->erase(session->second.bit);
        space->bits &= ~(1ULL << session->second.bit);
        space->promised -= session->second.quota;
        note_(session->second.process->name() + " left " + space->head().label + " (" + why + ")");
        std::shared_ptr<Process> process = session->second.process;
        sessions_.erase(session);
        bool has_others = std::any_of(sessions_.begin(), sessions_.end(),
                                      [&](const auto &each) { return each.second.process->key() == process->key(); });
        if (!has_others) kept_.remove(name_of(*process));
        if (space->head().is_private == 0) return;
        for (auto it = spaces_.begin(); it != spaces_.end(); ++it) {
            if (it->second.get() == space) return drop(Key(it->first));
        }
    }

    // `all`: include keys after a missing one.
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
            forgotten += space.index.forget(&space.ledger, place) ? 1 : 0;
        }
        space.damaged += forgotten;
        std::string words;
        append(&words, "%s finds %" PRIu64 " pages of ", session.process->name().c_str(), forgotten);
        note_(words + space.head().label + " damaged; they are removed");
        return Answer{};
    }

    Processes &processes_;
    Kept &kept_;
    std::vector<std::unique_ptr<SlabSource>> banks_;
    const unsigned share_;
    Note note_;
    std::unordered_map<Key, std::unique_ptr<Space>, KeyHash> spaces_;
    std::unordered_map<Key, Making, KeyHash> making_;
    std::unordered_map<std::string, std::string> said_;  // by bank
    Sessions sessions_;
    std::unordered_map<std::uint64_t, std::uint64_t> joined_;  // connection -> session
    std::uint64_t joins_ = 0;
};

}  // namespace mtier::pages

// Handles requests: memory of banks for leases, fully accounted.
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bank_thread.h"
#include "connections.h"
#include "journal.h"
#include "ledger.h"
#include "log.h"
#include "loop.h"
#include "processes.h"
#include "protocol.h"
#include "text.h"

namespace mtier {

struct Rules {
    std::uint64_t quota = 0;   // bytes of one process; 0: no limit
    bool allow_reset = false;  // serve kResetAll
};

class Service : public Handler {
  public:
    // `journal`: the grants of earlier services; must outlive this.
    Service(Loop &loop, Log &log, Processes &processes, Journal &journal, std::vector<std::unique_ptr<Bank>> banks,
            const Rules &rules)
        : loop_(loop),
          log_(log),
          processes_(processes),
          journal_(journal),
          rules_(rules),
          mailbox_(loop),
          ledger_(banks.size()),
          counts_(banks.size()),
          set_aside_(banks.size()) {
        for (auto &bank : banks) {
            log_.line("bank %zu: %s, %s in granules of %" PRIu64 " KiB", banks_.size(), bank->describe().c_str(),
                      amount(bank->total()).c_str(), bank->granularity() >> 10);
            banks_.push_back(std::make_unique<BankThread>(std::move(bank), mailbox_));
        }
        rlimit files{};
        // The rest are for connections, their processes and the driver.
        if (::getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur != RLIM_INFINITY) {
            most_grants_ = std::min<rlim_t>(most_grants_, files.rlim_cur - std::min<rlim_t>(600, files.rlim_cur / 2));
        }
        processes_.when_gone([this](const Process &process) { give_up_all_of(process); });
        restore();
    }

    // The connections, for later answers.
    void answer_over(Connections &connections) { connections_ = &connections; }

    // Reserves bytes of a host bank for the page bank, which allocates and keeps the memory itself.
    void set_aside(std::size_t index, std::uint64_t bytes) { set_aside_[index] += bytes; }
    void give_back(std::size_t index, std::uint64_t bytes) { set_aside_[index] -= bytes; }
    std::size_t banks() const { return banks_.size(); }
    const Bank &bank(std::size_t index) const { return banks_[index]->bank(); }
    std::uint64_t available(std::size_t index) const {
        std::uint64_t used = ledger_.of_bank(index).bytes + set_aside_[index], total = bank(index).total();
        return total - std::min(total, used);  // an earlier service may have had a larger bank
    }

    // Posts the page bank's work to a bank's thread; see BankThread::post.
    template <typename Work, typename Done>
    void have_done(std::size_t index, Work work, Done done) {
        banks_[index]->post(std::move(work), std::move(done));
    }

    // Whether each bank finishes its work within the given time.
    bool idle_within(std::chrono::milliseconds time) {
        return std::all_of(banks_.begin(), banks_.end(), [&](auto &bank) { return bank->idle_within(time); });
    }

    std::optional<Answer> handle(const Peer &peer, const Request &request, std::string_view, Descriptors &) override {
        switch (static_cast<Op>(request.op)) {
            case Op::kHello:
                return hello(peer, request.allocation);
            case Op::kStatus:
                return status();
            case Op::kBankStatus:
                return bank_status(peer, request.bank);
            case Op::kMalloc:
                return allocate(peer, request);
            case Op::kKeep: {
                Grant *grant = grant_of(peer, request.allocation);
                if (grant == nullptr) return no_such_allocation();
                grant->stage = Stage::kHeld;
                return Answer{};
            }
            case Op::kFree: {
                Grant *grant = grant_of(peer, request.allocation);
                if (grant == nullptr) return no_such_allocation();
                give_up(*grant, peer.number);
                return std::nullopt;
            }
            case Op::kLogs: {
                Answer answer;
                answer.text = log_.tail(request.size);
                return answer;
            }
            case Op::kResetAll:
                return reset_all(peer);
            case Op::kReport: {
                Answer answer;
                answer.text = report();
                return answer;
            }
            case Op::kRefused:
                break;
        }
        return Answer::error(kInvalidArgument, "the request has an unknown kind");
    }

    Answer not_sent(const Peer &peer, const Reply &reply, const std::string &why) override {
        Answer answer = Answer::error(kMallocError, "the memory's descriptor cannot be sent now: " + why +
                                                        "; a process of this user does not read its descriptors");
        answer.fields.kind = reply.kind;  // may pass
        log_.often(Often::kFault, "%s: %s", peer.process->name().c_str(), answer.text.c_str());
        if (Grant *grant = grant_of(peer, reply.allocation)) {
            ++counts_[grant->bank].failed;
            give_up(*grant);
        }
        return answer;
    }

    bool keeps(const Peer &peer) override {
        Lease *lease = lease_of(peer);
        return lease != nullptr && !lease->grants.empty();
    }

    void closed(const Peer &peer) override {
        Lease *lease = lease_of(peer);
        if (lease == nullptr) return;
        lease->connection = 0;
        leases_.erase(peer.number);
        for (std::uint64_t id : std::set<std::uint64_t>(lease->grants)) {
            Grant &grant = *ledger_.grant(id);
            // Memory that is being allocated was not sent; sent memory may have been read.
            if (grant.stage == Stage::kMaking) {
                give_up(grant);
            } else {
                watch(grant);
            }
        }
        ++lease->departures;
        if (!lease->grants.empty() && peer.process->fd() < 0) expire(*lease);
        ledger_.drop_if_empty(lease->id);
    }

    // Samples of metrics in Prometheus's text format.
    std::string metrics() const {
        std::string text;
        auto metric = [&](const char *name, const char *type, const char *help, auto value) {
            append(&text, "# HELP mtierd_%s %s\n# TYPE mtierd_%s %s\n", name, help, name, type);
            for (std::size_t i = 0; i < banks_.size(); ++i) {
                append(&text, "mtierd_%s{bank=\"%zu\",kind=\"%s\"} %" PRIu64 "\n", name, i, label(i).c_str(),
                       static_cast<std::uint64_t>(value(i)));
            }
        };
        metric("bank_capacity_bytes", "gauge", "Bytes that the bank may grant.",
               [&](std::size_t i) { return bank(i).total(); });
        metric("bank_used_bytes", "gauge", "Bytes that clients use or have not released, and the page bank's.",
               [&](std::size_t i) { return ledger_.of_bank(i).bytes + set_aside_[i]; });
        metric("bank_allocations", "gauge", "Allocations of clients in bank_used_bytes.",
               [&](std::size_t i) { return ledger_.of_bank(i).grants; });
        metric("bank_busy_milliseconds", "gauge", "Duration of the bank's current call.",
               [&](std::size_t i) { return banks_[i]->busy().count(); });
        metric("grants_total", "counter", "Allocations granted.", [&](std::size_t i) { return counts_[i].granted; });
        metric("refusals_total", "counter", "Allocations refused for lack of space or quota.",
               [&](std::size_t i) { return counts_[i].refused; });
        metric("failures_total", "counter", "Allocations that failed or could not be sent.",
               [&](std::size_t i) { return counts_[i].failed; });
        append(&text, "# HELP mtierd_clients Clients that hold memory.\n# TYPE mtierd_clients gauge\n");
        append(&text, "mtierd_clients %zu\n", holders());
        append(&text, "# HELP mtierd_connections Open connections.\n# TYPE mtierd_connections gauge\n");
        append(&text, "mtierd_connections %zu\n", connections_ == nullptr ? 0 : connections_->size());
        return text;
    }

    // JSON of banks and of clients with memory.
    std::string report() const {
        std::string text;
        append(&text, "{\"pid\": %d, \"quota\": %" PRIu64 ", \"banks\": [", static_cast<int>(::getpid()), rules_.quota);
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            append(&text, "%s{\"bank\": %zu, %s", i == 0 ? "" : ", ", i, bank(i).json().c_str());
            append(&text, ", \"total\": %" PRIu64 ", \"available\": %" PRIu64, bank(i).total(), available(i));
            append(&text, ", \"granularity\": %" PRIu64 ", \"allocations\": %zu}", bank(i).granularity(),
                   ledger_.of_bank(i).grants);
        }
        text += "], \"clients\": [";
        const char *comma = "";
        for (const auto &[id, lease] : ledger_.leases()) {
            if (lease.grants.empty()) continue;
            if (text.size() > kMaxTextBytes / 2) break;  // the page bank's part follows
            append(&text, "%s{\"pid\": %d, \"process\": \"%s\", \"bytes\": %" PRIu64 ", \"allocations\": %zu, ", comma,
                   static_cast<int>(lease.process->pid()), lease.process->key().c_str(), lease.account.bytes,
                   lease.grants.size());
            append(&text, "\"connected\": %s, \"ended\": %s}", lease.connection != 0 ? "true" : "false",
                   lease.process->gone() ? "true" : "false");
            comma = ", ";
        }
        return text + "]}";
    }

  private:
    struct Counts {
        std::uint64_t granted = 0, refused = 0, failed = 0;
    };

    static constexpr std::size_t kMaxGrants = 1 << 16;
    static constexpr std::chrono::milliseconds kFirstLook{10}, kLastLook{1000};
    // How long a client with an invisible process may be disconnected before it counts as ended.
    static constexpr std::chrono::milliseconds kAway{60'000};

    std::string label(std::size_t index) const { return bank(index).label(); }
    std::size_t holders() const {
        auto holds = [](const auto &entry) { return !entry.second.grants.empty(); };
        return static_cast<std::size_t>(std::count_if(ledger_.leases().begin(), ledger_.leases().end(), holds));
    }

    // ---- requests ----

    Answer hello(const Peer &peer, std::uint64_t wanted) {
        Lease *lease = lease_of(peer);
        if (lease == nullptr) {
            lease = ledger_.lease(wanted);
            if (lease != nullptr && lease->process->key() == peer.process->key()) {
                resume(*lease, peer);
            } else {
                lease = &open(peer);
            }
        }
        Answer answer;
        answer.fields.allocation = lease->id;
        return answer;
    }

    Answer status() const {
        Answer answer;
        answer.fields.num_banks = static_cast<std::int32_t>(banks_.size());
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            std::uint64_t total = bank(i).total();
            answer.fields.total = i == 0 ? total : std::min(answer.fields.total, total);
        }
        return answer;
    }

    Answer bank_status(const Peer &peer, std::int32_t index) const {
        if (!has_bank(index)) return unknown_bank(index);
        auto i = static_cast<std::size_t>(index);
        Answer answer;
        answer.fields.total = bank(i).total();
        // Whole granules, so that an allocation of all available bytes succeeds.
        std::uint64_t granule = bank(i).granularity();
        answer.fields.available = std::min(available(i), quota_left(peer)) / granule * granule;
        return answer;
    }

    std::optional<Answer> allocate(const Peer &peer, const Request &request) {
        if (!has_bank(request.bank)) return unknown_bank(request.bank);
        if (request.size == 0) return Answer::error(kInvalidArgument, "an allocation of 0 bytes was requested");
        auto index = static_cast<std::size_t>(request.bank);
        std::uint64_t size = bank(index).rounded(request.size);
        if (auto refused = refuses(peer, index, size, request.size)) {
            ++counts_[index].refused;
            log_.often(Often::kRefusedGrant, "refused %s: %s", peer.process->name().c_str(), refused->c_str());
            return Answer::error(kOutOfMemory, *refused);
        }
        Lease *lease = lease_of(peer);
        if (lease == nullptr) lease = &open(peer);
        std::uint64_t id = ledger_.add(*lease, index, size).id;
        banks_[index]->post([size, id](Bank &bank) { return bank.create(size, id); },
                            [this, peer, id](const Made &made) { offer(peer, id, made); });
        return std::nullopt;
    }

    // A clause if an allocation of `size` bytes (`asked`, rounded up) exceeds the free capacity or a limit.
    std::optional<std::string> refuses(const Peer &peer, std::size_t index, std::uint64_t size,
                                       std::uint64_t asked) const {
        std::string why;
        if (size == 0 || size > available(index)) {
            append(&why, "bank %zu has %s of %s available, but %s were requested", index,
                   amount(available(index)).c_str(), amount(bank(index).total()).c_str(), amount(asked).c_str());
            return why;
        }
        Account account = ledger_.of_process(*peer.process);
        if (size > quota_left(peer)) {
            append(&why, "%s has a quota of %s, has %s and requested %s; start the service with a larger --quota",
                   peer.process->name().c_str(), amount(rules_.quota).c_str(), amount(account.bytes).c_str(),
                   amount(asked).c_str());
            return why;
        }
        if (account.grants >= most_grants_ / 2 || ledger_.grants() >= most_grants_) {
            append(&why, "the service can make %zu allocations, half of them for one process; raise its limit of open "
                         "files", most_grants_);
            return why;
        }
        return std::nullopt;
    }

    // The bank has finished an allocation, successfully or not.
    void offer(const Peer &peer, std::uint64_t id, const Made &made) {
        Grant *grant = ledger_.grant(id);
        if (grant == nullptr || grant->stage != Stage::kMaking) {  // given up or reset in the meantime
            if (made.fd >= 0) ::close(made.fd);
            if (grant != nullptr && made.fd < 0) remove(id);
            connections_->answer(peer.number, Answer::error(kMallocError, "the allocation was reset"));
            return;
        }
        std::size_t index = grant->bank;
        Lease &lease = *ledger_.lease(grant->lease);
        std::string why = made.why;
        bool written = made.fd < 0 ||
                       journal_.add({id, lease.id, index, label(index), grant->size, lease.process->pid(),
                                     lease.process->key()}, &why);
        if (made.fd < 0 || !written) {
            ++counts_[index].failed;
            std::string words;
            append(&words, "bank %zu could not allocate %s: %s", index, amount(grant->size).c_str(), why.c_str());
            log_.often(Often::kFault, "%s", words.c_str());
            Answer answer = Answer::error(kMallocError, words);
            if (made.may_pass) answer.fields.kind = bank(index).kind();
            if (made.fd >= 0) {
                ::close(made.fd);
                give_up(*grant);
            } else {
                remove(id);
            }
            connections_->answer(peer.number, std::move(answer));
            return;
        }
        ++counts_[index].granted;
        log_.often(Often::kGrant, "%s has %s of bank %zu", peer.process->name().c_str(), amount(grant->size).c_str(),
                   index);
        grant->stage = Stage::kOffered;
        Answer answer;
        answer.fd = made.fd;
        answer.fields.kind = bank(index).kind();
        answer.fields.size = grant->size;
        answer.fields.granularity = bank(index).granularity();
        answer.fields.allocation = id;
        connections_->answer(peer.number, std::move(answer));
    }

    std::optional<Answer> reset_all(const Peer &peer) {
        if (!rules_.allow_reset) {
            return Answer::error(kFailure, "mtierd does not reclaim memory in use; start it with --allow-reset to let "
                                           "mTierResetAll clear all accounts");
        }
        log_.line("%s resets all banks: mapped memory stays mapped, but is no longer counted",
                  peer.process->name().c_str());
        std::vector<std::vector<std::uint64_t>> of_bank(banks_.size());
        std::vector<std::uint64_t> ids;
        for (const auto &[id, lease] : ledger_.leases()) {
            ids.insert(ids.end(), lease.grants.begin(), lease.grants.end());
        }
        for (std::uint64_t id : ids) {
            of_bank[ledger_.grant(id)->bank].push_back(id);
            remove(id);
        }
        auto left = std::make_shared<std::size_t>(banks_.size());
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            banks_[i]->post(
                [forgotten = std::move(of_bank[i])](Bank &bank) {
                    for (std::uint64_t id : forgotten) bank.forget(id);
                    return true;
                },
                [this, left, number = peer.number](bool) {
                    if (--*left == 0) connections_->answer(number, Answer{});
                });
        }
        return std::nullopt;
    }

    bool has_bank(std::int32_t bank) const { return bank >= 0 && static_cast<std::size_t>(bank) < banks_.size(); }

    Answer unknown_bank(std::int32_t bank) const {
        std::string words;
        append(&words, "there is no bank %d; the service has %zu, counted from 0", bank, banks_.size());
        return Answer::error(kInvalidArgument, words);
    }

    static Answer no_such_allocation() {
        return Answer::error(kInvalidArgument, "the client has no such allocation");
    }

    // A process has one quota for all its connections.
    std::uint64_t quota_left(const Peer &peer) const {
        if (rules_.quota == 0) return UINT64_MAX;
        return rules_.quota - std::min(rules_.quota, ledger_.of_process(*peer.process).bytes);
    }

    // ---- leases ----

    Lease *lease_of(const Peer &peer) {
        auto found = leases_.find(peer.number);
        return found == leases_.end() ? nullptr : ledger_.lease(found->second);
    }

    Lease &open(const Peer &peer) {
        Lease &lease = ledger_.open(peer.process);
        lease.connection = peer.number;
        leases_[peer.number] = lease.id;
        return lease;
    }

    // The client of a lease has reconnected.
    void resume(Lease &lease, const Peer &peer) {
        leases_.erase(lease.connection);
        lease.connection = peer.number;
        leases_[peer.number] = lease.id;
        for (std::uint64_t id : std::set<std::uint64_t>(lease.grants)) {
            Grant &grant = *ledger_.grant(id);
            if (grant.stage == Stage::kHeld) {
                watched_.erase(id);
            } else if (grant.stage != Stage::kLeaving) {
                give_up(grant);  // the client gives it up
            }
        }
    }

    // An allocation that the client has or was offered.
    Grant *grant_of(const Peer &peer, std::uint64_t id) {
        Grant *grant = ledger_.grant(id);
        Lease *lease = lease_of(peer);
        bool its_own = grant != nullptr && lease != nullptr && grant->lease == lease->id &&
                       (grant->stage == Stage::kOffered || grant->stage == Stage::kHeld);
        return its_own ? grant : nullptr;
    }

    void expire(const Lease &away) {
        loop_.after(kAway, [this, id = away.id, departures = away.departures] {
            Lease *lease = ledger_.lease(id);
            if (lease == nullptr || lease->connection != 0 || lease->departures != departures) return;
            for (std::uint64_t grant : std::set<std::uint64_t>(lease->grants)) give_up(*ledger_.grant(grant));
        });
    }

    // ---- reclaiming ----

    void give_up_all_of(const Process &process) {
        std::uint64_t bytes = 0;
        std::vector<std::uint64_t> ids;
        for (const auto &[id, lease] : ledger_.leases()) {
            if (lease.process->key() != process.key()) continue;
            bytes += lease.account.bytes;
            ids.insert(ids.end(), lease.grants.begin(), lease.grants.end());
        }
        if (ids.empty()) return;
        log_.often(Often::kReturn, "%s has ended: %s in %zu allocations are reclaimed", process.name().c_str(),
                   amount(bytes).c_str(), ids.size());
        for (std::uint64_t id : ids) give_up(*ledger_.grant(id));
    }

    // Its client has given it up or ended. `asked_by`: a connection to answer once the bank has checked.
    void give_up(Grant &grant, std::uint64_t asked_by = 0) {
        grant.stage = Stage::kLeaving;
        watch(grant, asked_by);
    }

    // Checks now, and periodically, whether it is unused.
    void watch(const Grant &grant, std::uint64_t asked_by = 0) {
        watched_.insert(grant.id);
        look(grant, asked_by);
        pause_ = kFirstLook;
        if (!looking_) look_later();
    }

    void look(const Grant &grant, std::uint64_t asked_by) {
        bool given_up = grant.stage == Stage::kLeaving;
        banks_[grant.bank]->post([id = grant.id, given_up](Bank &bank) { return bank.settle(id, given_up); },
                                 [this, id = grant.id, asked_by](bool back) {
                                     if (back && watched_.count(id) != 0) remove(id);
                                     if (asked_by != 0) connections_->answer(asked_by, Answer{});
                                 });
    }

    void look_later() {
        looking_ = true;
        loop_.after(pause_, [this] {
            looking_ = false;
            pause_ = std::min(pause_ * 2, kLastLook);
            for (std::uint64_t id : watched_) {
                Grant *grant = ledger_.grant(id);
                bool made = grant != nullptr && grant->stage != Stage::kMaking;
                if (made && (bank(grant->bank).kind() == MemoryKind::kHostFile || grant->stage == Stage::kLeaving)) {
                    look(*grant, 0);
                }
            }
            if (!watched_.empty()) look_later();
        });
    }

    void remove(std::uint64_t id) {
        watched_.erase(id);
        journal_.remove(id);
        ledger_.remove(id);
    }

    // ---- earlier services ----

    void restore() {
        std::vector<std::uint64_t> lost;
        std::uint64_t bytes = 0;
        for (const auto &[id, record] : journal_.records()) {
            std::optional<std::size_t> index = bank_of(record);
            std::shared_ptr<Process> process = index ? Process::of_key(record.pid, record.key) : nullptr;
            if (process == nullptr) {
                lost.push_back(id);
                continue;
            }
            Lease *lease = ledger_.lease(record.lease);
            if (lease == nullptr) {
                lease = &ledger_.open(processes_.shared(process), record.lease);
                if (process->fd() < 0) expire(*lease);
            }
            ledger_.add(*lease, *index, record.size, id).stage = Stage::kHeld;
            bytes += record.size;
        }
        for (std::uint64_t id : lost) journal_.remove(id);
        if (bytes != 0) {
            log_.line("%s are still held by %zu clients of the previous service", amount(bytes).c_str(),
                      ledger_.leases().size());
        }
    }

    // The bank of a record; none if this service does not have its memory.
    std::optional<std::size_t> bank_of(const Record &record) const {
        if (record.bank < banks_.size() && label(record.bank) == record.label) return record.bank;
        for (std::size_t i = 0; i < banks_.size(); ++i) {
            if (label(i) == record.label) return i;
        }
        return std::nullopt;
    }

    Loop &loop_;
    Log &log_;
    Processes &processes_;
    Journal &journal_;
    const Rules rules_;
    Connections *connections_ = nullptr;
    Mailbox mailbox_;
    Ledger ledger_;
    std::vector<Counts> counts_;
    std::vector<std::uint64_t> set_aside_;
    std::size_t most_grants_ = kMaxGrants;
    std::unordered_map<std::uint64_t, std::uint64_t> leases_;  // by the connection's number
    std::set<std::uint64_t> watched_;                          // grants to check
    std::chrono::milliseconds pause_{kFirstLook};
    bool looking_ = false;
    std::vector<std::unique_ptr<BankThread>> banks_;  // ends first: its threads use the mailbox
};

}  // namespace mtier

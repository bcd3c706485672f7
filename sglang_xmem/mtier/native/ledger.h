// Accounts of banks and clients. Independent of memory and connections.
#pragma once

#include <sys/random.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "process.h"

namespace mtier {

enum class Stage {
    kMaking,   // the bank is allocating it
    kOffered,  // sent; the client has not confirmed it
    kHeld,     // the client has it
    kLeaving,  // given up, and counted until it is unused
};

struct Grant {
    std::uint64_t id;
    std::uint64_t lease;
    std::size_t bank;
    std::uint64_t size;
    Stage stage = Stage::kMaking;
};

struct Account {
    std::uint64_t bytes = 0;
    std::size_t grants = 0;
};

// One client's grants, over all its successive connections.
struct Lease {
    std::uint64_t id;
    std::shared_ptr<Process> process;
    std::uint64_t connection = 0;  // its number; 0 without one
    Account account;
    std::set<std::uint64_t> grants;
    std::uint64_t departures = 0;  // number of its ended connections
};

class Ledger {
  public:
    explicit Ledger(std::size_t banks) : banks_(banks) {}

    // `id`: the lease's id in an earlier service; 0 for a new one, with an unguessable id.
    Lease &open(std::shared_ptr<Process> process, std::uint64_t id = 0) {
        while (id == 0 || leases_.count(id) != 0) {
            if (::getrandom(&id, sizeof(id), 0) != sizeof(id)) id = leases_.size() + 1;
        }
        return leases_.emplace(id, Lease{id, std::move(process), 0, {}, {}, 0}).first->second;
    }

    Lease *lease(std::uint64_t id) {
        auto found = leases_.find(id);
        return found == leases_.end() ? nullptr : &found->second;
    }

    Grant *grant(std::uint64_t id) {
        auto found = grants_.find(id);
        return found == grants_.end() ? nullptr : &found->second;
    }

    // `id`: the grant's id in an earlier service; 0 for a new one.
    Grant &add(Lease &lease, std::size_t bank, std::uint64_t size, std::uint64_t id = 0) {
        id = id == 0 ? last_ + 1 : id;
        last_ = std::max(last_, id);
        Grant &grant = grants_.emplace(id, Grant{id, lease.id, bank, size}).first->second;
        lease.grants.insert(id);
        count(lease, grant, +1);
        return grant;
    }

    void remove(std::uint64_t id) {
        auto found = grants_.find(id);
        if (found == grants_.end()) return;
        Lease &lease = leases_.at(found->second.lease);
        count(lease, found->second, -1);
        lease.grants.erase(id);
        grants_.erase(found);
        drop_if_empty(lease.id);
    }

    // Drops a client without memory and without a connection.
    void drop_if_empty(std::uint64_t lease) {
        auto found = leases_.find(lease);
        if (found == leases_.end()) return;
        if (found->second.grants.empty() && found->second.connection == 0) leases_.erase(found);
    }

    const Account &of_bank(std::size_t bank) const { return banks_[bank]; }
    Account of_process(const Process &process) const {
        auto found = processes_.find(process.key());
        return found == processes_.end() ? Account{} : found->second;
    }
    std::size_t grants() const { return grants_.size(); }
    const std::unordered_map<std::uint64_t, Lease> &leases() const { return leases_; }

  private:
    void count(Lease &lease, const Grant &grant, int sign) {
        Account &process = processes_[lease.process->key()];
        for (Account *each : {&banks_[grant.bank], &lease.account, &process}) {
            each->bytes += static_cast<std::uint64_t>(sign) * grant.size;
            each->grants += static_cast<std::size_t>(sign);
        }
        if (process.grants == 0) processes_.erase(lease.process->key());
    }

    std::vector<Account> banks_;
    std::unordered_map<std::uint64_t, Lease> leases_;
    std::unordered_map<std::uint64_t, Grant> grants_;
    std::unordered_map<std::string, Account> processes_;
    std::uint64_t last_ = 0;
};

}  // namespace mtier

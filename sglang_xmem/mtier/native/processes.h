// The processes that hold memory or are connected: one object each, with a notification of their end.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "loop.h"
#include "process.h"

namespace mtier {

class Processes {
  public:
    explicit Processes(Loop &loop) : loop_(loop) {}

    // Calls `action` when a process with a live shared() object has ended.
    void when_gone(std::function<void(const Process &)> action) { actions_.push_back(std::move(action)); }

    // The shared object of the process.
    std::shared_ptr<Process> shared(const std::shared_ptr<Process> &process) {
        std::weak_ptr<Process> &known = known_[process->key()];
        if (std::shared_ptr<Process> found = known.lock()) {
            if (found->fd() >= 0 || process->fd() < 0) return found;
            found->know(*process);
            watch(*found);
            return found;
        }
        std::shared_ptr<Process> mine(process.get(), [this, process](Process *) {
            if (process->fd() >= 0) loop_.forget(process->fd());
            known_.erase(process->key());
        });
        known = mine;
        if (process->fd() >= 0) watch(*process);
        return mine;
    }

  private:
    void watch(const Process &process) {
        loop_.watch(process.fd(), POLLIN, [this, key = process.key()](short) { ended(key); });
    }

    void ended(const std::string &key) {
        std::shared_ptr<Process> process = known_[key].lock();
        if (process == nullptr) return;
        loop_.forget(process->fd());
        for (const auto &action : actions_) action(*process);
    }

    Loop &loop_;
    std::unordered_map<std::string, std::weak_ptr<Process>> known_;
    std::vector<std::function<void(const Process &)>> actions_;
};

}  // namespace mtier

// The service's main loop: actions for ready file descriptors and for timers. One thread; an action may watch and
// forget descriptors, including its own.
#pragma once

#include <poll.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace mtier {

class Loop {
  public:
    using Action = std::function<void(short events)>;
    using Clock = std::chrono::steady_clock;

    // Calls `action` while `fd` has one of `events`, or has ended. Without events it is ignored until change().
    void watch(int fd, short events, Action action) {
        watches_[fd] = {events, std::make_shared<Action>(std::move(action)), ++last_};
    }
    void change(int fd, short events) { watches_.at(fd).events = events; }
    void forget(int fd) { watches_.erase(fd); }

    void after(std::chrono::milliseconds delay, std::function<void()> action) {
        timers_.emplace(Clock::now() + delay, std::move(action));
    }

    void stop() { running_ = false; }

    void run() {
        std::vector<pollfd> entries;
        std::vector<std::uint64_t> serials;
        while (running_) {
            entries.clear();
            serials.clear();
            for (const auto &[fd, watch] : watches_) {
                if (watch.events == 0) continue;
                entries.push_back({fd, watch.events, 0});
                serials.push_back(watch.serial);
            }
            if (::poll(entries.data(), entries.size(), until_next_ms()) < 0) continue;
            for (std::size_t i = 0; i < entries.size(); ++i) {
                if (entries[i].revents == 0) continue;
                auto found = watches_.find(entries[i].fd);
                // An earlier action may have closed the descriptor, and another may have its number now.
                if (found == watches_.end() || found->second.serial != serials[i]) continue;
                auto action = found->second.action;
                (*action)(entries[i].revents);
            }
            while (!timers_.empty() && timers_.begin()->first <= Clock::now()) {
                auto action = std::move(timers_.begin()->second);
                timers_.erase(timers_.begin());
                action();
            }
        }
    }

  private:
    struct Watch {
        short events;
        std::shared_ptr<Action> action;  // kept while it runs
        std::uint64_t serial;
    };

    int until_next_ms() const {
        if (timers_.empty()) return -1;
        auto left = std::chrono::ceil<std::chrono::milliseconds>(timers_.begin()->first - Clock::now()).count();
        return static_cast<int>(std::clamp<std::int64_t>(left, 0, 60'000));
    }

    std::unordered_map<int, Watch> watches_;
    std::multimap<Clock::time_point, std::function<void()>> timers_;
    std::uint64_t last_ = 0;
    bool running_ = true;
};

}  // namespace mtier

// The service's log: the latest lines for mTierGetLogs, and all lines on stderr. Contains numbers and the service's own
// text, never a client's. Only for the main thread.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <ctime>
#include <deque>
#include <string>

#include "protocol.h"
#include "text.h"

namespace mtier {

// Events that a client can cause arbitrarily often, and so could flood the log.
enum class Often : std::size_t { kGrant, kReturn, kRefusedConnection, kRefusedGrant, kMistake, kFault, kCount };

class Log {
  public:
    __attribute__((format(printf, 2, 3))) void line(const char *format, ...) {
        va_list arguments;
        va_start(arguments, format);
        write(format, arguments);
        va_end(arguments);
    }

    // As line(), but limited per kind to kBurst at once and kPerSecond on average; the next written line of the kind
    // reports the number of dropped ones.
    __attribute__((format(printf, 3, 4))) void often(Often kind, const char *format, ...) {
        Budget &budget = budgets_[static_cast<std::size_t>(kind)];
        auto now = Clock::now();
        double grown = std::chrono::duration<double>(now - budget.at).count() * kPerSecond;
        budget.left = std::min(kBurst, budget.left + grown);
        budget.at = now;
        if (budget.left < 1) {
            ++budget.left_out;
            return;
        }
        budget.left -= 1;
        if (budget.left_out != 0) line("%" PRIu64 " lines like the next one were dropped", budget.left_out);
        budget.left_out = 0;
        va_list arguments;
        va_start(arguments, format);
        write(format, arguments);
        va_end(arguments);
    }

    // The newest complete lines that fit into `bytes`.
    std::string tail(std::uint64_t bytes) const {
        std::size_t total = 0;
        auto first = lines_.end();
        while (first != lines_.begin() && total + std::prev(first)->size() <= bytes) total += (--first)->size();
        std::string text;
        for (; first != lines_.end(); ++first) text += *first;
        return text;
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr double kBurst = 50;
    static constexpr double kPerSecond = 1;
    struct Budget {
        double left = kBurst;
        Clock::time_point at = Clock::now();
        std::uint64_t left_out = 0;
    };

    void write(const char *format, va_list arguments) {
        char words[512];
        std::vsnprintf(words, sizeof(words), format, arguments);
        char when[32];
        std::time_t now = std::time(nullptr);
        std::tm parts{};
        gmtime_r(&now, &parts);
        std::strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ ", &parts);
        lines_.push_back(when + std::string(words) + "\n");
        bytes_ += lines_.back().size();
        while (bytes_ > kMaxTextBytes) {
            bytes_ -= lines_.front().size();
            lines_.pop_front();
        }
        // A stopped terminal or a full pipe must not block the thread that serves all clients.
        pollfd out{STDERR_FILENO, POLLOUT, 0};
        if (::poll(&out, 1, 0) == 1 && (out.revents & POLLOUT) != 0) std::fputs(lines_.back().c_str(), stderr);
    }

    std::deque<std::string> lines_;
    std::size_t bytes_ = 0;
    std::array<Budget, static_cast<std::size_t>(Often::kCount)> budgets_;
};

}  // namespace mtier

// A bank's own thread: a driver call may take seconds, and no other thread waits for it.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "bank.h"
#include "loop.h"
#include "text.h"

namespace mtier {

// Actions of other threads for the main one.
class Mailbox {
  public:
    explicit Mailbox(Loop &loop) : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
        if (fd_ < 0) throw std::runtime_error("an eventfd cannot be created: " + words_of(errno));
        loop.watch(fd_, POLLIN, [this](short) { deliver(); });
    }
    Mailbox(const Mailbox &) = delete;
    Mailbox &operator=(const Mailbox &) = delete;
    ~Mailbox() { ::close(fd_); }

    void post(std::function<void()> action) {
        std::lock_guard<std::mutex> guard(mutex_);
        actions_.push_back(std::move(action));
        std::uint64_t one = 1;
        if (::write(fd_, &one, sizeof(one)) < 0) return;  // full, so it is readable already
    }

  private:
    void deliver() {
        std::uint64_t count = 0;
        std::vector<std::function<void()>> actions;
        {
            std::lock_guard<std::mutex> guard(mutex_);
            if (::read(fd_, &count, sizeof(count)) < 0) return;
            actions.swap(actions_);
        }
        for (const auto &action : actions) action();
    }

    const int fd_;
    std::mutex mutex_;
    std::vector<std::function<void()>> actions_;
};

class BankThread {
  public:
    BankThread(std::unique_ptr<Bank> bank, Mailbox &mailbox)
        : bank_(std::move(bank)), mailbox_(mailbox), thread_([this] { run(); }) {}
    BankThread(const BankThread &) = delete;
    BankThread &operator=(const BankThread &) = delete;
    ~BankThread() {
        {
            std::lock_guard<std::mutex> guard(mutex_);
            stopping_ = true;
        }
        changed_.notify_one();
        thread_.join();
    }

    // For its constant members.
    const Bank &bank() const { return *bank_; }

    // Calls `work` with the bank, after all earlier posts, and then `done` with its result on the main thread.
    template <typename Work, typename Done>
    void post(Work work, Done done) {
        {
            std::lock_guard<std::mutex> guard(mutex_);
            jobs_.push_back([this, work = std::move(work), done = std::move(done)]() mutable {
                auto result = work(*bank_);
                mailbox_.post([done = std::move(done), result = std::move(result)]() mutable { done(result); });
            });
        }
        changed_.notify_one();
    }

    // How long the current job has been running.
    std::chrono::milliseconds busy() const {
        std::int64_t since = busy_since_.load();
        return std::chrono::milliseconds(since == 0 ? 0 : now_ms() - since);
    }

    // Whether all jobs end within the given time.
    bool idle_within(std::chrono::milliseconds time) {
        std::unique_lock<std::mutex> guard(mutex_);
        return finished_.wait_for(guard, time, [this] { return jobs_.empty() && busy_since_ == 0; });
    }

  private:
    static std::int64_t now_ms() {
        auto now = std::chrono::steady_clock::now().time_since_epoch();
        return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
    }

    void run() {
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            auto wanted = [this] { return stopping_ || !jobs_.empty(); };
            int rest_ms = bank_->rest_in_ms();
            if (rest_ms < 0) {
                changed_.wait(guard, wanted);
            } else {
                changed_.wait_for(guard, std::chrono::milliseconds(rest_ms), wanted);
            }
            if (jobs_.empty()) {
                if (stopping_) return;
                bank_->rest_if_due();
                continue;
            }
            auto job = std::move(jobs_.front());
            jobs_.pop_front();
            busy_since_ = now_ms();
            guard.unlock();
            job();
            guard.lock();
            busy_since_ = 0;
            finished_.notify_all();
        }
    }

    const std::unique_ptr<Bank> bank_;
    Mailbox &mailbox_;
    std::mutex mutex_;
    std::condition_variable changed_, finished_;
    std::deque<std::function<void()>> jobs_;
    std::atomic<std::int64_t> busy_since_{0};
    bool stopping_ = false;
    std::thread thread_;
};

}  // namespace mtier

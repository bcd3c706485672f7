// pages.h against a plain model: pages_model OPERATIONS SEED, and with threads: pages_model threads SECONDS SEED.
//
// Ends with status 1 at the first difference. What a frame holds is kept next to the ledger, in plain memory, so that
// ThreadSanitizer sees a write that races with a reader who has the frame pinned.

#include "../../sglang_xmem/mtier/native/pages.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>

using namespace mtier::pages;

namespace {

constexpr std::uint64_t kFrames = 320;
constexpr int kClients = kSessions;
constexpr std::uint64_t kQuota = kFrames / kClients;  // pages of a client; together no more than there are frames
constexpr int kKeys = 500;

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            std::fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #condition);     \
            std::exit(1);                                                                  \
        }                                                                                  \
    } while (false)

Key key_of(int number) {
    Key key{};
    std::uint64_t mixed = (static_cast<std::uint64_t>(number) + 1) * 0x9E3779B97F4A7C15ULL;
    std::memcpy(key.bytes.data(), &mixed, sizeof(mixed));
    std::memcpy(key.bytes.data() + 24, &number, sizeof(number));
    return key;
}

struct Memory {
    std::vector<Frame> bytes = std::vector<Frame>(kFrames + 1);  // aligned as frames are
    Ledger ledger{bytes.data(), kFrames};
    Memory() { ledger.begin(); }
};

// ---- one thread: every step is compared ----

struct Page {
    std::uint64_t frame;
    int key;  // -1: not published
};

struct Model {
    std::map<int, std::uint64_t> where;                 // key -> frame, until the frame is evicted
    std::map<std::uint64_t, std::multiset<int>> holds;  // frame -> clients that hold it, once per page
};

void run_model(std::uint64_t operations, std::uint32_t seed) {
    std::mt19937 random(seed);
    auto below = [&random](std::uint64_t n) { return random() % n; };
    Memory memory;
    Ledger &ledger = memory.ledger;
    Index index(kFrames);
    Model model;
    std::vector<std::unique_ptr<Holding>> clients;
    std::vector<std::vector<Page>> pages(kClients);
    for (int c = 0; c < kClients; ++c) clients.push_back(std::make_unique<Holding>(ledger, c));
    std::uint64_t published = 0, adopted = 0, evicted = 0, kills = 0, restarts = 0;

    auto gone = [&](std::uint64_t frame) {  // the frame has another owner: its contents are lost
        CHECK(model.holds[frame].empty());
        for (auto it = model.where.begin(); it != model.where.end(); ++it) {
            if (it->second != frame) continue;
            model.where.erase(it);
            ++evicted;
            return;
        }
    };
    auto let_go = [&](int c, std::size_t at) {
        Page page = pages[c][at];
        pages[c].erase(pages[c].begin() + static_cast<std::ptrdiff_t>(at));
        model.holds[page.frame].erase(model.holds[page.frame].find(c));
        return page.frame;
    };
    for (std::uint64_t n = 0; n < operations; ++n) {
        int c = static_cast<int>(below(kClients));
        switch (below(16)) {
            case 0: case 1: case 2: case 3: {  // store pages
                std::uint64_t left = kQuota - pages[c].size();
                if (left == 0) break;
                std::vector<std::uint64_t> frames(1 + below(left));
                CHECK(clients[c]->claim(frames.size(), frames.data()));
                for (std::uint64_t frame : frames) {
                    gone(frame);
                    CHECK(ledger.state(frame).phase == Phase::kOwned && ledger.state(frame).session == c);
                    model.holds[frame].insert(c);
                    pages[c].push_back({frame, -1});
                }
                break;
            }
            case 4: case 5: case 6: case 7: {  // publish one
                if (pages[c].empty()) break;
                Page &page = pages[c][below(pages[c].size())];
                int key = static_cast<int>(below(kKeys));
                bool mine = page.key < 0 && ledger.state(page.frame).phase == Phase::kOwned;
                std::uint64_t generation = clients[c]->generation(page.frame) + (below(20) == 0 ? 1 : 0);
                if (below(20) == 0) generation += kGenerations;  // the same word
                bool right = generation == clients[c]->generation(page.frame);
                Verdict verdict = index.publish(&ledger, c, key_of(key), {page.frame, generation});
                if (model.where.count(key) != 0) {
                    CHECK(verdict == Verdict::kHave);
                } else if (!mine || !right) {
                    CHECK(verdict == Verdict::kStale);
                } else {
                    CHECK(verdict == Verdict::kNew);
                    model.where[key] = page.frame;
                    page.key = key;
                    ++published;
                }
                break;
            }
            case 8: case 9: case 10: case 11: {  // look up, and adopt
                int key = static_cast<int>(below(kKeys));
                std::optional<Place> place = index.find(ledger, key_of(key));
                CHECK(place.has_value() == (model.where.count(key) != 0));
                if (!place) break;
                CHECK(place->frame == model.where[key]);
                CHECK(!clients[c]->adopt(place->frame, place->generation + 1, key_of(key)));
                CHECK(!clients[c]->adopt(place->frame, place->generation, key_of(key + 1)));
                for (std::uint64_t none : {kFrames, UINT64_MAX}) {
                    CHECK(!clients[c]->adopt(none, place->generation, key_of(key)));
                    CHECK(!clients[c]->owns(none) && clients[c]->generation(none) == 0);
                    clients[c]->touch(1, &none);
                    clients[c]->release(1, &none);
                    CHECK(index.publish(&ledger, c, key_of(key + kKeys), {none, 0}) == Verdict::kStale);
                    CHECK(!index.forget(&ledger, {none, 0}));
                }
                if (pages[c].size() == kQuota) break;
                CHECK(clients[c]->adopt(place->frame, place->generation, key_of(key)));
                model.holds[place->frame].insert(c);
                pages[c].push_back({place->frame, key});
                ++adopted;
                break;
            }
            case 12: case 13: {  // free one page
                if (pages[c].empty()) break;
                std::uint64_t frame = let_go(c, below(pages[c].size()));
                clients[c]->release(1, &frame);
                break;
            }
            case 14: {  // free all, as a flush does
                if (below(8) != 0) break;
                std::vector<std::uint64_t> frames;
                while (!pages[c].empty()) frames.push_back(let_go(c, pages[c].size() - 1));
                clients[c]->release(frames.size(), frames.data());
                CHECK(clients[c]->count() == 0);
                break;
            }
            case 15: {  // a kill, now and then in the middle of taking a frame; once in a while a flush of the service
                if (below(4) != 0) break;
                if (below(50) == 0) {
                    index.forget(&ledger);
                    model.where.clear();
                    break;
                }
                if (below(10) == 0) {  // the service restarts; a key was damaged
                    std::uint64_t damaged = below(kFrames);
                    Key was = memory.bytes[damaged + 1].key;
                    memory.bytes[damaged + 1].key.bytes[below(32)] ^= 1;
                    index = Index(kFrames);
                    index.restore(ledger);
                    std::size_t lost = 0;
                    for (const auto &[key, frame] : model.where) {
                        bool found = index.find(ledger, key_of(key)).has_value();
                        CHECK(found == (frame != damaged));
                        lost += found ? 0 : 1;
                    }
                    CHECK(index.size() == model.where.size() - lost);
                    memory.bytes[damaged + 1].key = was;
                    index = Index(kFrames);
                    index.restore(ledger);
                    ++restarts;
                    break;
                }
                std::uint64_t half = kFrames;
                std::uint64_t f = below(kFrames);
                for (std::uint64_t i = 0; i < kFrames && half == kFrames; ++i, f = (f + 1) % kFrames) {
                    if (ledger.begin_evict(c, f)) half = f;
                }
                if (half < kFrames && below(2) == 0) {
                    // Another one has pinned the frame and seen it valid, just before it was marked.
                    std::uint64_t other = 1ULL << ((c + 1) % kClients);
                    memory.bytes[half + 1].pins.fetch_or(other);
                    CHECK(!ledger.finish_evict(c, half));
                    CHECK(ledger.state(half).phase == Phase::kValid);
                    memory.bytes[half + 1].pins.fetch_and(~other);
                    CHECK(ledger.begin_evict(c, half));
                }
                while (!pages[c].empty()) let_go(c, pages[c].size() - 1);
                if (half < kFrames) CHECK(ledger.state(half).phase == Phase::kEvicting);
                ledger.fence(c);
                if (half < kFrames) CHECK(ledger.state(half).phase == Phase::kValid);
                clients[c] = std::make_unique<Holding>(ledger, c);
                ++kills;
                break;
            }
        }
        if (n % 1000 != 0) continue;
        for (std::uint64_t frame = 0; frame < kFrames; ++frame) {
            std::uint64_t expected = 0;
            for (int holder : model.holds[frame]) expected |= 1ULL << holder;
            CHECK(ledger.pins(frame) == expected);
            Phase phase = ledger.state(frame).phase;
            CHECK(expected != 0 || phase == Phase::kFree || phase == Phase::kValid);
            CHECK(phase != Phase::kEvicting);
        }
    }
    CHECK(operations < 100000 || (published > 1000 && adopted > 1000 && evicted > 1000 && kills > 100 && restarts > 10));
    std::printf("restarts %llu published %llu adopted %llu evicted %llu kills %llu\n",
                static_cast<unsigned long long>(restarts), static_cast<unsigned long long>(published),
                static_cast<unsigned long long>(adopted), static_cast<unsigned long long>(evicted),
                static_cast<unsigned long long>(kills));
}

// ---- many threads: what is pinned stays what it is ----

void run_threads(int seconds, std::uint32_t seed) {
    Memory memory;
    Index index(kFrames);
    std::mutex service;                               // one thread serves
    std::vector<int> content(kFrames, -1);            // plain memory, as frames are
    std::atomic<bool> stop{false};
    std::atomic<std::uint64_t> adopted{0}, kills{0};
    auto client = [&](int c) {
        std::mt19937 random(seed * 1000 + static_cast<std::uint32_t>(c));
        auto below = [&random](std::uint64_t n) { return random() % n; };
        auto holding = std::make_unique<Holding>(memory.ledger, c);
        std::vector<Page> pages;
        while (!stop) {
            std::uint64_t choice = below(8);
            if (choice < 3 && pages.size() < kQuota) {
                std::uint64_t frame = 0;
                CHECK(holding->claim(1, &frame));
                int key = static_cast<int>(below(kKeys));
                content[frame] = key;
                pages.push_back({frame, key});
                std::lock_guard<std::mutex> turn(service);
                index.publish(&memory.ledger, c, key_of(key), {frame, holding->generation(frame)});
            } else if (choice < 6 && pages.size() < kQuota) {
                int key = static_cast<int>(below(kKeys));
                std::optional<Place> place;
                {
                    std::lock_guard<std::mutex> turn(service);
                    place = index.find(memory.ledger, key_of(key));
                }
                if (place && holding->adopt(place->frame, place->generation, key_of(key))) {
                    pages.push_back({place->frame, key});
                    adopted.fetch_add(1);
                }
            } else if (choice == 6 && !pages.empty()) {
                std::uint64_t frame = pages.back().frame;
                pages.pop_back();
                holding->release(1, &frame);
            } else if (below(200) == 0) {
                std::lock_guard<std::mutex> turn(service);
                memory.ledger.fence(c);
                holding = std::make_unique<Holding>(memory.ledger, c);
                pages.clear();
                kills.fetch_add(1);
            }
            for (const Page &page : pages) CHECK(content[page.frame] == page.key);
        }
    };
    std::vector<std::thread> threads;
    for (int c = 0; c < kClients; ++c) threads.emplace_back(client, c);
    std::this_thread::sleep_for(std::chrono::seconds(seconds));
    stop = true;
    for (std::thread &thread : threads) thread.join();
    CHECK(adopted > 100 && kills > 10);
    std::printf("adopted %llu kills %llu\n", static_cast<unsigned long long>(adopted.load()),
                static_cast<unsigned long long>(kills.load()));
}

}  // namespace

int main(int argc, char **argv) {
    if (argc == 4 && std::string(argv[1]) == "threads") {
        run_threads(std::atoi(argv[2]), static_cast<std::uint32_t>(std::atoi(argv[3])));
        return 0;
    }
    if (argc != 3) return 2;
    run_model(std::strtoull(argv[1], nullptr, 10), static_cast<std::uint32_t>(std::atoi(argv[2])));
    return 0;
}

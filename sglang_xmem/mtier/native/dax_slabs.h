// Slabs of the page bank on a devdax that the service owns. Record, ledger and frames of a slab are adjacent on it, so
// pages survive engines, the service and its keeper, until the machine reboots.
//
// A slab's contents never reach another space's engines: its bytes are zeroed before reuse.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dax.h"
#include "slabs.h"

namespace mtier::pages {

class DaxSlabs : public SlabSource {
  public:
    // The keeper's name of a device's descriptor.
    static std::string kept_name(const std::string &path) { return "dax " + path; }

    DaxSlabs(std::unique_ptr<DaxDevice> device, Kept &kept) : device_(std::move(device)), kept_(kept) {
        // A restarted service without the descriptor must not trust the old state.
        if (kept_.restarts() > 0 && !device_->is_kept()) device_->write({});
        kept_.leave(kept_name(device_->path()), device_->fd());
    }

    MemoryKind kind() const override { return MemoryKind::kDevice; }
    std::string name() const override { return "dax:" + device_->path(); }
    std::uint64_t total() const override { return device_->range() - granularity(); }
    std::uint64_t granularity() const override { return device_->granule(); }
    std::uint64_t mapping_granule() const override { return device_->granule(); }

    // Of a single slab.
    std::uint64_t available(std::uint64_t frame_bytes) const override {
        std::uint64_t most = 0;
        for (const auto &[offset, bytes] : gaps()) most = std::max(most, bytes);
        std::uint64_t control = whole(control_bytes(most / frame_bytes));
        return most - std::min(most, control);
    }

    std::shared_ptr<Slab> make(std::uint64_t bytes, std::uint64_t control) override {
        auto slab = std::make_shared<Slab>();
        slab->id = random_number();
        control = whole(control);
        for (const auto &[offset, free] : gaps()) {
            if (free < control + bytes) continue;
            place(*slab, {slab->id, offset, control, bytes});
            clearing_[slab->id] = std::make_unique<Clearing>(*device_, extents_[slab->id].all());
            return slab;
        }
        slab->state = Slab::State::kFailed;
        slab->why = "the free bytes of " + device_->path() + " are fragmented";
        return slab;
    }

    void advance(Slab &slab) override {
        auto found = clearing_.find(slab.id);
        if (slab.state != Slab::State::kMaking || found == clearing_.end() || !found->second->ended()) return;
        slab.why = found->second->why();
        Avoided avoided{found->second->where(), found->second->is_broken()};
        clearing_.erase(found);
        DaxExtent extent = extents_[slab.id];
        if (!slab.why.empty()) {
            avoided_.push_back(avoided);
        } else if (take(slab, device_->share(extent.all(), &slab.why))) {
            slab.state = Slab::State::kReady;
            if (write()) return;
            slab.why = device_->path() + " has the maximum number of slabs";
        }
        slab.state = Slab::State::kFailed;
        discard(slab);
    }

    std::vector<std::shared_ptr<Slab>> left() override {
        std::vector<std::shared_ptr<Slab>> slabs;
        for (const DaxExtent &extent : device_->left()) {
            auto slab = std::make_shared<Slab>();
            slab->id = extent.id;
            bool is_free = std::all_of(extents_.begin(), extents_.end(), [&](const auto &other) {
                return other.second.offset >= extent.end() || other.second.end() <= extent.offset;
            });
            if (!is_free || extents_.count(slab->id) != 0) continue;
            place(*slab, extent);
            Descriptor fd = kept_.take(kept_name(slab->id));
            slab->deserted = fd.get() < 0 && !device_->shared(extent.all());
            if (fd.get() < 0) fd = device_->share(extent.all(), &slab->why);
            std::optional<SpaceHead> head;
            if (take(*slab, std::move(fd)) && is_present(slab->control)) head = read_head(slab->control);
            if (!head || head->epoch != slab->id || head->slab_bytes != extent.memory) {
                forget(*slab);
                continue;
            }
            slab->state = Slab::State::kReady;
            slabs.push_back(std::move(slab));
        }
        write();
        return slabs;
    }

    void discard(Slab &slab) override {
        forget(slab);
        write();
    }

  private:
    // Bytes that could not be cleared: excluded permanently, or while another process uses them.
    struct Avoided {
        DaxBytes bytes;
        bool is_broken;
    };

    static std::string kept_name(std::uint64_t id) { return "dax-slab " + std::to_string(id); }

    std::uint64_t whole(std::uint64_t bytes) const {
        return (bytes + granularity() - 1) / granularity() * granularity();
    }

    // Allocates the slab's range.
    void place(Slab &slab, const DaxExtent &extent) {
        extents_[extent.id] = extent;
        slab.control.granule = slab.memory.granule = granularity();
        slab.control.offset = extent.offset;
        slab.control.bytes = extent.control;
        slab.memory.offset = extent.offset + extent.control;
        slab.memory.bytes = extent.memory;
    }

    bool take(Slab &slab, Descriptor fd) {
        slab.control.fd = Descriptor(fd.get() >= 0 ? fd.duplicate() : -1);
        slab.memory.fd = std::move(fd);
        if (slab.control.fd.get() < 0) return false;
        if (!kept_.leave(kept_name(slab.id), slab.memory.fd.get())) {
            std::fprintf(stderr, "mtierd: the next service reopens a slab of %s.\n", device_->path().c_str());
        }
        return true;
    }

    // The locks of engines that still map it remain, and delay its clearing.
    void forget(Slab &slab) {
        clearing_.erase(slab.id);
        extents_.erase(slab.id);
        slab.control.fd = Descriptor();
        slab.memory.fd = Descriptor();
        kept_.remove(kept_name(slab.id));
    }

    bool write() {
        std::vector<DaxExtent> ready;
        for (const auto &[id, extent] : extents_) {
            if (clearing_.count(id) == 0) ready.push_back(extent);
        }
        return device_->write(ready);
    }

    static bool is_present(const Part &part) {
        void *memory = part.map(part.bytes);
        if (memory == MAP_FAILED) return false;
        bool is = DaxDevice::is_present(memory, part.bytes);
        ::munmap(memory, part.bytes);
        return is;
    }

    // (offset, bytes) of each free range.
    std::vector<std::pair<std::uint64_t, std::uint64_t>> gaps() const {
        std::map<std::uint64_t, std::uint64_t> used;  // offset -> end
        for (const auto &[id, extent] : extents_) used[extent.offset] = extent.end();
        for (const auto &[bytes, is_broken] : avoided_) {
            if (!is_broken && !device_->shared(bytes)) continue;
            std::uint64_t &end = used[bytes.offset];
            end = std::max(end, bytes.offset + bytes.bytes);
        }
        std::vector<std::pair<std::uint64_t, std::uint64_t>> found;
        std::uint64_t at = granularity();
        for (const auto &[offset, end] : used) {
            if (offset > at) found.emplace_back(at, offset - at);
            at = std::max(at, end);
        }
        if (device_->range() > at) found.emplace_back(at, device_->range() - at);
        return found;
    }

    const std::unique_ptr<DaxDevice> device_;
    Kept &kept_;
    std::map<std::uint64_t, DaxExtent> extents_;  // of slabs, by their ids
    std::vector<Avoided> avoided_;
    std::map<std::uint64_t, std::unique_ptr<Clearing>> clearing_;  // last, so that its threads end first
};

}  // namespace mtier::pages

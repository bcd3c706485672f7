// Slabs of the page bank from the service's banks: one class per kind of memory. A slab is memory for frames, plus
// CPU-addressable memory for its record and ledger (space_record.h).
#pragma once

#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "descriptor.h"
#include "keeper.h"
#include "populate.h"
#include "service.h"
#include "space_record.h"
#include "text.h"

namespace mtier::pages {

// A range of a file or device.
struct Part {
    Descriptor fd;
    std::uint64_t offset = 0;
    std::uint64_t bytes = 0;
    std::uint64_t granule = 4096;  // lengths of mappings are multiples of this

    std::uint64_t mapped(std::uint64_t size) const { return (size + granule - 1) / granule * granule; }
    // Maps the first `size` bytes, for mapped(size) of munmap. MAP_FAILED with errno.
    void *map(std::uint64_t size) const {
        return ::mmap(nullptr, mapped(size), PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), static_cast<off_t>(offset));
    }
    // Makes a descriptor for an engine; -1 with errno.
    int to_send() const { return is_locked ? fd.reopened() : fd.duplicate(); }

    bool is_locked = false;  // the open file, which only the service and its keeper have
};

struct Slab {
    enum class State { kMaking, kReady, kFailed };
    State state = State::kMaking;
    std::string why;  // of a failed one: a clause
    std::uint64_t id = 0;  // unique
    Part memory, control;
    std::shared_ptr<Populating> populating;  // while its memory is being populated
    bool deserted = false;  // no engine has it
};

class SlabSource {
  public:
    virtual ~SlabSource() = default;
    virtual MemoryKind kind() const = 0;
    // Unique for this source in the service, also after a restart.
    virtual std::string name() const = 0;
    virtual std::uint64_t total() const = 0;
    // Maximum bytes of one more slab with frames of that size.
    virtual std::uint64_t available(std::uint64_t frame_bytes) const = 0;
    virtual std::uint64_t granularity() const = 0;
    // Granule of an engine's mappings.
    virtual std::uint64_t mapping_granule() const { return 4096; }
    // Starts to allocate a slab of zeroed memory of whole granules, at most available(), from which it is deducted
    // until it is discarded or has failed.
    virtual std::shared_ptr<Slab> make(std::uint64_t bytes, std::uint64_t control) = 0;
    // Updates a slab's state; called before the state is read.
    virtual void advance(Slab &) {}
    // Returns the slabs of earlier services, each once.
    virtual std::vector<std::shared_ptr<Slab>> left() = 0;
    // Takes over a slab of a service whose keeper has ended too, from an engine's descriptors. nullptr with a clause.
    virtual std::shared_ptr<Slab> take_over(const Descriptor &, const Descriptor &, std::string *why) {
        *why = "a device has nothing of it any more";
        return nullptr;
    }
    // Releases a slab, even if it is mapped.
    virtual void discard(Slab &slab) = 0;
    // Manages memory that is populated ahead of engines; called after changes of grants or slabs, and periodically.
    virtual void tend() {}
    // The population of a slab that no engine has yet. nullptr without one.
    virtual const Populating *ahead() const { return nullptr; }
};

inline std::uint64_t random_number() {
    std::uint64_t number = 0;
    while (number == 0) {
        if (::getrandom(&number, sizeof(number), 0) != sizeof(number)) throw std::bad_alloc();
    }
    return number;
}

// The head of a slab's record; none if it is incomplete, or of another boot.
inline std::optional<SpaceHead> read_head(const Part &control) {
    if (control.bytes < kLedgerOffset) return std::nullopt;
    void *memory = control.map(kLedgerOffset);
    if (memory == MAP_FAILED) return std::nullopt;
    SpaceHead head = static_cast<SpaceRecord *>(memory)->head;
    ::munmap(memory, control.mapped(kLedgerOffset));
    if (!head.is_sound() || control_bytes(head.frames) > control.bytes) return std::nullopt;
    return head;
}

// Slabs of a bank with an account in the service; the keeper has their descriptors.
class SlabsOfBank : public SlabSource {
  public:
    SlabsOfBank(Service &service, std::size_t bank, Kept &kept) : service_(service), bank_(bank), kept_(kept) {}

    MemoryKind kind() const override { return service_.bank(bank_).kind(); }
    std::string name() const override { return std::to_string(bank_) + " " + service_.bank(bank_).label(); }
    std::uint64_t total() const override { return service_.bank(bank_).total(); }
    std::uint64_t available(std::uint64_t) const override { return service_.available(bank_); }
    std::uint64_t granularity() const override { return service_.bank(bank_).granularity(); }

    std::vector<std::shared_ptr<Slab>> left() override {
        std::vector<std::shared_ptr<Slab>> slabs;
        const std::string prefix = "control " + name() + " ";
        for (const std::string &control : kept_.found(prefix)) {
            auto slab = std::make_shared<Slab>();
            slab->id = std::strtoull(control.c_str() + prefix.size(), nullptr, 10);
            slab->control.fd = kept_.take(control);
            slab->memory.fd = kept_.take(kept_name("slab", *slab));
            std::uint64_t id = slab->id;
            if (lock(slab->control) && read(*slab) && slab->id == id) {
                resume(*slab);
                slabs.push_back(std::move(slab));
            } else {
                slab->id = id;
                forget(*slab);
            }
        }
        return slabs;
    }

    std::shared_ptr<Slab> take_over(const Descriptor &memory, const Descriptor &control, std::string *why) override {
        auto slab = std::make_shared<Slab>();
        slab->memory.fd = Descriptor(memory.duplicate());
        slab->control.fd = Descriptor(control.reopened());
        if (!is_sealed(slab->control.fd) || !lock(slab->control)) {
            *why = "another service has it";
        } else if (!read(*slab)) {
            *why = "it is not from a bank like this one, or exceeds its free bytes";
        } else {
            resume(*slab);
            finish(*slab);
            return slab;
        }
        return nullptr;
    }

    void discard(Slab &slab) override {
        forget(slab);
        service_.give_back(bank_, slab.memory.bytes);
    }

  protected:
    // A slab with reserved bytes and memory for its record; kFailed if that fails.
    std::shared_ptr<Slab> begin(std::uint64_t bytes, std::uint64_t control) {
        auto slab = std::make_shared<Slab>();
        slab->id = random_number();
        slab->memory.bytes = bytes;
        slab->control.bytes = control;
        service_.set_aside(bank_, bytes);
        slab->control.fd = sealed_file("mtier-pages", control);
        if (slab->control.fd.get() < 0 || !lock(slab->control)) fail(*slab, words_of(errno));
        return slab;
    }

    void finish(Slab &slab) {
        slab.state = Slab::State::kReady;
        // Both are needed: the slab first.
        if (!kept_.leave(kept_name("slab", slab), slab.memory.fd.get()) ||
            !kept_.leave(kept_name("control", slab), slab.control.fd.get())) {
            std::fprintf(stderr, "mtierd: pages of a slab will not survive this service (%s).\n",
                         words_of(errno).c_str());
        }
    }

    void fail(Slab &slab, std::string why) {
        slab.state = Slab::State::kFailed;
        slab.why = std::move(why);
        discard(slab);
    }

    // Whether the old memory has these bytes.
    virtual bool has(const Slab &slab, std::uint64_t bytes) const = 0;
    // Counts an old slab as in use again.
    virtual void resume(Slab &slab) { service_.set_aside(bank_, slab.memory.bytes); }

    static std::uint64_t size_of(const Descriptor &fd) {
        struct stat info {};
        return ::fstat(fd.get(), &info) == 0 ? static_cast<std::uint64_t>(info.st_size) : 0;
    }

    Service &service_;
    const std::size_t bank_;

  private:
    // Locks a slab for this service: with two services, two engines could be the same session. Only the service and its
    // keeper have the locked open file, so the lock ends with them. False with errno.
    static bool lock(Part &control) {
        control.is_locked = ::flock(control.fd.get(), LOCK_EX | LOCK_NB) == 0;
        return control.is_locked;
    }

    // Reads an old slab's record. False if this bank cannot have the slab.
    bool read(Slab &slab) const {
        slab.control.bytes = size_of(slab.control.fd);
        std::optional<SpaceHead> head = read_head(slab.control);
        if (!head || name() != head->bank || slab.memory.fd.get() < 0 || head->slab_bytes > service_.available(bank_) ||
            !has(slab, head->slab_bytes)) {
            return false;
        }
        slab.id = head->epoch;
        slab.memory.bytes = head->slab_bytes;
        slab.state = Slab::State::kReady;
        return true;
    }

    std::string kept_name(const char *what, const Slab &slab) const {
        return what + (" " + name() + " ") + std::to_string(slab.id);
    }
    void forget(const Slab &slab) {
        kept_.remove(kept_name("slab", slab));
        kept_.remove(kept_name("control", slab));
    }

    Kept &kept_;
};

// Anonymous files, which engines map and pin. The memory of the next slab, of the usual size, is populated before an
// engine requests it, unless the bank's bytes are needed otherwise.
class HostSlabs : public SlabsOfBank {
  public:
    // `usual`: minimum bytes of a slab; 0: populate nothing ahead.
    HostSlabs(Service &service, std::size_t bank, Kept &kept, std::uint64_t usual)
        : SlabsOfBank(service, bank, kept), usual_(usual) {}

    std::shared_ptr<Slab> make(std::uint64_t bytes, std::uint64_t control) override {
        std::shared_ptr<Slab> slab = begin(bytes, control);
        if (slab->state == Slab::State::kFailed) return slab;
        if (next_ != nullptr && bytes == usual_) {
            slab->memory.fd = std::move(next_file_);
            slab->populating = std::move(next_);
        } else {
            slab->memory.fd = sealed_file("mtier", bytes);
        }
        if (slab->memory.fd.get() < 0) {
            fail(*slab, words_of(errno));
        } else {
            finish(*slab);
        }
        return slab;
    }

    void tend() override {
        bool has_room = usual_ != 0 && usual_ <= service_.available(bank_);
        if (next_ != nullptr && !has_room) {
            next_.reset();
            next_file_ = Descriptor();
        } else if (next_ == nullptr && has_room) {
            next_file_ = sealed_file("mtier", usual_);
            if (next_file_.get() >= 0) next_ = std::make_shared<Populating>(next_file_.get(), usual_);
        }
    }

    const Populating *ahead() const override { return next_.get(); }

  protected:
    bool has(const Slab &slab, std::uint64_t bytes) const override {
        return is_sealed(slab.memory.fd) && size_of(slab.memory.fd) == bytes;
    }

  private:
    const std::uint64_t usual_;
    Descriptor next_file_;
    std::shared_ptr<Populating> next_;
};

// Memory of a GPU, by the driver's descriptors. The service maps it only to clear it.
class GpuSlabs : public SlabsOfBank {
  public:
    using SlabsOfBank::SlabsOfBank;

    std::shared_ptr<Slab> make(std::uint64_t bytes, std::uint64_t control) override {
        std::shared_ptr<Slab> slab = begin(bytes, control);
        if (slab->state == Slab::State::kFailed) return slab;
        service_.have_done(
            bank_, [bytes, id = name_of(*slab)](Bank &bank) { return bank.create(bytes, id); },
            [this, slab](const Made &made) {
                slab->memory.fd = Descriptor(made.fd);
                if (made.fd < 0) {
                    fail(*slab, made.why);
                } else {
                    finish(*slab);
                }
            });
        return slab;
    }

    void discard(Slab &slab) override {
        SlabsOfBank::discard(slab);
        service_.have_done(
            bank_, [id = name_of(slab)](Bank &bank) { return bank.forget(id), true; }, [](bool) {});
    }

  protected:
    // The driver does not report the size; it refuses to map another size.
    bool has(const Slab &, std::uint64_t) const override { return true; }
    void resume(Slab &slab) override {
        SlabsOfBank::resume(slab);
        service_.have_done(
            bank_, [id = name_of(slab)](Bank &bank) { return bank.resume(id), true; }, [](bool) {});
    }

  private:
    // In the bank; not a grant's id.
    static std::uint64_t name_of(const Slab &slab) { return slab.id | 1ULL << 63; }
};

}  // namespace mtier::pages

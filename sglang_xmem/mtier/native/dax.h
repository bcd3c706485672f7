// A devdax (such as CXL memory) that this service owns: its claim, the record of its slabs, and clearing.
//
// Claims are locks on bytes of the device (OFD locks), as in tier dax (tiers/dax.py), which locks all of its bytes
// exclusively:
//
// - the service locks the first granule, with its superblock, exclusively, and the rest of its range shared. So no
//   other service and no tier can lock any of it;
// - an engine gets a separate open file for a slab, with a shared lock on the slab's bytes. The kernel releases it with
//   the last descriptor and mapping, even if the service ended first. So bytes without a foreign lock are unused,
//   however processes ended.
//
// The superblock lists the slabs. It has two copies, of which the newer intact one is valid: a service that is killed
// during a write leaves the other one intact. A tier that claims bytes of a superblock erases it, since their pages are
// lost.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "descriptor.h"
#include "pages.h"
#include "populate.h"
#include "space_record.h"
#include "text.h"

namespace mtier::pages {

struct DaxBytes {
    std::uint64_t offset;
    std::uint64_t bytes;
};

// A slab: its record and ledger, then its frames.
struct DaxExtent {
    std::uint64_t id;
    std::uint64_t offset;
    std::uint64_t control, memory;  // bytes

    std::uint64_t end() const { return offset + control + memory; }
    DaxBytes all() const { return {offset, control + memory}; }
};

// Its layout on the device; tiers/dax.py reads the first fields.
struct Superblock {
    static constexpr std::uint64_t kMagic = 0x314b'4e41'4258'4144ULL;  // "DAXBANK1", with the layout's version
    static constexpr std::size_t kCopyBytes = 32 << 10, kCopies = 2, kMostSlabs = 512;

    std::uint64_t magic;
    std::uint64_t range;       // bytes of the device that the service owns, including these
    std::uint64_t generation;  // the copy with the larger one is valid
    std::uint64_t user;
    char boot[64];
    char device[64];
    std::uint64_t slabs;
    DaxExtent extents[kMostSlabs];
    std::uint64_t sum;

    std::uint64_t right_sum() const { return sum_of(this, offsetof(Superblock, sum), kMagic) | 1; }
    bool is_whole() const { return magic == kMagic && slabs <= kMostSlabs && sum == right_sum(); }
};

static_assert(sizeof(Superblock) <= Superblock::kCopyBytes && offsetof(Superblock, sum) % 8 == 0);

class DaxDevice {
  public:
    // nullptr with a clause in `why` if the first `bytes` of the device are unavailable. `kept`: its descriptor from an
    // earlier service.
    static std::unique_ptr<DaxDevice> open(const std::string &path, std::uint64_t bytes, std::uint64_t granularity,
                                           Descriptor kept, std::string *why) {
        auto device = std::unique_ptr<DaxDevice>(new DaxDevice(path));
        device->is_kept_ = kept.get() >= 0;
        device->fd_ = device->is_kept_ ? std::move(kept) : device->reopen(why);
        if (device->fd_.get() < 0 || !device->look(why)) return nullptr;
        device->granule_ = std::max(granularity, device->align_);
        device->range_ = bytes / device->granule_ * device->granule_;
        if (bytes > device->size_ || device->range_ < 3 * device->granule_) {
            *why = "it has " + amount(device->size_) + " in granules of " + amount(device->granule_) +
                   "; give at least three granules and at most the device's size";
            return nullptr;
        }
        return device->claim(why) && device->map(why) ? std::move(device) : nullptr;
    }
    ~DaxDevice() {
        if (superblocks_ != MAP_FAILED) ::munmap(superblocks_, granule_);
    }
    DaxDevice(const DaxDevice &) = delete;
    DaxDevice &operator=(const DaxDevice &) = delete;

    const std::string &path() const { return path_; }
    int fd() const { return fd_.get(); }
    bool is_kept() const { return is_kept_; }
    std::uint64_t granule() const { return granule_; }
    std::uint64_t range() const { return range_; }

    // The state of an earlier service, if it has this boot and this user.
    std::vector<DaxExtent> left() const {
        const Superblock *newest = nullptr;
        for (std::size_t i = 0; i < Superblock::kCopies; ++i) {
            const Superblock *copy = superblock(i);
            if (copy->is_whole() && (newest == nullptr || copy->generation > newest->generation)) newest = copy;
        }
        if (newest == nullptr || newest->range != range_ || newest->user != ::geteuid() || boot_id() != newest->boot ||
            identity_ != newest->device) {
            return {};
        }
        std::vector<DaxExtent> found(newest->extents, newest->extents + newest->slabs);
        for (const DaxExtent &each : found) {
            bool is_inside = each.offset >= granule_ && each.offset <= range_ && each.control <= range_ &&
                             each.memory <= range_ && each.end() <= range_;
            if (!is_inside || each.offset % granule_ + each.control % granule_ + each.memory % granule_ != 0) return {};
        }
        return found;
    }

    // False if there are too many.
    bool write(const std::vector<DaxExtent> &extents) {
        if (extents.size() > Superblock::kMostSlabs) return false;
        auto next = std::make_unique<Superblock>();
        std::memset(static_cast<void *>(next.get()), 0, sizeof(*next));
        next->magic = Superblock::kMagic;
        next->range = range_;
        for (std::size_t i = 0; i < Superblock::kCopies; ++i) {
            if (superblock(i)->is_whole()) next->generation = std::max(next->generation, superblock(i)->generation);
        }
        ++next->generation;
        next->user = ::geteuid();
        put_text(next->boot, boot_id());
        put_text(next->device, identity_);
        next->slabs = extents.size();
        std::copy(extents.begin(), extents.end(), next->extents);
        next->sum = next->right_sum();
        std::memcpy(static_cast<void *>(superblock(next->generation % Superblock::kCopies)), next.get(), sizeof(*next));
        return true;
    }

    // A descriptor for engines that locks the bytes while it is open or mapped anywhere.
    Descriptor share(const DaxBytes &bytes, std::string *why) const {
        Descriptor fd = reopen(why);
        if (fd.get() >= 0 && !lock(fd.get(), F_RDLCK, bytes.offset, bytes.bytes)) {
            *why = words_of(errno);
            return Descriptor();
        }
        return fd;
    }

    // Some of these bytes that are locked through share(); empty if none are.
    std::optional<DaxBytes> shared(const DaxBytes &bytes) const {
        struct flock asked = bytes_of(F_WRLCK, bytes.offset, bytes.bytes);
        if (::fcntl(fd_.get(), F_OFD_GETLK, &asked) != 0) return bytes;  // unknown
        if (asked.l_type == F_UNLCK) return std::nullopt;
        return DaxBytes{static_cast<std::uint64_t>(asked.l_start), static_cast<std::uint64_t>(asked.l_len)};
    }

    // Whether memory of the device can be touched; finds broken pages without a signal.
    static bool is_present(void *address, std::uint64_t bytes) {
        return ::madvise(address, bytes, MADV_POPULATE_WRITE) == 0 || errno == EINVAL;  // Linux 5.14
    }

  private:
    explicit DaxDevice(std::string path) : path_(std::move(path)) {}

    Superblock *superblock(std::size_t copy) const {
        return reinterpret_cast<Superblock *>(static_cast<char *>(superblocks_) + copy * Superblock::kCopyBytes);
    }

    Descriptor reopen(std::string *why) const {
        Descriptor fd(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
        if (fd.get() < 0) *why = words_of(errno);
        return fd;
    }

    // The device's facts in sysfs.
    bool look(std::string *why) {
        struct stat info {};
        bool is_device = ::fstat(fd_.get(), &info) == 0 && S_ISCHR(info.st_mode);
        std::string root;
#ifdef MTIER_TESTING
        if (const char *stand_in = std::getenv("MTIER_SYSFS_ROOT")) {
            root = stand_in;
            is_device = true;
        }
#endif
        std::string number = std::to_string(major(info.st_rdev)) + ":" + std::to_string(minor(info.st_rdev));
        std::string folder = root + "/sys/dev/char/" + number;
        char link[256] = "";
        ssize_t length = ::readlink((folder + "/subsystem").c_str(), link, sizeof(link));
        std::string subsystem = "/" + std::string(link, static_cast<std::size_t>(std::max<ssize_t>(length, 0)));
        is_device = is_device && subsystem.substr(subsystem.rfind('/')) == "/dax";
        size_ = number_in(folder + "/size");
        align_ = number_in(folder + "/align");
        if (align_ == 0) align_ = number_in(folder + "/dax_region/align");
        if (!is_device || size_ == 0 || align_ == 0 || (align_ & (align_ - 1)) != 0) {
            *why = "it is not a devdax; give a device such as /dev/dax0.0 (daxctl list shows them)";
            return false;
        }
        identity_ = number + " " + std::to_string(info.st_ino) + " " + std::to_string(size_);
        if (S_ISCHR(info.st_mode)) identity_ = number + " " + std::to_string(size_);  // of any node of it
        return true;
    }

    static std::uint64_t number_in(const std::string &path) {
        std::uint64_t number = 0;
        std::ifstream(path) >> number;
        return number;
    }

    bool claim(std::string *why) const {
        if (lock(fd_.get(), F_WRLCK, 0, granule_) && lock(fd_.get(), F_RDLCK, granule_, range_ - granule_)) return true;
        *why = errno == EAGAIN || errno == EACCES ? "another process uses some of its bytes" : words_of(errno);
        return false;
    }

    bool map(std::string *why) {
        superblocks_ = ::mmap(nullptr, granule_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
        if (superblocks_ == MAP_FAILED) {
            *why = words_of(errno);
            return false;
        }
        if (is_present(superblocks_, granule_)) return true;
        *why = "its first page is broken (" + words_of(errno) + ")";
        return false;
    }

    static struct flock bytes_of(short type, std::uint64_t offset, std::uint64_t bytes) {
        struct flock asked {};
        asked.l_type = type;
        asked.l_whence = SEEK_SET;
        asked.l_start = static_cast<off_t>(offset);
        asked.l_len = static_cast<off_t>(bytes);
        return asked;
    }

    static bool lock(int fd, short type, std::uint64_t offset, std::uint64_t bytes) {
        struct flock asked = bytes_of(type, offset, bytes);
        return ::fcntl(fd, F_OFD_SETLK, &asked) == 0;
    }

    const std::string path_;
    Descriptor fd_;
    bool is_kept_ = false;
    std::string identity_;
    std::uint64_t size_ = 0, align_ = 0, granule_ = 0, range_ = 0;
    void *superblocks_ = MAP_FAILED;
};

// Threads that fill bytes of a device with zeros once they are unused.
class Clearing {
  public:
    // `device` must outlive this.
    Clearing(const DaxDevice &device, const DaxBytes &bytes)
        : device_(device), all_(bytes), offset_(bytes.offset), bytes_(bytes.bytes) {
        thread_ = std::thread([this] {
            run();
            ended_ = true;
        });
    }
    Clearing(const Clearing &) = delete;
    Clearing &operator=(const Clearing &) = delete;
    ~Clearing() {
        stopping_ = true;
        thread_.join();
    }

    bool ended() const { return ended_; }
    // After its end: why the bytes are not cleared, a clause; empty on success.
    const std::string &why() const { return why_; }
    // The bytes, and whether they are permanently broken.
    const DaxBytes &where() const { return where_; }
    bool is_broken() const { return is_broken_; }

  private:
    static constexpr std::uint64_t kStep = 8 << 20;
    static constexpr unsigned kMostThreads = 8;
    static constexpr std::chrono::milliseconds kTurn{20};
    static constexpr std::chrono::seconds kPatience{5};  // for a process that is ending or unmapping

    void run() {
        std::optional<DaxBytes> others;
        for (auto end = std::chrono::steady_clock::now() + kPatience; (others = device_.shared(all_));) {
            if (stopping_) return;
            if (std::chrono::steady_clock::now() > end) {
                where_ = *others;
                why_ = "another process still uses bytes of " + device_.path() + " that were the bank's; end it";
                return;
            }
            std::this_thread::sleep_for(kTurn);
        }
        Descriptor zeros(::open("/dev/zero", O_RDONLY | O_CLOEXEC));
        void *memory = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, device_.fd(),
                              static_cast<off_t>(offset_));
        if (zeros.get() < 0 || memory == MAP_FAILED) {
            why_ = "memory of " + device_.path() + " cannot be cleared: " + words_of(errno);
        } else {
            clear(zeros.get(), static_cast<char *>(memory));
        }
        if (memory != MAP_FAILED) ::munmap(memory, bytes_);
    }

    // The kernel clears them, and returns an error where a write of this process would raise SIGBUS.
    void clear(int zeros, char *memory) {
        std::atomic<std::uint64_t> next{0}, broken{UINT64_MAX};
        std::vector<std::thread> threads;
        auto work = [&] {
            while (!stopping_ && broken == UINT64_MAX) {
                std::uint64_t at = next.fetch_add(kStep);
                for (std::uint64_t end = std::min(at + kStep, bytes_); at < end;) {
                    ssize_t done = ::read(zeros, memory + at, end - at);
                    if (done <= 0) {
                        broken = at;
                        break;
                    }
                    at += static_cast<std::uint64_t>(done);
                }
                if (at >= bytes_) return;
            }
        };
        unsigned count = std::clamp(std::thread::hardware_concurrency() / 2, 1U, kMostThreads);
        for (unsigned i = 1; i < count; ++i) threads.emplace_back(work);
        work();
        for (std::thread &thread : threads) thread.join();
        if (broken != UINT64_MAX) {
            is_broken_ = true;
            where_ = {(offset_ + broken) / device_.granule() * device_.granule(), device_.granule()};
            append(&why_, "a page of %s at %" PRIu64 " MiB is poisoned; the bytes are excluded from now on, restart "
                   "the engine", device_.path().c_str(), (offset_ + broken) >> 20);
        }
    }

    const DaxDevice &device_;
    const DaxBytes all_;
    const std::uint64_t offset_, bytes_;
    std::atomic<bool> stopping_{false}, ended_{false};
    std::string why_;
    DaxBytes where_{0, 0};
    bool is_broken_ = false;
    std::thread thread_;
};

}  // namespace mtier::pages

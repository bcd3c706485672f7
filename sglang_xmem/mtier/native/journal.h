// A file of grants and their owners for the next service: memory stays with a client while no service runs. One line
// per change, in order; rewritten when most lines are obsolete.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>

#include "text.h"

namespace mtier {

struct Record {
    std::uint64_t id = 0;
    std::uint64_t lease = 0;
    std::size_t bank = 0;
    std::string label;  // the bank's
    std::uint64_t size = 0;
    pid_t pid = 0;
    std::string key;  // the process's
};

class Journal {
  public:
    Journal() = default;
    Journal(const Journal &) = delete;
    Journal &operator=(const Journal &) = delete;
    ~Journal() {
        if (fd_ < 0) return;
        ::close(fd_);
        if (records_.empty()) ::unlink(path_.c_str());
    }

    // Reads the file of an earlier service of this boot at `path`. False with a clause in `why` if the file cannot be
    // written.
    bool open(const std::string &path, std::string *why) {
        path_ = path;
        struct stat info;
        if (::lstat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == ::geteuid()) load();
        return rewrite(why);
    }

    const std::map<std::uint64_t, Record> &records() const { return records_; }

    // False with a clause in `why` if it could not be written; the record then does not exist.
    bool add(const Record &record, std::string *why) {
        if (!write(line_of(record), why)) return false;
        records_[record.id] = record;
        return true;
    }

    void remove(std::uint64_t id) {
        if (records_.erase(id) == 0) return;
        std::string why;
        // Without this line, the next service would wait for the end of a process that has already freed it.
        write("- " + std::to_string(id) + "\n", &why);
        if (lines_ > 1000 + 4 * records_.size()) rewrite(&why);
    }

  private:
    static std::string head() {
        std::string boot;
        std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
        return "mtierd 1 " + boot + "\n";
    }

    static std::string line_of(const Record &r) {
        std::ostringstream line;
        line << "+ " << r.id << ' ' << r.lease << ' ' << r.bank << ' ' << r.label << ' ' << r.size << ' ' << r.pid
             << ' ' << r.key << '\n';
        return line.str();
    }

    void load() {
        std::ifstream file(path_);
        std::string line;
        if (!std::getline(file, line) || line + "\n" != head()) return;
        // A line without its end was cut off when the service was killed.
        while (std::getline(file, line) && !file.eof()) {
            std::istringstream words(line);
            std::string sign;
            Record r;
            words >> sign >> r.id;
            if (sign == "-") records_.erase(r.id);
            if (sign == "+" && words >> r.lease >> r.bank >> r.label >> r.size >> r.pid >> r.key) records_[r.id] = r;
        }
    }

    bool rewrite(std::string *why) {
        std::string text = head();
        for (const auto &[id, record] : records_) text += line_of(record);
        std::string made = path_ + ".new";
        int fd = ::open(made.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0 || ::write(fd, text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
            ::rename(made.c_str(), path_.c_str()) != 0) {
            *why = path_ + " cannot be written (" + words_of(errno) + ")";
            if (fd >= 0) ::close(fd);
            return false;
        }
        if (fd_ >= 0) ::close(fd_);
        fd_ = fd;
        lines_ = records_.size();
        return true;
    }

    bool write(const std::string &line, std::string *why) {
        off_t before = ::lseek(fd_, 0, SEEK_END);
        ssize_t n = ::write(fd_, line.data(), line.size());
        if (n == static_cast<ssize_t>(line.size())) {
            ++lines_;
            return true;
        }
        *why = path_ + " cannot be written (" + (n < 0 ? words_of(errno) : "no space is left") + ")";
        if (n > 0 && ::ftruncate(fd_, before) != 0) *why += ", nor repaired";  // a partial line would corrupt the next
        return false;
    }

    std::string path_;
    int fd_ = -1;
    std::size_t lines_ = 0;
    std::map<std::uint64_t, Record> records_;
};

}  // namespace mtier

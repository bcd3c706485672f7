// Host memory that is available to this process. The kernel kills a process that exceeds its control group's limit
// without a recoverable error, so callers check before they allocate.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

namespace mtier {

class HostMemory {
  public:
    // Bytes available now in the machine and under the limits of this process's control groups. Page cache counts as
    // free: the kernel drops it before it kills a process.
    static std::uint64_t available() { return least("MemAvailable:", true); }
    // The same, without any current use.
    static std::uint64_t capacity() { return least("MemTotal:", false); }

  private:
    static constexpr std::uint64_t kNoLimit = 1ULL << 60;  // control groups represent no limit by a larger number

    static std::uint64_t least(const char *field, bool less_used) {
        std::uint64_t bytes = UINT64_MAX;
        if (std::uint64_t kib = find("/proc/meminfo", field); kib != 0) bytes = kib * 1024;
        lines("/proc/self/cgroup", [&](const char *line) {
            // "0::/path" of version 2, "5:memory:/path" of version 1
            const char *controllers = std::strchr(line, ':');
            const char *path = controllers == nullptr ? nullptr : std::strchr(controllers + 1, ':');
            if (path == nullptr) return;
            std::string names = "," + std::string(controllers + 1, path) + ",";
            bool second = names == ",,";
            if (!second && names.find(",memory,") == std::string::npos) return;
            std::string below(path + 1);
            for (;;) {
                if (second) {
                    for (const char *top : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}) {
                        for (const char *limit : {"/memory.max", "/memory.high"}) {
                            bytes = std::min(bytes, left(top + below, limit, "/memory.current", "", less_used));
                        }
                    }
                } else {
                    std::string folder = "/sys/fs/cgroup/memory" + below;
                    const char *usage = "/memory.usage_in_bytes";
                    bytes = std::min(bytes, left(folder, "/memory.limit_in_bytes", usage, "total_", less_used));
                }
                std::size_t slash = below.rfind('/');
                if (below.empty() || slash == std::string::npos) break;
                below.resize(slash);
            }
        });
        return bytes;
    }

    static std::uint64_t left(const std::string &folder, const char *limit, const char *usage,
                              const std::string &prefix, bool less_used) {
        std::uint64_t most = 0;
        bool limited = false;
        lines(folder + limit, [&](const char *line) {
            limited = *line >= '0' && *line <= '9';  // not "max"
            most = std::strtoull(line, nullptr, 10);
        });
        if (!limited || most >= kNoLimit) return UINT64_MAX;
        if (!less_used) return most;
        std::uint64_t used = 0;
        lines(folder + usage, [&](const char *line) { used = std::strtoull(line, nullptr, 10); });
        std::string stat = folder + "/memory.stat";
        std::uint64_t cache = find(stat, (prefix + "active_file ").c_str());
        cache += find(stat, (prefix + "inactive_file ").c_str());
        used -= std::min(used, cache);
        return most - std::min(most, used);
    }

    // The number after `name` at the start of a line; 0 if it is missing.
    static std::uint64_t find(const std::string &path, const char *name) {
        std::uint64_t value = 0;
        lines(path, [&](const char *line) {
            if (std::strncmp(line, name, std::strlen(name)) == 0) {
                value = std::strtoull(line + std::strlen(name), nullptr, 10);
            }
        });
        return value;
    }

    template <typename Action>
    static void lines(const std::string &path, Action action) {
        std::FILE *file = std::fopen(path.c_str(), "re");
        if (file == nullptr) return;
        char line[4096];
        while (std::fgets(line, sizeof(line), file) != nullptr) {
            line[std::strcspn(line, "\n")] = '\0';
            action(line);
        }
        std::fclose(file);
    }
};

}  // namespace mtier

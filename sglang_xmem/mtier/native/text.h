// Text for users: system errors, and amounts of memory.
#pragma once

#include <cinttypes>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace mtier {

inline std::string words_of(int error) {
    char buffer[128];
    return strerror_r(error, buffer, sizeof(buffer));
}

inline void append(std::string *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
inline void append(std::string *text, const char *format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof(buffer), format, arguments);
    va_end(arguments);
    *text += buffer;
}

// "4.00 GB", "2.10 MB", "512 bytes"
inline std::string amount(std::uint64_t bytes) {
    std::string text;
    if (bytes >= 1'000'000'000) {
        append(&text, "%.2f GB", static_cast<double>(bytes) / 1e9);
    } else if (bytes >= 1'000'000) {
        append(&text, "%.2f MB", static_cast<double>(bytes) / 1e6);
    } else {
        append(&text, "%" PRIu64 " bytes", bytes);
    }
    return text;
}

}  // namespace mtier

// mtierd's arguments, in bytes and milliseconds, as passed by the command `sglang-xmem mtierd`.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "bank.h"

namespace mtier {

struct BankOption {
    std::optional<int> gpu;  // without gpu and device: host memory
    std::string device;      // a devdax's node
    std::uint64_t bytes = 0;
    std::string text;
};

struct Options {
    std::string socket;
    std::string library;  // printed to stdout once the service is reachable
    std::vector<BankOption> banks;
    std::uint64_t quota = 0;  // 0: none
    std::uint64_t granularity = 2 << 20;
    std::uint64_t rest_after_ms = 5000;
    std::optional<std::uint16_t> metrics;  // a port
    bool allow_reset = false;
    std::uint64_t share = 100;  // percent of a host bank
    bool status = false;
    bool flush = false;
    bool lazy = false;  // populate no memory of the page bank ahead
};

inline bool parse_number(const std::string &text, std::uint64_t *value) {
    if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos) return false;
    *value = std::strtoull(text.c_str(), nullptr, 10);
    return true;
}

// "host:BYTES", "gpu:ORDINAL:BYTES" or "dax:PATH:BYTES"
inline bool parse_bank(const std::string &text, BankOption *bank) {
    bank->text = text;
    std::size_t size = text.rfind(':');
    if (size == std::string::npos || !parse_number(text.substr(size + 1), &bank->bytes)) return false;
    if (bank->bytes == 0) return false;
    std::string place = text.substr(0, size);
    if (place == "host") return true;
    if (place.rfind("dax:/", 0) == 0) {
        bank->device = place.substr(4);
        return bank->device.find_first_of("\"\\") == std::string::npos && bank->device.size() < 180;
    }
    std::uint64_t gpu = 0;
    if (place.rfind("gpu:", 0) != 0 || !parse_number(place.substr(4), &gpu) || gpu > 1023) return false;
    bank->gpu = static_cast<int>(gpu);
    return true;
}

// Parses one argument's value. Returns a sentence if it is invalid.
inline std::optional<std::string> parse_value(const std::string &name, const std::string &value, Options *options) {
    std::uint64_t number = 0;
    bool is_number = parse_number(value, &number);
    if (name == "--socket") {
        options->socket = value;
    } else if (name == "--library") {
        options->library = value;
    } else if (name == "--bank") {
        BankOption bank;
        if (!parse_bank(value, &bank)) {
            return "--bank is " + value + "; give host:BYTES, gpu:ORDINAL:BYTES or dax:PATH:BYTES, in numbers";
        }
        options->banks.push_back(bank);
    } else if (name == "--rest-after") {
        if (!is_number || number > kMaxRestAfterMs) {
            return name + " is " + value + "; give milliseconds, at most an hour";
        }
        options->rest_after_ms = number;
    } else if (name == "--share") {
        if (!is_number || number < 1 || number > 100) {
            return name + " is " + value + "; give percent of a bank, 1 to 100";
        }
        options->share = number;
    } else if (name == "--metrics") {
        if (!is_number || number > UINT16_MAX) return name + " is " + value + "; give a port, or 0 for any";
        options->metrics = static_cast<std::uint16_t>(number);
    } else if (name == "--quota" || name == "--granularity") {
        if (!is_number) return name + " is " + value + "; give a number of bytes";
        (name == "--quota" ? options->quota : options->granularity) = number;
    } else {
        return "the option " + name + " is unknown; known: --bank host:BYTES, --bank gpu:ORDINAL:BYTES, "
               "--bank dax:PATH:BYTES, "
               "--socket PATH, --quota BYTES, --granularity BYTES, --rest-after MILLISECONDS, --metrics PORT, "
               "--library PATH, --share PERCENT, --allow-reset, --status, --flush";
    }
    return std::nullopt;
}

// Returns a sentence if the arguments are invalid.
inline std::optional<std::string> parse(int argc, char **argv, Options *options) {
    for (int i = 1; i < argc; ++i) {
        std::string name = argv[i];
        if (name == "--status") {
            options->status = true;
        } else if (name == "--flush") {
            options->flush = true;
        } else if (name == "--lazy") {
            options->lazy = true;
        } else if (name == "--allow-reset") {
            options->allow_reset = true;
        } else {
            bool last = i + 1 == argc;
            if (auto wrong = parse_value(name, last ? "0" : argv[i + 1], options)) return wrong;
            if (last) return name + " has no value; give one";
            ++i;
        }
    }
    std::uint64_t granule = options->granularity;
    if (granule < 4096 || granule > (1ULL << 30) || (granule & (granule - 1)) != 0) {
        return "--granularity is " + std::to_string(granule) + "; give a power of two from 4096 bytes to 1 GiB";
    }
    for (const BankOption &bank : options->banks) {
        if (bank.bytes < granule) {
            return "--bank " + bank.text + " is smaller than the granularity of " + std::to_string(granule) +
                   " bytes; give more";
        }
    }
    return std::nullopt;
}

}  // namespace mtier

// What a handler of the service answers, before it is a message.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>

#include "protocol.h"

namespace mtier {

struct Answer {
    Code code = kSuccess;
    std::string text;
    Reply fields{};
    int fd = -1;  // goes along and is closed then

    static Answer error(Code code, std::string words) {
        Answer answer;
        answer.code = code;
        answer.text = std::move(words);
        return answer;
    }
};

__attribute__((format(printf, 2, 3))) inline void append(std::string *text, const char *format, ...) {
    char buffer[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof(buffer), format, arguments);
    va_end(arguments);
    *text += buffer;
}

}  // namespace mtier

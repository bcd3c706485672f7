// Signals that stop keeper and service cleanly.
#pragma once

#include <signal.h>

namespace mtier {

// SIGTERM, SIGINT, and SIGHUP of a closed terminal, unless `nohup` ignores it.
inline void add_stops(sigset_t *set) {
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
    struct sigaction now {};
    if (::sigaction(SIGHUP, nullptr, &now) != 0 || now.sa_handler != SIG_IGN) sigaddset(set, SIGHUP);
}

inline const char *name_of_stop(unsigned number) {
    return number == SIGINT ? "SIGINT" : number == SIGHUP ? "SIGHUP" : "SIGTERM";
}

}  // namespace mtier

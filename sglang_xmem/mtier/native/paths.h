// The default path of the service's socket, in a folder that only this user can write to.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <string>

namespace mtier {

// Whether `folder` belongs to this user, and only this user may write there.
inline bool is_own_folder(const std::string &folder) {
    struct stat info;
    return ::lstat(folder.c_str(), &info) == 0 && S_ISDIR(info.st_mode) && info.st_uid == ::geteuid() &&
           (info.st_mode & 022) == 0;
}

// Used if the system has no folder for this user's sockets; the service creates it.
inline std::string own_temporary_folder() { return "/tmp/mtierd-" + std::to_string(::geteuid()); }

// $MTIER_SOCKET, else mtierd.sock in $XDG_RUNTIME_DIR or /run/user/UID if that is this user's folder, else in
// own_temporary_folder().
inline std::string socket_path() {
    const char *chosen = std::getenv("MTIER_SOCKET");
    if (chosen != nullptr && *chosen != '\0') return chosen;
    const char *runtime = std::getenv("XDG_RUNTIME_DIR");
    if (runtime != nullptr && is_own_folder(runtime)) return std::string(runtime) + "/mtierd.sock";
    std::string usual = "/run/user/" + std::to_string(::geteuid());
    return (is_own_folder(usual) ? usual : own_temporary_folder()) + "/mtierd.sock";
}

}  // namespace mtier

// mtierd: owns banks of memory and hands them out to processes of its own user over a Unix socket.
//
// One thread answers (loop.h, connections.h, service.h), and each bank has one of its own, since the driver may take
// its time. What a client has is its process's and comes back when nobody has it any more. Nothing that a client sends
// or leaves unread may stop the service or make it wait.

#include <sys/signalfd.h>

#include <csignal>
#include <cstdio>
#include <exception>

#include "channel.h"
#include "connections.h"
#include "host_memory.h"
#include "listener.h"
#include "metrics.h"
#include "notify.h"
#include "options.h"
#include "service.h"

namespace {

using namespace mtier;

constexpr int kFailed = 1, kWrongOptions = 2;
constexpr int kStatusTimeoutMs = 5000;
constexpr std::chrono::milliseconds kStopPatience{5000};

int complain(const std::string &sentence, int status = kFailed) {
    std::fprintf(stderr, "mtierd: %s.\n", sentence.c_str());
    return status;
}

int show_status(const std::string &path) {
    Channel channel;
    Deadline deadline(kStatusTimeoutMs);
    Request request{};
    request.op = static_cast<std::uint16_t>(Op::kReport);
    Reply reply;
    std::string text;
    int fd = -1;
    Code code = channel.connect(path, deadline, &text);
    if (code == kSuccess) code = channel.exchange(request, deadline, &reply, &text, &fd);
    if (fd >= 0) ::close(fd);
    if (code != kSuccess) return complain(text);
    std::printf("%s\n", text.c_str());
    return 0;
}

// SIGTERM and SIGINT end the loop; nothing else may end the process. Blocked before the first thread and the socket are
// there, so that none can be hit and leave the socket behind.
int take_signals() {
    ::signal(SIGPIPE, SIG_IGN);  // nobody reads the log
    ::signal(SIGXFSZ, SIG_IGN);  // a limit of file sizes counts for memory too: an error of one allocation
    sigset_t stops;
    sigemptyset(&stops);
    sigaddset(&stops, SIGTERM);
    sigaddset(&stops, SIGINT);
    ::sigprocmask(SIG_BLOCK, &stops, nullptr);
    return ::signalfd(-1, &stops, SFD_CLOEXEC | SFD_NONBLOCK);
}

void raise_file_limit() {
    rlimit files{};
    if (::getrlimit(RLIMIT_NOFILE, &files) != 0) return;
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
}

// Returns a sentence where a bank cannot be served.
std::optional<std::string> open_banks(const Options &options, std::vector<std::unique_ptr<Bank>> *banks) {
    std::uint64_t in_host = 0;
    for (const BankOption &bank : options.banks) {
        if (bank.gpu) {
            std::string why;
            std::chrono::milliseconds rest_after(options.rest_after_ms);
            auto made = GpuBank::open(*bank.gpu, bank.bytes, options.granularity, rest_after, &why);
            if (made == nullptr) return "--bank " + bank.text + " cannot be served: " + why;
            banks->push_back(std::move(made));
            continue;
        }
        in_host += bank.bytes;
        banks->push_back(std::make_unique<HostBank>(bank.bytes, options.granularity));
        if (std::uint64_t most = HostMemory::capacity(); bank.bytes > most || in_host > most) {
            return "--bank " + bank.text + ": banks of " + amount(in_host) + " do not fit into the " + amount(most) +
                   " of memory that this machine, or this container's limit, has; give less";
        }
    }
    return std::nullopt;
}

void beat(Loop &loop, const Notify &notify) {
    if (notify.beat().count() == 0) return;
    notify.send("WATCHDOG=1");
    loop.after(notify.beat(), [&] { beat(loop, notify); });
}

int serve(const Options &options) {
    int signals = take_signals();
    if (signals < 0) return complain("signals cannot be waited for: " + words_of(errno));
    raise_file_limit();
    std::vector<std::unique_ptr<Bank>> banks;
    if (auto refused = open_banks(options, &banks)) return complain(*refused);
    Listener listener;
    if (auto refused = listener.lock(options.socket)) return complain(*refused);
    Journal journal;
    std::string why;
    if (!journal.open(options.socket + ".ledger", &why)) return complain(why + "; give another --socket");
    if (auto refused = listener.listen()) return complain(*refused);

    Loop loop;
    Log log;
    Notify notify;
    Processes processes(loop);
    Service service(loop, log, processes, journal, std::move(banks), {options.quota, options.allow_reset});
    Metrics metrics(loop, [&] { return service.metrics(); });
    if (options.metrics) {
        if (auto refused = metrics.listen(*options.metrics)) return complain(*refused);
        log.line("metrics on http://127.0.0.1:%d/metrics", metrics.port());
    }
    bool in_time = true;
    {
        Connections connections(loop, log, processes, service);
        service.answer_over(connections);
        connections.listen(listener.fd());
        loop.watch(signals, POLLIN, [&](short) {
            signalfd_siginfo info{};
            if (::read(signals, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
                log.line("stopping on %s", info.ssi_signo == SIGINT ? "SIGINT" : "SIGTERM");
            }
            loop.stop();
        });
        log.line("serving %s", options.socket.c_str());
        if (!options.library.empty()) {
            std::printf("MTIER_LIB_PATH=%s\n", options.library.c_str());
            std::fflush(stdout);
        }
        notify.send("READY=1");
        beat(loop, notify);
        loop.run();
        notify.send("STOPPING=1");
        in_time = service.idle_within(kStopPatience);
    }
    ::close(signals);
    if (!in_time) {  // a call of the driver hangs, and its thread with it
        log.line("a bank does not finish; ending without it");
        listener.remove();
        std::_Exit(kFailed);
    }
    return 0;
}

int run(int argc, char **argv) {
    Options options;
    if (auto wrong = parse(argc, argv, &options)) return complain(*wrong, kWrongOptions);
    if (options.socket.empty()) options.socket = socket_path();
    if (options.status) return show_status(options.socket);
    if (options.banks.empty()) return complain("there is no bank to serve; give --bank host:BYTES", kWrongOptions);
    return serve(options);
}

}  // namespace

int main(int argc, char **argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception &error) {
        return complain(error.what());
    }
}

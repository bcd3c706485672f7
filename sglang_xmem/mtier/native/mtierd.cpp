// mtierd: owns banks of memory and grants it to processes of its user over a Unix socket.
//
// Two processes: the keeper (keeper.h), which is the started process, and the service, its child.
//
// One thread serves requests (loop.h, connections.h, service.h), and each bank has its own thread, since driver calls
// may be slow. A client's memory belongs to its process and is reclaimed when it is unused. A client can neither stop
// nor block the service by what it sends or does not read.

#include <sys/signalfd.h>

#include <csignal>
#include <cstdio>
#include <exception>

#include "channel.h"
#include "connections.h"
#include "dax_slabs.h"
#include "host_memory.h"
#include "keeper.h"
#include "listener.h"
#include "metrics.h"
#include "options.h"
#include "pages_service.h"
#include "service.h"
#include "slabs.h"
#include "stops.h"

namespace {

using namespace mtier;

constexpr int kFailed = 1, kWrongOptions = 2;
constexpr int kStatusTimeoutMs = 5000;
constexpr std::chrono::milliseconds kStopPatience{5000}, kBeat{3000};

int complain(const std::string &sentence, int status = kFailed) {
    std::fprintf(stderr, "mtierd: %s.\n", sentence.c_str());
    return status;
}

// Sends one request to a running service, and prints the text of its answer.
int ask(const std::string &path, std::uint16_t op) {
    Channel channel;
    Deadline deadline(kStatusTimeoutMs);
    Request request{};
    request.op = op;
    Reply reply;
    std::string text;
    int fd = -1;
    Code code = channel.connect(path, deadline, &text);
    if (code == kSuccess) code = channel.exchange(request, deadline, &reply, &text, &fd);
    if (fd >= 0) ::close(fd);
    if (code != kSuccess) return complain(text);
    if (!text.empty()) std::printf("%s\n", text.c_str());
    return 0;
}

// Returns a sentence if a device is unavailable.
std::optional<std::string> open_devices(const Options &options, Kept &kept,
                                        std::vector<std::unique_ptr<pages::DaxSlabs>> *devices) {
    for (const BankOption &bank : options.banks) {
        if (bank.device.empty()) continue;
        std::string why;
        auto device = pages::DaxDevice::open(bank.device, bank.bytes, options.granularity,
                                             kept.take(pages::DaxSlabs::kept_name(bank.device)), &why);
        if (device == nullptr) return "--bank " + bank.text + " cannot be served: " + why;
        devices->push_back(std::make_unique<pages::DaxSlabs>(std::move(device), kept));
    }
    return std::nullopt;
}

std::vector<std::unique_ptr<pages::SlabSource>> slab_sources(const Options &options, Service &service, Kept &kept,
                                                             std::vector<std::unique_ptr<pages::DaxSlabs>> devices) {
    std::vector<std::unique_ptr<pages::SlabSource>> sources;
    for (std::size_t i = 0; i < service.banks(); ++i) {
        if (service.bank(i).kind() == MemoryKind::kGpuMemory) {
            sources.push_back(std::make_unique<pages::GpuSlabs>(service, i, kept));
        } else {
            std::uint64_t granule = service.bank(i).granularity();
            std::uint64_t usual = options.lazy ? 0 : service.bank(i).total() * options.share / 100 / granule * granule;
            sources.push_back(std::make_unique<pages::HostSlabs>(service, i, kept, usual));
        }
    }
    for (auto &device : devices) sources.push_back(std::move(device));
    return sources;
}

// Handles grants and pages over the same connections.
class Both : public Handler {
  public:
    Both(Service &service, pages::PageService &pages, unsigned restarts)
        : service_(service), pages_(pages), restarts_(restarts) {}

    std::optional<Answer> handle(const Peer &peer, const Request &request, std::string_view behind,
                                 Descriptors &sent) override {
        if (request.op >= kFirstPagesOp) return pages_.handle(peer, request, behind, sent);
        std::optional<Answer> answer = service_.handle(peer, request, behind, sent);
        if (request.op == static_cast<std::uint16_t>(Op::kMalloc)) pages_.tend();
        if (answer && request.op == static_cast<std::uint16_t>(Op::kReport)) {
            answer->text.back() = ',';
            append(&answer->text, " \"keeper\": %d, \"restarts\": %u, ", static_cast<int>(::getppid()), restarts_);
            answer->text += pages_.json(kMaxTextBytes - answer->text.size()) + "}";
        }
        return answer;
    }
    Answer not_sent(const Peer &peer, const Reply &reply, const std::string &why) override {
        return reply.op >= kFirstPagesOp ? pages_.not_sent(peer, reply, why) : service_.not_sent(peer, reply, why);
    }
    bool keeps(const Peer &peer) override { return service_.keeps(peer) || pages_.keeps(peer); }
    void closed(const Peer &peer) override {
        pages_.closed(peer);
        service_.closed(peer);
    }

  private:
    Service &service_;
    pages::PageService &pages_;
    const unsigned restarts_;
};

// Stop signals end the loop; no other signal may end the process. Blocked before the first thread and the socket exist,
// so that no signal leaves the socket behind.
int take_signals() {
    ::signal(SIGPIPE, SIG_IGN);  // the log's reader is gone
    ::signal(SIGXFSZ, SIG_IGN);  // a file size limit applies to memory files too: an error of one allocation
    sigset_t stops;
    sigemptyset(&stops);
    add_stops(&stops);
    ::sigprocmask(SIG_BLOCK, &stops, nullptr);
    return ::signalfd(-1, &stops, SFD_CLOEXEC | SFD_NONBLOCK);
}

void raise_file_limit() {
    rlimit files{};
    if (::getrlimit(RLIMIT_NOFILE, &files) != 0) return;
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
}

// Returns a sentence if a bank cannot be served.
std::optional<std::string> open_banks(const Options &options, std::vector<std::unique_ptr<Bank>> *banks) {
    std::uint64_t in_host = 0;
    for (const BankOption &bank : options.banks) {
        if (!bank.device.empty()) continue;
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
                   " of memory of this machine, or of this container's limit; give less";
        }
    }
    return std::nullopt;
}

void beat(Loop &loop, Kept &kept, pages::PageService &pages) {
    kept.beat();
    pages.tend();
    loop.after(kBeat, [&] { beat(loop, kept, pages); });
}

// The service itself, on a listening socket.
int serve(const Options &options, int listener, Kept &kept) {
    int signals = take_signals();
    if (signals < 0) return complain("waiting for signals failed: " + words_of(errno));
    std::vector<std::unique_ptr<Bank>> banks;
    if (auto refused = open_banks(options, &banks)) return complain(*refused);
    std::vector<std::unique_ptr<pages::DaxSlabs>> devices;
    if (auto refused = open_devices(options, kept, &devices)) return complain(*refused);
    Journal journal;
    std::string why;
    if (!journal.open(options.socket + ".ledger", &why)) return complain(why + "; give another --socket");

    Loop loop;
    Log log;
    Processes processes(loop);
    Service service(loop, log, processes, journal, std::move(banks), {options.quota, options.allow_reset});
    const pages::PageService *shown = nullptr;
    Metrics metrics(loop, [&] { return service.metrics() + shown->metrics(); });
    if (options.metrics) {
        if (auto refused = metrics.listen(*options.metrics)) return complain(*refused);
        log.line("metrics on http://127.0.0.1:%d/metrics", metrics.port());
    }
    bool in_time = true;
    {
        pages::PageService pages(processes, kept, slab_sources(options, service, kept, std::move(devices)),
                                 static_cast<unsigned>(options.share),
                                 [&log](const std::string &words) { log.line("%s", words.c_str()); });
        shown = &pages;
        Both both(service, pages, kept.restarts());
        Connections connections(loop, log, processes, both);
        service.answer_over(connections);
        connections.listen(listener);
        loop.watch(signals, POLLIN, [&](short) {
            signalfd_siginfo info{};
            if (::read(signals, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
                log.line("stopping on %s", name_of_stop(info.ssi_signo));
            }
            loop.stop();
        });
        log.line("serving %s", options.socket.c_str());
        if (!options.library.empty() && kept.restarts() == 0) {
            std::printf("MTIER_LIB_PATH=%s\n", options.library.c_str());
            std::fflush(stdout);
        }
        kept.ready();
        beat(loop, kept, pages);
        loop.run();
        in_time = service.idle_within(kStopPatience);
    }
    ::close(signals);
    if (!in_time) {  // a driver call hangs
        log.line("a bank does not finish; stopping without it");
        std::_Exit(kFailed);
    }
    return 0;
}

int keep(const Options &options) {
    ::signal(SIGPIPE, SIG_IGN);  // the reader is gone
    raise_file_limit();
    Listener listener;
    if (auto refused = listener.lock(options.socket)) return complain(*refused);
    if (auto refused = listener.listen()) return complain(*refused);
    return Keeper().run([&](Kept &kept) { return serve(options, listener.fd(), kept); });
}

int run(int argc, char **argv) {
    Options options;
    if (auto wrong = parse(argc, argv, &options)) return complain(*wrong, kWrongOptions);
    if (options.socket.empty()) options.socket = socket_path();
    if (options.status) return ask(options.socket, static_cast<std::uint16_t>(Op::kReport));
    if (options.flush) return ask(options.socket, static_cast<std::uint16_t>(pages::PagesOp::kForget));
    if (options.banks.empty()) return complain("no bank is given; give --bank host:BYTES", kWrongOptions);
    return keep(options);
}

}  // namespace

int main(int argc, char **argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception &error) {
        return complain(error.what());
    }
}

// settings.cpp: the environment, the log, planted failures, and the functions that tests call beside the
// driver's.
//
//     EMU_CC       8.0, 8.6, 8.9, 9.0 (default)         EMU_DEVICES   1 (default) or 2
//     EMU_SEED     orders and tempers; 0 (default)       EMU_MEMORY    bytes per device, default 4 GiB
//     EMU_LOG      a file: one JSON line per event       EMU_ABORT     1: a kernel's fault ends the program
//     EMU_RACES    0: no traces of device memory (they take 8 bytes per byte that kernels touch)
//     EMU_PLANT    faults of the program, for tests of tests: see plant.h
//     EMU_NO_PEER  1: the two devices cannot reach one another's memory
//     EMU_FAIL     launch:NAME:CODE  the next launch of NAME fails with CODE when it runs (sticky);
//                  launch:NAME:CODE:DEVICE  the next on that device
//                  alloc:N           the N-th device allocation from now is out of memory (several: a,b)
//
// Read by the first cuInit. emu_set changes one later, where a change has meaning (SEED, LOG, FAIL, PLANT, ABORT,
// and MEMORY and DEVICES before cuInit).
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "plant.h"
#include "state.h"

namespace emu {

namespace {

FILE *log_file = nullptr;
std::uint64_t log_count = 0;

bool apply(const std::string &name, const char *value) {
    Settings &s = driver().settings;
    if (name == "CC") {
        const double cc = std::atof(value);
        s.cc = static_cast<int>(cc * 10 + 0.5);
    } else if (name == "DEVICES") {
        s.devices = std::atoi(value);
    } else if (name == "SEED") {
        s.seed = std::strtoull(value, nullptr, 10);
        driver().random.state = s.seed;
    } else if (name == "MEMORY") {
        s.memory = std::strtoull(value, nullptr, 10);
    } else if (name == "FAIL") {
        s.fail = value;
        driver().allocations = 0;
    } else if (name == "PLANT") {
        if (!read_plants(value)) {
            std::fprintf(stderr, "emulated device: EMU_PLANT=%s: see tests/emu/driver/plant.h\n", value);
            return false;
        }
    } else if (name == "RACES") {
        s.races = std::strcmp(value, "0") != 0;
    } else if (name == "NO_PEER") {
        s.no_peer = value[0] != 0 && std::strcmp(value, "0") != 0;
    } else if (name == "ABORT") {
        s.abort = value[0] != 0 && std::strcmp(value, "0") != 0;
    } else if (name == "LOG") {
        if (log_file != nullptr) {
            std::fclose(log_file);
            log_file = nullptr;
        }
        if (value[0] != 0) {
            log_file = std::fopen(value, "ae");
            if (log_file == nullptr) {
                std::fprintf(stderr, "emulated device: cannot write EMU_LOG=%s\n", value);
                return false;
            }
        }
    } else {
        return false;
    }
    return true;
}

} // namespace

void read_settings() {
    for (const char *name : {"CC", "DEVICES", "SEED", "MEMORY", "FAIL", "ABORT", "NO_PEER", "RACES",
                             "PLANT", "LOG"}) {
        if (const char *value = std::getenv((std::string("EMU_") + name).c_str())) {
            apply(name, value);
        }
    }
}

bool logging() { return log_file != nullptr; }

void log_line(const std::string &event, const std::string &fields) {
    if (log_file != nullptr) {
        std::fprintf(log_file, "{\"n\":%llu,\"event\":\"%s\",%s}\n",
                     static_cast<unsigned long long>(++log_count), event.c_str(), fields.c_str());
        std::fflush(log_file);
    }
}

std::string json(const std::string &text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
        }
        if (static_cast<unsigned char>(c) < 0x20) {
            char escape[8];
            std::snprintf(escape, sizeof escape, "\\u%04x", c);
            out += escape;
        } else {
            out += c;
        }
    }
    return out + "\"";
}

void say(const std::string &report) {
    driver().last_report = report;
    std::fputs(report.c_str(), stderr);
}

namespace {

// Calls `use` with each comma-separated wish until it is true; that wish is spent when `spend`.
template <class F> bool any_wish(F use, bool spend) {
    std::string &all = driver().settings.fail;
    for (std::size_t at = 0; at < all.size();) {
        const std::size_t end = std::min(all.find(',', at), all.size());
        if (use(all.substr(at, end - at))) {
            if (spend) {
                all.erase(at, end - at + 1);
            }
            return true;
        }
        at = end + 1;
    }
    return false;
}

} // namespace

CUresult planted_launch_failure(const char *kernel, int device) {
    CUresult code = SUCCESS;
    const std::string start = std::string("launch:") + kernel + ":";
    any_wish(
        [&](const std::string &wish) {
            if (wish.compare(0, start.size(), start) != 0) {
                return false;
            }
            const std::size_t where = wish.find(':', start.size());
            if (where != std::string::npos && std::atoi(wish.c_str() + where + 1) != device) {
                return false;
            }
            code = std::atoi(wish.c_str() + start.size());
            return true;
        },
        true);
    return code;
}

bool planted_allocation_failure() {
    const std::uint64_t number = ++driver().allocations;
    return any_wish(
        [&](const std::string &wish) {
            return wish.compare(0, 6, "alloc:") == 0 &&
                   std::strtoull(wish.c_str() + 6, nullptr, 10) == number;
        },
        true);
}

} // namespace emu

extern "C" {

// emu_set("SEED", "3"): 0 when it was understood.
__attribute__((visibility("default"))) int emu_set(const char *name, const char *value) {
    const std::lock_guard<std::mutex> held(emu::driver().lock);
    return emu::apply(name, value) ? 0 : 1;
}

// The last report into `text` (at most `room` bytes with the final zero); its length. Empty when all went
// well so far.
__attribute__((visibility("default"))) std::size_t emu_last_report(char *text, std::size_t room) {
    const std::lock_guard<std::mutex> held(emu::driver().lock);
    const std::string &report = emu::driver().last_report;
    if (room > 0) {
        const std::size_t n = std::min(room - 1, report.size());
        std::memcpy(text, report.data(), n);
        text[n] = 0;
    }
    return report.size();
}

// Forgets sticky errors and the last report, so that one process can test many faults. A real device cannot
// do that.
__attribute__((visibility("default"))) void emu_heal() {
    emu::Driver &d = emu::driver();
    const std::lock_guard<std::mutex> held(d.lock);
    for (auto &device : d.devices) {
        device->sticky = SUCCESS;
        d.host.join(device->legacy.clock);
    }
    for (const emu::Stream *stream : d.streams) {
        d.host.join(stream->clock);
    }
    d.history = emu::History{};
    d.last_report.clear();
}

// Device memory as it is now, without running anything or being a copy in the log: 0 when the range is live.
__attribute__((visibility("default"))) int emu_peek(void *to, CUdeviceptr from, std::size_t bytes) {
    emu::Driver &d = emu::driver();
    const std::lock_guard<std::mutex> held(d.lock);
    emu::Memory *memory = d.memory_of(from);
    if (memory == nullptr || memory->holding(from, bytes) == nullptr) {
        return 1;
    }
    std::memcpy(to, memory->alias(from), bytes);
    return 0;
}

// Pieces of work that are enqueued and not done.
__attribute__((visibility("default"))) std::size_t emu_pending() {
    const std::lock_guard<std::mutex> held(emu::driver().lock);
    return emu::driver().pending.size();
}
}

// report.cpp: see report.h.
#include "report.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "engine.h"

namespace emu {

namespace {

struct Frame {
    std::string function, place;
};

std::string quoted(const char *path) {
    std::string text = "'";
    for (; *path != 0; path++) {
        text += *path == '\'' ? std::string("'\\''") : std::string(1, *path);
    }
    return text + "'";
}

std::vector<Frame> look_up(const void *pc) {
    Dl_info info;
    const auto *at = static_cast<const char *>(pc) - 1; // inside the call, not after it
    if (pc == nullptr || dladdr(at, &info) == 0) {
        return {{"?", "unknown place"}};
    }
    // Position-independent objects are named by offset, a fixed executable by address.
    const auto offset = static_cast<std::size_t>(at - static_cast<const char *>(info.dli_fbase));
    char tail[64];
    std::snprintf(tail, sizeof tail, " 0x%zx 2>/dev/null", offset);
    std::vector<Frame> frames;
    if (FILE *pipe = popen(("addr2line -i -f -C -e " + quoted(info.dli_fname) + tail).c_str(), "r")) {
        char function[1024], place[1024];
        while (std::fgets(function, sizeof function, pipe) && std::fgets(place, sizeof place, pipe)) {
            function[std::strcspn(function, "\n")] = 0;
            place[std::strcspn(place, " \n")] = 0;
            const char *path = place; // from the repository's root
            while (path[0] == '.' && path[1] == '/') {
                path += 2;
            }
            frames.push_back({function, path});
        }
        pclose(pipe);
    }
    if (frames.empty() || std::strncmp(frames[0].place.c_str(), "??", 2) == 0) {
        const char *name = std::strrchr(info.dli_fname, '/');
        std::snprintf(tail, sizeof tail, "+0x%zx", offset);
        return {
            {info.dli_sname ? info.dli_sname : "?", std::string(name ? name + 1 : info.dli_fname) + tail}};
    }
    return frames;
}

const std::vector<Frame> &frames_of(const void *pc) {
    static std::mutex lock;
    static std::unordered_map<const void *, std::vector<Frame>> known;
    const std::lock_guard<std::mutex> held(lock);
    const auto found = known.find(pc);
    return found != known.end() ? found->second : known.emplace(pc, look_up(pc)).first->second;
}

bool in_primitives(const Frame &frame) {
    return frame.place.find("ptx.cuh:") != std::string::npos ||
           frame.place.find("ptx_sm90.cuh:") != std::string::npos ||
           frame.place.find("emu.h:") != std::string::npos;
}

} // namespace

std::string line_of(const void *pc) {
    const auto &frames = frames_of(pc);
    for (const Frame &frame : frames) {
        if (!in_primitives(frame)) {
            return frame.place;
        }
    }
    return frames[0].place;
}

std::string lines_of(const void *pc) {
    std::string text;
    for (const Frame &frame : frames_of(pc)) {
        if (!in_primitives(frame)) {
            text += (text.empty() ? "    at " : "    in ") + frame.place + " (" + frame.function + ")\n";
        }
    }
    return text;
}

std::string mark_line(const void *pc) {
    return "\x01" + std::to_string(reinterpret_cast<std::uintptr_t>(pc)) + "\x02";
}

static std::string fill_in(const std::string &text) {
    std::string out;
    for (std::size_t i = 0; i < text.size(); i++) {
        if (text[i] != '\x01') {
            out += text[i];
            continue;
        }
        const auto address = std::strtoull(text.c_str() + i + 1, nullptr, 10);
        out += line_of(reinterpret_cast<const void *>(static_cast<std::uintptr_t>(address)));
        i = text.find('\x02', i);
    }
    return out;
}

void compose_report(const Executor &ex, Fault &fault) {
    const Launch &launch = *ex.launch;
    fault.where = line_of(fault.pc);
    fault.detail = fill_in(fault.detail);
    const unsigned thread = hot.self->index;
    char text[400];
    std::snprintf(text, sizeof text,
                  "    kernel %s, block (%u, %u, %u) of (%u, %u, %u), thread %u (warp %u, lane %u)\n"
                  "    launch %llu, seed %llu\n",
                  launch.kernel->name, ex.block_index.x, ex.block_index.y, ex.block_index.z, launch.grid.x,
                  launch.grid.y, launch.grid.z, thread, thread / LANES, thread % LANES,
                  static_cast<unsigned long long>(launch.number),
                  static_cast<unsigned long long>(launch.seed));
    fault.report = "emulated device: " + fault.kind + ": " + fault.detail + "\n" + text + lines_of(fault.pc);
}

} // namespace emu

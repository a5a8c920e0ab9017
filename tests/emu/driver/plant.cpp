// plant.cpp: see plant.h.
#include "plant.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace emu {

namespace {

struct Plant {
    std::string what, name;
    std::vector<double> numbers;
    std::size_t calls = 0;
};

std::vector<Plant> plants;
std::size_t count = 0, allocations = 0;
std::size_t graphs = 0;
std::vector<Node> graph_before;

bool is(const Plant &plant, const char *what, std::size_t numbers) {
    return plant.what == what && plant.numbers.size() == numbers;
}

bool names(const Plant &plant, const char *kernel) {
    const std::string &name = plant.name;
    return !name.empty() && name.back() == '*' ? std::strncmp(kernel, name.c_str(), name.size() - 1) == 0
                                               : name == kernel;
}

template <class T> void change(unsigned char *at, T more) {
    T value;
    std::memcpy(&value, at, sizeof value);
    value += more;
    std::memcpy(at, &value, sizeof value);
}

std::vector<std::string> split(const std::string &text, char by) {
    std::vector<std::string> parts;
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t end = std::min(text.find(by, at), text.size());
        parts.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    return parts;
}

// Whether it is one of the kinds in plant.h.
bool known(const Plant &p) {
    return (p.what == "skip" && p.numbers.size() <= 2) || is(p, "roll", 2) || is(p, "change", 2) ||
           is(p, "change8", 2) || is(p, "scale", 2) || is(p, "swap", 3) || is(p, "grid", 2) ||
           is(p, "shared", 1) || is(p, "stream", 0) || is(p, "alloc", 2) || is(p, "instantiate", 1);
}

} // namespace

bool read_plants(const std::string &text) {
    plants.clear();
    count = allocations = graphs = 0;
    for (const std::string &one : split(text, ',')) {
        if (one.empty()) {
            continue;
        }
        const std::vector<std::string> words = split(one, ':');
        Plant plant{words[0], "", {}, 0};
        for (std::size_t i = 1; i < words.size(); i++) {
            char *end = nullptr;
            const double number = std::strtod(words[i].c_str(), &end);
            if (!words[i].empty() && *end == 0) {
                plant.numbers.push_back(number);
            } else if (plant.name.empty()) {
                plant.name = words[i];
            } else {
                return false;
            }
        }
        if (!known(plant)) {
            return false;
        }
        plants.push_back(plant);
    }
    return true;
}

bool planted_skip(const char *call, const Stream *stream) {
    for (Plant &plant : plants) {
        const std::vector<double> &n = plant.numbers;
        const bool here = n.empty() || (stream != nullptr && n[0] == stream->number);
        if (plant.what != "skip" || plant.name != call || !here) {
            continue;
        }
        if (n.size() < 2 || n[1] == static_cast<double>(++plant.calls)) {
            count++;
            return true;
        }
    }
    return false;
}

bool planted_launch(Command &c, Stream *&stream, Device *device) {
    for (const Plant &plant : plants) {
        const std::vector<double> &n = plant.numbers;
        if (!names(plant, c.kernel->name) || plant.what == "alloc") {
            continue;
        }
        count++;
        unsigned char *const arguments = c.packed.data();
        if (plant.what == "skip") {
            return false;
        }
        if (plant.what == "change") {
            change(arguments + static_cast<std::size_t>(n[0]), static_cast<std::int32_t>(n[1]));
        } else if (plant.what == "change8") {
            change(arguments + static_cast<std::size_t>(n[0]), static_cast<std::int64_t>(n[1]));
        } else if (plant.what == "scale") {
            float value;
            std::memcpy(&value, arguments + static_cast<std::size_t>(n[0]), sizeof value);
            value *= static_cast<float>(n[1]);
            std::memcpy(arguments + static_cast<std::size_t>(n[0]), &value, sizeof value);
        } else if (plant.what == "swap") {
            unsigned char *a = arguments + static_cast<std::size_t>(n[0]);
            std::swap_ranges(a, a + static_cast<std::size_t>(n[2]), arguments + static_cast<std::size_t>(n[1]));
        } else if (plant.what == "grid") {
            c.grid.x += static_cast<unsigned>(static_cast<int>(n[0]));
            c.grid.y += static_cast<unsigned>(static_cast<int>(n[1]));
        } else if (plant.what == "shared") {
            c.shared_bytes += static_cast<std::size_t>(static_cast<std::ptrdiff_t>(n[0]));
        } else if (plant.what == "stream") {
            stream = &device->legacy;
        }
    }
    return true;
}

bool planted_upload(Command &c) {
    for (const Plant &plant : plants) {
        const bool skips = is(plant, "skip", 1) && plant.name == "upload";
        if (c.from.memory != nullptr || (!skips && !is(plant, "roll", 2)) ||
            plant.numbers[0] != static_cast<double>(c.bytes * c.rows)) {
            continue;
        }
        count++;
        if (skips) {
            return false;
        }
        const auto by = static_cast<std::size_t>(plant.numbers[1]);
        std::vector<unsigned char> bytes(c.bytes * c.rows);
        for (std::size_t i = 0; i < bytes.size(); i++) {
            const std::size_t from = (i + by) % bytes.size();
            const std::uintptr_t row = c.from.address + from / c.bytes * c.from.pitch;
            bytes[i] = reinterpret_cast<const unsigned char *>(row)[from % c.bytes];
        }
        c.staged = std::make_shared<std::vector<unsigned char>>(std::move(bytes));
    }
    return true;
}

std::size_t planted_bytes(std::size_t bytes) {
    allocations++;
    for (const Plant &plant : plants) {
        if (plant.what == "alloc" && plant.numbers[0] == static_cast<double>(allocations)) {
            count++;
            bytes += static_cast<std::size_t>(static_cast<std::ptrdiff_t>(plant.numbers[1]));
        }
    }
    return bytes;
}

void planted_graph(GraphExec &made) {
    graphs++;
    for (const Plant &plant : plants) {
        if (plant.what == "instantiate" && plant.numbers[0] == static_cast<double>(graphs)) {
            count++;
            made.nodes = graph_before;
        }
    }
    if (!plants.empty()) {
        graph_before = made.nodes;
    }
}

} // namespace emu

// Times that a planted fault changed something.
extern "C" __attribute__((visibility("default"))) std::size_t emu_planted() {
    const std::lock_guard<std::mutex> held(emu::driver().lock);
    return emu::count;
}

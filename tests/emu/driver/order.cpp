// order.cpp: see order.h.
#include "order.h"

#include <algorithm>

#include "state.h"

namespace emu {

void Clock::join(const Clock &other) {
    for (const auto &[stream, work] : other.newest) {
        std::uint64_t &mine = newest[stream];
        mine = std::max(mine, work);
    }
}

bool Clock::covers(int stream, std::uint64_t work) const {
    const auto found = newest.find(stream);
    return found != newest.end() && work <= found->second;
}

void History::add(const Turn &turn, std::uint32_t first, std::uint32_t last, std::string what) {
    done_.push_back(Done{first, last, turn.stream, turn.work, turn.node, std::move(what)});
}

namespace {

// Whether node `before` leads to node `after`, which has a greater number.
bool leads_to(const std::vector<Node> &nodes, std::size_t before, std::size_t after) {
    std::vector<bool> seen(nodes.size());
    std::vector<std::size_t> next{after};
    while (!next.empty()) {
        const std::size_t node = next.back();
        next.pop_back();
        if (node == before) {
            return true;
        }
        for (const std::size_t earlier : nodes[node].after) {
            if (earlier >= before && !seen[earlier]) {
                seen[earlier] = true;
                next.push_back(earlier);
            }
        }
    }
    return false;
}

} // namespace

std::vector<Unordered> History::unordered(const Turn &turn) const {
    std::vector<Unordered> found;
    for (const Done &done : done_) {
        const bool before = done.work == turn.work && turn.nodes != nullptr
                                ? leads_to(*turn.nodes, done.node, turn.node)
                                : turn.clock->covers(done.stream, done.work);
        if (!before) {
            found.push_back(Unordered{done.first, done.last, done.what});
        }
    }
    return found;
}

void History::forget(const Clock &host) {
    done_.erase(std::remove_if(done_.begin(), done_.end(),
                               [&](const Done &done) { return host.covers(done.stream, done.work); }),
                done_.end());
}

std::string trace_range(Memory &memory, std::uintptr_t address, std::size_t bytes, bool write, std::uint32_t epoch,
                  const std::vector<Unordered> &unordered) {
    const Shadow &shadow = memory.shadow();
    if (shadow.traces == nullptr) {
        return "";
    }
    Trace *c = shadow.traces + (address - shadow.base) / CELL;
    for (Trace *end = c + (address % CELL + bytes + CELL - 1) / CELL; c != end; c++) {
        const Unordered *other = find_unordered(unordered, c->write_epoch);
        const bool wrote = other != nullptr;
        if (!wrote && write) {
            other = find_unordered(unordered, c->read_epoch);
        }
        if (other != nullptr) {
            const auto at = shadow.base + static_cast<std::uintptr_t>(c - shadow.traces) * CELL;
            return std::string(write ? "writes " : "reads ") + memory.describe(std::max(at, address)) +
                   ", which " + other->what + (wrote ? " wrote" : " read") +
                   ": no stream, event or wait puts one before the other";
        }
        if (write) {
            c->write_epoch = epoch;
            c->writer = UNTRACKED;
        } else {
            c->read_epoch = epoch;
            c->reader = UNTRACKED;
        }
    }
    return "";
}

} // namespace emu

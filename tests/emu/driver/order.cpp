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

struct Before {
    std::vector<bool> end, begin; // of all nodes: over when this one ends, and when it begins
};

Before before(const std::vector<Node> &nodes, std::size_t node) {
    Before found{std::vector<bool>(nodes.size()), std::vector<bool>(nodes.size())};
    const auto all_before = [&](std::vector<bool> &over, std::vector<std::size_t> next) {
        while (!next.empty()) {
            const std::size_t at = next.back();
            next.pop_back();
            if (!over[at]) {
                over[at] = true;
                next.insert(next.end(), nodes[at].after.begin(), nodes[at].after.end());
            }
        }
    };
    all_before(found.end, nodes[node].after);
    for (std::size_t at = node; at != NO_NODE; at = nodes[at].overlaps) { // back along the chain
        std::vector<std::size_t> waited_for = nodes[at].after;
        waited_for.erase(std::remove(waited_for.begin(), waited_for.end(), nodes[at].overlaps), waited_for.end());
        all_before(found.begin, waited_for);
    }
    return found;
}

} // namespace

std::vector<Unordered> History::unordered(const Turn &turn) const {
    const Before nodes = turn.nodes != nullptr ? before(*turn.nodes, turn.node) : Before{};
    std::vector<Unordered> found;
    for (const Done &done : done_) {
        bool end, begin;
        if (done.work == turn.work && turn.nodes != nullptr) {
            end = nodes.end[done.node];
            begin = nodes.begin[done.node];
        } else {
            end = turn.clock->covers(done.stream, done.work);
            begin = turn.begin == nullptr ? end : turn.begin->covers(done.stream, done.work);
        }
        if (!end || !begin) {
            found.push_back(Unordered{done.first, done.last, done.what, end});
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

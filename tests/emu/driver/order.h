// order.h: which work comes before which, by what streams, events and the host's waits say and nothing else.
//
// A clock names, for every stream, the newest piece of work that is known to be over.
//
//     stream   what its newest work comes after, and that work
//     event    the clock of its stream when it was recorded
//     host     all that the program has waited for, on any thread
//
// New work takes its stream's clock and the host's; a stream that waits for an event takes the event's. Whether
// the other work happens to be done already counts for nothing: so a missing event shows under every seed.
//
// A programmatic launch may begin while the launch before it in its stream runs: it begins after what that one began
// after, so that a chain of them reaches back to the last launch that waits for all before it. What lies between is
// ordered with it by its grid_wait only, which also makes its end the end of all those. Records do not end a chain, nor
// do waits for events, whose work is over when it begins; copies, fills and graphs do.
//
// The history remembers the epochs (races.h) that each launch and copy had. What touches memory looks at the
// traces of those that its own clock does not cover. One trace per cell holds the last reader only, so of
// several unordered readers before a writer, the last one is named, and one that an ordered reader followed is
// missed.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "../engine.h"
#include "../memory.h"

namespace emu {

struct Node;

struct Clock {
    std::map<int, std::uint64_t> newest; // work, by stream

    void join(const Clock &other);
    void add(int stream, std::uint64_t work) { newest[stream] = work; }
    bool covers(int stream, std::uint64_t work) const;
};

// Work whose turn it is; of a graph, one node.
struct Turn {
    int stream = 0;
    std::uint64_t work = 0;
    const Clock *clock = nullptr;
    const Clock *begin = nullptr; // null: the same
    const std::vector<Node> *nodes = nullptr; // of the graph, if it is one
    std::size_t node = 0;
};

class History {
  public:
    // `what` did its work in the epochs from `first` to `last`, later ones than all before.
    void add(const Turn &turn, std::uint32_t first, std::uint32_t last, std::string what);
    // What was done and does not come before this turn, or not before its grid_wait.
    std::vector<Unordered> unordered(const Turn &turn) const;
    // Forgets what the host waited for. For when nothing is pending: all to come is after that.
    void forget(const Clock &host);

  private:
    struct Done {
        std::uint32_t first, last;
        int stream;
        std::uint64_t work;
        std::size_t node;
        std::string what;
    };
    std::vector<Done> done_; // by epoch
};

// Looks at what a copy or fill touches, and leaves its trace. A conflict in words, or "".
std::string trace_range(Memory &memory, std::uintptr_t address, std::size_t bytes, bool write, std::uint32_t epoch,
                  const std::vector<Unordered> &unordered);

} // namespace emu

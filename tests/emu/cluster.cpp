// cluster.cpp: blocks that run together, each an Executor of its own. See engine.h and async.h.
//
//     block 0   threads, shared memory, mbarriers, clocks  ◀─ arrivals, copies ─▶  block 1   the same
//                 └──────────────────── the cluster's barrier, one for both ───────────────────┘
//
// What one block does to another is ordered by two things: an mbarrier that is arrived at from there and waited for
// here, and the cluster's barrier. A block's end is such a moment too: what others did to it must be known to one of
// its threads by then.
#include <algorithm>
#include <string>

#include "async.h"
#include "report.h"

#define CALLER __builtin_return_address(0)

namespace emu {

int cluster_rank() { return static_cast<int>(hot.executor->rank); }

Async &block_of_cluster(unsigned rank, const char *what, const void *pc) {
    Executor &me = *hot.executor;
    if (rank >= me.cluster) {
        me.fail(719, "no such block",
                std::string(what) + " block " + std::to_string(rank) + " of a cluster of " + std::to_string(me.cluster),
                pc);
    }
    Executor &ex = *me.blocks[rank];
    if (ex.over()) {
        me.fail(719, "cluster exit",
                std::string(what) + " block " + std::to_string(rank) +
                    " of the cluster, which has returned: a cluster_barrier must come last",
                pc);
    }
    return ex.remote() ? *ex.async : async();
}

void mbarrier_arrive_cluster(void *at, int rank) {
    const void *pc = CALLER;
    Async &there = block_of_cluster(static_cast<unsigned>(rank), "an arrival at an mbarrier of", pc);
    Phases &b = there.find(at, pc);
    if (there.ex.remote()) {
        if (!b.fenced) {
            there.ex.fail(719, "missing proxy fence",
                          "an arrival at an mbarrier" + there.ex.whose() + " that no fence_mbarrier_init followed", pc);
        }
        b.remote = b.phase + 1;
        b.remote_pc = pc;
    }
    there.arrive(b, 0, pc);
    async().maybe_progress();
}

bool Async::told_of_write(const Cell &c) const {
    return c.write_epoch < ex.first_epoch || c.writer >= ATOMIC ||
           known().steps[c.writer / LANES] > c.write_step;
}

bool Async::told_of_read(const Cell &c) const {
    if (c.read_epoch < ex.first_epoch || c.reader == UNTRACKED || c.reader >= SEVERAL) { // which ones is not known
        return true;
    }
    return known().steps[c.reader < ONE_WARP ? c.reader / LANES : c.reader & ~ONE_WARP] > c.read_step;
}

// ---- the cluster's barrier

namespace {

// All threads of all blocks have come: what any of them knows, all do.
void open(Executor &first) {
    Known all{};
    bool waited = false; // some thread, for the launch before
    for (unsigned r = 0; r < first.cluster; r++) {
        Executor &ex = *first.blocks[r];
        waited = waited || std::any_of(ex.threads.begin(), ex.threads.begin() + ex.thread_count,
                                       [](const Thread &t) { return t.waited; });
        for (unsigned w = 0; w < ex.warp_count; w++) {
            all.join(ex.async->warps[w].clock);
            all.of[r].steps[w] = ++ex.warps[w].step;
        }
    }
    for (unsigned r = 0; r < first.cluster; r++) {
        Executor &ex = *first.blocks[r];
        ex.epoch += first.cluster;
        for (unsigned t = 0; t < ex.thread_count; t++) {
            ex.threads[t].waited |= waited;
        }
        for (unsigned w = 0; w < ex.warp_count; w++) {
            ex.async->warps[w].clock = all;
        }
        for (Phases &b : ex.async->mbarriers) {
            b.told = b.remote;
        }
        wake(ex);
    }
    first.at_cluster_barrier = 0;
    first.cluster_opened++;
}

} // namespace

void cluster_barrier() {
    const void *pc = CALLER;
    Executor &me = async().ex, &first = *me.blocks[0];
    for (unsigned r = 0; r < me.cluster; r++) {
        if (me.blocks[r]->done != 0) {
            me.fail(719, "barrier divergence",
                    "thread " + std::to_string(hot.self->index) +
                        " waits at the cluster's barrier, but others have returned:\n" + me.waiting(),
                    pc);
        }
    }
    first.cluster_pc = pc;
    if (++first.at_cluster_barrier == me.thread_count * me.cluster) {
        open(first);
        me.preempt(hot.self);
        return;
    }
    for (const std::uint32_t before = first.cluster_opened; first.cluster_opened == before;) {
        sleep(Op::Cluster, nullptr, 0, pc);
    }
}

} // namespace emu

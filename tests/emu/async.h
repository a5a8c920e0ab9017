// async.h: what Hopper does beside the threads: mbarriers, bulk copies of tensors, wgmma, named barriers.
//
//     bulk copy  issued: its destination is poison, nobody may touch it     lands: when nothing else can run, or at a
//                drawn moment, in any order; its bytes count in the phase that its mbarrier is in then
//     wgmma      issued: sums are poison     done: by the wait that names it, from the operands as they are then
//
// A report must not hang on who was faster. So what was seen is known, not guessed: each warp has a clock of what the
// others did before it, which arrivals hand to the phase they belong to, and phases to those who wait for them:
//
//     steps     of each warp (races.h), so that plain accesses are ordered by mbarriers and named barriers too
//     retired   the last wgmma that each warp has waited for: only then may its operands be written
//     phases    of each mbarrier that are known to be over: only then may what they brought be read
//
// All three of each block of the cluster, for what one block's copies write in another.
//
// A lane's arrival hands on what its warp did in the same step, a little more than it should: lanes that still read are
// then not seen. Named barriers are of whole warps, and exact.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "warp.h"

namespace emu {

constexpr unsigned MAX_WARPS = MAX_THREADS / LANES, MAX_MBARRIERS = 64;

struct Known {
    struct Block {
        std::uint32_t steps[MAX_WARPS], retired[MAX_WARPS], phases[MAX_MBARRIERS];
    } of[MAX_CLUSTER];
    void join(const Known &other); // of the blocks that there are
};

struct Phases {         // an mbarrier
    unsigned at;        // its byte of shared memory
    bool live;
    int arrivals, missing;
    std::int64_t bytes; // expected and not there
    std::uint32_t phase, waited, filled; // phases over; of those, somebody saw; the last that a copy belonged to, + 1
    unsigned maker;     // the thread that initialised it
    bool fenced;
    std::uint32_t made, made_step; // the epoch, its warp's step
    std::uint32_t remote, told; // the last phase that another block arrived in, + 1; those that a thread here knows of
    const void *remote_pc;
    bool coming_waited, over_waited; // some of those who came had passed grid_wait
    Known coming, over;
};

struct Named {
    unsigned threads, come;
    std::uint32_t opened;
    bool coming_waited, over_waited;
    Known coming, over;
};

struct BulkCopy {
    std::vector<unsigned char> bytes; // as they were when it was issued
    unsigned to, mbarrier;
    bool waited; // whoever issued it had passed grid_wait
    const void *pc;
};

struct Sums { // of a warp, in flight
    float *at[LANES];
    int count, users; // each lane's; wgmmas under way
    std::vector<float> values;
};

struct Multiply { // a wgmma of a warp, issued
    std::uint32_t serial, group;
    std::uint64_t a, b;
    Quad kept[LANES];
    int n;
    bool b_n_major, add, a_kept;
    const void *pc;
    Sums *sums;
};

struct WarpAsync {
    Known clock;
    std::uint32_t issued, group; // serials go on from block to block
    bool fenced;                 // since the last commit
    unsigned registers, multiplies;
    const void *registers_pc;
    std::vector<Multiply> pending;
    std::vector<std::unique_ptr<Sums>> sums;
};

struct Shape { // of the wgmmas of a warp group, in order: all four warps must agree
    std::uint64_t a, b;
    int n;
    bool b_n_major, add;
};

// Bits of Executor::in_flight.
enum : unsigned char { CP_ASYNC = 1, BULK = 2, LANDED = 4, MULTIPLIED = 8, MBARRIER = 16 };

struct Async {
    Executor &ex;
    bool used = false; // by this block
    std::vector<Phases> mbarriers;
    std::vector<BulkCopy> copies;
    Named named[16] = {};
    WarpAsync warps[MAX_WARPS] = {};
    std::vector<Shape> shapes[MAX_WARPS / 4];
    // Of each 16 bytes: the copy that brought them, and the last wgmma of each warp that reads them.
    std::vector<std::uint32_t> landed_by, landed_phase, read_by;
    // Of each thread: the moment of its last proxy fence.
    std::uint32_t fence_epoch[MAX_THREADS], fence_step[MAX_THREADS];

    const void *last_copy = nullptr, *last_multiply = nullptr; // lines

    explicit Async(Executor &e) : ex(e) {}
    void begin(); // the first use in a block
    bool progress(); // lands a copy, in any block of the cluster; false: there is none
    bool land();     // one of this block's
    void maybe_progress();
    void block_barrier();
    void check_exit(const Thread &self);
    void check_end();
    std::string waiting(const Thread &t) const;

    Phases &find(const void *at, const void *pc, unsigned *index = nullptr);
    void arrive(Phases &b, int bytes, const void *pc);
    void turn(Phases &b);
    void wait_phase(void *at, int parity, bool of_cluster, const void *pc);
    // The running thread's warp, and what it knows of this block.
    WarpAsync &me() const { return hot.executor->async->warps[hot.self->index / LANES]; }
    const Known::Block &known() const { return me().clock.of[ex.rank]; }
    unsigned char &flags(unsigned granule) const { return ex.in_flight[granule]; }
    // A reader that is no ordinary load: the tensor core. A writer that is no store: a copy.
    std::uintptr_t check_place(unsigned granule, const char *who, Access access, const void *pc);
    void check_read(unsigned granule, std::uint32_t serial, const void *pc);
    void check_write(unsigned granule, const void *pc);
    void check_generic(const Cell &c, const char *who, const void *pc);
    void touched(std::uintptr_t address, std::size_t bytes, Access access, const void *pc);
    bool still_read(unsigned granule, unsigned *by) const;
    // Of a cell here, by the running thread of another block: whether it comes after the last write, the reads.
    bool told_of_write(const Cell &c) const;
    bool told_of_read(const Cell &c) const;
    void issue(Thread *lanes);
    void wait(Thread *lanes, unsigned groups_left);
    void named_barrier(Thread *lanes, bool waits);
    void multiply(Multiply &m, unsigned warp);
};

// That of the running block.
inline Async &async() {
    Async &a = *hot.executor->async;
    if (!a.used) {
        a.begin();
    }
    return a;
}
inline std::string byte(unsigned at) { return "shared byte " + std::to_string(at); }

// Leaves the running thread until something was arrived at: for wake(), or for nothing.
void sleep(Op op, const void *argument, unsigned value, const void *pc);
void wake(Executor &ex);
// A block of the running cluster. `what` is done to it.
Async &block_of_cluster(unsigned rank, const char *what, const void *pc);

// What a warp does together, when it is complete.
void perform_async(Op op, Thread *lanes);

} // namespace emu

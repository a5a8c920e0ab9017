// engine.h: runs one block of CUDA threads on one host thread, or the blocks of one cluster.
//
//     Launch ──▶ Executor::run: for each block (each cluster), in an order drawn from the seed
//                  │  one fiber per CUDA thread, all created at the top of the kernel
//                  ▼
//     a thread runs until it  ── arrives at a warp collective ─▶ its next lane runs; the 32nd does the work
//                             ── arrives at the block's barrier ─▶ some other warp runs; the last opens it
//                             ── is pre-empted (drawn) ─▶ some other warp runs
//                             ── returns ─▶ some other thread runs; the last one ends the block
//                             ── does something forbidden ─▶ all fibers are dropped; a report
//
// A warp runs ahead of the others as far as barriers let it. That is what a GPU may do and seldom does, so a
// missing barrier shows here at once. Which warp, how often it is interrupted and in which order its lanes go
// is drawn per block from the seed.
//
// An Executor is one block. Blocks of a cluster are an Executor each; the first runs them all, `hot` is of the block
// whose thread is running, and what thread comes next is drawn from all of them (cluster.cpp).
//
// Only fibers of the running blocks exist. They never move to another host thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emu.h"
#include "fiber.h"
#include "races.h"

namespace emu {

class Memory;
struct Async;
struct Executor;

constexpr int LANES = 32;
constexpr int MAX_THREADS = 1024;              // per block
constexpr unsigned MAX_CLUSTER = 2;            // blocks that run together
constexpr std::size_t MAX_SHARED = 227 * 1024; // bytes per block, the most that any card allows
constexpr std::size_t STACK = 64 * 1024;       // bytes per fiber, guard page included

struct Dim {
    unsigned x, y, z;
    constexpr Dim(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// A kernel as the registry knows it: `call` reads the parameters from a packed buffer and calls it.
struct Kernel {
    const char *name;
    void (*call)(const unsigned char *packed);
    const void *entry;
    int parameters;
    const std::size_t *offsets; // [parameters]
    const std::size_t *sizes;   // [parameters]
    std::size_t packed_bytes;
    int max_threads; // of its launch bounds; 0: none known
};

// What no stream, event or wait puts before a launch, though it ran first: its epochs (races.h), and its name.
struct Unordered {
    std::uint32_t first, last;
    std::string what;
    bool until_wait; // before a grid_wait of this launch all the same, which may begin while that one runs
};
// The one that had this epoch, or null. They are sorted.
const Unordered *find_unordered(const std::vector<Unordered> &all, std::uint32_t epoch);

struct Launch {
    const Kernel *kernel;
    const unsigned char *packed; // parameters
    Dim grid, block;
    std::size_t shared_bytes;
    std::uint64_t seed;
    std::uint64_t number;              // of this launch in this process, from 1
    std::vector<Memory *> memories;    // what the kernel may reach
    std::vector<Memory *> unreachable; // other devices without peer access
    std::vector<Unordered> unordered;
    bool programmatic = false; // may begin before the launch before it is over: see grid_wait
    unsigned cluster = 1;      // blocks, next to each other in x
};

// What went wrong, and where. `code` is the CUDA driver's error for it.
struct Fault {
    int code = 0;
    const void *pc = nullptr;
    std::string kind; // "out of bounds", "barrier divergence", ..
    std::string detail;
    std::string report; // everything, as printed
    std::string where;  // file:line of the access
};

// Small and seeded: splitmix64.
struct Random {
    std::uint64_t state;
    std::uint64_t next() {
        std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    unsigned below(unsigned n) { return static_cast<unsigned>((next() >> 32) * n >> 32); }
};

// ---- the threads of a block
// ---------------------------------------------------------------------------------

enum class Op : std::uint8_t {
    None,
    Barrier,
    Shuffle,
    ShuffleXor,
    Ballot,
    Ldmatrix,
    LdmatrixTrans,
    Mma,
    WgmmaFence, // from here on: async.h
    Wgmma,
    WgmmaCommit,
    WgmmaWait,
    Named,
    NamedArrive,
    SetRegisters,
    Mbarrier,
    Cluster,
};
const char *op_name(Op op);

struct AsyncCopy {
    unsigned char *to;
    const unsigned char *from;
    int bytes;
    unsigned group;
    const void *pc; // where it was issued
};

enum class State : std::uint8_t { Ready, AtCollective, AtBarrier, AtAsync, Done };

struct Thread {
    Context context;
    unsigned index; // threadIdx.x
    State state;
    bool waited;    // comes after a grid_wait of the block, its own or one that a barrier tells of
    Op op;          // the collective it waits in
    const void *pc; // where it waits
    // In: what it brought to the collective. Out: what it takes away.
    union {
        struct {
            FloatQuad d;
            Quad a;
            unsigned b[2];
        } mma;
        struct {
            unsigned value, argument;
        } word;
        const unsigned char *row;
        Quad quad;
        struct {
            float *d;
            std::uint64_t a, b;
            Quad kept;
            int n;
            bool b_n_major, add, a_kept;
        } wgmma;
    };
    unsigned group;                // cp.async: the group that the next commit closes
    unsigned landed;               // groups below this one have landed
    std::vector<AsyncCopy> copies; // in flight, oldest first
};

struct Warp {
    unsigned alive;   // lanes that have not returned
    unsigned ready;   // lanes that can run
    unsigned arrived; // lanes in the collective under way
    unsigned waiting; // lanes at an mbarrier or a named barrier
    Op op;
    const void *pc;
    unsigned first_lane; // lanes are tried from this one on
    std::uint16_t step;  // warp barriers passed: see races.h
};

// A live allocation.
struct Hit {
    std::uintptr_t base, bytes;
    const Shadow *shadow;
    bool holds(std::uintptr_t address, std::size_t n) const {
        return address - base < bytes && address - base + n <= bytes;
    }
};

// What the hooks look at on every access: in thread-local storage, no indirection. All zero outside a kernel.
struct Hot {
    std::uintptr_t shared, shared_bytes;
    std::uintptr_t stacks, stacks_bytes;
    Hit hit, older;           // the device allocation that was last accessed, and the one before
    std::int64_t budget;      // hooked accesses until the next pre-emption
    unsigned char *in_flight; // per 16 bytes of shared memory: not 0 while a cp.async writes there (and async.h)
    Thread *self;
    Executor *executor;
};
extern __thread Hot hot __attribute__((tls_model("initial-exec"), visibility("hidden")));

struct Executor {
    Executor();
    ~Executor();
    Executor(const Executor &) = delete;

    // Runs all blocks; false on a fault, which is then in `fault`.
    bool run(const Launch &launch);

    Fault fault;

    // ---- for the parts of the engine; called on fibers ----
    Warp &warp_of(const Thread &t) { return warps[t.index / LANES]; }
    Thread *lanes_of(const Thread &t) { return &threads[t.index / LANES * LANES]; }
    // Leaves the running thread (its state is set) for some thread that can run. Returns when it is chosen
    // again.
    void leave(Thread *self);
    // The running thread may go on, or be interrupted.
    void maybe_preempt(Thread *self);
    void preempt(Thread *self);
    void thread_main();
    // Ends the launch. `pc`: a return address in the kernel.
    [[noreturn]] void fail(int code, const char *kind, const std::string &detail, const void *pc);
    // Whether two return addresses belong to one source line (asked on the main stack; remembered).
    bool same_line(const void *a, const void *b);
    // Whether an mbarrier or a named barrier puts the last write (the reads) of a cell before this moment.
    bool ordered_write(const Trace &c, const Moment &now) const;
    bool ordered_read(const Trace &c, const Moment &now) const;
    // What `count` threads from this one on know of a grid_wait is known to all of them now.
    void share_wait(Thread *first, unsigned count);
    // Threads that wait, grouped: for reports of deadlock and divergence.
    std::string waiting() const;
    // Of the blocks of the cluster: whether another one's thread is running; whether all threads have returned.
    bool remote() const { return hot.executor != this; }
    bool over() const { return done == thread_count; }
    std::string whose() const; // " of block (1, 0, 0)" when it is remote, else ""

    const Launch *launch = nullptr;
    Dim block_index;
    unsigned thread_count = 0, warp_count = 0;
    unsigned at_barrier = 0, done = 0;
    const void *barrier_pc = nullptr;
    unsigned barrier_first = 0;
    unsigned current_warp = 0;
    int preempt_style = 0;
    Random random{0};
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    unsigned char *shared = nullptr;
    std::vector<unsigned char> in_flight;
    std::unique_ptr<Async> async; // what only Hopper has
    // For races.h. Epochs are never used twice, so cells need no clearing.
    std::uint32_t epoch = 0, first_epoch = 0, launch_epoch = 0;
    std::uint32_t unordered_from = 0; // first epoch of `launch->unordered`; the launch's own: there are none
    bool ordered_once_waited = false; // all of them are `until_wait`
    // Cells that this launch read before its grid_wait: the epoch of the reader before, of an overlapped launch.
    std::unordered_map<const Trace *, std::uint32_t> hidden_readers;
    std::vector<Cell> cells;
    std::vector<std::pair<std::uint32_t, std::uint64_t>> blocks_begun; // first epoch, number; of a cluster: the first's
    Dim block_of(std::uint32_t epoch) const;
    Begun begun() const { return Begun{launch_epoch, first_epoch, cluster - 1}; }
    // The cluster. Its blocks take turns at epochs, so that an epoch tells the block: epoch % cluster == rank.
    unsigned cluster = 1, rank = 0;
    Executor *blocks[MAX_CLUSTER] = {this}; // by rank
    unsigned at_cluster_barrier = 0;        // of the first block: threads of all that have come,
    std::uint32_t cluster_opened = 0;       // how often it opened,
    const void *cluster_pc = nullptr;       // and where one of them waits

  private:
    void prepare(const Launch &l);
    void begin_block();
    bool run_blocks();
    void enter();     // `hot` is of this block
    bool draw_warp(); // one that can run, of any block; false: there is none
    Thread *pick();
    std::string waiting_here() const; // of this block
    unsigned pick_lane(Warp &w);
    void draw_budget();

    Context main_{};
    unsigned char *stacks_ = nullptr;
    unsigned char *shared_map_ = nullptr;
    std::unique_ptr<Executor> others_[MAX_CLUSTER - 1]; // of the first block; made when a launch needs them
    // From here on of the first block alone.
    bool failed_ = false;
    bool finished_ = false;
    // A question that a fiber has for the main stack.
    const void *ask_a_ = nullptr, *ask_b_ = nullptr;
    bool answer_ = false;
};

// Block and thread limits, shared memory: in words what is wrong with a launch, or "".
std::string check_launch(const Launch &launch);

} // namespace emu

// engine.cpp: fibers, blocks and the order in which they run. See engine.h.
#include "engine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <sys/mman.h>

#include "async.h"
#include "memory.h"
#include "report.h"

namespace emu {

__thread Hot hot;

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
asm(R"(
.text
.p2align 4
.globl emu_switch_stack
.hidden emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch_stack, . - emu_switch_stack
)");
#endif

namespace {

constexpr std::size_t PAGE = 4096;
constexpr std::size_t SHARED_OFFSET = 128; // the window is 128-byte aligned and no better
constexpr std::int64_t NEVER = INT64_MAX;

void fiber_entry() { hot.executor->thread_main(); }

unsigned char *map(std::size_t bytes) {
    void *at =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        std::perror("emu: cannot map stacks");
        std::abort();
    }
    return static_cast<unsigned char *>(at);
}

} // namespace

const char *op_name(Op op) {
    static const char *const names[] = {
        "nothing",     "warp_barrier", "shuffle",      "shuffle_xor",    "ballot",          "ldmatrix_x4",
        "ldmatrix_x4_trans", "mma_16816", "wgmma_fence", "wgmma",        "wgmma_commit",    "wgmma_wait",
        "named_barrier", "named_arrive", "set_registers", "mbarrier_wait", "cluster_barrier"};
    return names[static_cast<int>(op)];
}

Executor::Executor()
    : threads(MAX_THREADS), warps(MAX_THREADS / LANES), in_flight(MAX_SHARED / 16 + 1),
      async(std::make_unique<Async>(*this)), cells(MAX_SHARED / CELL + 1) {
    stacks_ = map(MAX_THREADS * STACK);
    for (int i = 0; i < MAX_THREADS; i++) {
        mprotect(stacks_ + i * STACK, PAGE, PROT_NONE); // overflow stops here
    }
    shared_map_ = map(PAGE + MAX_SHARED + 2 * PAGE);
    mprotect(shared_map_, PAGE, PROT_NONE);
    shared = shared_map_ + PAGE + SHARED_OFFSET;
}

Executor::~Executor() {
    munmap(stacks_, MAX_THREADS * STACK);
    munmap(shared_map_, PAGE + MAX_SHARED + 2 * PAGE);
}

std::string check_launch(const Launch &l) {
    char text[160];
    const std::uint64_t count = std::uint64_t(l.block.x) * l.block.y * l.block.z;
    if (count == 0 || count > MAX_THREADS || l.block.y != 1 || l.block.z != 1) {
        std::snprintf(text, sizeof text, "block (%u, %u, %u): 1 to 1024 threads, all of them in x", l.block.x,
                      l.block.y, l.block.z);
        return text;
    }
    if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.x > 0x7fffffffu || l.grid.y > 65535 ||
        l.grid.z > 65535) {
        std::snprintf(text, sizeof text, "grid (%u, %u, %u): at least 1, at most 2^31 - 1, 65535, 65535",
                      l.grid.x, l.grid.y, l.grid.z);
        return text;
    }
    if (l.shared_bytes > MAX_SHARED) {
        std::snprintf(text, sizeof text, "%zu bytes of shared memory, at most %zu", l.shared_bytes,
                      MAX_SHARED);
        return text;
    }
    if (l.cluster < 1 || l.cluster > MAX_CLUSTER || l.grid.x % l.cluster != 0) {
        std::snprintf(text, sizeof text, "clusters of %u blocks, %u in x: 1 or 2, and a divisor", l.cluster,
                      l.grid.x);
        return text;
    }
    return "";
}

const Unordered *find_unordered(const std::vector<Unordered> &all, std::uint32_t epoch) {
    const auto next = std::upper_bound(all.begin(), all.end(), epoch,
                                       [](std::uint32_t e, const Unordered &u) { return e < u.first; });
    return next != all.begin() && epoch <= std::prev(next)->last ? &*std::prev(next) : nullptr;
}

bool Executor::run(const Launch &l) {
    fault = Fault{};
    blocks[0] = this;
    for (unsigned r = 1; r < l.cluster; r++) {
        if (!others_[r - 1]) {
            others_[r - 1] = std::make_unique<Executor>();
        }
        blocks[r] = others_[r - 1].get();
    }
    launch_epoch = epoch + 1;
    for (unsigned r = 0; r < l.cluster; r++) {
        Executor &ex = *blocks[r];
        for (unsigned i = 0; i < l.cluster; i++) {
            ex.blocks[i] = blocks[i];
        }
        ex.rank = r;
        ex.launch_epoch = launch_epoch;
        ex.prepare(l);
    }

    // All clusters, each once, from a drawn start with a drawn stride that shares no factor with their number.
    const std::uint64_t clusters = std::uint64_t(l.grid.x) * l.grid.y * l.grid.z / cluster;
    Random order{l.seed * 0x2545f4914f6cdd1dull + l.number};
    std::uint64_t at = l.seed == 0 ? 0 : order.next() % clusters;
    std::uint64_t stride = l.seed == 0 ? 1 : 1 + order.next() % clusters;
    while (std::gcd(stride, clusters) != 1) {
        stride++;
    }
    const Hot before = hot;
    hot = Hot{};
    hot.shared_bytes = l.shared_bytes;
    hot.stacks_bytes = MAX_THREADS * STACK;
    hidden_readers.clear();
    blocks_begun.clear();
    bool good = true;
    for (std::uint64_t i = 0; i < clusters && good; i++) {
        const std::uint32_t first = (epoch + cluster) / cluster * cluster;
        blocks_begun.emplace_back(first, at * cluster);
        for (unsigned r = 0; r < cluster; r++) {
            Executor &ex = *blocks[r];
            ex.epoch = ex.first_epoch = first + r;
            ex.block_index = block_of(first + r);
            ex.random.state = (l.seed + 1) * 0x9e3779b97f4a7c15ull ^ l.number << 40 ^ (at * cluster + r);
            ex.begin_block();
        }
        good = run_blocks();
        for (unsigned r = 1; r < cluster; r++) {
            epoch = std::max(epoch, blocks[r]->epoch);
        }
        at = (at + stride) % clusters;
    }
    hot = before;
    launch = nullptr;
    return good;
}

void Executor::prepare(const Launch &l) {
    launch = &l;
    cluster = l.cluster;
    thread_count = l.block.x;
    warp_count = (thread_count + LANES - 1) / LANES;
    unordered_from = l.unordered.empty() ? launch_epoch : l.unordered.front().first;
    ordered_once_waited = std::all_of(l.unordered.begin(), l.unordered.end(),
                                      [](const Unordered &u) { return u.until_wait; });
}

void Executor::enter() {
    hot.executor = this;
    hot.shared = reinterpret_cast<std::uintptr_t>(shared);
    hot.stacks = reinterpret_cast<std::uintptr_t>(stacks_);
    hot.in_flight = in_flight.data();
}

Dim Executor::block_of(std::uint32_t when) const {
    const auto &begun = blocks[0]->blocks_begun;
    const auto last = std::prev(std::upper_bound(begun.begin(), begun.end(), std::make_pair(when, ~std::uint64_t{0})));
    const std::uint64_t number = last->second + (when - last->first) % cluster;
    const Dim &grid = launch->grid;
    return Dim{static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
               static_cast<unsigned>(number / grid.x / grid.y)};
}

void Executor::begin_block() {
    poison(shared, launch->shared_bytes);
    std::fill_n(in_flight.begin(), launch->shared_bytes / 16 + 1, 0);
    preempt_style = rank == 0 ? static_cast<int>(random.below(3)) : blocks[0]->preempt_style;
    const unsigned lane_style = random.below(3);
    for (unsigned w = 0; w < warp_count; w++) {
        const unsigned lanes = std::min<unsigned>(LANES, thread_count - w * LANES);
        const unsigned all = lanes == LANES ? ~0u : (1u << lanes) - 1;
        warps[w] = Warp{all, all, 0, 0, Op::None, nullptr, lane_style == 0 ? 0 : random.below(LANES), 0};
    }
    for (unsigned t = 0; t < thread_count; t++) {
        Thread &thread = threads[t];
        thread.index = t;
        thread.state = State::Ready;
        thread.waited = !launch->programmatic;
        thread.op = Op::None;
        thread.pc = nullptr;
        thread.group = thread.landed = 0;
        thread.copies.clear();
        // Tops are staggered: equal addresses modulo 4 KiB would share the same few cache sets.
        context_make(thread.context, stacks_ + t * STACK, STACK - t * 192 % 3840, fiber_entry);
    }
    async->used = false;
    at_barrier = done = 0;
}

bool Executor::run_blocks() {
    at_cluster_barrier = 0;
    failed_ = finished_ = false;
    enter();
    for (unsigned r = 0; r < cluster && cluster > 1; r++) {
        blocks[r]->async->begin(); // each has to know of the other's beginning
    }
    draw_budget();

    Context *next = &pick()->context;
    for (;;) {
        context_switch(main_, *next);
        if (failed_) {
            compose_report(*hot.executor, fault);
            return false;
        }
        if (finished_) {
            return true;
        }
        // A fiber asked for something that needs a real stack.
        answer_ = line_of(ask_a_) == line_of(ask_b_);
        next = &hot.self->context;
    }
}

// ---- whose turn
// ---------------------------------------------------------------------------------------------

void Executor::draw_budget() {
    // Style 0 runs as far ahead as it can, 1 is interrupted at collectives, 2 anywhere.
    hot.budget = preempt_style == 2 ? 1 + random.below(1u << (4 + random.below(9))) : NEVER;
}

unsigned Executor::pick_lane(Warp &w) {
    const unsigned from = w.first_lane;
    const unsigned turned = from == 0 ? w.ready : (w.ready >> from | w.ready << (LANES - from));
    return (static_cast<unsigned>(__builtin_ctz(turned)) + from) % LANES;
}

bool Executor::draw_warp() {
    unsigned candidates[MAX_CLUSTER] = {}, count = 0;
    for (unsigned r = 0; r < cluster; r++) {
        const Executor &ex = *blocks[r];
        for (unsigned w = 0; w < warp_count; w++) {
            candidates[r] |= static_cast<unsigned>(ex.warps[w].ready != 0) << w;
        }
        count += static_cast<unsigned>(__builtin_popcount(candidates[r]));
    }
    if (count == 0) {
        return false;
    }
    unsigned skip = random.below(count), r = 0;
    for (; skip >= static_cast<unsigned>(__builtin_popcount(candidates[r])); r++) {
        skip -= static_cast<unsigned>(__builtin_popcount(candidates[r]));
    }
    for (; skip > 0; skip--) {
        candidates[r] &= candidates[r] - 1;
    }
    blocks[r]->current_warp = static_cast<unsigned>(__builtin_ctz(candidates[r]));
    if (cluster > 1) {
        blocks[r]->enter();
    }
    return true;
}

// A thread that can run: of this block's current warp when it has one. Null: none at all.
Thread *Executor::pick() {
    if ((warps[current_warp].ready == 0 || current_warp >= warp_count) && !draw_warp()) {
        return nullptr;
    }
    Executor &ex = *hot.executor;
    hot.self = &ex.threads[ex.current_warp * LANES + ex.pick_lane(ex.warps[ex.current_warp])];
    return hot.self;
}

void Executor::leave(Thread *self) {
    Thread *next = hot.executor->pick();
    while (next == nullptr && async->progress()) {
        next = hot.executor->pick();
    }
    if (next == self) {
        return;
    }
    if (next == nullptr) {
        hot.self = self;
        fail(719, "deadlock",
             std::string("no thread of the ") + (cluster > 1 ? "cluster" : "block") + " can run:\n" + waiting(),
             self->pc);
    }
    context_switch(self->context, next->context);
}

void Executor::maybe_preempt(Thread *self) {
    if (preempt_style == 1 && random.below(8) == 0) {
        preempt(self);
    }
}

void Executor::preempt(Thread *self) {
    draw_budget();
    draw_warp(); // there is one: this
    Executor &next = *hot.executor;
    next.warps[next.current_warp].first_lane = random.below(LANES);
    leave(self);
}

// ---- life and death of a thread
// -----------------------------------------------------------------------------

void Executor::thread_main() {
    launch->kernel->call(launch->packed);

    Thread *self = hot.self;
    Warp &w = warp_of(*self);
    if (!self->copies.empty()) {
        fail(719, "exit with cp.async in flight",
             std::to_string(self->copies.size()) +
                 " copies were never waited for; the first writes shared byte " +
                 std::to_string(self->copies[0].to - shared),
             self->copies[0].pc);
    }
    if (async->used) {
        async->check_exit(*self);
    }
    const unsigned bit = 1u << self->index % LANES;
    self->state = State::Done;
    w.alive &= ~bit;
    w.ready &= ~bit;
    done++;
    if (at_barrier != 0) {
        fail(719, "barrier divergence",
             "thread " + std::to_string(self->index) +
                 " returned while others wait at the block's barrier:\n" + waiting(),
             barrier_pc);
    }
    if (w.arrived != 0 && (w.ready | w.waiting) == 0) {
        fail(719, "warp divergence",
             "thread " + std::to_string(self->index) + " returned while lanes of its warp wait for it:\n" +
                 waiting(),
             w.pc);
    }
    if (blocks[0]->at_cluster_barrier != 0) {
        fail(719, "barrier divergence",
             "thread " + std::to_string(self->index) + " returned while others wait at the cluster's barrier:\n" +
                 waiting(),
             blocks[0]->cluster_pc);
    }
    if (over()) {
        if (async->used) {
            async->check_end();
        }
        if (std::none_of(threads.begin(), threads.begin() + thread_count,
                         [](const Thread &t) { return t.waited; })) {
            fail(719, "dependency never waited for",
                 "no thread of the block came to grid_wait: that this launch is over then says nothing of those "
                 "before it",
                 static_cast<const char *>(launch->kernel->entry) + 1);
        }
        if (std::all_of(blocks, blocks + cluster, [](const Executor *ex) { return ex->over(); })) {
            blocks[0]->finished_ = true;
            Context dead;
            context_switch(dead, blocks[0]->main_);
        }
    }
    leave(self);
    std::abort(); // a thread that returned is never chosen
}

void Executor::share_wait(Thread *first, unsigned count) {
    if (launch->programmatic && std::any_of(first, first + count, [](const Thread &t) { return t.waited; })) {
        std::for_each(first, first + count, [](Thread &t) { t.waited = true; });
    }
}

bool Executor::same_line(const void *a, const void *b) {
    if (a == b) {
        return true;
    }
    Executor &first = *blocks[0];
    first.ask_a_ = a;
    first.ask_b_ = b;
    context_switch(hot.self->context, first.main_);
    return first.answer_;
}

// ---- faults
// -------------------------------------------------------------------------------------------------

namespace {

std::string name(const Dim &b) {
    return "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
}

} // namespace

std::string Executor::whose() const { return remote() ? " of " + name(block_index) : ""; }

std::string Executor::waiting() const {
    std::string text;
    for (unsigned r = 0; r < cluster; r++) {
        text += (cluster > 1 ? "  " + name(blocks[r]->block_index) + ":\n" : "") + blocks[r]->waiting_here();
    }
    return text;
}

std::string Executor::waiting_here() const {
    // Neighbours that wait for the same thing are one line.
    std::string text;
    const auto same = [](const Thread &a, const Thread &b) {
        return a.state == b.state && (a.state == State::Done || (a.pc == b.pc && a.op == b.op &&
                                        (a.state != State::AtAsync || a.word.argument == b.word.argument)));
    };
    for (unsigned t = 0; t < thread_count;) {
        unsigned end = t + 1;
        while (end < thread_count && same(threads[t], threads[end])) {
            end++;
        }
        const Thread &first = threads[t];
        text +=
            "    threads " + std::to_string(t) + (end - t > 1 ? ".." + std::to_string(end - 1) : "") + ": ";
        switch (first.state) {
        case State::Ready:
            text += "running or ready";
            break;
        case State::AtCollective:
            text += std::string("in ") + op_name(first.op) + " at " + mark_line(first.pc);
            break;
        case State::AtBarrier:
            text += "at the block's barrier at " + mark_line(first.pc);
            break;
        case State::AtAsync:
            text += async->waiting(first) + mark_line(first.pc);
            break;
        case State::Done:
            text += "returned";
            break;
        }
        text += "\n";
        t = end;
    }
    return text;
}

void Executor::fail(int code, const char *kind, const std::string &detail, const void *pc) {
    Executor &first = *blocks[0];
    first.fault.code = code;
    first.fault.kind = kind;
    first.fault.detail = detail;
    first.fault.pc = pc; // becomes words on the main stack
    first.failed_ = true;
    context_switch(hot.self->context, first.main_);
    std::abort();
}

} // namespace emu

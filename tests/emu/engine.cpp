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
        "named_barrier", "named_arrive", "set_registers", "mbarrier_wait"};
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
    return "";
}

const Unordered *find_unordered(const std::vector<Unordered> &all, std::uint32_t epoch) {
    const auto next = std::upper_bound(all.begin(), all.end(), epoch,
                                       [](std::uint32_t e, const Unordered &u) { return e < u.first; });
    return next != all.begin() && epoch <= std::prev(next)->last ? &*std::prev(next) : nullptr;
}

bool Executor::run(const Launch &l) {
    launch = &l;
    fault = Fault{};
    thread_count = l.block.x;
    warp_count = (thread_count + LANES - 1) / LANES;

    // All blocks, each once, from a drawn start with a drawn stride that shares no factor with their number.
    const std::uint64_t blocks = std::uint64_t(l.grid.x) * l.grid.y * l.grid.z;
    Random order{l.seed * 0x2545f4914f6cdd1dull + l.number};
    std::uint64_t at = l.seed == 0 ? 0 : order.next() % blocks;
    std::uint64_t stride = l.seed == 0 ? 1 : 1 + order.next() % blocks;
    while (std::gcd(stride, blocks) != 1) {
        stride++;
    }
    const Hot before = hot;
    hot = Hot{};
    hot.executor = this;
    hot.shared = reinterpret_cast<std::uintptr_t>(shared);
    hot.shared_bytes = l.shared_bytes;
    hot.stacks = reinterpret_cast<std::uintptr_t>(stacks_);
    hot.stacks_bytes = MAX_THREADS * STACK;
    hot.in_flight = in_flight.data();
    launch_epoch = epoch + 1;
    unordered_from = l.unordered.empty() ? launch_epoch : l.unordered.front().first;
    ordered_once_waited = std::all_of(l.unordered.begin(), l.unordered.end(),
                                      [](const Unordered &u) { return u.until_wait; });
    hidden_readers.clear();
    blocks_begun.clear();
    bool good = true;
    for (std::uint64_t i = 0; i < blocks && good; i++) {
        blocks_begun.emplace_back(epoch + 1, at);
        block_index = block_of(epoch + 1);
        random.state = (l.seed + 1) * 0x9e3779b97f4a7c15ull ^ l.number << 40 ^ at;
        good = run_block();
        at = (at + stride) % blocks;
    }
    hot = before;
    launch = nullptr;
    return good;
}

Dim Executor::block_of(std::uint32_t when) const {
    const auto next =
        std::upper_bound(blocks_begun.begin(), blocks_begun.end(), std::make_pair(when, ~std::uint64_t{0}));
    const std::uint64_t number = std::prev(next)->second;
    const Dim &grid = launch->grid;
    return Dim{static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
               static_cast<unsigned>(number / grid.x / grid.y)};
}

bool Executor::run_block() {
    poison(shared, launch->shared_bytes);
    std::fill_n(in_flight.begin(), launch->shared_bytes / 16 + 1, 0);
    first_epoch = ++epoch;
    preempt_style = static_cast<int>(random.below(3));
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
    failed_ = finished_ = false;
    draw_budget();

    Context *next = &pick()->context;
    for (;;) {
        context_switch(main_, *next);
        if (failed_) {
            compose_report(*this, fault);
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

// A thread that can run: of the current warp when it has one. Null: none at all.
Thread *Executor::pick() {
    if (warps[current_warp].ready == 0 || current_warp >= warp_count) {
        unsigned candidates = 0;
        for (unsigned w = 0; w < warp_count; w++) {
            candidates |= static_cast<unsigned>(warps[w].ready != 0) << w;
        }
        if (candidates == 0) {
            return nullptr;
        }
        for (unsigned skip = random.below(static_cast<unsigned>(__builtin_popcount(candidates))); skip > 0;
             skip--) {
            candidates &= candidates - 1;
        }
        current_warp = static_cast<unsigned>(__builtin_ctz(candidates));
    }
    hot.self = &threads[current_warp * LANES + pick_lane(warps[current_warp])];
    return hot.self;
}

void Executor::leave(Thread *self) {
    Thread *next = pick();
    while (next == nullptr && async->progress()) {
        next = pick();
    }
    if (next == self) {
        return;
    }
    if (next == nullptr) {
        hot.self = self;
        fail(719, "deadlock", "no thread of the block can run:\n" + waiting(), self->pc);
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
    unsigned candidates = 0;
    for (unsigned w = 0; w < warp_count; w++) {
        candidates |= static_cast<unsigned>(warps[w].ready != 0) << w;
    }
    for (unsigned skip = random.below(static_cast<unsigned>(__builtin_popcount(candidates))); skip > 0;
         skip--) {
        candidates &= candidates - 1;
    }
    current_warp = static_cast<unsigned>(__builtin_ctz(candidates));
    Warp &w = warps[current_warp];
    w.first_lane = random.below(LANES);
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
    if (done == thread_count) {
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
        finished_ = true;
        Context dead;
        context_switch(dead, main_);
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
    ask_a_ = a;
    ask_b_ = b;
    context_switch(hot.self->context, main_);
    return answer_;
}

// ---- faults
// -------------------------------------------------------------------------------------------------

std::string Executor::waiting() const {
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
    fault.code = code;
    fault.kind = kind;
    fault.detail = detail;
    fault.pc = pc; // becomes words on the main stack
    failed_ = true;
    context_switch(hot.self->context, main_);
    std::abort();
}

} // namespace emu

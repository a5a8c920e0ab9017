// warp.cpp: what a warp, a block and a thread's asynchronous copies do together.
//
// A collective: every lane leaves what it brings in its own Thread and waits; the lane that completes the
// warp does the work for all 32 and goes on. Each lane then takes its result from its own Thread.
//
//     lane 0  ─ brings ─┐ waits
//     lane 1  ─ brings ─┤ waits
//       ..              │
//     lane 31 ─ brings ─┴▶ works for all, continues ─▶ at its next wait the others follow
#include <cstring>
#include <string>

#include "async.h"
#include "memory.h"
#include "report.h"
#include "warp.h"

#define CALLER __builtin_return_address(0)

namespace emu {

// ---- collectives
// --------------------------------------------------------------------------------------------

namespace {

void shuffle_words(Thread *lanes, bool exclusive_or) {
    unsigned values[LANES];
    for (int i = 0; i < LANES; i++) {
        values[i] = lanes[i].word.value;
    }
    for (int i = 0; i < LANES; i++) {
        const unsigned from = exclusive_or ? i ^ lanes[i].word.argument : lanes[i].word.argument;
        lanes[i].word.value = values[from % LANES];
    }
}

void vote(Thread *lanes) {
    unsigned votes = 0;
    for (int i = 0; i < LANES; i++) {
        votes |= (lanes[i].word.value != 0 ? 1u : 0u) << i;
    }
    for (int i = 0; i < LANES; i++) {
        lanes[i].word.value = votes;
    }
}

// Lane i brought the address of row i % 8 of matrix i / 8; see the map in ptx.cuh.
void load_matrices(Thread *lanes, bool transposed) {
    unsigned short m[4][8][8];
    for (int i = 0; i < LANES; i++) {
        std::memcpy(m[i / 8][i % 8], lanes[i].row, 16);
    }
    for (int i = 0; i < LANES; i++) {
        const int g = i / 4, t = i % 4;
        unsigned r[4];
        for (int j = 0; j < 4; j++) {
            r[j] = transposed ? m[j][2 * t][g] | static_cast<unsigned>(m[j][2 * t + 1][g]) << 16
                              : m[j][g][2 * t] | static_cast<unsigned>(m[j][g][2 * t + 1]) << 16;
        }
        lanes[i].quad = Quad{r[0], r[1], r[2], r[3]};
    }
}

void multiply(Thread *lanes) {
    alignas(32) unsigned short a[16][16]; // [m][k]
    alignas(32) unsigned short b[8][16];  // [n][k]
    alignas(32) float d[16][8];           // [m][n]
    const auto put = [](void *to, const void *from, int bytes) { std::memcpy(to, from, bytes); };
    for (int i = 0; i < LANES; i++) {
        const int g = i / 4, t = i % 4;
        const auto &x = lanes[i].mma;
        put(&a[g][2 * t], &x.a.r0, 4);
        put(&a[g + 8][2 * t], &x.a.r1, 4);
        put(&a[g][2 * t + 8], &x.a.r2, 4);
        put(&a[g + 8][2 * t + 8], &x.a.r3, 4);
        put(&b[g][2 * t], &x.b[0], 4);
        put(&b[g][2 * t + 8], &x.b[1], 4);
        put(&d[g][2 * t], &x.d.f0, 8);
        put(&d[g + 8][2 * t], &x.d.f2, 8);
    }
    mma_m16n8k16(d, a, b);
    for (int i = 0; i < LANES; i++) {
        const int g = i / 4, t = i % 4;
        lanes[i].mma.d = FloatQuad{d[g][2 * t], d[g][2 * t + 1], d[g + 8][2 * t], d[g + 8][2 * t + 1]};
    }
}

void perform(Op op, Thread *lanes) {
    switch (op) {
    case Op::Shuffle:
        return shuffle_words(lanes, false);
    case Op::ShuffleXor:
        return shuffle_words(lanes, true);
    case Op::Ballot:
        return vote(lanes);
    case Op::Ldmatrix:
        return load_matrices(lanes, false);
    case Op::LdmatrixTrans:
        return load_matrices(lanes, true);
    case Op::Mma:
        return multiply(lanes);
    case Op::None:
    case Op::Barrier:
        return;
    default:
        return perform_async(op, lanes);
    }
}

std::string lane_name(const Thread &t) { return "thread " + std::to_string(t.index); }

} // namespace

void collect(Thread *self, Op op, const void *pc) {
    Executor &ex = *hot.executor;
    Warp &w = ex.warp_of(*self);
    self->op = op;
    self->pc = pc;
    if (w.arrived == 0) {
        w.op = op;
        w.pc = pc;
    } else if (w.op != op || (w.pc != pc && !ex.same_line(w.pc, pc))) {
        ex.fail(719, "warp divergence",
                lane_name(*self) + " comes to " + op_name(op) + " at " + mark_line(pc) +
                    " while lanes of its warp are in " + op_name(w.op) + " at " + mark_line(w.pc),
                pc);
    }
    w.arrived |= 1u << self->index % LANES;
    if (w.arrived == ~0u) {
        perform(op, ex.lanes_of(*self));
        Thread *lanes = ex.lanes_of(*self);
        for (int i = 0; i < LANES; i++) {
            lanes[i].state = State::Ready;
        }
        w.arrived = 0;
        w.ready = ~0u;
        if (op == Op::Barrier) {
            w.step++;
            ex.share_wait(lanes, LANES);
        }
        ex.maybe_preempt(self);
        return;
    }
    self->state = State::AtCollective;
    w.ready &= ~(1u << self->index % LANES);
    if ((w.ready | w.waiting) == 0) {
        const bool short_warp =
            ex.thread_count % LANES != 0 && self->index / LANES == ex.thread_count / LANES;
        ex.fail(719, "warp divergence",
                short_warp ? std::string(op_name(op)) + " in a warp of " +
                                 std::to_string(ex.thread_count % LANES) + " lanes: collectives need all 32"
                           : "the rest of the warp never comes to " + std::string(op_name(op)) + ":\n" +
                                 ex.waiting(),
                pc);
    }
    ex.leave(self);
}

void warp_barrier() { collect(hot.self, Op::Barrier, CALLER); }

unsigned shuffle_xor(unsigned value, int lane_mask) {
    Thread *self = hot.self;
    self->word = {value, static_cast<unsigned>(lane_mask)};
    collect(self, Op::ShuffleXor, CALLER);
    return self->word.value;
}

unsigned shuffle(unsigned value, int from_lane) {
    Thread *self = hot.self;
    self->word = {value, static_cast<unsigned>(from_lane)};
    collect(self, Op::Shuffle, CALLER);
    return self->word.value;
}

unsigned ballot(bool yes) {
    Thread *self = hot.self;
    self->word = {yes, 0};
    collect(self, Op::Ballot, CALLER);
    return self->word.value;
}

Quad ldmatrix_x4(const void *row) {
    Thread *self = hot.self;
    check_shared(row, 16, Access::Read, CALLER);
    self->row = static_cast<const unsigned char *>(row);
    collect(self, Op::Ldmatrix, CALLER);
    return self->quad;
}

Quad ldmatrix_x4_trans(const void *row) {
    Thread *self = hot.self;
    check_shared(row, 16, Access::Read, CALLER);
    self->row = static_cast<const unsigned char *>(row);
    collect(self, Op::LdmatrixTrans, CALLER);
    return self->quad;
}

FloatQuad mma_16816(FloatQuad d, Quad a, unsigned b0, unsigned b1) {
    Thread *self = hot.self;
    self->mma = {d, a, {b0, b1}};
    collect(self, Op::Mma, CALLER);
    return self->mma.d;
}

// ---- the block's barrier
// ------------------------------------------------------------------------------------

void block_barrier() {
    Thread *self = hot.self;
    Executor &ex = *hot.executor;
    const void *pc = CALLER;
    Warp &w = ex.warp_of(*self);
    self->pc = pc;
    self->state = State::AtBarrier;
    w.ready &= ~(1u << self->index % LANES);
    if (ex.at_barrier++ == 0) {
        ex.barrier_pc = pc;
        ex.barrier_first = self->index;
    } else if (ex.barrier_pc != pc && !ex.same_line(ex.barrier_pc, pc)) {
        ex.fail(719, "barrier divergence",
                lane_name(*self) + " waits at " + mark_line(pc) + ", thread " +
                    std::to_string(ex.barrier_first) + " at " + mark_line(ex.barrier_pc),
                pc);
    }
    if (ex.done != 0) {
        ex.fail(719, "barrier divergence",
                lane_name(*self) + " waits at the block's barrier, but others have returned:\n" +
                    ex.waiting(),
                pc);
    }
    if (w.arrived != 0 && (w.ready | w.waiting) == 0) {
        ex.fail(719, "warp divergence",
                lane_name(*self) + " waits at the block's barrier while lanes of its warp wait for it:\n" +
                    ex.waiting(),
                pc);
    }
    if (ex.at_barrier == ex.thread_count) {
        ex.at_barrier = 0;
        ex.epoch += ex.cluster;
        ex.share_wait(ex.threads.data(), ex.thread_count);
        if (ex.async->used) {
            ex.async->block_barrier();
        }
        for (unsigned t = 0; t < ex.thread_count; t++) {
            ex.threads[t].state = State::Ready;
        }
        for (unsigned i = 0; i < ex.warp_count; i++) {
            ex.warps[i].ready = ex.warps[i].alive;
        }
        ex.preempt(self);
        return;
    }
    ex.leave(self);
}

// ---- cp.async
// -----------------------------------------------------------------------------------------------
//
// The destination is poisoned when the copy is issued and written when it is waited for, from the source as
// it is then: a reader that is too early finds NaN, a writer that reuses the source too early changes what
// arrives.

void cp_async_16(void *to, const void *from, bool copy) {
    Thread *self = hot.self;
    const void *pc = CALLER;
    check_shared(to, 16, Access::Write, pc);
    const int bytes = copy ? 16 : 0;
    check_global(from, bytes, 16, Access::Read, pc);
    poison(to, 16);
    auto *target = static_cast<unsigned char *>(to);
    hot.in_flight[(target - hot.executor->shared) / 16] |= CP_ASYNC;
    self->copies.push_back({target, static_cast<const unsigned char *>(from), bytes, self->group, pc});
}

void cp_async_commit() { hot.self->group++; }

void cp_async_wait(int groups_left) {
    Thread *self = hot.self;
    const void *pc = CALLER;
    if (self->group - self->landed <= static_cast<unsigned>(groups_left)) {
        return;
    }
    self->landed = self->group - static_cast<unsigned>(groups_left);
    auto &copies = self->copies;
    std::size_t ready = 0;
    while (ready < copies.size() && static_cast<int>(copies[ready].group - self->landed) < 0) {
        ready++;
    }
    // In an order that nobody may rely on: from a drawn one on, forwards or backwards.
    const bool forwards = hot.executor->random.below(2) == 0;
    for (std::size_t i = 0; i < ready; i++) {
        const AsyncCopy &copy = copies[forwards ? i : ready - 1 - i];
        std::memcpy(copy.to, copy.from, copy.bytes);
        std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
        hot.in_flight[(copy.to - hot.executor->shared) / 16] = 0;
        landed_in_shared(copy.to, pc);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(ready));
}

} // namespace emu

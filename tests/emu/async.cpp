// async.cpp: mbarriers, named barriers, and who knows of whom. See async.h.
#include "async.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "memory.h"
#include "report.h"
#include "track.h"
#include "warp.h"

#define CALLER __builtin_return_address(0)

namespace emu {

namespace {

unsigned my_warp() { return hot.self->index / LANES; }

} // namespace

void sleep(Op op, const void *argument, unsigned value, const void *pc) {
    Thread *self = hot.self;
    Executor &ex = *hot.executor;
    Warp &w = ex.warp_of(*self);
    self->op = op;
    self->pc = pc;
    self->word = {value, static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(argument) - hot.shared)};
    self->state = State::AtAsync;
    w.ready &= ~(1u << self->index % LANES);
    w.waiting |= 1u << self->index % LANES;
    ex.leave(self);
}

void wake(Executor &ex) {
    for (unsigned t = 0; t < ex.thread_count; t++) {
        if (ex.threads[t].state == State::AtAsync) {
            ex.threads[t].state = State::Ready;
            ex.warps[t / LANES].ready |= 1u << t % LANES;
        }
    }
    for (unsigned w = 0; w < ex.warp_count; w++) {
        ex.warps[w].waiting = 0;
    }
}

void Known::join(const Known &other) {
    for (unsigned b = 0; b < hot.executor->cluster; b++) {
        Block &mine = of[b];
        const Block &o = other.of[b];
        for (unsigned i = 0; i < MAX_WARPS; i++) {
            mine.steps[i] = std::max(mine.steps[i], o.steps[i]);
            mine.retired[i] = std::max(mine.retired[i], o.retired[i]);
        }
        for (unsigned i = 0; i < MAX_MBARRIERS; i++) {
            mine.phases[i] = std::max(mine.phases[i], o.phases[i]);
        }
    }
}

// ---- a block's life

void Async::begin() {
    used = true;
    if (read_by.empty()) {
        landed_by.resize(MAX_SHARED / 16 + 1);
        landed_phase.resize(MAX_SHARED / 16 + 1);
        read_by.resize((MAX_SHARED / 16 + 1) * MAX_WARPS);
    }
    mbarriers.clear();
    copies.clear();
    std::memset(named, 0, sizeof named);
    std::memset(fence_epoch, 0, sizeof fence_epoch);
    Known start{};
    for (unsigned b = 0; b < ex.cluster; b++) {
        for (unsigned w = 0; w < MAX_WARPS; w++) {
            start.of[b].retired[w] = ex.blocks[b]->async->warps[w].issued;
        }
    }
    for (unsigned w = 0; w < ex.warp_count; w++) {
        WarpAsync &x = warps[w];
        x.clock = start;
        x.fenced = false;
        x.opened = x.multiplies = 0;
        x.pending.clear();
        x.sums.clear();
        x.registers_pc = nullptr;
        x.registers = std::min(256u, 65536 / ex.thread_count / 8 * 8);
        shapes[w / 4].clear();
    }
}

void Async::block_barrier() {
    Known all{};
    for (unsigned w = 0; w < ex.warp_count; w++) {
        all.join(warps[w].clock);
        if (ex.cluster > 1) { // other blocks know of no epochs here: steps tell them
            all.of[ex.rank].steps[w] = warps[w].opened = ++ex.warps[w].step;
        }
    }
    for (unsigned w = 0; w < ex.warp_count; w++) {
        warps[w].clock = all;
    }
}

void Async::check_exit(const Thread &self) {
    const WarpAsync &w = warps[self.index / LANES];
    if (!w.pending.empty()) {
        ex.fail(719, "exit with wgmma in flight",
                std::to_string(w.pending.size()) + " wgmma of the warp were never waited for", w.pending[0].pc);
    }
}

// All threads have returned.
void Async::check_end() {
    if (!copies.empty()) {
        ex.fail(719, "exit with bulk copies in flight",
                std::to_string(copies.size()) + " were never waited for; the first writes " + byte(copies[0].to),
                copies[0].pc);
    }
    for (const Phases &b : mbarriers) {
        if (b.filled > b.waited) {
            ex.fail(719, "exit with bulk copies in flight",
                    "nobody waited for those of the last phase of the mbarrier at " + byte(b.at), last_copy);
        }
        if (b.remote > b.told) {
            ex.fail(719, "cluster exit",
                    "the block has returned, but nobody in it waited for another block's arrival at the mbarrier at " +
                        byte(b.at) + ": a cluster_barrier must come last",
                    b.remote_pc);
        }
    }
    unsigned total = 0;
    const void *pc = nullptr;
    for (unsigned w = 0; w < ex.warp_count; w++) {
        total += warps[w].registers * LANES;
        pc = warps[w].registers_pc != nullptr ? warps[w].registers_pc : pc;
        if (warps[w].multiplies != shapes[w / 4].size()) {
            ex.fail(719, "warp group divergence",
                    "warp " + std::to_string(w) + " took part in " + std::to_string(warps[w].multiplies) +
                        " wgmma, its group in " + std::to_string(shapes[w / 4].size()),
                    last_multiply);
        }
    }
    const unsigned pool = std::min(256u, 65536 / ex.thread_count / 8 * 8) * ex.warp_count * LANES;
    if (pc != nullptr && total > pool) {
        ex.fail(719, "register budget",
                "set_registers_* leave " + std::to_string(total) + " registers to the block, which has " +
                    std::to_string(pool),
                pc);
    }
}

std::string Async::waiting(const Thread &t) const {
    if (t.op == Op::Cluster) {
        return "at the cluster's barrier, to which " + std::to_string(ex.blocks[0]->at_cluster_barrier) + " of " +
               std::to_string(ex.thread_count * ex.cluster) + " threads have come, at ";
    }
    if (t.op == Op::Named) {
        return "at named barrier " + std::to_string(t.word.value) + ", to which " +
               std::to_string(named[t.word.value].come) + " of " + std::to_string(named[t.word.value].threads) +
               " threads have come, at ";
    }
    std::string text = "at the mbarrier at " + byte(t.word.argument) + " for parity " + std::to_string(t.word.value);
    for (const Phases &b : mbarriers) {
        if (b.at == t.word.argument && b.live) {
            text += " (phase " + std::to_string(b.phase) + ", " + std::to_string(b.missing) + " arrivals and " +
                    std::to_string(b.bytes) + " bytes missing)";
        }
    }
    return text + " at ";
}

// ---- mbarriers

Phases &Async::find(const void *at, const void *pc, unsigned *index) {
    const auto offset = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(at) - hot.shared);
    if (offset % 8 != 0) {
        ex.fail(716, "misaligned address", "an mbarrier at " + byte(offset) + ", which is no multiple of 8", pc);
    }
    for (unsigned i = 0; i < mbarriers.size(); i++) {
        Phases &b = mbarriers[i];
        if (b.at == offset && b.live) {
            const bool told = ex.remote() ? known().steps[b.maker / LANES] > b.made_step
                                          : b.maker == hot.self->index || ex.epoch != b.made;
            if (!told) {
                ex.fail(719, ex.remote() ? "missing cluster_barrier" : "race in shared memory",
                        "the mbarrier at " + byte(offset) + ex.whose() + " was initialised by thread " +
                            std::to_string(b.maker) + " with no barrier in between",
                        pc);
            }
            if (index != nullptr) {
                *index = i;
            }
            return b;
        }
    }
    ex.fail(719, ex.remote() ? "missing cluster_barrier" : "no mbarrier",
            "nothing was initialised at " + byte(offset) + ex.whose(), pc);
}

// What the running warp, of this block or another, did so far is before the end of this phase.
void Async::arrive(Phases &b, int bytes, const void *pc) {
    if (b.missing == 0) {
        ex.fail(719, "mbarrier overrun",
                "more than " + std::to_string(b.arrivals) + " arrivals at " + byte(b.at) + ex.whose() + " in one phase",
                pc);
    }
    const Executor &mine = *hot.executor;
    b.coming.join(me().clock);
    b.coming.of[mine.rank].steps[my_warp()] = mine.warps[my_warp()].step + 1u;
    b.coming_waited |= hot.self->waited;
    b.bytes += bytes;
    b.missing--;
    turn(b);
}

void Async::turn(Phases &b) {
    if (b.missing == 0 && b.bytes == 0) {
        b.over = b.coming;
        b.over_waited = b.coming_waited;
        b.phase++;
        b.missing = b.arrivals;
        wake(ex);
    }
}

void mbarrier_init(void *at, int arrivals) {
    Async &a = async();
    check_shared(at, 8, Access::Write, CALLER);
    Phases b{};
    b.at = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(at) - hot.shared);
    b.live = true;
    b.arrivals = b.missing = arrivals;
    b.maker = hot.self->index;
    b.made = a.ex.epoch;
    b.made_step = a.ex.warps[my_warp()].step;
    if (a.mbarriers.size() == MAX_MBARRIERS || arrivals < 1) {
        a.ex.fail(719, "no mbarrier", "more than the emulated device has, or of no arrivals", CALLER);
    }
    a.mbarriers.push_back(b);
    a.flags(b.at / 16) |= MBARRIER;
}

void mbarrier_invalidate(void *at) {
    Async &a = async();
    a.find(at, CALLER).live = false;
}

void fence_mbarrier_init() {
    for (Phases &b : async().mbarriers) {
        b.fenced |= b.maker == hot.self->index;
    }
}

void mbarrier_arrive(void *at, int bytes) {
    Async &a = async();
    const void *pc = CALLER;
    a.arrive(a.find(at, pc), bytes, pc);
    a.maybe_progress();
}

void Async::wait_phase(void *at, int parity, bool of_cluster, const void *pc) {
    maybe_progress();
    for (;;) {
        unsigned index;
        Phases &b = find(at, pc, &index);
        if (b.phase % 2 != static_cast<unsigned>(parity & 1)) {
            if (b.remote != 0 && b.remote <= b.phase && !of_cluster) {
                ex.fail(719, "missing mbarrier_wait_cluster",
                        "an mbarrier_wait at " + byte(b.at) + ", where another block arrives", pc);
            }
            Known &mine = me().clock;
            mine.join(b.over);
            mine.of[ex.rank].phases[index] = b.phase;
            b.waited = b.told = b.phase;
            hot.self->waited |= b.over_waited;
            return;
        }
        sleep(Op::Mbarrier, at, static_cast<unsigned>(parity), pc);
    }
}

void mbarrier_wait(void *at, int parity) { async().wait_phase(at, parity, false, CALLER); }
void mbarrier_wait_cluster(void *at, int parity) { async().wait_phase(at, parity, true, CALLER); }

void fence_proxy_async() {
    Async &a = async();
    const unsigned t = hot.self->index;
    a.fence_epoch[t] = a.ex.epoch;
    a.fence_step[t] = a.ex.warps[t / LANES].step;
    fence_mbarrier_init();
}

// ---- who may touch what

bool Executor::ordered_write(const Trace &c, const Moment &now) const {
    return async->used && !same_warp(c.writer, now.thread) &&
           async->known().steps[c.writer / LANES] > c.write_step;
}

bool Executor::ordered_read(const Trace &c, const Moment &now) const {
    if (!async->used) {
        return false;
    }
    const unsigned me = now.thread / LANES;
    const std::uint32_t *steps = async->known().steps;
    if (c.reader >= SEVERAL) { // which ones is not known: those that this warp has heard of
        return async->heard_since_barrier();
    }
    const unsigned warp = c.reader < ONE_WARP ? c.reader / LANES : c.reader & ~ONE_WARP;
    return warp != me && steps[warp] > c.read_step;
}

bool Async::heard_since_barrier() const {
    const std::uint32_t *steps = known().steps;
    for (unsigned w = 0; w < ex.warp_count; w++) {
        if (steps[w] > warps[w].opened) {
            return true;
        }
    }
    return false;
}

bool Async::still_read(unsigned granule, unsigned *by) const {
    for (unsigned w = 0; w < ex.warp_count; w++) {
        if (read_by[granule * MAX_WARPS + w] > known().retired[w]) {
            *by = w;
            return true;
        }
    }
    return false;
}

// What ordinary stores left there is for the other proxy only after a fence.
void Async::check_generic(const Cell &c, const char *who, const void *pc) {
    if (c.write_epoch < ex.first_epoch || c.writer == UNTRACKED) {
        return;
    }
    const unsigned t = c.writer;
    if (fence_epoch[t] < c.write_epoch || (fence_epoch[t] == c.write_epoch && fence_step[t] < c.write_step)) {
        ex.fail(719, "missing proxy fence",
                std::string(who) + " where thread " + std::to_string(t) +
                    " wrote by ordinary stores: it needs a fence_proxy_async, and then a barrier",
                pc);
    }
}

std::uintptr_t Async::check_place(unsigned granule, const char *who, Access access, const void *pc) {
    const std::uintptr_t address = hot.shared + granule * 16;
    if (granule * 16 + 16 > hot.shared_bytes) {
        ex.fail(700, "shared memory out of bounds",
                who + (" " + byte(granule * 16)) + " of " + std::to_string(hot.shared_bytes), pc);
    }
    if (flags(granule) != 0) {
        touched(address, 16, access, pc);
    }
    return address;
}

void Async::check_read(unsigned granule, std::uint32_t serial, const void *pc) {
    const std::uintptr_t address = check_place(granule, "wgmma reads", Access::Read, pc);
    const Moment now = this_moment(pc);
    for (unsigned i = 0; i < 16 / CELL; i++) {
        const Cell &c = ex.cells[granule * (16 / CELL) + i];
        if (c.write_epoch < ex.first_epoch) {
            nothing_in_shared(address, 16, pc);
        }
        if (write_conflicts(c, now) && !ex.ordered_write(c, now)) {
            shared_race(c, true, address, 16, Access::Read, pc);
        }
        check_generic(c, "wgmma reads", pc);
    }
    flags(granule) |= MULTIPLIED;
    read_by[granule * MAX_WARPS + my_warp()] = serial;
}

void Async::check_write(unsigned granule, const void *pc) {
    const std::uintptr_t address = check_place(granule, "a bulk copy writes", Access::Write, pc);
    const Moment now = this_moment(pc);
    for (unsigned i = 0; i < 16 / CELL; i++) {
        Cell &c = ex.cells[granule * (16 / CELL) + i];
        const bool remote = ex.remote();
        if (remote ? !told_of_write(c) : write_conflicts(c, now) && !ex.ordered_write(c, now)) {
            shared_race(c, true, address, 16, Access::Write, pc, ex.whose());
        }
        if (remote ? !told_of_read(c) : read_conflicts(c, now) && !ex.ordered_read(c, now)) {
            shared_race(c, false, address, 16, Access::Write, pc, ex.whose());
        }
        check_generic(c, "a bulk copy writes", pc);
        c.write_epoch = ex.epoch;
        c.writer = UNTRACKED;
        c.read_epoch = 0;
    }
}

// An access where a flag is set. Of the hooks, and of the two above. The address is of the running thread's window.
void Async::touched(std::uintptr_t address, std::size_t bytes, Access access, const void *pc) {
    const auto at = static_cast<unsigned>(address - hot.shared);
    const unsigned granule = at / 16;
    unsigned char &flag = flags(granule);
    const auto here = [&] { // words for the few accesses that end in a report
        return std::string(verb(access)) + " of " + std::to_string(bytes) + " bytes at " + byte(at) + ex.whose();
    };
    if ((flag & BULK) != 0) {
        ex.fail(719, "race with a bulk copy", here() + ", which is still under way: wait for its mbarrier first", pc);
    }
    if ((flag & MBARRIER) != 0) {
        for (const Phases &b : mbarriers) {
            if (b.live && b.at < at + bytes && at < b.at + 8) {
                ex.fail(719, "mbarrier touched", here() + ", where an mbarrier lives", pc);
            }
        }
    }
    if ((flag & LANDED) != 0 && known().phases[landed_by[granule]] <= landed_phase[granule]) {
        ex.fail(719, "race with a bulk copy",
                here() + ", which came in a phase of the mbarrier at " + byte(mbarriers[landed_by[granule]].at) +
                    " that this warp has not waited for",
                pc);
    }
    if (access != Access::Read) {
        unsigned by;
        if ((flag & MULTIPLIED) != 0 && still_read(granule, &by)) {
            ex.fail(719, "race with wgmma",
                    here() + ", which wgmma of warp " + std::to_string(by) +
                        " reads: its wgmma_wait, and what tells of it, must come first",
                    pc);
        }
        flag = static_cast<unsigned char>(flag & ~(LANDED | MULTIPLIED));
    }
}

// ---- named barriers, registers, launches

void Async::named_barrier(Thread *lanes, bool waits) {
    const unsigned id = lanes[0].word.value, threads = lanes[0].word.argument, warp = my_warp();
    if (id < 1 || id > 15 || threads % LANES != 0 || threads == 0) {
        ex.fail(719, "barrier divergence", "named barriers are 1 to 15, of whole warps", lanes[0].pc);
    }
    Named &b = named[id];
    if (b.come != 0 && b.threads != threads) {
        ex.fail(719, "barrier divergence",
                "named barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, others come for " +
                    std::to_string(b.threads),
                lanes[0].pc);
    }
    for (int i = 0; i < LANES; i++) {
        lanes[i].word.argument = b.opened;
    }
    b.threads = threads;
    b.come += LANES;
    b.coming.join(warps[warp].clock);
    b.coming.of[ex.rank].steps[warp] = ++ex.warps[warp].step;
    b.coming_waited |= std::any_of(lanes, lanes + LANES, [](const Thread &t) { return t.waited; });
    if (b.come >= threads) {
        b.over = b.coming;
        b.over_waited = b.coming_waited;
        b.come = 0;
        b.opened++;
        wake(ex);
    }
}

void named_barrier(int id, int threads, bool waits) {
    Async &a = async();
    Thread *self = hot.self;
    const void *pc = CALLER;
    self->word = {static_cast<unsigned>(id), static_cast<unsigned>(threads)};
    collect(self, waits ? Op::Named : Op::NamedArrive, pc);
    const std::uint32_t mine = self->word.argument;
    while (waits && a.named[id].opened == mine) {
        sleep(Op::Named, nullptr, static_cast<unsigned>(id), pc);
    }
    if (waits) {
        a.warps[my_warp()].clock.join(a.named[id].over);
        self->waited |= a.named[id].over_waited;
    }
}

void set_registers(int count, bool more) {
    async();
    hot.self->word = {static_cast<unsigned>(count), more};
    collect(hot.self, Op::SetRegisters, CALLER);
}

// The launches before this one are over already: what is kept is who knows of it. A dependent of this one is taken to
// begin as early as it can, whenever this one allows it.
void grid_wait() { hot.self->waited = true; }
void grid_launch_dependents() {}

void perform_async(Op op, Thread *lanes) {
    Async &a = async();
    WarpAsync &w = a.warps[my_warp()];
    switch (op) {
    case Op::Named:
    case Op::NamedArrive:
        return a.named_barrier(lanes, op == Op::Named);
    case Op::SetRegisters:
        if ((lanes[0].word.argument != 0) != (lanes[0].word.value >= w.registers)) {
            a.ex.fail(719, "register budget",
                      "a warp of " + std::to_string(w.registers) + " registers a thread is set to " +
                          std::to_string(lanes[0].word.value) + " the wrong way",
                      lanes[0].pc);
        }
        w.registers = lanes[0].word.value;
        w.registers_pc = lanes[0].pc;
        return;
    case Op::WgmmaFence:
        w.fenced = true;
        return;
    case Op::Wgmma:
        return a.issue(lanes);
    case Op::WgmmaCommit:
        w.group++;
        w.fenced = false;
        return;
    default:
        return a.wait(lanes, lanes[0].word.argument);
    }
}

} // namespace emu

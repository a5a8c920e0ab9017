// races.h: who touched a cell of memory last, and whether that was ordered with who touches it now.
//
// Time is cut into epochs: one begins with each block and with each opening of the block's barrier; numbers
// are never used twice. Inside an epoch only two things order accesses of different threads: a warp_barrier
// between them, when both are of one warp, and nothing else. (Shuffles, votes, ldmatrix and mma order no
// memory.) A clock per thread would say the same; with these few kinds of synchronisation, an epoch and the
// number of warp barriers so far, the step, are the clock.
//
//     cell, one per 2 bytes of shared memory
//       last write   epoch, thread, step, line
//       last read    epoch, thread | several lanes of one warp | several warps, step, line
//
//     a read  races with a write of this epoch by another thread that no warp barrier separates
//     a write races with such a write, and with such a read
//     a read of a cell whose last write is older than the block reads what nothing wrote
//
// A cp.async writes twice: when it is issued and when it is waited for.
//
// Global memory has the same traces, without lines. Blocks of one launch are not ordered, whatever their
// epochs: an access of this launch that is older than the running block belongs to another block, and races.
// One of an earlier launch or copy races where no stream, event or wait puts that before this one
// (driver/order.h). Atomic updates leave a trace for other launches only. A second set of bits says what was ever
// written, by kernels, copies or fills.
//
// Single bytes are not tracked inside a launch: neighbours share a cell. Between launches they are.
#pragma once

#include <cstdint>

namespace emu {

constexpr unsigned CELL = 2; // bytes

constexpr std::uint16_t ONE_WARP = 0x4000;  // | warp: several of its lanes
constexpr std::uint16_t SEVERAL = 0x8000;   // warps
constexpr std::uint16_t BLOCKS = 0xfffe;    // several blocks of this launch (global memory)
constexpr std::uint16_t ATOMIC = 0xfffe;    // updates, as the writer: they do not race with one another
constexpr std::uint16_t UNTRACKED = 0xffff; // touched in single bytes, or by a copy

struct Trace {
    std::uint32_t write_epoch;
    std::uint16_t writer, write_step;
    std::uint32_t read_epoch;
    std::uint16_t reader, read_step;
};
struct Cell : Trace {
    std::int32_t write_line, read_line; // return address, from the kernel's entry
};

// The traces of a device's memory, one per CELL bytes, and one bit per CELL bytes: written ever. Null: not
// kept.
struct Shadow {
    std::uintptr_t base = 0;
    Trace *traces = nullptr;
    unsigned char *written = nullptr;
};

// Who accesses now.
struct Moment {
    std::uint32_t epoch;
    std::uint16_t thread, step;
    std::int32_t line;
};

inline bool same_warp(unsigned a, unsigned b) { return a / 32 == b / 32; }

// Whether a single thread's earlier access, of the same epoch, comes before this one.
inline bool comes_before(unsigned thread, unsigned step, const Moment &now) {
    return thread == now.thread || (same_warp(thread, now.thread) && step < now.step);
}

inline bool write_conflicts(const Trace &c, const Moment &now) {
    return c.write_epoch == now.epoch && c.writer < ATOMIC && !comes_before(c.writer, c.write_step, now);
}

inline bool read_conflicts(const Trace &c, const Moment &now) {
    if (c.read_epoch != now.epoch || c.reader == UNTRACKED) {
        return false;
    }
    if (c.reader < ONE_WARP) {
        return !comes_before(c.reader, c.read_step, now);
    }
    return c.reader >= SEVERAL || (c.reader & ~ONE_WARP) != now.thread / 32 || c.read_step >= now.step;
}

inline void note_read(Trace &c, const Moment &now) {
    if (c.read_epoch != now.epoch || c.reader == UNTRACKED) {
        c.reader = now.thread;
    } else if (c.reader != now.thread && c.reader < SEVERAL) {
        const unsigned warp = c.reader < ONE_WARP ? c.reader / 32u : c.reader & ~ONE_WARP;
        c.reader = warp == now.thread / 32u ? static_cast<std::uint16_t>(ONE_WARP | warp) : SEVERAL;
    }
    c.read_epoch = now.epoch;
    c.read_step = now.step;
}

inline void note_write(Trace &c, const Moment &now) {
    c.write_epoch = now.epoch;
    c.writer = now.thread;
    c.write_step = now.step;
}

// ---- global memory ----

// The first epochs of the running launch and block. Blocks of a cluster run together and take turns at epochs: the
// mask tells their turns apart.
struct Begun {
    std::uint32_t launch, block, mask;
};

inline bool other_block(std::uint32_t epoch, const Begun &b) {
    return epoch >= b.launch && (epoch < b.block || ((epoch ^ b.block) & b.mask) != 0);
}

inline bool global_write_conflicts(const Trace &c, const Moment &now, const Begun &b) {
    return (other_block(c.write_epoch, b) && c.writer < ATOMIC) || write_conflicts(c, now);
}

inline bool read_by_others(const Trace &c, const Begun &b) {
    return (other_block(c.read_epoch, b) && c.reader != UNTRACKED) || (c.read_epoch >= b.launch && c.reader == BLOCKS);
}

inline bool global_read_conflicts(const Trace &c, const Moment &now, const Begun &b) {
    return read_by_others(c, b) || read_conflicts(c, now);
}

inline void note_global_read(Trace &c, const Moment &now, const Begun &b) {
    if (read_by_others(c, b)) {
        c.reader = BLOCKS;
        c.read_epoch = now.epoch;
        return;
    }
    note_read(c, now);
}

} // namespace emu

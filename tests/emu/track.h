// track.h: the traces of races.h, kept and asked on every access. Included by hooks.cpp alone.
#pragma once

#include <string>

#include "engine.h"
#include "races.h"
#include "warp.h"

namespace emu {

// ---- reports (track.cpp) ----

const char *verb(Access access);
[[noreturn]] void shared_race(const Cell &c, bool with_write, std::uintptr_t address, std::size_t bytes,
                              Access access, const void *pc, const std::string &whose = "");
[[noreturn]] void nothing_in_shared(std::uintptr_t address, std::size_t bytes, const void *pc);
[[noreturn]] void global_race(const Trace &c, bool with_write, std::uintptr_t address, std::size_t bytes,
                              Access access, const void *pc);
// What launches and copies that are not ordered with this launch did to the cells.
void look_for_unordered(const Trace *first, std::size_t count, std::uintptr_t address, std::size_t bytes,
                        Access access, const void *pc);
[[noreturn]] void nothing_in_global(std::uintptr_t address, std::size_t bytes, const void *pc);

// ---- the fast paths ----

inline __attribute__((always_inline)) Moment this_moment(const void *pc) {
    const Executor &ex = *hot.executor;
    const auto thread = static_cast<std::uint16_t>(hot.self->index);
    return Moment{ex.epoch, thread, ex.warps[thread / LANES].step,
                  static_cast<std::int32_t>(static_cast<const char *>(pc) -
                                            static_cast<const char *>(ex.launch->kernel->entry))};
}

inline __attribute__((always_inline)) void track_shared(std::uintptr_t address, std::size_t bytes,
                                                        Access access, const void *pc) {
    const Moment now = this_moment(pc);
    Cell *c = &hot.executor->cells[(address - hot.shared) / CELL];
    if (bytes < CELL) {
        if (access != Access::Read) {
            c->write_epoch = now.epoch;
            c->writer = UNTRACKED;
        }
        return;
    }
    for (Cell *end = c + bytes / CELL; c != end; c++) {
        if (write_conflicts(*c, now) && !hot.executor->ordered_write(*c, now)) {
            shared_race(*c, true, address, bytes, access, pc);
        }
        if (access == Access::Read) {
            if (c->write_epoch < hot.executor->first_epoch) {
                nothing_in_shared(address, bytes, pc);
            }
            note_read(*c, now);
            c->read_line = now.line;
        } else {
            if (read_conflicts(*c, now) && !hot.executor->ordered_read(*c, now)) {
                shared_race(*c, false, address, bytes, access, pc);
            }
            note_write(*c, now);
            c->write_line = now.line;
        }
    }
}

// Whether the bits of all `count` cells from `first` on are set; sets them.
inline bool all_written(const unsigned char *bits, std::size_t first, std::size_t count) {
    for (std::size_t i = first; i < first + count; i++) {
        if ((bits[i / 8] >> i % 8 & 1) == 0) {
            return false;
        }
    }
    return true;
}
inline void set_written(unsigned char *bits, std::size_t first, std::size_t count) {
    for (std::size_t i = first; i < first + count; i++) {
        bits[i / 8] = static_cast<unsigned char>(bits[i / 8] | 1u << i % 8);
    }
}

inline __attribute__((always_inline)) void track_global(const Shadow &shadow, std::uintptr_t address,
                                                        std::size_t bytes, Access access, const void *pc) {
    if (shadow.traces == nullptr) {
        return;
    }
    const std::size_t first = (address - shadow.base) / CELL;
    const std::size_t count = (address % CELL + bytes + CELL - 1) / CELL;
    if (shadow.written != nullptr) {
        if (access == Access::Write) {
            set_written(shadow.written, first, count);
        } else if (!__builtin_expect(all_written(shadow.written, first, count), 1)) {
            nothing_in_global(address, bytes, pc);
        }
    }
    Trace *c = shadow.traces + first;
    const Executor &ex = *hot.executor;
    const std::uint32_t launch = ex.launch_epoch;
    const Begun begun = ex.begun();
    if (__builtin_expect(ex.unordered_from != launch, 0) && !(ex.ordered_once_waited && hot.self->waited)) {
        look_for_unordered(c, count, address, bytes, access, pc);
    }
    if (access == Access::Atomic || bytes < CELL) {
        if (access == Access::Write) {
            c->write_epoch = ex.epoch;
            c->writer = UNTRACKED;
        } else if (access == Access::Read && c->read_epoch < launch) {
            c->read_epoch = ex.epoch;
            c->reader = UNTRACKED;
        }
        for (Trace *end = c + count; access == Access::Atomic && c != end; c++) {
            if (c->write_epoch < launch) {
                c->write_epoch = ex.epoch;
                c->writer = ATOMIC;
            }
        }
        return;
    }
    const Moment now = this_moment(pc);
    for (Trace *end = c + count; c != end; c++) {
        if (global_write_conflicts(*c, now, begun)) {
            global_race(*c, true, address, bytes, access, pc);
        }
        if (access == Access::Read) {
            note_global_read(*c, now, begun);
        } else {
            if (global_read_conflicts(*c, now, begun)) {
                global_race(*c, false, address, bytes, access, pc);
            }
            note_write(*c, now);
        }
    }
}

} // namespace emu

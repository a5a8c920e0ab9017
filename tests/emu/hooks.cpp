// hooks.cpp: every load and store of a kernel comes by here.
//
// Kernels are compiled with -fsanitize=thread, which puts a call to __tsan_read4(address) and its kin before
// each access to memory. The sanitizer's runtime is not linked; these are the functions instead. Atomics of
// C++ have no hook here, so a kernel that uses them does not link.
//
//     address ─▶ shared window? ─▶ inside the launch's size, aligned, no cp.async under way there, no race
//             ─▶ a fiber's stack? ─▶ registers and locals: free
//             ─▶ allocation of the last accesses? ─▶ inside, aligned, no race
//             ─▶ slow: look it up; constants of the program may be read; anything else ends the launch
//
// Code of the harness that is compiled with the same flags passes: outside a kernel there is no running
// thread.
#include <cstring>
#include <link.h>
#include <string>

#include "async.h"
#include "memory.h"
#include "report.h"
#include "track.h"
#include "warp.h"

#define CALLER __builtin_return_address(0)
#define LIKELY(x) __builtin_expect(!!(x), 1)

namespace emu {

namespace {

std::string hex(std::uintptr_t address) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
    return text;
}

std::string what(Access access, std::size_t bytes, std::uintptr_t address) {
    return std::string(verb(access)) + " of " + std::to_string(bytes) + " bytes at " + hex(address);
}

// Whether the address lies in a read-only segment of the object that holds the kernel: constant tables.
bool is_constant(std::uintptr_t address, std::size_t bytes, const void *kernel) {
    struct Query {
        std::uintptr_t address, end, kernel;
        bool found;
    } query{address, address + bytes, reinterpret_cast<std::uintptr_t>(kernel), false};
    dl_iterate_phdr(
        [](dl_phdr_info *info, std::size_t, void *data) {
            auto *q = static_cast<Query *>(data);
            bool holds_kernel = false, holds_data = false;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto &segment = info->dlpi_phdr[i];
                if (segment.p_type != PT_LOAD) {
                    continue;
                }
                const std::uintptr_t from = info->dlpi_addr + segment.p_vaddr, to = from + segment.p_memsz;
                holds_kernel |= q->kernel >= from && q->kernel < to;
                holds_data |= (segment.p_flags & PF_W) == 0 && q->address >= from && q->end <= to;
            }
            q->found = holds_kernel && holds_data;
            return holds_kernel ? 1 : 0;
        },
        &query);
    return query.found;
}

__attribute__((noinline, noreturn)) void misaligned(std::uintptr_t address, std::size_t bytes, Access access,
                                                    int alignment, const void *pc) {
    hot.executor->fail(
        716, "misaligned address",
        what(access, bytes, address) + ", which is no multiple of " + std::to_string(alignment), pc);
}

__attribute__((noinline, noreturn)) void beyond_shared(std::uintptr_t address, std::size_t bytes,
                                                       Access access, const void *pc) {
    hot.executor->fail(700, "shared memory out of bounds",
                       std::string(verb(access)) + " of " + std::to_string(bytes) + " bytes at byte " +
                           std::to_string(static_cast<std::intptr_t>(address - hot.shared)) + " of " +
                           std::to_string(hot.shared_bytes) + " that the launch gave",
                       pc);
}

__attribute__((noinline)) void under_way(std::uintptr_t address, std::size_t bytes, Access access, const void *pc) {
    if ((hot.in_flight[(address - hot.shared) / 16] & CP_ASYNC) == 0) {
        return hot.executor->async->touched(address, bytes, access, pc);
    }
    // Whose copy is it?
    std::string owner;
    const Executor &ex = *hot.executor;
    for (unsigned t = 0; t < ex.thread_count && owner.empty(); t++) {
        for (const AsyncCopy &copy : ex.threads[t].copies) {
            const auto to = reinterpret_cast<std::uintptr_t>(copy.to);
            if (to < address + bytes && address < to + 16) {
                owner = " of thread " + std::to_string(t) + " (issued at " + mark_line(copy.pc) + ")";
                break;
            }
        }
    }
    hot.executor->fail(719, "race with cp.async",
                       std::string(verb(access)) + " of " + std::to_string(bytes) + " bytes at shared byte " +
                           std::to_string(address - hot.shared) + ", which a cp.async" + owner +
                           " may still be writing: wait for its group (and then a barrier) first",
                       pc);
}

// Not shared, not the stack, not one of the last two allocations. True: now the last one; false: a constant.
__attribute__((noinline)) bool look_up(std::uintptr_t address, std::size_t bytes, Access access,
                                       const void *pc) {
    Executor &ex = *hot.executor;
    for (Memory *memory : ex.launch->memories) {
        if (const Allocation *a = memory->holding(address, bytes)) {
            if (a->pooled && memory != ex.launch->memories.front()) {
                ex.fail(700, "peer access",
                        what(access, bytes, address) + ": " + memory->describe(address) + " on device " +
                            std::to_string(memory->device()) + ", from a pool, which peer access does not open",
                        pc);
            }
            hot.older = hot.hit;
            hot.hit = Hit{a->base, a->bytes, &memory->shadow()};
            return true;
        }
    }
    if (access == Access::Read && is_constant(address, bytes, ex.launch->kernel->entry)) {
        return false;
    }
    if (address - hot.shared + 4096 < hot.shared_bytes + 8192) {
        beyond_shared(address, bytes, access, pc);
    }
    for (Memory *memory : ex.launch->memories) {
        if (memory->contains(address)) {
            const Allocation *a = memory->near(address);
            const bool dead = a != nullptr && !a->live && address >= a->base && address < a->base + a->bytes;
            ex.fail(700, dead ? "use after free" : "out of bounds",
                    what(access, bytes, address) + ": " + memory->describe(address), pc);
        }
    }
    for (Memory *memory : ex.launch->unreachable) {
        if (memory->contains(address)) {
            ex.fail(700, "peer access",
                    what(access, bytes, address) + ": " + memory->describe(address) + " on device " +
                        std::to_string(memory->device()) + ", to which peer access is not enabled",
                    pc);
        }
    }
    ex.fail(700, address < 4096 ? "null pointer" : "host memory in a kernel",
            what(access, bytes, address) + ": not memory that this device may reach", pc);
}

inline __attribute__((always_inline)) void touch(std::uintptr_t address, std::size_t bytes, int alignment,
                                                 Access access, const void *pc) {
    if (LIKELY(address - hot.shared < hot.shared_bytes)) {
        if (!LIKELY((address & (alignment - 1)) == 0)) {
            misaligned(address, bytes, access, alignment, pc);
        }
        if (!LIKELY(address - hot.shared + bytes <= hot.shared_bytes)) {
            beyond_shared(address, bytes, access, pc);
        }
        if (!LIKELY(hot.in_flight[(address - hot.shared) / 16] == 0)) {
            under_way(address, bytes, access, pc);
        }
        track_shared(address, bytes, access, pc);
    } else if (LIKELY(address - hot.stacks < hot.stacks_bytes)) {
        return;
    } else {
        if (hot.self == nullptr) {
            return;
        }
        if (!LIKELY((address & (alignment - 1)) == 0)) {
            misaligned(address, bytes, access, alignment, pc);
        }
        if (LIKELY(hot.hit.holds(address, bytes))) {
            track_global(*hot.hit.shadow, address, bytes, access, pc);
        } else if (hot.older.holds(address, bytes)) {
            track_global(*hot.older.shadow, address, bytes, access, pc);
        } else if (look_up(address, bytes, access, pc)) {
            track_global(*hot.hit.shadow, address, bytes, access, pc);
        }
    }
    if (!LIKELY(--hot.budget > 0)) {
        hot.executor->preempt(hot.self);
    }
}

inline std::uintptr_t number(const void *p) { return reinterpret_cast<std::uintptr_t>(p); }

} // namespace

void check_shared(const void *at, int bytes, Access access, const void *pc) {
    const std::uintptr_t address = number(at);
    if (address - hot.shared >= hot.shared_bytes) {
        if (address - hot.shared + 4096 < hot.shared_bytes + 8192) {
            beyond_shared(address, bytes, access, pc);
        }
        hot.executor->fail(700, "not shared memory", what(access, bytes, address) + " as shared memory", pc);
    }
    touch(address, bytes, bytes, access, pc);
}

void check_global(const void *at, int bytes, int alignment, Access access, const void *pc) {
    const std::uintptr_t address = number(at);
    if (address - hot.shared < hot.shared_bytes || address - hot.stacks < hot.stacks_bytes) {
        hot.executor->fail(700, "not global memory", what(access, bytes, address) + " as global memory", pc);
    }
    if ((address & (alignment - 1)) != 0) {
        misaligned(address, bytes, access, alignment, pc);
    }
    if (bytes > 0) {
        touch(address, bytes, 1, access, pc);
    }
}

void landed_in_shared(const void *at, const void *pc) {
    Cell *c = &hot.executor->cells[(number(at) - hot.shared) / CELL];
    const Moment now = this_moment(pc);
    for (unsigned i = 0; i < 16 / CELL; i++) {
        note_write(c[i], now);
        c[i].write_line = now.line;
    }
}

void load(void *to, const void *from, int bytes) {
    touch(number(from), bytes, bytes, Access::Read, CALLER);
    std::memcpy(to, from, bytes);
}

void store(void *to, const void *from, int bytes) {
    touch(number(to), bytes, bytes, Access::Write, CALLER);
    std::memcpy(to, from, bytes);
}

void load_constant(void *to, const void *from, int bytes) {
    check_global(from, bytes, bytes, Access::Read, CALLER);
    std::memcpy(to, from, bytes);
}

unsigned long long atomic_min_u64(unsigned long long *at, unsigned long long value) {
    check_global(at, 8, 8, Access::Atomic, CALLER);
    unsigned long long old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (value < old &&
           !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

unsigned atomic_add_u32(unsigned *at, unsigned value) {
    check_global(at, 4, 4, Access::Atomic, CALLER);
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

int thread_x() { return static_cast<int>(hot.self->index); }
int block_x() { return static_cast<int>(hot.executor->block_index.x); }
int block_y() { return static_cast<int>(hot.executor->block_index.y); }
int block_z() { return static_cast<int>(hot.executor->block_index.z); }
int grid_x() { return static_cast<int>(hot.executor->launch->grid.x); }
int grid_y() { return static_cast<int>(hot.executor->launch->grid.y); }
int block_dim_x() { return static_cast<int>(hot.executor->thread_count); }
unsigned char *shared_memory() { return hot.executor->shared; }
// A window that begins with 1 KiB of the system's, as on recent cards, and no better aligned than its address here.
unsigned shared_address(const void *p) { return static_cast<unsigned>(number(p) - hot.shared) + 1024 + 128; }

} // namespace emu

// ---- the compiler's calls
// -----------------------------------------------------------------------------------

#define HOOK(name, bytes, alignment, access) \
    void name(void *at);                     \
    void name(void *at) { emu::touch(emu::number(at), bytes, alignment, emu::Access::access, CALLER); }

extern "C" {
HOOK(__tsan_read1, 1, 1, Read)
HOOK(__tsan_read2, 2, 2, Read)
HOOK(__tsan_read4, 4, 4, Read)
HOOK(__tsan_read8, 8, 8, Read)
HOOK(__tsan_read16, 16, 8, Read)
HOOK(__tsan_write1, 1, 1, Write)
HOOK(__tsan_write2, 2, 2, Write)
HOOK(__tsan_write4, 4, 4, Write)
HOOK(__tsan_write8, 8, 8, Write)
HOOK(__tsan_write16, 16, 8, Write)
// The compiler knows that these are not aligned, and so does nvcc, which then moves them in pieces.
HOOK(__tsan_unaligned_read2, 2, 1, Read)
HOOK(__tsan_unaligned_read4, 4, 1, Read)
HOOK(__tsan_unaligned_read8, 8, 1, Read)
HOOK(__tsan_unaligned_read16, 16, 1, Read)
HOOK(__tsan_unaligned_write2, 2, 1, Write)
HOOK(__tsan_unaligned_write4, 4, 1, Write)
HOOK(__tsan_unaligned_write8, 8, 1, Write)
HOOK(__tsan_unaligned_write16, 16, 1, Write)
void __tsan_read_range(void *at, std::size_t bytes);
void __tsan_read_range(void *at, std::size_t bytes) {
    emu::touch(emu::number(at), bytes, 1, emu::Access::Read, CALLER);
}
void __tsan_write_range(void *at, std::size_t bytes);
void __tsan_write_range(void *at, std::size_t bytes) {
    emu::touch(emu::number(at), bytes, 1, emu::Access::Write, CALLER);
}
void __tsan_init();
void __tsan_init() {}
void __tsan_func_entry(void *);
void __tsan_func_entry(void *) {}
void __tsan_func_exit();
void __tsan_func_exit() {}
}

// fiber.h: a second stack to stand on. One fiber per CUDA thread.
//
//     context_make(c, stack, bytes, entry)   c will start in entry(), which never returns
//     context_switch(from, to)               leave here (kept in `from`), go on where `to` was left
//
// x86-64: six callee-saved registers and the stack pointer, about 2 ns. Elsewhere: ucontext, which also saves
// the signal mask by a system call, a hundred times slower and just as right (-DEMU_UCONTEXT asks for it, to
// test it).
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)

struct Context {
    void *sp;
};

extern "C" __attribute__((visibility("hidden"))) void emu_switch_stack(void **save, void *load);

inline void context_make(Context &c, void *stack, std::size_t bytes, void (*entry)()) {
    // The switch pops six registers and returns into `entry`, which must find rsp = 8 mod 16, as after a
    // call.
    auto top = (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t{15};
    auto *slot = reinterpret_cast<void **>(top);
    *--slot = nullptr;
    *--slot = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; i++) {
        *--slot = nullptr;
    }
    c.sp = slot;
}

inline void context_switch(Context &from, Context &to) { emu_switch_stack(&from.sp, to.sp); }

#else

} // namespace emu
#include <ucontext.h>
namespace emu {

struct Context {
    ucontext_t u;
};

inline void context_make(Context &c, void *stack, std::size_t bytes, void (*entry)()) {
    getcontext(&c.u);
    c.u.uc_stack.ss_sp = stack;
    c.u.uc_stack.ss_size = bytes;
    c.u.uc_link = nullptr;
    makecontext(&c.u, entry, 0);
}

inline void context_switch(Context &from, Context &to) { swapcontext(&from.u, &to.u); }

#endif

} // namespace emu

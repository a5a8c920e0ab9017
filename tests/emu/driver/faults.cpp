// faults.cpp: host code that follows a device pointer is stopped by the processor; this says why.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <unistd.h>

#include "state.h"

namespace emu {

namespace {

struct sigaction before;

void on_fault(int signal, siginfo_t *info, void *context) {
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    for (const auto &device : driver().devices) {
        if (device->memory.contains(address)) {
            // The program is lost anyway: formatting in a handler is a risk worth taking for the place of the
            // mistake.
            std::fprintf(stderr,
                         "emulated device: host code touched device memory at %p: %s\n"
                         "    a device pointer is not for the host to follow: copy (cuMemcpyDtoH, HtoD)\n",
                         info->si_addr, device->memory.describe(address).c_str());
            std::abort();
        }
    }
    if (address - hot.stacks < hot.stacks_bytes) {
        std::fprintf(stderr, "emulated device: a kernel's thread used more than its %zu bytes of stack\n",
                     STACK);
        std::abort();
    }
    // Somebody else's fault: whoever was there before, or the default.
    if ((before.sa_flags & SA_SIGINFO) != 0 && before.sa_sigaction != nullptr) {
        before.sa_sigaction(signal, info, context);
        return;
    }
    if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signal);
        return;
    }
    std::signal(signal, SIG_DFL); // on return the access faults again
}

} // namespace

void install_fault_handler() {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &before);
}

} // namespace emu

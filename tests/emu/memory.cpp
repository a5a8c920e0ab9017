// memory.cpp: see memory.h.
#include "memory.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace emu {

void poison(void *at, std::size_t bytes) {
    auto *words = static_cast<unsigned char *>(at);
    std::size_t i = 0;
    // Written as a loop that the compiler turns into wide stores; odd ends follow.
    for (; i + 2 <= bytes; i += 2) {
        __builtin_memcpy(words + i, &POISON, 2);
    }
    if (i < bytes) {
        words[i] = POISON & 0xff;
    }
}

Memory::Memory(int device, std::size_t limit, bool host_visible, bool races)
    : device_(device), limit_(limit), host_visible_(host_visible) {
    file_ = memfd_create("emulated device memory", MFD_CLOEXEC);
    const int protection = host_visible ? PROT_READ | PROT_WRITE : PROT_NONE;
    if (file_ < 0 || ftruncate(file_, RANGE) != 0) {
        std::perror("emu: cannot make the memory of the emulated device");
        std::abort();
    }
    void *base = mmap(nullptr, RANGE, protection, MAP_SHARED | MAP_NORESERVE, file_, 0);
    void *alias = mmap(nullptr, RANGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
    if (base == MAP_FAILED || alias == MAP_FAILED) {
        std::perror("emu: cannot map the memory of the emulated device");
        std::abort();
    }
    // Never in a core file, never in a child.
    madvise(base, RANGE, MADV_DONTDUMP);
    madvise(alias, RANGE, MADV_DONTDUMP);
    base_ = reinterpret_cast<std::uintptr_t>(base);
    alias_ = static_cast<unsigned char *>(alias);
    // Reserved for the whole range, used where kernels go.
    const auto reserve = [](std::size_t bytes) {
        void *at =
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        madvise(at, bytes, MADV_DONTDUMP);
        return at == MAP_FAILED ? nullptr : at;
    };
    shadow_.base = base_;
    if (races) {
        shadow_.traces = static_cast<Trace *>(reserve(RANGE / CELL * sizeof(Trace)));
        shadow_.written = host_visible ? nullptr : static_cast<unsigned char *>(reserve(RANGE / CELL / 8));
    }
}

std::uintptr_t Memory::allocate(std::size_t bytes, bool pooled) {
    // `next_` is a multiple of the page; the address is GUARD past one, so that nobody comes to rely on more.
    const std::size_t span = (GUARD + bytes + GUARD + PAGE - 1) / PAGE * PAGE + PAGE;
    if (bytes == 0 || bytes > limit_ - used_ || span > RANGE - next_) {
        return 0;
    }
    const std::uintptr_t base = base_ + next_ + GUARD;
    next_ += span;
    used_ += bytes;
    allocations_[base] = Allocation{base, bytes, ++count_, true, pooled};
    poison(alias(base), bytes);
    return base;
}

bool Memory::release(std::uintptr_t base) {
    const auto found = allocations_.find(base);
    if (found == allocations_.end() || !found->second.live) {
        return false;
    }
    Allocation &a = found->second;
    a.live = false;
    used_ -= a.bytes;
    // The addresses are never given out again, so the pages can go back; who looks finds a report, not bytes.
    const std::size_t first = (base - GUARD) - base_;
    const std::size_t span = (GUARD + a.bytes + PAGE - 1) / PAGE * PAGE;
    if (shadow_.traces != nullptr) {
        madvise(shadow_.traces + first / CELL, span / CELL * sizeof(Trace), MADV_DONTNEED);
    }
    fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(first),
              static_cast<off_t>(span));
    return true;
}

void Memory::mark_written(std::uintptr_t address, std::size_t bytes) {
    if (shadow_.written == nullptr) {
        return;
    }
    std::size_t cell = (address - base_) / CELL;
    const std::size_t end = (address - base_ + bytes + CELL - 1) / CELL;
    for (; cell < end && cell % 8 != 0; cell++) {
        shadow_.written[cell / 8] = static_cast<unsigned char>(shadow_.written[cell / 8] | 1u << cell % 8);
    }
    if (cell < end) {
        std::memset(shadow_.written + cell / 8, 0xff, (end - cell) / 8);
        cell += (end - cell) / 8 * 8;
    }
    for (; cell < end; cell++) {
        shadow_.written[cell / 8] = static_cast<unsigned char>(shadow_.written[cell / 8] | 1u << cell % 8);
    }
}

void Memory::carry_written(std::uintptr_t to, const Memory &from_memory, std::uintptr_t from,
                           std::size_t bytes) {
    const unsigned char *bits = from_memory.shadow_.written;
    if (shadow_.written == nullptr || bits == nullptr) {
        return;
    }
    if ((to - from) % CELL != 0) { // cells do not match: be generous
        mark_written(to, bytes);
        return;
    }
    std::size_t source = (from - from_memory.base_) / CELL, target = (to - base_) / CELL;
    for (const std::size_t end = (to - base_ + bytes + CELL - 1) / CELL; target < end; target++, source++) {
        const unsigned bit = bits[source / 8] >> source % 8 & 1u;
        unsigned char &byte = shadow_.written[target / 8];
        byte = static_cast<unsigned char>((byte & ~(1u << target % 8)) | bit << target % 8);
    }
}

const Allocation *Memory::near(std::uintptr_t address) const {
    auto next = allocations_.upper_bound(address + GUARD);
    if (next == allocations_.begin()) {
        return nullptr;
    }
    const Allocation &a = std::prev(next)->second;
    // One that starts just above, or one that holds the address, or one that ends below it within a few
    // guards.
    return address < a.base + a.bytes + PAGE ? &a : nullptr;
}

const Allocation *Memory::holding(std::uintptr_t address, std::size_t bytes) const {
    auto next = allocations_.upper_bound(address);
    if (next == allocations_.begin()) {
        return nullptr;
    }
    const Allocation &a = std::prev(next)->second;
    const std::size_t offset = address - a.base;
    return a.live && offset <= a.bytes && bytes <= a.bytes - offset ? &a : nullptr;
}

std::string Memory::describe(std::uintptr_t address) const {
    char text[200];
    const Allocation *a = near(address);
    if (a == nullptr) {
        std::snprintf(text, sizeof text, "no allocation of device %d is near", device_);
        return text;
    }
    const char *state = a->live ? "live" : "freed";
    if (address < a->base) {
        std::snprintf(text, sizeof text, "%zu bytes before the start of allocation %d (%zu bytes, %s)",
                      std::size_t(a->base - address), a->number, a->bytes, state);
    } else if (address >= a->base + a->bytes) {
        std::snprintf(text, sizeof text, "%zu bytes past the end of allocation %d (%zu bytes, %s)",
                      std::size_t(address - a->base - a->bytes), a->number, a->bytes, state);
    } else {
        std::snprintf(text, sizeof text, "byte %zu of allocation %d (%zu bytes, %s)",
                      std::size_t(address - a->base), a->number, a->bytes, state);
    }
    return text;
}

void Memory::open() {
    if (!host_visible_ && opened_++ == 0) {
        mprotect(reinterpret_cast<void *>(base_), next_, PROT_READ | PROT_WRITE);
    }
}

void Memory::close() {
    if (!host_visible_ && --opened_ == 0) {
        mprotect(reinterpret_cast<void *>(base_), next_, PROT_NONE);
    }
}

} // namespace emu

// memory.h: the memory of an emulated device.
//
// One range of addresses per device, never used twice, so that a pointer into freed memory stays
// recognisable:
//
//     base ─┬─ page ──────────────┬─ ...
//           │ guard │ data │ guard │ guard page │ guard │ data │ ...
//
// The range is mapped twice over the same pages. The device's view lies at the addresses that programs hold;
// it can be read and written only while a kernel runs (open/close), so that host code that follows a device
// pointer is stopped by the processor. The driver's own view (`alias`) is where copies read and write.
//
// New and freed memory holds POISON: 0x7fff in every 16 bits, a NaN as fp16 and as f32.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "races.h"

namespace emu {

constexpr std::uint16_t POISON = 0x7fff;
constexpr std::size_t GUARD =
    512; // bytes before and after each allocation, at least; also the alignment of its address

void poison(void *at, std::size_t bytes);

struct Allocation {
    std::uintptr_t base;
    std::size_t bytes;
    int number; // 1, 2, .. in order of allocation
    bool live;
    bool pooled = false; // from a pool: peer access to the device is not access to this
};

class Memory {
  public:
    // `limit`: bytes that may be live at once. `host_visible`: the device's view stays open (kernel authors'
    // harness), and what was written is not known. `races`: keep traces at all.
    Memory(int device, std::size_t limit, bool host_visible, bool races = true);

    // 0 when over the limit.
    std::uintptr_t allocate(std::size_t bytes, bool pooled = false);
    // False: not the address of a live allocation.
    bool release(std::uintptr_t base);

    // The allocation whose data or guards hold the address, dead or alive; null when none.
    const Allocation *near(std::uintptr_t address) const;
    // The live allocation that holds all of it, or null.
    const Allocation *holding(std::uintptr_t address, std::size_t bytes) const;
    // In words: where an address lies.
    std::string describe(std::uintptr_t address) const;

    bool contains(std::uintptr_t address) const { return address - base_ < RANGE; }
    unsigned char *alias(std::uintptr_t address) const { return alias_ + (address - base_); }
    const Shadow &shadow() const { return shadow_; }
    // A copy or fill wrote there; a copy between places of device memory carries over what was written.
    void mark_written(std::uintptr_t address, std::size_t bytes);
    void carry_written(std::uintptr_t to, const Memory &from_memory, std::uintptr_t from, std::size_t bytes);

    void open();
    void close();

    std::size_t used() const { return used_; }
    std::size_t limit() const { return limit_; }
    int device() const { return device_; }

  private:
    static constexpr std::size_t RANGE = std::size_t{1} << 38; // addresses, not memory
    static constexpr std::size_t PAGE = 4096;

    int device_;
    std::size_t limit_;
    bool host_visible_;
    int file_ = -1;
    std::uintptr_t base_ = 0;
    unsigned char *alias_ = nullptr;
    Shadow shadow_;
    std::size_t next_ = PAGE;
    std::size_t used_ = 0;
    int count_ = 0;
    int opened_ = 0;
    std::map<std::uintptr_t, Allocation> allocations_;
};

} // namespace emu

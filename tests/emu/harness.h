// harness.h: run one kernel on plain arrays, for people who write kernels.
//
//     #include "../../kernels/layer_norm.cu"
//     #include "harness.h"
//
//     int main() {
//         emu::Array<fp16> x(rows * pitch), y(rows * pitch);  // device memory; x[i] works here too
//         ...
//         EMU_LAUNCH(layer_norm, (grid), (128), shared, y.get(), x.get(), ...);  // under 8 seeds
//         ...compare y[i]; the array is the one that the last seed left
//     }
//
// Compile and run: bash tests/emu/try my_test.cpp   (see README.md)
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "engine.h"
#include "memory.h"
#include "registry.h"

namespace emu {

// The one device of a harness; its memory is open to the host as well.
Memory &harness_memory();

template <class T> class Array {
  public:
    explicit Array(std::size_t count)
        : count_(count), data_(reinterpret_cast<T *>(harness_memory().allocate(count * sizeof(T)))) {
        if (data_ == nullptr) {
            std::fprintf(stderr, "harness: no room for %zu bytes\n", count * sizeof(T));
            std::abort();
        }
    }
    Array(std::size_t count, T value) : Array(count) { fill(value); }
    explicit Array(const std::vector<T> &from) : Array(from.size()) {
        std::memcpy(data_, from.data(), count_ * sizeof(T));
    }
    ~Array() { harness_memory().release(reinterpret_cast<std::uintptr_t>(data_)); }
    Array(const Array &) = delete;

    void fill(T value) {
        for (std::size_t i = 0; i < count_; i++) {
            data_[i] = value;
        }
    }
    void poison() { emu::poison(data_, count_ * sizeof(T)); }
    T *get() const { return data_; }
    T &operator[](std::size_t i) const { return data_[i]; }
    std::size_t size() const { return count_; }
    std::vector<T> copy() const { return std::vector<T>(data_, data_ + count_); }

  private:
    std::size_t count_;
    T *data_;
};

// While one lives, launches are programmatic: they begin while a launch before them still reads and writes what is named
// here, and they may touch that after a grid_wait only.
class Before {
  public:
    Before();
    ~Before();
    Before(const Before &) = delete;

    template <class T> Before &writes(const Array<T> &array) { return touches(array, true); }
    template <class T> Before &reads(const Array<T> &array) { return touches(array, false); }

  private:
    struct Range {
        std::uintptr_t address;
        std::size_t bytes;
        bool write;
    };
    template <class T> Before &touches(const Array<T> &array, bool write) {
        ranges_.push_back({reinterpret_cast<std::uintptr_t>(array.get()), array.size() * sizeof(T), write});
        return *this;
    }
    std::vector<Range> ranges_;

    friend Fault harness_launch(const Kernel &, const void *const *, Dim, Dim, std::size_t, std::uint64_t, unsigned);
};

// One launch under one seed. The fault's code is 0 when all went well.
Fault harness_launch(const Kernel &kernel, const void *const *parameters, Dim grid, Dim block,
                     std::size_t shared_bytes, std::uint64_t seed, unsigned cluster = 1);

template <auto entry, class... P>
Fault launch_cluster_seed(const char *name, std::uint64_t seed, unsigned cluster, Dim grid, Dim block,
                          std::size_t shared_bytes, void (*)(P...), typename std::common_type<P>::type... values) {
    const Kernel kernel = Entry<entry>::kernel(name);
    const void *parameters[] = {static_cast<const void *>(&values)..., nullptr};
    return harness_launch(kernel, parameters, grid, block, shared_bytes, seed, cluster);
}
template <auto entry, class... P>
Fault launch_seed(const char *name, std::uint64_t seed, Dim grid, Dim block, std::size_t shared_bytes,
                  void (*kernel)(P...), typename std::common_type<P>::type... values) {
    return launch_cluster_seed<entry>(name, seed, 1, grid, block, shared_bytes, kernel, values...);
}

// The seeds to try: EMU_SEED as one number or "from..to", else 0..8.
std::vector<std::uint64_t> harness_seeds();
// Prints the report and exits with 1 when there is one.
void harness_demand(const Fault &fault);

} // namespace emu

// One launch, one seed, the Fault as value; in clusters of `cluster` blocks in x.
#define EMU_LAUNCH_SEED(seed, kernel, grid, block, shared, ...) \
    EMU_LAUNCH_CLUSTER_SEED(seed, kernel, 1, grid, block, shared, __VA_ARGS__)
#define EMU_LAUNCH_CLUSTER_SEED(seed, kernel, cluster, grid, block, shared, ...)                                  \
    emu::launch_cluster_seed<kernel>(#kernel, seed, cluster, emu::Dim grid, emu::Dim block, shared, kernel, \
                                     __VA_ARGS__)

// A launch under every seed; the first fault ends the program. Outputs must not be inputs (or launch seed by
// seed).
#define EMU_LAUNCH(kernel, grid, block, shared, ...) EMU_LAUNCH_CLUSTER(kernel, 1, grid, block, shared, __VA_ARGS__)
#define EMU_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared, ...)                                    \
    do {                                                                                                 \
        for (const std::uint64_t emu_seed : emu::harness_seeds()) {                                      \
            emu::harness_demand(                                                                         \
                EMU_LAUNCH_CLUSTER_SEED(emu_seed, kernel, cluster, grid, block, shared, __VA_ARGS__));   \
        }                                                                                                \
    } while (0)

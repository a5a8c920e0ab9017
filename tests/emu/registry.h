// registry.h: a kernel function -> something that can be launched from an array of parameters.
//
// Parameters lie in a packed buffer exactly as CUDA lays them out: each at the next multiple of its
// alignment.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "engine.h"

namespace emu {

template <auto entry> struct Entry;

template <class... P, void (*entry)(P...)> struct Entry<entry> {
    static constexpr std::size_t count = sizeof...(P);

    struct Layout {
        std::size_t offsets[count + 1] = {};
        std::size_t sizes[count + 1] = {};
        std::size_t bytes = 0;
        constexpr Layout() {
            constexpr std::size_t size[] = {sizeof(P)..., 0};
            constexpr std::size_t alignment[] = {alignof(P)..., 1};
            for (std::size_t i = 0; i < count; i++) {
                offsets[i] = (bytes + alignment[i] - 1) / alignment[i] * alignment[i];
                sizes[i] = size[i];
                bytes = offsets[i] + size[i];
            }
        }
    };
    static constexpr Layout layout{};

    template <class T> __attribute__((no_sanitize("thread"))) static T read(const unsigned char *at) {
        typename std::remove_const<T>::type value;
        __builtin_memcpy(&value, at, sizeof value);
        return value;
    }
    template <std::size_t... I>
    __attribute__((no_sanitize("thread"))) static void apply(const unsigned char *packed,
                                                             std::index_sequence<I...>) {
        entry(read<P>(packed + layout.offsets[I])...);
    }
    __attribute__((no_sanitize("thread"))) static void call(const unsigned char *packed) {
        apply(packed, std::make_index_sequence<count>{});
    }
    static Kernel kernel(const char *name, int max_threads = 0, int = 0) {
        return Kernel{name,
                      call,
                      reinterpret_cast<const void *>(entry),
                      static_cast<int>(count),
                      layout.offsets,
                      layout.sizes,
                      layout.bytes,
                      max_threads};
    }
};

// All kernels of the library, by name: filled before main by the generated registration files.
struct Registered {
    explicit Registered(const Kernel &kernel);
};
const Kernel *find_kernel(const char *name);

} // namespace emu

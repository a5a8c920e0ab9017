// check.h: what the tests of single kernels share: numbers to feed, and comparisons that print.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "harness.h"

namespace check {

inline double value(fp16 h) { return emu::half_to_float(h.bits); }
inline fp16 half(double x) { return fp16{emu::float_to_half(static_cast<float>(x))}; }

// The distance between neighbouring fp16 around x.
inline double ulp(double x) {
    const double magnitude = std::fmax(std::fabs(x), 0x1p-14);
    return std::ldexp(1.0, std::ilogb(magnitude) - 10);
}

inline int round_up(int a, int b) { return (a + b - 1) / b * b; }

struct Random {
    std::mt19937_64 engine;
    explicit Random(unsigned long long seed) : engine(seed) {}
    double normal() { return std::normal_distribution<double>()(engine); }
    int below(int n) { return static_cast<int>(engine() % static_cast<unsigned long long>(n)); }
};

[[noreturn]] inline void fail(const std::string &what) {
    std::printf("FAILED: %s\n", what.c_str());
    std::exit(1);
}
inline void demand(bool good, const char *what, const char *of = "") {
    if (!good) {
        fail(std::string(what) + " " + of);
    }
}

// The inner loops of references, without the emulated device's hooks, which would cost more than the kernels.
__attribute__((no_sanitize("thread"))) inline double dot(const double *a, const double *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}
__attribute__((no_sanitize("thread"))) inline void add_scaled(double *to, double by, const double *from,
                                                               int n) {
    for (int i = 0; i < n; i++) {
        to[i] += by * from[i];
    }
}

// `count` numbers from `from` on.
__attribute__((no_sanitize("thread"))) inline std::vector<double> values(const fp16 *from, std::size_t count) {
    std::vector<double> all(count);
    double *to = all.data();
    for (std::size_t i = 0; i < count; i++) {
        to[i] = value(from[i]);
    }
    return all;
}

__attribute__((no_sanitize("thread"))) inline bool same_bits(const std::vector<fp16> &a, const std::vector<fp16> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(fp16)) == 0);
}

// Errors over many elements: the worst in ulp of fp16, and relative in the L2 norm.
struct Errors {
    double worst = 0, squares = 0, reference = 0;
    // `slack` is what the order of the sum may cost, absolute; it is taken off before ulps are counted.
    void add(double got, double expected, double slack = 0) {
        const double error = std::fabs(got - expected);
        if (!(error <= 1e30)) {
            worst = INFINITY;
        }
        worst = std::fmax(worst, std::fmax(0.0, error - slack) / ulp(expected));
        squares += error * error, reference += expected * expected;
    }
    double relative() const { return std::sqrt(squares / std::fmax(reference, 1e-300)); }
};

inline std::vector<unsigned long long> seeds(int most) {
    std::vector<unsigned long long> all;
    for (const auto seed : emu::harness_seeds()) {
        all.push_back(seed);
    }
    if (std::getenv("EMU_SEED") == nullptr && static_cast<int>(all.size()) > most) {
        all.resize(static_cast<std::size_t>(most));
    }
    return all;
}

}  // namespace check

// engine.cpp: right kernels pass and wrong ones are reported, each under several seeds, through the harness.
#include "kernels/dependent_sm90.cu"
#include "kernels/micro.cu"

#include <cmath>

#include "check.h"

namespace {

constexpr char MICRO[] = "tests/emu/selftest/kernels/micro.cu";
constexpr char GEMM[] = "tests/emu/selftest/kernels/gemm.cuh";

// All kernels (out, in, n) that are wrong: one block of 64 threads.
#define REPORTED(kernel, kind)                                                                              \
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {                                                    \
        emu::Array<float> in(64 * 4 + 4, 1.0f), out(64, 0.0f);                                              \
        reported(#kernel, seed, EMU_LAUNCH_SEED(seed, kernel, (1), (64), 64 * 16, out.get(), in.get(), 64), \
                 kind, MICRO);                                                                              \
    }

void right_ones(std::uint64_t seed) {
    const int n = 1000;
    emu::Array<float> in(n), out(n);
    for (int i = 0; i < n; i++) {
        in[i] = static_cast<float>(i * 37 % 101 - 20);
    }
    passes("micro_copy", seed, EMU_LAUNCH_SEED(seed, micro_copy, (8), (128), 0, out.get(), in.get(), n), [&] {
        bool good = true;
        for (int i = 0; i < n; i++) {
            good = good && out[i] == in[i];
        }
        return good;
    });
    passes("micro_reverse", seed,
           EMU_LAUNCH_SEED(seed, micro_reverse, (1), (512), 2048, out.get(), in.get(), 512), [&] {
               bool good = true;
               for (int i = 0; i < 512; i++) {
                   good = good && out[i] == in[511 - i];
               }
               return good;
           });
    passes("micro_sum", seed,
           EMU_LAUNCH_SEED(seed, micro_sum, (3), (64), 0, SumArgs{out.get(), in.get(), 0, 0.5}), [&] {
               float sum = 0;
               for (int i = 160; i < 192; i++) {
                   sum += in[i];
               }
               return out[170] == std::fabs(sum) * 100.0f * 0.5f;
           });
    passes("micro_exchange", seed,
           EMU_LAUNCH_SEED(seed, micro_exchange, (1), (64), 256, out.get(), in.get(), 64),
           [&] { return out[0] == in[1] + 2.0f && out[63] == in[62] + 2.0f; });
    passes("micro_reverse_in_place", seed,
           EMU_LAUNCH_SEED(seed, micro_reverse_in_place, (1), (128), 0, out.get(), in.get(), 128),
           [&] { return out[0] == in[127] && out[127] == in[0]; });
    emu::Array<unsigned> count(1, 0u);
    emu::Array<unsigned long long> least(1, ~0ull);
    passes("micro_count", seed,
           EMU_LAUNCH_SEED(seed, micro_count, (8), (128), 0, count.get(), least.get(), in.get(), n), [&] {
               unsigned expected = 0, first = n;
               for (int i = n - 1; i >= 0; i--) {
                   expected += in[i] < 0 ? 1 : 0;
                   first = in[i] < 0 ? i : first;
               }
               return count[0] == expected && least[0] == first;
           });
}

struct Gemm {
    static constexpr int M = 128, N = 256, K = 160; // wraps the ring of three stages
    emu::Array<fp16> a{M * K}, b{N * K}, d{M * N};
    std::vector<float> expected = std::vector<float>(M * N);
    Gemm() {
        unsigned state = 1;
        const auto fill = [&](emu::Array<fp16> &x) {
            for (std::size_t i = 0; i < x.size(); i++) {
                state = state * 1664525u + 1013904223u;
                x[i] = f32_to_fp16(static_cast<float>(state >> 16) / 32768.0f - 1.0f);
            }
        };
        fill(a), fill(b);
        for (int m = 0; m < M; m++) {
            for (int n = 0; n < N; n++) {
                double sum = 0;
                for (int k = 0; k < K; k++) {
                    sum += static_cast<double>(fp16_to_f32(a[m * K + k])) * fp16_to_f32(b[n * K + k]);
                }
                expected[m * N + n] = static_cast<float>(sum);
            }
        }
    }
    bool right() const {
        for (int i = 0; i < M * N; i++) {
            if (!(std::fabs(fp16_to_f32(d[i]) - expected[i]) <= 0.02f)) {
                return false;
            }
        }
        return true;
    }
};
#define GEMM_LAUNCH(kernel)                                                                        \
    EMU_LAUNCH_CLUSTER_SEED(seed, kernel, cluster, (2, 1), (256), GEMM_SHARED, g.d.get(), g.a.get(), \
                            g.b.get(), Gemm::N, Gemm::K)

// What a block does by itself is the same in a cluster.
void gemms(unsigned cluster) {
    Gemm g;
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        g.d.poison();
        passes("micro_gemm", seed, GEMM_LAUNCH(micro_gemm), [&] { return g.right(); });
        reported("micro_gemm_no_barrier", seed, GEMM_LAUNCH(micro_gemm_no_barrier), "race|uninitialised",
                 GEMM);
        reported("micro_gemm_early_refill", seed, GEMM_LAUNCH(micro_gemm_early_refill), "race", GEMM);
        reported("micro_gemm_wait_off", seed, GEMM_LAUNCH(micro_gemm_wait_off), "race", GEMM);
        reported("micro_gemm_beyond", seed, GEMM_LAUNCH(micro_gemm_beyond), "out of bounds|race in global",
                 GEMM);
        if (GEMM_LAUNCH(micro_gemm_swizzle).code != 0 || g.right()) {
            complain("micro_gemm_swizzle", seed, "expected wrong values");
        }
    }
}

// The same seed gives the same report, word for word (addresses aside: the arrays are the same).
void repeatable() {
    emu::Array<float> in(64, 1.0f), out(64, 0.0f);
    for (std::uint64_t seed = 0; seed < 4; seed++) {
        const auto once = EMU_LAUNCH_SEED(seed, micro_half_warp, (4), (64), 0, out.get(), in.get(), 64);
        const auto again = EMU_LAUNCH_SEED(seed, micro_half_warp, (4), (64), 0, out.get(), in.get(), 64);
        if (once.report != again.report) {
            complain("micro_half_warp", seed, "two runs, two reports");
        }
    }
}

void blocks(unsigned cluster) {
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        emu::Array<float> in(64, 1.0f), out(64, 0.0f);
        reported("micro_read_and_replaced", seed,
                 EMU_LAUNCH_CLUSTER_SEED(seed, micro_read_and_replaced, cluster, (2), (64), 64 * 4, out.get(),
                                         in.get(), 64),
                 "race in shared", MICRO);
        reported("micro_blocks_write", seed,
                 EMU_LAUNCH_CLUSTER_SEED(seed, micro_blocks_write, cluster, (4), (16), 0, out.get(), in.get(),
                                         16),
                 "race in global", MICRO);
        reported("micro_blocks_read", seed,
                 EMU_LAUNCH_CLUSTER_SEED(seed, micro_blocks_read, cluster, (4), (16), 0, out.get(), in.get(),
                                         64),
                 "race in global", MICRO);
        reported("micro_blocks_shift", seed,
                 EMU_LAUNCH_CLUSTER_SEED(seed, micro_blocks_shift, cluster, (4), (16), 0, out.get(), in.get(),
                                         64),
                 "race in global", MICRO);
    }
}

void addresses() {
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        emu::Array<float> in(64, 1.0f), out(64, 0.0f);
        const float *freed;
        {
            emu::Array<float> gone(64, 1.0f);
            freed = gone.get();
        }
        std::vector<float> host(64);
        const auto copy = [&](float *to, const float *from) {
            return EMU_LAUNCH_SEED(seed, micro_copy, (1), (64), 0, to, from, 64);
        };
        reported("micro_copy", seed, copy(out.get(), freed), "use after free", MICRO);
        reported("micro_copy", seed, copy(out.get(), host.data()), "host memory", MICRO);
        reported("micro_copy", seed, copy(nullptr, in.get()), "null pointer", MICRO);
    }
}

// What half a warp, a block too large and too much shared memory are told.
void launches() {
    emu::Array<float> in(64, 1.0f), out(64, 0.0f);
    const std::uint64_t seed = 0;
    if (EMU_LAUNCH_SEED(seed, micro_copy, (1), (2048), 0, out.get(), in.get(), 64).kind != "bad launch" ||
        EMU_LAUNCH_SEED(seed, micro_copy, (1), (64), 1 << 20, out.get(), in.get(), 64).kind != "bad launch" ||
        EMU_LAUNCH_SEED(seed, micro_copy, (0), (64), 0, out.get(), in.get(), 64).kind != "bad launch") {
        complain("micro_copy", seed, "a launch that no device accepts was accepted");
    }
    reported("micro_sum", seed,
             EMU_LAUNCH_SEED(seed, micro_sum, (1), (40), 0, SumArgs{out.get(), in.get(), 0, 1.0}),
             "warp divergence", MICRO);
}

// Every fp16 there and back, and rounding at the edges.
void conversions() {
    for (unsigned bits = 0; bits < 0x10000; bits++) {
        const bool nan = (bits & 0x7fff) > 0x7c00;
        const unsigned back = f32_to_fp16(fp16_to_f32(fp16{static_cast<unsigned short>(bits)})).bits;
        if (nan ? back != 0x7fff : back != bits) {
            complain("fp16", bits, "does not survive f32");
        }
        if (!nan && (bits & 0x7fff) < 0x7bff) {
            const double x = fp16_to_f32(fp16{static_cast<unsigned short>(bits)});
            const double next = fp16_to_f32(fp16{static_cast<unsigned short>(bits + 1)});
            const auto half = static_cast<float>((x + next) / 2);
            const unsigned even = bits % 2 == 0 ? bits : bits + 1;
            if (f32_to_fp16(half).bits != even ||
                f32_to_fp16(std::nextafter(half, static_cast<float>(x))).bits != bits ||
                f32_to_fp16(std::nextafter(half, static_cast<float>(next))).bits != bits + 1) {
                complain("fp16", bits, "rounds wrongly above it");
            }
        }
    }
    if (f32_to_fp16(65519.99f).bits != 0x7bff || f32_to_fp16(65520.0f).bits != 0x7c00 ||
        f32_to_fp16(-1e30f).bits != 0xfc00) {
        complain("fp16", 0, "rounds wrongly at the top");
    }
}

// Launches while an earlier one still runs: what that touches is known in the next launch too, and forgotten after.
void overlapping() {
    constexpr int N = 128;
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        emu::Array<float> in(N, 1.0f), out(N, 0.0f), weights(N, 2.0f);
        const auto launch = [&](int way) {
            return EMU_LAUNCH_SEED(seed, dependent, (N / 64), (64), 2048, out.get(), in.get(), weights.get(), N, way);
        };
        const auto right = [&] { return out[0] == 3.0f && out[N - 1] == 3.0f; };
        constexpr char FILE_NAME[] = "tests/emu/selftest/kernels/dependent_sm90.cu", LATE[] = "dependency wait missing or late";
        {
            emu::Before before;
            before.writes(in).reads(out);
            for (const Way way : {ALL_WAIT, BLOCK_BARRIER, MBARRIER}) {
                passes("dependent", seed, launch(way), right);
            }
            for (const Way way : {NO_WAIT, ONE_WAITS, EARLY_READ, EARLY_WRITE, EARLY_COPY}) {
                reported("dependent", seed, launch(way), LATE, FILE_NAME);
            }
        }
        {
            emu::Before before;
            before.reads(in);
            reported("dependent", seed, launch(NO_WAIT), "dependency never waited for", FILE_NAME);
            passes("dependent", seed, launch(EARLY_READ), right);
        }
        passes("dependent", seed, launch(NO_WAIT), right);
    }
}

} // namespace

int main() {
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        right_ones(seed);
    }
    for (const unsigned cluster : {1u, 2u}) {
        gemms(cluster);
        blocks(cluster);
    }
    REPORTED(micro_reverse_no_barrier, "race|uninitialised")
    REPORTED(micro_exchange_no_barrier, "race|uninitialised")
    REPORTED(micro_in_place_no_barrier, "race in global")
    REPORTED(micro_uninitialised, "uninitialised shared")
    REPORTED(micro_read_before, "out of bounds")
    REPORTED(micro_shared_beyond, "shared memory out of bounds")
    REPORTED(micro_misaligned_16, "misaligned")
    REPORTED(micro_misaligned_4, "misaligned")
    REPORTED(micro_misaligned_async, "misaligned")
    REPORTED(micro_barrier_in_branch, "barrier divergence")
    REPORTED(micro_early_return, "barrier divergence")
    REPORTED(micro_half_warp, "warp divergence")
    REPORTED(micro_two_ways, "warp divergence")
    REPORTED(micro_deadlock, "divergence")
    REPORTED(micro_exit_in_flight, "cp.async in flight")
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        emu::Array<float> in(100, 1.0f), out(100, 0.0f);
        reported("micro_copy_beyond", seed,
                 EMU_LAUNCH_SEED(seed, micro_copy_beyond, (4), (32), 0, out.get(), in.get(), 100),
                 "out of bounds", MICRO);
    }
    addresses();
    launches();
    repeatable();
    overlapping();
    conversions();
    std::printf("engine: %s\n", failures == 0 ? "all good" : "FAILED");
    return failures != 0;
}

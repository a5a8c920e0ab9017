// hopper.cpp: Hopper's GEMMs, right and wrong, each under several seeds.
#include "kernels/hopper_sm90.cu"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "maps.h"

// The wrong ones, and one that is right but for its values.
#define OTHER_GEMM(name, bug, keep_a)                                                                               \
    extern "C" __global__ void __launch_bounds__(HOPPER_THREADS, 1)                                             \
        name(fp16 *d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int n, int k) { \
        hopper_body<bug, keep_a>(d, &a, &b, n, k);                                                              \
    }
OTHER_GEMM(hopper_parity, PARITY, false)
OTHER_GEMM(hopper_fewer_bytes, FEWER_BYTES, false)
OTHER_GEMM(hopper_more_bytes, MORE_BYTES, false)
OTHER_GEMM(hopper_no_proxy_fence, NO_PROXY_FENCE, false)
OTHER_GEMM(hopper_proxy_fence, PROXY_FENCE, false)
OTHER_GEMM(hopper_no_fence, NO_FENCE, false)
OTHER_GEMM(hopper_no_wait, NO_WAIT, false)
OTHER_GEMM(hopper_early_release, EARLY_RELEASE, false)
OTHER_GEMM(hopper_one_releases, ONE_RELEASES, false)
OTHER_GEMM(hopper_stride, STRIDE, false)
OTHER_GEMM(hopper_too_many_registers, REGISTERS, false)
OTHER_GEMM(hopper_exit_copies, EXIT_COPIES, false)
OTHER_GEMM(hopper_exit_wgmma, EXIT_WGMMA, false)
OTHER_GEMM(hopper_no_full_wait, NO_FULL_WAIT, false)
OTHER_GEMM(hopper_no_init_fence, NO_INIT_FENCE, false)
OTHER_GEMM(hopper_misaligned, MISALIGNED, false)
OTHER_GEMM(hopper_group_diverges, GROUP_DIVERGES, false)
OTHER_GEMM(hopper_early_release_registers, EARLY_RELEASE, true)

namespace {

constexpr char FILE_NAME[] = "tests/emu/selftest/kernels/hopper.cuh";

// K has a tail, whose place in memory is NaN, and wraps the ring of three stages twice.
struct Gemm {
    static constexpr int M = 128, N = 128, K = 7 * 64 + 24, PITCH = 512;
    emu::Array<fp16> a{M * PITCH}, b{N * PITCH}, bt{K * N}, d{M * N};
    TensorMap map_a = map_of(a, M, K, PITCH, 128), map_b = map_of(b, N, K, PITCH, 64), map_bt = map_of(bt, K, N, N, 64);
    std::vector<float> expected = std::vector<float>(M * N);
    Gemm() {
        unsigned state = 1;
        const auto drawn = [&] {
            state = state * 1664525u + 1013904223u;
            return f32_to_fp16(static_cast<float>(state >> 16) / 32768.0f - 1.0f);
        };
        for (int k = 0; k < K; k++) {
            for (int m = 0; m < M; m++) {
                a[static_cast<std::size_t>(m * PITCH + k)] = drawn();
            }
            for (int n = 0; n < N; n++) {
                bt[static_cast<std::size_t>(k * N + n)] = b[static_cast<std::size_t>(n * PITCH + k)] = drawn();
            }
        }
        for (int m = 0; m < M; m++) {
            for (int n = 0; n < N; n++) {
                double sum = 0;
                for (int k = 0; k < K; k++) {
                    sum += static_cast<double>(fp16_to_f32(a[static_cast<std::size_t>(m * PITCH + k)])) *
                           fp16_to_f32(b[static_cast<std::size_t>(n * PITCH + k)]);
                }
                expected[static_cast<std::size_t>(m * N + n)] = static_cast<float>(sum);
            }
        }
    }
    bool right() const {
        for (std::size_t i = 0; i < M * N; i++) {
            if (!(std::fabs(fp16_to_f32(d[i]) - expected[i]) <= 0.03f)) {
                return false;
            }
        }
        return true;
    }
};

#define LAUNCH(kernel, b)                                                                                         \
    EMU_LAUNCH_SEED(seed, kernel, (Gemm::N / 64, 1), (HOPPER_THREADS), HOPPER_SHARED, g.d.get(), g.map_a, b, Gemm::N, \
                    Gemm::K)
#define REPORTED(kernel, kind) reported(#kernel, seed, LAUNCH(kernel, g.map_b), kind, FILE_NAME)
#define WRONG(kernel)                                                   \
    if (LAUNCH(kernel, g.map_b).code != 0 || g.right()) {               \
        complain(#kernel, seed, "expected wrong values and no report"); \
    }

template <int N, auto kernel> void width(const char *name, const Gemm &g, std::uint64_t seed) {
    emu::Array<float> out(64 * N);
    // N rows, of which the map has all but the last three.
    const TensorMap b = map_of(g.b, std::min(N - 3, Gemm::N), Gemm::K, Gemm::PITCH, N);
    const TensorMap a = map_of(g.a, Gemm::M, Gemm::K, Gemm::PITCH, 64);
    const emu::Kernel entry = emu::Entry<kernel>::kernel(name, 0);
    float *to = out.get();
    const void *parameters[] = {&to, &a, &b};
    passes(name, seed, emu::harness_launch(entry, parameters, {1}, {WARP_GROUP}, WIDTH_SHARED, seed), [&] {
        for (int m = 0; m < 64; m++) {
            for (int n = 0; n < N; n++) {
                double sum = 0;
                for (int k = 0; k < 64 && n < std::min(N - 3, Gemm::N); k++) {
                    sum += static_cast<double>(fp16_to_f32(g.a[static_cast<std::size_t>(m * Gemm::PITCH + k)])) *
                           fp16_to_f32(g.b[static_cast<std::size_t>(n * Gemm::PITCH + k)]);
                }
                if (!(std::fabs(out[static_cast<std::size_t>(m * N + n)] - sum) <= 1e-4)) {
                    return false;
                }
            }
        }
        return true;
    });
}

// Images [IMAGES][ROWS][WIDTH] that lie one right after the other: what a box has beyond the rows of its image is zeros,
// not the rows of the next.
struct Images {
    static constexpr int IMAGES = 3, ROWS = 50, WIDTH = 72;
    emu::Array<fp16> x{IMAGES * ROWS * WIDTH};
    Images() {
        for (std::size_t i = 0; i < x.size(); i++) {
            x[i] = f32_to_fp16(static_cast<float>(i % 2039 + 1));
        }
    }
    fp16 at(int column, int row, int image) const {
        if (column < 0 || column >= WIDTH || row < 0 || row >= ROWS || image < 0 || image >= IMAGES) {
            return fp16{0};
        }
        return x[static_cast<std::size_t>((image * ROWS + row) * WIDTH + column)];
    }
    TensorMap map(const std::uint32_t (&box)[3], bool swizzle) const {
        TensorMap map;
        const std::uint64_t sizes[3] = {WIDTH, ROWS, IMAGES}, strides[2] = {WIDTH * 2, ROWS * WIDTH * 2};
        if (const char *wants = emu::encode_tensor_map(&map, 3, reinterpret_cast<std::uint64_t>(x.get()), sizes,
                                                       strides, box, swizzle)) {
            std::printf("FAILED: the map wants %s\n", wants);
            std::exit(1);
        }
        return map;
    }
    void loads(std::uint64_t seed, const std::uint32_t (&box)[3], bool swizzle, int cx, int cy, int cz) const {
        const auto [width, rows, planes] = box;
        const int bytes = static_cast<int>(width * rows * planes * 2);
        emu::Array<fp16> out(static_cast<std::size_t>(bytes / 2));
        const emu::Fault fault = EMU_LAUNCH_SEED(seed, hopper_box_3d, (1), (WARP_GROUP), bytes + 2048, out.get(),
                                                 map(box, swizzle), bytes, cx, cy, cz);
        passes("hopper_box_3d", seed, fault, [&, width = width, rows = rows, planes = planes] {
            for (unsigned i = 0; i < width * rows * planes; i++) {
                const unsigned c = i % width, r = i / width % rows, p = i / width / rows;
                const unsigned place = swizzle ? i ^ (i >> 6 & 7) << 3 : i;
                const fp16 wants = at(cx + static_cast<int>(c), cy + static_cast<int>(r), cz + static_cast<int>(p));
                if (out[place].bits != wants.bits) {
                    return false;
                }
            }
            return true;
        });
    }
};

} // namespace

int main() {
    const Images images;
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        images.loads(seed, {64, 64, 1}, true, 0, 0, 0);   // 14 rows beyond the first image
        images.loads(seed, {64, 64, 1}, true, 64, 48, 1); // 8 columns, 2 rows
        images.loads(seed, {64, 16, 1}, true, 0, -3, 2);
        images.loads(seed, {64, 8, 1}, true, 0, 0, 3);    // no such image
        images.loads(seed, {64, 7, 2}, true, 8, 46, -1);
        images.loads(seed, {8, 5, 4}, false, 66, 47, 0);
        emu::Array<fp16> out(64 * 64);
        reported("hopper_box_2d", seed,
                 EMU_LAUNCH_SEED(seed, hopper_box_2d, (1), (WARP_GROUP), 8192 + 2048, out.get(),
                                 images.map({64, 64, 1}, true), 8192, 0, 0, 0),
                 "no tensor map", FILE_NAME);
        const TensorMap flat = map_of(images.x, Images::IMAGES * Images::ROWS, Images::WIDTH, Images::WIDTH, 64);
        reported("hopper_box_3d", seed,
                 EMU_LAUNCH_SEED(seed, hopper_box_3d, (1), (WARP_GROUP), 8192 + 2048, out.get(), flat, 8192, 0, 0, 0),
                 "no tensor map", FILE_NAME);
    }
    Gemm g;
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        g.d.poison();
        passes("hopper_gemm", seed, LAUNCH(hopper_gemm, g.map_b), [&] { return g.right(); });
        g.d.poison();
        passes("hopper_gemm_registers", seed, LAUNCH(hopper_gemm_registers, g.map_bt), [&] { return g.right(); });
        const TensorMap plain = map_of(g.b, Gemm::N, Gemm::K, Gemm::PITCH, 64, false);
        if (LAUNCH(hopper_gemm, plain).code != 0 || g.right()) {
            complain("hopper_gemm", seed, "a map without the swizzle: expected wrong values and no report");
        }
        REPORTED(hopper_parity, "deadlock|race with a bulk copy|uninitialised");
        REPORTED(hopper_fewer_bytes, "deadlock|race with a bulk copy|uninitialised");
        const auto stuck = LAUNCH(hopper_more_bytes, g.map_b);
        reported("hopper_more_bytes", seed, stuck, "deadlock", FILE_NAME);
        if (!holds(stuck.report, "at the mbarrier at shared byte") || !holds(stuck.report, " and 8192 bytes missing)")) {
            complain("hopper_more_bytes", seed, "the mbarrier and what it lacks are not named:\n" + stuck.report);
        }
        REPORTED(hopper_no_proxy_fence, "missing proxy fence");
        passes("hopper_proxy_fence", seed, LAUNCH(hopper_proxy_fence, g.map_b), [] { return true; });
        REPORTED(hopper_no_fence, "missing wgmma_fence");
        REPORTED(hopper_no_wait, "exit with wgmma");
        REPORTED(hopper_early_release, "race with wgmma");
        REPORTED(hopper_one_releases, "race with wgmma|deadlock"); // a whole ring behind: a phase missed
        WRONG(hopper_stride)
        REPORTED(hopper_too_many_registers, "register budget");
        REPORTED(hopper_exit_copies, "exit with bulk copies");
        REPORTED(hopper_exit_wgmma, "exit with wgmma");
        REPORTED(hopper_no_full_wait, "race with a bulk copy|uninitialised");
        REPORTED(hopper_no_init_fence, "missing proxy fence");
        REPORTED(hopper_misaligned, "misaligned");
        REPORTED(hopper_group_diverges, "warp group divergence");
        const auto early = LAUNCH(hopper_early_release_registers, g.map_bt);
        reported("hopper_early_release_registers", seed, early, "race with wgmma", FILE_NAME);
    }
    for (std::uint64_t seed = 0; seed < 2; seed++) {
#define EACH(n) width<n, hopper_width_##n>("hopper_width_" #n, g, seed);
        WIDTHS(EACH)
    }
    std::printf("hopper: %s\n", failures == 0 ? "all good" : "FAILED");
    return failures != 0;
}

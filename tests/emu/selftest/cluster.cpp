// cluster.cpp: a GEMM of clusters, right and wrong, each under several seeds.
#include "kernels/cluster_sm90.cu"

#include <cmath>

#include "check.h"
#include "maps.h"

#define OTHER_GEMM(name, bug)                                                                                     \
    extern "C" __global__ void __launch_bounds__(HOPPER_THREADS, 1) name(                                         \
        fp16 *d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int m, int n, int k) { \
        cluster_body<bug>(d, &a, &b, m, n, k);                                                                    \
    }
OTHER_GEMM(cluster_written_before, WRITTEN_BEFORE)
OTHER_GEMM(cluster_tail, TAIL)
OTHER_GEMM(cluster_no_last_barrier, NO_LAST_BARRIER)
OTHER_GEMM(cluster_no_first_barrier, NO_FIRST_BARRIER)
OTHER_GEMM(cluster_no_init_fence, LATE_INIT_FENCE)
OTHER_GEMM(cluster_own_consumers, OWN_CONSUMERS)
OTHER_GEMM(cluster_half_count, HALF_COUNT)
OTHER_GEMM(cluster_release_there_early, RELEASE_THERE_EARLY)
OTHER_GEMM(cluster_own_bytes, OWN_BYTES)
OTHER_GEMM(cluster_all_bytes, ALL_BYTES)
OTHER_GEMM(cluster_mask, MASK)
OTHER_GEMM(cluster_block_scope, BLOCK_SCOPE)
OTHER_GEMM(cluster_one_stage_more, ONE_STAGE_MORE)
OTHER_GEMM(cluster_one_stage_more_exit, ONE_STAGE_MORE_EXIT)
OTHER_GEMM(cluster_producer_returns, PRODUCER_RETURNS)
OTHER_GEMM(cluster_written_here, WRITTEN_HERE)
OTHER_GEMM(cluster_read_after_release, READ_AFTER_RELEASE)

namespace {

constexpr char FILE_NAME[] = "tests/emu/selftest/kernels/cluster.cuh";

// The third block of rows has a tail and the fourth nothing; K has a tail, and wraps the ring of three stages twice.
struct Gemm {
    static constexpr int M = 300, N = 128, K = 7 * 64 + 24, PITCH = 512;
    emu::Array<fp16> a{M * PITCH}, b{N * PITCH}, d{M * N};
    TensorMap map_a = map_of(a, M, K, PITCH, 128), map_b = map_of(b, N, K, PITCH, 32);
    std::vector<float> expected = std::vector<float>(M * N);
    Gemm() {
        unsigned state = 1;
        const auto draw = [&](emu::Array<fp16> &x, int rows) {
            for (int i = 0; i < rows; i++) {
                for (int k = 0; k < K; k++) {
                    state = state * 1664525u + 1013904223u;
                    const float drawn = static_cast<float>(state >> 16) / 32768.0f - 1.0f;
                    x[static_cast<std::size_t>(i * PITCH + k)] = f32_to_fp16(drawn);
                }
            }
        };
        draw(a, M);
        draw(b, N);
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
    bool right(int rows = M) const {
        for (std::size_t i = 0; i < static_cast<std::size_t>(rows * N); i++) {
            if (!(std::fabs(fp16_to_f32(d[i]) - expected[i]) <= 0.03f)) {
                return false;
            }
        }
        return true;
    }
};

#define LAUNCH(kernel, cluster, blocks)                                                                     \
    EMU_LAUNCH_CLUSTER_SEED(seed, kernel, cluster, (blocks, Gemm::N / 64), (HOPPER_THREADS), HOPPER_SHARED, \
                            g.d.get(), g.map_a, g.map_b, Gemm::M, Gemm::N, Gemm::K)
#define REPORTED(kernel, kind) reported(#kernel, seed, LAUNCH(kernel, 2, 4), kind, FILE_NAME)

} // namespace

int main() {
    Gemm g;
    for (std::uint64_t seed = 0; seed < SEEDS; seed++) {
        g.d.poison();
        passes("cluster_gemm", seed, LAUNCH(cluster_gemm, 2, 4), [&] { return g.right(); });
        emu::Array<int> ranks(6, -1);
        passes("cluster_ranks", seed,
               EMU_LAUNCH_CLUSTER_SEED(seed, cluster_ranks, 2, (6), (WARP_GROUP), 0, ranks.get()),
               [&] { return ranks.copy() == std::vector<int>{0, 1, 0, 1, 0, 1}; });
        passes("cluster_ranks", seed, EMU_LAUNCH_SEED(seed, cluster_ranks, (6), (WARP_GROUP), 0, ranks.get()),
               [&] { return ranks.copy() == std::vector<int>(6, 0); });

        g.d.poison();
        passes("cluster_written_before", seed, LAUNCH(cluster_written_before, 2, 2), [&] { return g.right(256); });
        g.d.poison();
        passes("cluster_tail", seed, LAUNCH(cluster_tail, 2, 2), [&] { return g.right(256); });
        REPORTED(cluster_no_last_barrier, "cluster exit");
        REPORTED(cluster_no_first_barrier, "missing cluster_barrier");
        REPORTED(cluster_no_init_fence, "missing proxy fence");
        REPORTED(cluster_own_consumers, "race with a bulk copy");
        REPORTED(cluster_half_count, "race with a bulk copy|race with wgmma");
        REPORTED(cluster_release_there_early, "race with wgmma");
        REPORTED(cluster_own_bytes, "deadlock|race with a bulk copy|uninitialised");
        const auto stuck = LAUNCH(cluster_all_bytes, 2, 4);
        reported("cluster_all_bytes", seed, stuck, "deadlock", FILE_NAME);
        const std::size_t left = stuck.report.find("\n  block ("), right = stuck.report.find("\n  block (", left + 1);
        const std::size_t lacks = stuck.report.find(" and 8192 bytes missing)");
        if (!(left < lacks && lacks < right && right < stuck.report.rfind(" and 8192 bytes missing)"))) {
            complain("cluster_all_bytes", seed, "the two blocks and what each lacks are not named:\n" + stuck.report);
        }
        REPORTED(cluster_mask, "deadlock");
        REPORTED(cluster_block_scope, "missing mbarrier_wait_cluster");
        REPORTED(cluster_one_stage_more, "exit with bulk copies");
        REPORTED(cluster_one_stage_more_exit, "exit with bulk copies|cluster exit");
        REPORTED(cluster_producer_returns, "barrier divergence");
        REPORTED(cluster_written_here, "race in shared memory|race with a bulk copy");
        REPORTED(cluster_read_after_release, "race in shared memory|race with a bulk copy");
        reported("cluster_gemm", seed, LAUNCH(cluster_gemm, 1, 4), "no such block", FILE_NAME);
        if (LAUNCH(cluster_gemm, 2, 3).kind != "bad launch" || LAUNCH(cluster_gemm, 3, 3).kind != "bad launch") {
            complain("cluster_gemm", seed, "a grid that the cluster does not divide, or a cluster of three, is taken");
        }
    }
    std::printf("cluster: %s\n", failures == 0 ? "all good" : "FAILED");
    return failures != 0;
}

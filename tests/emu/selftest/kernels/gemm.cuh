// gemm.cuh: a small GEMM of the kind that the project's kernels are, with faults to plant. D[M, N] = A[M, K]
// . B[N, K]^T, fp16 in and out, all sizes multiples of the tile.
//
//     block 256 threads, 8 warps as 2 x 4, tile 128 x 128 x 32, ring of 3 stages of cp.async, rows of 64 bytes
//     with the 16-byte chunk c of row r stored at c ^ (r / 2 % 4)
//
// Shared memory: 3 x 16 KiB.
#pragma once

#include "ptx.cuh"

enum Bug {
    NONE,
    NO_BARRIER,      // nothing between the copies of others landing and reading them
    EARLY_REFILL,    // a stage is refilled while slower warps still read it
    WAIT_OFF_BY_ONE, // one group too many may be in flight
    WRONG_SWIZZLE,   // written one way, read another
    BEYOND_N,        // one column block too many is stored
};

constexpr int BM = 128, BN = 128, BK = 32, STAGES = 3, GEMM_THREADS = 256;
constexpr int STAGE_BYTES = (BM + BN) * BK * 2;
constexpr int GEMM_SHARED = STAGES * STAGE_BYTES;

template <int BUG> PTX_INLINE int swizzled(int row, int chunk) {
    return row * 64 + ((chunk ^ (row / 2 % 4)) * 16);
}

PTX_INLINE void fill_stage(unsigned char *stage, const fp16 *a, const fp16 *b, int k, int step) {
    for (int i = thread_x(); i < (BM + BN) * 4; i += GEMM_THREADS) {
        const int row = i / 4, chunk = i % 4;
        const fp16 *from =
            row < BM ? a + static_cast<long long>(row) * k : b + static_cast<long long>(row - BM) * k;
        cp_async_16(stage + swizzled<NONE>(row, chunk), from + step * BK + chunk * 8, true);
    }
}

template <int BUG> PTX_INLINE void gemm(fp16 *d, const fp16 *a, const fp16 *b, int n, int k) {
    PTX_SMEM(unsigned char, smem);
    const int steps = k / BK;
    const int m0 = block_y() * BM, n0 = block_x() * BN;
    const fp16 *a0 = a + static_cast<long long>(m0) * k, *b0 = b + static_cast<long long>(n0) * k;
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) {
            fill_stage(smem + s * STAGE_BYTES, a0, b0, k, s);
        }
        cp_async_commit();
    }
    float sums[4][4][4] = {}; // [16 rows][8 columns][fragment]
    const int wm = warp() / 4 * 64, wn = warp() % 4 * 32;
    for (int s = 0; s < steps; s++) {
        cp_async_wait<BUG == WAIT_OFF_BY_ONE ? STAGES - 1 : STAGES - 2>();
        if (BUG != NO_BARRIER) {
            block_barrier(); // the stage is there for all, and nobody reads the one that is refilled next
        }
        if (BUG != EARLY_REFILL || s + STAGES - 1 >= steps) {
            if (s + STAGES - 1 < steps) {
                fill_stage(smem + (s + STAGES - 1) % STAGES * STAGE_BYTES, a0, b0, k, s + STAGES - 1);
            }
        } else { // one stage further than is free
            fill_stage(smem + s % STAGES * STAGE_BYTES, a0, b0, k, s + STAGES - 1);
        }
        cp_async_commit();
        const unsigned char *stage = smem + s % STAGES * STAGE_BYTES;
        for (int kk = 0; kk < BK / 16; kk++) {
            unsigned x[4][4], y[2][4];
            for (int i = 0; i < 4; i++) {
                const int row = wm + i * 16 + lane() % 16, chunk = kk * 2 + lane() / 16;
                ldmatrix_x4(
                    x[i], stage + (BUG == WRONG_SWIZZLE ? row * 64 + chunk * 16 : swizzled<BUG>(row, chunk)));
            }
            for (int j = 0; j < 2; j++) {
                const int row = BM + wn + j * 16 + lane() / 16 * 8 + lane() % 8,
                          chunk = kk * 2 + lane() / 8 % 2;
                ldmatrix_x4(y[j], stage + swizzled<BUG>(row, chunk));
            }
            for (int i = 0; i < 4; i++) {
                for (int j = 0; j < 4; j++) {
                    const unsigned columns[2] = {y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]};
                    mma_16816(sums[i][j], x[i], columns);
                }
            }
        }
    }
    cp_async_wait<0>();
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < (BUG == BEYOND_N ? 5 : 4); j++) {
            const int row = m0 + wm + i * 16 + lane() / 4, column = n0 + wn + j * 8 + lane() % 4 * 2;
            const float *f = sums[i][j % 4];
            *reinterpret_cast<unsigned *>(d + static_cast<long long>(row) * n + column) =
                pack_fp16x2(f[0], f[1]);
            *reinterpret_cast<unsigned *>(d + static_cast<long long>(row + 8) * n + column) =
                pack_fp16x2(f[2], f[3]);
        }
    }
}

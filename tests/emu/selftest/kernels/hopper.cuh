// hopper.cuh: a small GEMM of the kind that Hopper's kernels are, with faults to plant. D[M, N] = A[M, K] . B[N, K]^T,
// fp16 in and out; M a multiple of 128, N of 64; K is free, what a box has beyond it is zeros.
//
//     block 384 threads: a producer warp group, two consumer warp groups of 64 rows each; tile 128 x 64 x 64
//     ring of 3 stages of A [128][64] and B [64][64], 128-byte swizzle, a `full` and an `empty` mbarrier each
//     KEEP_A: a consumer loads its A by ldmatrix and multiplies it from registers; B as [K][N], N-major
//
// Shared memory: 3 x 24 KiB, 1024 to align, 48 bytes of mbarriers.
#pragma once

#include "ptx_sm90.cuh"

enum HopperBug {
    RIGHT,
    PARITY,         // the consumers wait for the phase after the right one
    FEWER_BYTES,    // B's bytes are not expected
    MORE_BYTES,     // a tile too many is
    NO_PROXY_FENCE, // a tile written by stores is multiplied without a fence
    PROXY_FENCE,    // with one: right, for other values
    NO_FENCE,       // no wgmma_fence
    NO_WAIT,        // sums are stored before they are there
    EARLY_RELEASE,  // a stage is released before wgmma has read it
    ONE_RELEASES,   // one warp group's stage is released by the other alone
    STRIDE,         // of eight rows: half of what it is
    REGISTERS,      // more than the block has
    EXIT_COPIES,    // a stage more than anyone waits for
    EXIT_WGMMA,     // the sums are not waited for, nor used
    NO_FULL_WAIT,   // the consumers do not wait at all
    NO_INIT_FENCE,  // nor do bulk copies know the mbarriers
    MISALIGNED,     // tiles begin at a multiple of 128 only
    GROUP_DIVERGES, // one warp of four does not multiply
};

constexpr int HOPPER_STAGES = 3, HOPPER_THREADS = 3 * WARP_GROUP;
constexpr int HOPPER_A = 128 * 128, HOPPER_B = 64 * 128, HOPPER_STAGE = HOPPER_A + HOPPER_B; // bytes
constexpr int HOPPER_SHARED = HOPPER_STAGES * HOPPER_STAGE + 1024 + 2 * HOPPER_STAGES * 8;

struct HopperRing {
    unsigned char *tiles; // [HOPPER_STAGES][A, B]
    Mbarrier *full, *empty;
};

template <int BUG, bool KEEP_A>
PTX_INLINE void hopper_produce(const HopperRing &ring, const TensorMap *a, const TensorMap *b, int steps) {
    const int m0 = block_y() * 128, n0 = block_x() * 64;
    const int last = BUG == EXIT_COPIES ? steps + 1 : steps;
    for (int s = 0; s < last; s++) {
        const int stage = s % HOPPER_STAGES, round = s / HOPPER_STAGES;
        unsigned char *tile = ring.tiles + stage * HOPPER_STAGE;
        mbarrier_wait(&ring.empty[stage], (round + 1) % 2);
        mbarrier_arrive_expect(&ring.full[stage], BUG == FEWER_BYTES  ? HOPPER_A
                                                  : BUG == MORE_BYTES ? HOPPER_STAGE + HOPPER_B
                                                                      : HOPPER_STAGE);
        tma_load_2d(tile, a, s * 64, m0, &ring.full[stage]);
        tma_load_2d(tile + HOPPER_A, b, KEEP_A ? n0 : s * 64, KEEP_A ? s * 64 : n0, &ring.full[stage]);
    }
}

template <int BUG, bool KEEP_A>
PTX_INLINE void hopper_multiply(float (&sums)[32], const unsigned char *a, const unsigned char *b, bool first) {
    const int row = warp() % 4 * 16 + lane() % 16;
    unsigned kept[4][4];
    if (KEEP_A) {
        for (int kk = 0; kk < 4; kk++) {
            ldmatrix_x4(kept[kk], a + row * 128 + ((kk * 2 + lane() / 16) ^ row % 8) * 16);
        }
    }
    if (BUG != NO_FENCE) {
        wgmma_fence();
    }
    for (int kk = 0; kk < 4; kk++) {
        if (KEEP_A) {
            wgmma_rs<64, true>(sums, kept[kk], descriptor_n_major(b + kk * 2048, 0), !first || kk > 0);
        } else if (BUG != GROUP_DIVERGES || warp() % 4 != 3 || kk < 3) {
            const unsigned char *rows = b + kk * 32;
            const unsigned long long right = descriptor_k_major(rows), half = matrix_descriptor(rows, 16, 512);
            wgmma_ss<64>(sums, descriptor_k_major(a + kk * 32), BUG == STRIDE ? half : right, !first || kk > 0);
        }
    }
    wgmma_commit();
}

template <int BUG, bool KEEP_A>
PTX_INLINE void hopper_consume(const HopperRing &ring, float (&sums)[32], int group, int steps) {
    for (int s = 0; s < steps; s++) {
        const int stage = s % HOPPER_STAGES, round = s / HOPPER_STAGES;
        unsigned char *tile = ring.tiles + stage * HOPPER_STAGE;
        if (BUG != NO_FULL_WAIT) {
            mbarrier_wait(&ring.full[stage], (BUG == PARITY ? round + 1 : round) % 2);
        }
        if (BUG == NO_PROXY_FENCE || BUG == PROXY_FENCE) { // its own zeros, over what came
            store_16(tile + group * 8192 + thread_x() % WARP_GROUP * 16, vec16{0, 0, 0, 0});
            if (BUG == PROXY_FENCE) {
                fence_proxy_async();
            }
            named_barrier(1 + group, WARP_GROUP);
        }
        hopper_multiply<BUG, KEEP_A>(sums, tile + group * 8192, tile + HOPPER_A, s == 0);
        const bool last = s == steps - 1;
        if (BUG != EARLY_RELEASE && !(last && (BUG == NO_WAIT || BUG == EXIT_WGMMA))) {
            wgmma_wait<0>(sums);
        }
        if (BUG != ONE_RELEASES || group == 0) {
            mbarrier_arrive(&ring.empty[stage]);
        }
        if (BUG == EARLY_RELEASE) {
            wgmma_wait<0>(sums);
        }
    }
}

template <int BUG, bool KEEP_A>
PTX_INLINE void hopper_body(fp16 *d, const TensorMap *a, const TensorMap *b, int n, int k) {
    PTX_SMEM(unsigned char, smem);
    unsigned char *tiles = align_1024(smem) + (BUG == MISALIGNED ? 128 : 0);
    Mbarrier *full = reinterpret_cast<Mbarrier *>(tiles + HOPPER_STAGES * HOPPER_STAGE);
    const HopperRing ring{tiles, full, full + HOPPER_STAGES};
    const int steps = (k + 63) / 64, group = thread_x() / WARP_GROUP;
    if (thread_x() == 0) {
        tma_prefetch(a);
        tma_prefetch(b);
        for (int s = 0; s < HOPPER_STAGES; s++) {
            mbarrier_init(&ring.full[s], 1);
            mbarrier_init(&ring.empty[s], BUG == ONE_RELEASES ? WARP_GROUP : 2 * WARP_GROUP);
        }
        if (BUG != NO_INIT_FENCE) {
            fence_mbarrier_init();
        }
    }
    block_barrier(); // the mbarriers are there for all
    if (group == 0) {
        set_registers_dec<40>();
        if (thread_x() == 0) {
            hopper_produce<BUG, KEEP_A>(ring, a, b, steps);
        }
    } else {
        set_registers_inc<BUG == REGISTERS ? 240 : 232>();
        if (BUG == REGISTERS) {
            set_registers_inc<248>();
        }
        float sums[32];
        hopper_consume<BUG, KEEP_A>(ring, sums, group - 1, steps);
        if (BUG == EXIT_WGMMA) {
            return;
        }
        const int row = block_y() * 128 + (group - 1) * 64 + warp() % 4 * 16 + lane() / 4;
        fp16 *to = d + static_cast<long long>(row) * n + block_x() * 64 + lane() % 4 * 2;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            *reinterpret_cast<unsigned *>(to + j * 8) = pack_fp16x2(sums[4 * j], sums[4 * j + 1]);
            *reinterpret_cast<unsigned *>(to + 8ll * n + j * 8) = pack_fp16x2(sums[4 * j + 2], sums[4 * j + 3]);
        }
    }
}

// One tile of N columns: out[64][N] = A[64][64] . B[N][64]^T, one warp group; half of K with A in shared memory, half
// with A in registers, as two groups on one set of sums. Shared memory: WIDTH_SHARED.
constexpr int WIDTH_SHARED = 1024 + 64 * 128 + 256 * 128 + 8;

template <int N> PTX_INLINE void hopper_width(float *out, const TensorMap *a, const TensorMap *b) {
    PTX_SMEM(unsigned char, smem);
    unsigned char *tile_a = align_1024(smem), *tile_b = tile_a + 64 * 128;
    Mbarrier *full = reinterpret_cast<Mbarrier *>(tile_b + 256 * 128);
    if (thread_x() == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(full, (64 + N) * 128);
        tma_load_2d(tile_a, a, 0, 0, full);
        tma_load_2d(tile_b, b, 0, 0, full);
    }
    grid_launch_dependents();
    grid_wait();
    block_barrier(); // the mbarrier is there for all
    mbarrier_wait(full, 0);
    unsigned kept[2][4];
#pragma unroll
    for (int kk = 0; kk < 2; kk++) {
        const int row = warp() * 16 + lane() % 16;
        ldmatrix_x4(kept[kk], tile_a + row * 128 + (((kk + 2) * 2 + lane() / 16) ^ row % 8) * 16);
    }
    float sums[N / 2];
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 2; kk++) {
        wgmma_ss<N>(sums, descriptor_k_major(tile_a + kk * 32), descriptor_k_major(tile_b + kk * 32), kk > 0);
    }
    wgmma_commit();
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 2; kk++) {
        wgmma_rs<N>(sums, kept[kk], descriptor_k_major(tile_b + (kk + 2) * 32), true);
    }
    wgmma_commit();
    wgmma_wait<1>(sums);
    wgmma_wait<0>(sums);
    named_arrive(2, 2 * WARP_GROUP);
    named_barrier(2, 2 * WARP_GROUP); // both: the group comes twice
    if (thread_x() == 0) {
        mbarrier_invalidate(full);
    }
    float *to = out + (warp() * 16 + lane() / 4) * N + lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        to[j * 8] = sums[4 * j], to[j * 8 + 1] = sums[4 * j + 1];
        to[8 * N + j * 8] = sums[4 * j + 2], to[8 * N + j * 8 + 1] = sums[4 * j + 3];
    }
}

// A box of a tensor of RANK dimensions as it arrives: out[bytes / 2].
template <int RANK>
PTX_INLINE void hopper_box(fp16 *out, const TensorMap *map, int bytes, int x, int y, int z) {
    PTX_SMEM(unsigned char, smem);
    unsigned char *tile = align_1024(smem);
    Mbarrier *full = reinterpret_cast<Mbarrier *>(tile + (bytes + 7) / 8 * 8);
    if (thread_x() == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(full, bytes);
        if (RANK == 2) {
            tma_load_2d(tile, map, x, y, full);
        } else {
            tma_load_3d(tile, map, x, y, z, full);
        }
    }
    block_barrier(); // the mbarrier is there for all
    mbarrier_wait(full, 0);
    for (int i = thread_x(); i < bytes / 2; i += block_dim_x()) {
        out[i] = reinterpret_cast<const fp16 *>(tile)[i];
    }
}

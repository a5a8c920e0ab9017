// cluster.cuh: the GEMM of hopper.cuh by clusters of two blocks that share their B, with faults to plant.
// D[M, N] = A[M, K] . B[N, K]^T; N a multiple of 64, M and K are free.
//
//     block_x   128 rows of M, of which the last blocks may have some or none      cluster {2, 1, 1}
//     block_y   64 columns of N
//     a stage   A [128][64], each block's own     B [64][64]: block r loads rows 32r..32r+32 and sends them to both
//     full      this block's producer, and all bytes that land here
//     empty     two lanes of each consumer warp: lane r arrives at block r, so that a stage is free when both are done
#pragma once

#include "hopper.cuh"

enum ClusterBug {
    CLUSTER_RIGHT,
    NO_LAST_BARRIER,     // blocks return while the other may still arrive
    NO_FIRST_BARRIER,    // a barrier of the block alone after the mbarriers are made
    LATE_INIT_FENCE,     // no fence_mbarrier_init
    OWN_CONSUMERS,       // a stage is free when this block's consumers are done
    HALF_COUNT,          // or when half of all are
    RELEASE_THERE_EARLY, // the other block's producer is told before wgmma has read
    OWN_BYTES,           // expected: what this block loads
    ALL_BYTES,           // expected: B twice
    MASK,                // B is sent to its sender alone
    BLOCK_SCOPE,         // mbarrier_wait where the other block arrives
    ONE_STAGE_MORE,      // than anyone waits for
    ONE_STAGE_MORE_EXIT, // the same, and no barrier at the end
    PRODUCER_RETURNS,    // without the barrier at the end
    WRITTEN_HERE,        // a stage that the other block sends to is written by stores
    WRITTEN_BEFORE,      // the same before the first barrier, and a fence: right
    READ_AFTER_RELEASE,  // by an ordinary load of what the other block sends
    TAIL,                // no barrier at the end, but the producer waits until all have arrived: right
};

constexpr int CLUSTER = 2;
constexpr unsigned short BOTH = 3;

template <int BUG>
PTX_INLINE void cluster_produce(const HopperRing &ring, const TensorMap *a, const TensorMap *b, int steps) {
    const int rank = cluster_rank(), m0 = block_x() * 128, n0 = block_y() * 64 + rank * 32;
    const int last = BUG == ONE_STAGE_MORE || BUG == ONE_STAGE_MORE_EXIT ? steps + 1 : steps;
    for (int s = 0; s < last; s++) {
        const int stage = s % HOPPER_STAGES, round = s / HOPPER_STAGES;
        unsigned char *tile = ring.tiles + stage * HOPPER_STAGE;
        if (BUG == BLOCK_SCOPE) {
            mbarrier_wait(&ring.empty[stage], (round + 1) % 2);
        } else {
            mbarrier_wait_cluster(&ring.empty[stage], (round + 1) % 2);
        }
        mbarrier_arrive_expect(&ring.full[stage], BUG == OWN_BYTES   ? HOPPER_A + HOPPER_B / 2
                                                  : BUG == ALL_BYTES ? HOPPER_STAGE + HOPPER_B
                                                                     : HOPPER_STAGE);
        tma_load_2d(tile, a, s * 64, m0, &ring.full[stage]);
        tma_load_2d_multicast(tile + HOPPER_A + rank * (HOPPER_B / 2), b, s * 64, n0, &ring.full[stage],
                              BUG == MASK ? static_cast<unsigned short>(1 << rank) : BOTH);
    }
    for (int s = steps; BUG == TAIL && s < steps + HOPPER_STAGES; s++) {
        mbarrier_wait_cluster(&ring.empty[s % HOPPER_STAGES], (s / HOPPER_STAGES + 1) % 2);
    }
}

template <int BUG> PTX_INLINE void cluster_release(Mbarrier *empty) {
    if (lane() < CLUSTER && (BUG != OWN_CONSUMERS || lane() == cluster_rank())) {
        mbarrier_arrive_cluster(empty, lane());
    }
}

template <int BUG>
PTX_INLINE void cluster_consume(const HopperRing &ring, float (&sums)[32], int group, int steps) {
    for (int s = 0; s < steps; s++) {
        const int stage = s % HOPPER_STAGES, round = s / HOPPER_STAGES;
        const unsigned char *tile = ring.tiles + stage * HOPPER_STAGE;
        mbarrier_wait(&ring.full[stage], round % 2);
        wgmma_fence();
        for (int kk = 0; kk < 4; kk++) {
            wgmma_ss<64>(sums, descriptor_k_major(tile + group * 8192 + kk * 32),
                         descriptor_k_major(tile + HOPPER_A + kk * 32), s > 0 || kk > 0);
        }
        wgmma_commit();
        if (BUG == RELEASE_THERE_EARLY && lane() == 0) {
            mbarrier_arrive_cluster(&ring.empty[stage], cluster_rank() ^ 1);
        }
        wgmma_wait<0>(sums);
        if (BUG == RELEASE_THERE_EARLY) {
            if (lane() == 0) {
                mbarrier_arrive_cluster(&ring.empty[stage], cluster_rank());
            }
        } else {
            cluster_release<BUG>(&ring.empty[stage]);
        }
        if (BUG == READ_AFTER_RELEASE) {
            warp_barrier();
            const unsigned char *theirs = tile + HOPPER_A + (cluster_rank() ^ 1) * (HOPPER_B / 2);
            if (thread_x() == WARP_GROUP + 5 && load_16(theirs).x == 77) {
                sums[0] = 0.0f;
            }
        }
    }
}

template <int BUG>
PTX_INLINE void cluster_body(fp16 *d, const TensorMap *a, const TensorMap *b, int m, int n, int k) {
    PTX_SMEM(unsigned char, smem);
    unsigned char *tiles = align_1024(smem);
    Mbarrier *full = reinterpret_cast<Mbarrier *>(tiles + HOPPER_STAGES * HOPPER_STAGE);
    const HopperRing ring{tiles, full, full + HOPPER_STAGES};
    const int steps = (k + 63) / 64, group = thread_x() / WARP_GROUP;
    constexpr int warps = BUG == OWN_CONSUMERS || BUG == HALF_COUNT ? 8 : 16; // that consume, of both blocks
    if (thread_x() == 0) {
        for (int s = 0; s < HOPPER_STAGES; s++) {
            mbarrier_init(&ring.full[s], 1);
            mbarrier_init(&ring.empty[s], warps);
        }
        if (BUG != LATE_INIT_FENCE) {
            fence_mbarrier_init();
        }
    }
    unsigned char *second = tiles + HOPPER_A + HOPPER_B / 2; // what block 1 sends, of the first stage
    if (BUG == WRITTEN_BEFORE && thread_x() < 8) {
        store_16(second + thread_x() * 16, vec16{0, 0, 0, 0});
        fence_proxy_async();
    }
    if (BUG == NO_FIRST_BARRIER) {
        block_barrier();
    } else {
        cluster_barrier();
    }
    if (BUG == WRITTEN_HERE && thread_x() < 8) {
        store_16(second + thread_x() * 16, vec16{0, 0, 0, 0});
        fence_proxy_async();
    }
    if (group == 0) {
        set_registers_dec<40>();
        if (thread_x() == 0) {
            cluster_produce<BUG>(ring, a, b, steps);
        }
        if (BUG == PRODUCER_RETURNS) {
            return;
        }
    } else {
        set_registers_inc<232>();
        float sums[32];
        cluster_consume<BUG>(ring, sums, group - 1, steps);
        const int row = block_x() * 128 + (group - 1) * 64 + warp() % 4 * 16 + lane() / 4;
        fp16 *to = d + static_cast<long long>(row) * n + block_y() * 64 + lane() % 4 * 2;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (row < m) {
                *reinterpret_cast<unsigned *>(to + j * 8) = pack_fp16x2(sums[4 * j], sums[4 * j + 1]);
            }
            if (row + 8 < m) {
                *reinterpret_cast<unsigned *>(to + 8ll * n + j * 8) = pack_fp16x2(sums[4 * j + 2], sums[4 * j + 3]);
            }
        }
    }
    if (BUG != TAIL && BUG != NO_LAST_BARRIER && BUG != ONE_STAGE_MORE_EXIT) {
        cluster_barrier(); // the other block arrives here until it is done
    }
}

// out[block_x()]: which of its cluster a block says that it is.
PTX_INLINE void cluster_ranks_body(int *out) {
    if (thread_x() == 0) {
        out[block_x()] = cluster_rank();
    }
    cluster_barrier();
}

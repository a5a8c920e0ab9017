// conform_sm90.cu: every function of kernels/ptx_sm90.cuh by itself, as conform.cu has those of ptx.cuh. For 9.0 alone.
//
//     conform_NAME(out, in, n)          tests/conform/hopper.py knows what they hold
//     conform_NAME(out, in, n, map)     a map of a tensor in `in`
#include "ptx_sm90.cuh"

namespace {

// Bulk copies of BOX bytes through a ring of two stages. in: for each of n boxes four coordinates; the tensor. out:
// each box as it lies in shared memory. One block of 160 threads: four warps copy, lane 0 of the fifth issues.
constexpr int BOX = 4096;

template <int RANK> PTX_INLINE void load_boxes(vec16 *out, const int *in, int n, const TensorMap *map) {
    PTX_SMEM(unsigned char, smem);
    unsigned char *stages = align_1024(smem);
    Mbarrier *full = reinterpret_cast<Mbarrier *>(stages + 2 * BOX), *empty = full + 2;
    if (thread_x() == 0) {
        tma_prefetch(map);
        for (int stage = 0; stage < 2; stage++) {
            mbarrier_init(&full[stage], 1);
            mbarrier_init(&empty[stage], 128);
        }
        fence_mbarrier_init();
    }
    block_barrier(); // the mbarriers are there for all
    if (warp() == 4 && lane() != 0) {
        return;
    }
    for (int i = 0; i < n; i++) {
        const int stage = i % 2, round = i / 2;
        unsigned char *box = stages + stage * BOX;
        if (warp() == 4) {
            mbarrier_wait(&empty[stage], (round + 1) % 2);
            mbarrier_arrive_expect(&full[stage], BOX);
            if (RANK == 2) {
                tma_load_2d(box, map, in[4 * i], in[4 * i + 1], &full[stage]);
            } else {
                tma_load_3d(box, map, in[4 * i], in[4 * i + 1], in[4 * i + 2], &full[stage]);
            }
            continue;
        }
        mbarrier_wait(&full[stage], round % 2);
        for (int j = thread_x(); j < BOX / 16; j += 128) {
            store_16(out + (i * BOX / 16 + j), load_16(reinterpret_cast<const vec16 *>(box) + j));
        }
        mbarrier_arrive(&empty[stage]);
    }
}

// The operands of products over 64 k, and where they lie.
template <int N> struct Operands {
    static constexpr int A = 64 * 128, B = N * 128, B_COLUMNS = 64 * 128; // bytes; the last of 64 columns
    static constexpr int TILES = A + B + (N + 63) / 64 * B_COLUMNS;
    unsigned char *a, *b, *b_n_major;
    const unsigned *kept; // [4 steps][4][128 threads]
    const float *start;   // [N / 2][128 threads]
};

// One warp group. in: A, B, B N-major as they must lie, A in registers, sums to start with.
template <int N> PTX_INLINE Operands<N> load_operands(const vec16 *in) {
    PTX_SMEM(unsigned char, smem);
    Operands<N> to;
    to.a = align_1024(smem);
    to.b = to.a + to.A;
    to.b_n_major = to.b + to.B;
    for (int i = thread_x(); i < to.TILES / 16; i += WARP_GROUP) {
        store_16(to.a + i * 16, load_16(in + i));
    }
    to.kept = reinterpret_cast<const unsigned *>(in + to.TILES / 16) + thread_x();
    to.start = reinterpret_cast<const float *>(in + to.TILES / 16 + 16 * WARP_GROUP / 4) + thread_x();
    fence_proxy_async();
    block_barrier(); // the tiles are there
    return to;
}

// out: [N / 2][128 threads].
template <int N, bool KEPT, bool N_MAJOR, bool ADD> PTX_INLINE void multiply(float *out, const Operands<N> &with) {
    unsigned kept[4][4];
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        kept[i / 4][i % 4] = with.kept[i * WARP_GROUP];
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        sums[i] = with.start[i * WARP_GROUP];
    }
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const unsigned long long b = N_MAJOR ? descriptor_n_major(with.b_n_major + step * 2048, with.B_COLUMNS)
                                             : descriptor_k_major(with.b + step * 32);
        if (KEPT) {
            wgmma_rs<N, N_MAJOR>(sums, kept[step], b, ADD || step > 0);
        } else {
            wgmma_ss<N, N_MAJOR>(sums, descriptor_after(descriptor_k_major(with.a), step * 32), b, ADD || step > 0);
        }
    }
    wgmma_commit();
    wgmma_wait<0>(sums);
    if (KEPT) {
#pragma unroll
        for (int step = 0; step < 4; step++) {
            wgmma_keep(kept[step]);
        }
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        out[i * WARP_GROUP + thread_x()] = sums[i];
    }
}

// out: four products; the second and the third begin with the sums given.
template <int N> PTX_INLINE void multiply_all(float *out, const vec16 *in) {
    const Operands<N> with = load_operands<N>(in);
    multiply<N, false, false, false>(out, with);
    multiply<N, false, true, true>(out + N * 64, with);
    multiply<N, true, false, true>(out + 2 * N * 64, with);
    multiply<N, true, true, false>(out + 3 * N * 64, with);
}

} // namespace

// -----------------------------------------------------------------------------------------------------------
// Addresses.

// One block of n threads, n + 1024 bytes of shared memory. out: whether the boundary is one, and the next.
extern "C" __global__ void conform_align_1024(unsigned *out, const unsigned *, int n) {
    PTX_SMEM(unsigned char, smem);
    const unsigned from = smem_address(smem + thread_x()), to = smem_address(align_1024(smem + thread_x()));
    out[2 * thread_x()] = to % 1024;
    out[2 * thread_x() + 1] = to - from < 1024 ? 1 : 0;
}

// One block of n threads, 16 n bytes of shared memory. in: for each descriptor the leading and the stride offset; out:
// three descriptors, with their distance from the first place in the address's bits.
extern "C" __global__ void conform_descriptors(unsigned long long *out, const int *in, int n) {
    PTX_SMEM(vec16, smem);
    const int i = thread_x();
    const unsigned long long start = (smem_address(smem) & 0x3ffffu) >> 4;
    out[3 * i] = matrix_descriptor(smem + i, in[2 * i], in[2 * i + 1]) - start;
    out[3 * i + 1] = descriptor_k_major(smem + i) - start;
    out[3 * i + 2] = descriptor_n_major(smem + i, in[2 * i]) - start;
}

// -----------------------------------------------------------------------------------------------------------
// mbarriers, named barriers, registers, launches.

// One block of n threads, 8 n + 8 bytes of shared memory. Sixteen rounds of passing values on between warps, two
// buffers, one mbarrier; then its bytes are memory again.
extern "C" __global__ void conform_mbarrier(unsigned *out, const unsigned *in, int n) {
    PTX_SMEM(unsigned, words);
    Mbarrier *passed = reinterpret_cast<Mbarrier *>(words + 2 * n);
    if (thread_x() == 0) {
        mbarrier_init(passed, n);
    }
    block_barrier(); // the mbarrier is there for all
    unsigned value = in[thread_x()];
    for (int round = 0; round < 16; round++) {
        unsigned *buffer = words + round % 2 * n;
        buffer[thread_x()] = value;
        mbarrier_arrive(passed);
        mbarrier_wait(passed, round % 2);
        value = buffer[(thread_x() + 96) % n] * 3 + static_cast<unsigned>(round);
    }
    block_barrier(); // nobody waits for it any more
    if (thread_x() == 0) {
        mbarrier_invalidate(passed);
        words[2 * n] = value;
        value = words[2 * n] + 1;
    }
    out[thread_x()] = value;
}

// One block of n threads, 8 n bytes of shared memory; n = 64 k, k < 8. Sixteen rounds of passing values on in each 64
// threads; then each 64 give theirs to the next and do not wait for it.
extern "C" __global__ void conform_named_barrier(unsigned *out, const unsigned *in, int n) {
    PTX_SMEM(unsigned, words);
    const int group = thread_x() / 64, groups = n / 64, at = thread_x() % 64;
    unsigned value = in[thread_x()];
    for (int round = 0; round < 16; round++) {
        unsigned *buffer = words + round % 2 * n + group * 64;
        buffer[at] = value;
        named_barrier(1 + group, 64);
        value = buffer[(at + 37) % 64] * 3 + static_cast<unsigned>(round);
    }
    block_barrier(); // the words are free
    words[thread_x()] = value;
    named_arrive(8 + (group + 1) % groups, 128);
    named_barrier(8 + group, 128); // of the group before
    out[thread_x()] = words[(thread_x() + n - 64) % n] + value;
}

// One block of 384 threads: the second and third 128 take the registers that the first give. in: n words.
extern "C" __global__ void __launch_bounds__(384, 1) conform_set_registers(unsigned *out, const unsigned *in, int n) {
    unsigned sum = 0;
    if (thread_x() < WARP_GROUP) {
        set_registers_dec<40>();
        sum = in[thread_x() % n];
    } else {
        set_registers_inc<232>();
        unsigned kept[160];
#pragma unroll
        for (int i = 0; i < 160; i++) {
            kept[i] = in[(thread_x() + i) % n];
        }
#pragma unroll
        for (int i = 0; i < 160; i++) {
            sum = sum * 31 + kept[159 - i];
        }
    }
    out[thread_x()] = sum;
}

// Launched as any other, so that neither does anything.
extern "C" __global__ void conform_grid_wait(unsigned *out, const unsigned *in, int n) {
    grid_launch_dependents();
    grid_wait();
    for (int i = block_x() * block_dim_x() + thread_x(); i < n; i += grid_x() * block_dim_x()) {
        out[i] = in[n - 1 - i];
    }
}

// -----------------------------------------------------------------------------------------------------------
// Bulk copies; 2 BOX + 1024 + 32 bytes of shared memory.

extern "C" __global__ void conform_tma_load_2d(
    vec16 *out, const int *in, int n, const __grid_constant__ TensorMap map) {
    load_boxes<2>(out, in, n, &map);
}
extern "C" __global__ void conform_tma_load_3d(
    vec16 *out, const int *in, int n, const __grid_constant__ TensorMap map) {
    load_boxes<3>(out, in, n, &map);
}

// -----------------------------------------------------------------------------------------------------------
// Clusters of two blocks.

// Blocks of any size. out: of each thread, which of its cluster its block is.
extern "C" __global__ void conform_cluster_rank(unsigned *out, const unsigned *, int) {
    out[block_x() * block_dim_x() + thread_x()] = static_cast<unsigned>(cluster_rank());
    cluster_barrier();
}

// One cluster; blocks as of load_boxes, and shared memory too. in: for each of n boxes, which are of half a BOX, x and
// y for either block. out: what lies in the first block, what lies in the second: each sends to both.
extern "C" __global__ void conform_tma_load_2d_multicast(
    vec16 *out, const int *in, int n, const __grid_constant__ TensorMap map) {
    PTX_SMEM(unsigned char, smem);
    unsigned char *stages = align_1024(smem);
    Mbarrier *full = reinterpret_cast<Mbarrier *>(stages + 2 * BOX), *empty = full + 2;
    const int rank = cluster_rank();
    if (thread_x() == 0) {
        for (int stage = 0; stage < 2; stage++) {
            mbarrier_init(&full[stage], 1);
            mbarrier_init(&empty[stage], 2 * 128);
        }
        fence_mbarrier_init();
    }
    cluster_barrier(); // the mbarriers are there for both
    if (warp() == 4 && lane() == 0) {
        for (int i = 0; i < n; i++) {
            const int stage = i % 2, *corner = in + 4 * i + 2 * rank;
            mbarrier_wait_cluster(&empty[stage], (i / 2 + 1) % 2);
            mbarrier_arrive_expect(&full[stage], BOX);
            tma_load_2d_multicast(stages + stage * BOX + rank * (BOX / 2), &map, corner[0], corner[1], &full[stage], 3);
        }
    } else if (warp() < 4) {
        for (int i = 0; i < n; i++) {
            const int stage = i % 2;
            mbarrier_wait(&full[stage], i / 2 % 2);
            for (int j = thread_x(); j < BOX / 16; j += 128) {
                store_16(out + ((rank * n + i) * BOX / 16 + j), load_16(stages + stage * BOX + j * 16));
            }
            mbarrier_arrive_cluster(&empty[stage], 0);
            mbarrier_arrive_cluster(&empty[stage], 1);
        }
    }
    cluster_barrier(); // nobody arrives here any more
}

// -----------------------------------------------------------------------------------------------------------
// wgmma. One block of 128 threads; 1024 bytes of shared memory beside the tiles.

extern "C" __global__ void conform_wgmma_16(float *out, const vec16 *in, int) { multiply_all<16>(out, in); }
extern "C" __global__ void conform_wgmma_64(float *out, const vec16 *in, int) { multiply_all<64>(out, in); }
extern "C" __global__ void conform_wgmma_80(float *out, const vec16 *in, int) { multiply_all<80>(out, in); }
extern "C" __global__ void conform_wgmma_176(float *out, const vec16 *in, int) { multiply_all<176>(out, in); }
extern "C" __global__ void conform_wgmma_208(float *out, const vec16 *in, int) { multiply_all<208>(out, in); }
extern "C" __global__ void conform_wgmma_256(float *out, const vec16 *in, int) { multiply_all<256>(out, in); }

// in: as of wgmma_16; out: the products of the first three steps of 16 k, groups that are waited for one by one.
extern "C" __global__ void conform_wgmma_groups(float *out, const vec16 *in, int) {
    const Operands<16> with = load_operands<16>(in);
    const auto issue = [&](float (&sums)[8], int step) {
        wgmma_fence();
        wgmma_ss<16>(sums, descriptor_k_major(with.a + step * 32), descriptor_k_major(with.b + step * 32), false);
        wgmma_commit();
    };
    const auto keep = [&](const float (&sums)[8], int step) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            out[(step * 8 + i) * WARP_GROUP + thread_x()] = sums[i];
        }
    };
    float first[8], second[8], third[8];
    issue(first, 0);
    issue(second, 1);
    issue(third, 2);
    wgmma_wait<2>(first);
    keep(first, 0);
    wgmma_wait<1>(second);
    keep(second, 1);
    wgmma_wait<0>(third);
    keep(third, 2);
}

// linear_sm80.cu: the linear layers for every GPU from sm_80 on: mma.sync fed by a ring of cp.async.
//
//     D[M, N] = epilogue( A[M, K] . W[N, K]^T )      contract, epilogues and launch checks: linear.cuh
//
// Who computes what. A block owns a BM x BN tile of D, its four warps a quarter each, in fragments of 16 x 8:
//
//              ◀────── BN ──────▶              a warp's quarter of the 128 x 128 tile, 64 x 64:
//            ┌─────────┬─────────┐                    8 columns each
//         ▲  │ warp 0  │ warp 1  │               ┌──┬──┬──┬──┬──┬──┬──┬──┐
//         BM │         │         │           16  │  │  │  │  │  │  │  │  │   lane = 4 g + t has, of each,
//         │  ├─────────┼─────────┤         rows  ├──┼──┼──┼──┼──┼──┼──┼──┤   rows g and g + 8,
//         ▼  │ warp 2  │ warp 3  │         each  │  │  │  │  │  │  │  │  │   columns 2t and 2t + 1: 128 f32
//            └─────────┴─────────┘               └──┴──┴──┴──┴──┴──┴──┴──┘
//
// The ring. A stage holds BK = 32 columns of both tiles, A [BM][32] then W [BN][32], rows of 64 bytes = 4
// chunks of 16. Chunk c of row r lies at place c ^ (r / 2 % 4): eight rows of one column of chunks, which is
// what ldmatrix reads at a time, then fall on all 32 banks, and so do the 8 x 4 chunks that a warp's cp.async
// writes.
//
//     copy     stage 0  1  2 │ 3     4     5     ...       three stages ahead, one commit per step
//     step                   │ 0     1     2     ...       each two halves of 16 columns:
//     half 0                 │ read half 1 of the stage, issue the copy, multiply half 0
//     half 1                 │ wait and barrier, read half 0 of the NEXT stage, multiply half 1
//
// So the tensor cores always have a half in registers while the next one is read, and the one barrier per
// step does both jobs: the next stage has landed for everybody, and everybody is done with the stage that is
// overwritten next.
//
// Rows beyond M or N are the last row again (their sums are never stored), chunks beyond K are zeros.
//
// Numerics: see linear.cuh. Source: the pipeline is the one that NVIDIA describes for Ampere (CUTLASS'
// efficient GEMM notes); the code is our own.

#include "linear.cuh"

namespace {

// Where a thread copies from and to: chunk thread % 4 of every (THREADS / 4)-th row, of both operands.
template <class Tile> struct Copies {
    static constexpr int ACROSS = Tile::BK / CHUNK;
    static constexpr int STEP = Tile::THREADS / ACROSS;  // rows from one copy to the next
    static constexpr int A = Tile::BM / STEP, B = Tile::BN / STEP;
    static_assert(STEP % 8 == 0, "the swizzle of a thread's rows is one and the same");

    const fp16 *a[A], *b[B];  // its chunk of k = 0
    int column, to;           // its first column of k; its place in a stage, bytes
};

template <class Tile> PTX_INLINE Copies<Tile> plan_copies(const LinearArgs &args, int m0, int n0) {
    using C = Copies<Tile>;
    C copies;
    const int row = thread_x() / C::ACROSS, chunk = thread_x() % C::ACROSS;
    copies.column = chunk * CHUNK;
    copies.to = row * (Tile::BK * 2) + (chunk ^ (row / 2 % 4)) * 16;
#pragma unroll
    for (int i = 0; i < C::A; i++) {
        int m = m0 + row + i * C::STEP;
        m = m < args.m ? m : args.m - 1;
        const long long from = args.a_skip ? static_cast<long long>(m) + m / args.group + 1 : m;
        copies.a[i] = args.a + from * args.a_pitch + copies.column;
    }
#pragma unroll
    for (int i = 0; i < C::B; i++) {
        int n = n0 + row + i * C::STEP;
        n = n < args.n ? n : args.n - 1;
        copies.b[i] = args.w + static_cast<long long>(n) * args.w_pitch + copies.column;
    }
    return copies;
}

// Issues this thread's part of columns k .. k + BK into `stage`.
template <class Tile>
PTX_INLINE void copy_stage(unsigned char *stage, const Copies<Tile> &copies, int k, int end) {
    using C = Copies<Tile>;
    unsigned char *to = stage + copies.to;
    const bool live = k + copies.column < end;
#pragma unroll
    for (int i = 0; i < C::A; i++) {
        cp_async_16(to + i * C::STEP * Tile::BK * 2, copies.a[i] + k, live);
    }
    to += Tile::A_BYTES;
#pragma unroll
    for (int i = 0; i < C::B; i++) {
        cp_async_16(to + i * C::STEP * Tile::BK * 2, copies.b[i] + k, live);
    }
}

// Sixteen columns of k in registers.
template <class Tile> struct Fragments {
    static constexpr int M = Tile::WARP_M / 16, N = Tile::WARP_N / 8;
    unsigned a[M][4];
    unsigned b[N][2];
};

// Where a lane reads in a stage, in bytes, for half 0. Half 1 is two chunks further: an xor, by the swizzle.
struct Reads {
    int a, b;
};
constexpr int HALF = 2 * 16;

template <class Tile> PTX_INLINE Reads plan_reads() {
    const int warp_m = warp() / Tile::WARPS_N * Tile::WARP_M, warp_n = warp() % Tile::WARPS_N * Tile::WARP_N;
    // A: matrices in the order rows 0-7, rows 8-15, and both again 8 columns further. W: the columns first.
    const int a_row = warp_m + lane() % 16, a_chunk = lane() / 16;
    const int b_row = warp_n + lane() / 16 * 8 + lane() % 8, b_chunk = lane() / 8 % 2;
    return Reads{a_row * (Tile::BK * 2) + (a_chunk ^ (a_row / 2 % 4)) * 16,
                 Tile::A_BYTES + b_row * (Tile::BK * 2) + (b_chunk ^ (b_row / 2 % 4)) * 16};
}

template <class Tile, int half>
PTX_INLINE void read_fragments(Fragments<Tile> &to, const unsigned char *stage, Reads reads) {
    const unsigned char *a = stage + (reads.a ^ (half * HALF)), *b = stage + (reads.b ^ (half * HALF));
#pragma unroll
    for (int i = 0; i < Fragments<Tile>::M; i++) {
        ldmatrix_x4(to.a[i], a + i * 16 * Tile::BK * 2);
    }
#pragma unroll
    for (int j = 0; j < Fragments<Tile>::N; j += 2) {
        unsigned pair[4];
        ldmatrix_x4(pair, b + j * 8 * Tile::BK * 2);
        to.b[j][0] = pair[0], to.b[j][1] = pair[1];
        to.b[j + 1][0] = pair[2], to.b[j + 1][1] = pair[3];
    }
}

template <class Tile> using Accumulators = float[Fragments<Tile>::M][Fragments<Tile>::N][4];

template <class Tile> PTX_INLINE void multiply(Accumulators<Tile> &acc, const Fragments<Tile> &f) {
#pragma unroll
    for (int i = 0; i < Fragments<Tile>::M; i++) {
#pragma unroll
        for (int j = 0; j < Fragments<Tile>::N; j++) {
            // Back and forth over the columns, so that each W fragment is used twice in a row.
            const int column = i % 2 ? Fragments<Tile>::N - 1 - j : j;
            mma_16816(acc[i][column], f.a[i], f.b[column]);
        }
    }
}

// acc += A . W^T over all of K. Leaves the ring free for anything.
template <class Tile>
PTX_INLINE void main_loop(Accumulators<Tile> &acc, unsigned char *ring, const LinearArgs &args, int m0,
                          int n0) {
    const Copies<Tile> copies = plan_copies<Tile>(args, m0, n0);
    const Reads reads = plan_reads<Tile>();
    const int steps = ceil_div(args.k, Tile::BK);
#pragma unroll
    for (int s = 0; s < Tile::STAGES - 1; s++) {
        if (s < steps) {
            copy_stage<Tile>(ring + s * Tile::STAGE_BYTES, copies, s * Tile::BK, args.k);
        }
        cp_async_commit();  // empty groups too: the count of groups is the clock of the ring
    }
    Fragments<Tile> first, second;
    cp_async_wait<Tile::STAGES - 2>();
    block_barrier();  // stage 0 has landed, also what the other threads copied
    read_fragments<Tile, 0>(first, ring, reads);

    int read = 0, write = (Tile::STAGES - 1) * Tile::STAGE_BYTES;  // offsets of stages
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        read_fragments<Tile, 1>(second, ring + read, reads);
        if (step + Tile::STAGES - 1 < steps) {
            copy_stage<Tile>(ring + write, copies, (step + Tile::STAGES - 1) * Tile::BK, args.k);
        }
        cp_async_commit();
        multiply<Tile>(acc, first);

        write = read;
        read = read + Tile::STAGE_BYTES < Tile::SHARED_BYTES ? read + Tile::STAGE_BYTES : 0;
        cp_async_wait<Tile::STAGES - 2>();
        block_barrier();  // the next stage has landed for all; nobody reads this one (`write`) any more
        if (step + 1 < steps) {
            read_fragments<Tile, 0>(first, ring + read, reads);
        }
        multiply<Tile>(acc, second);
    }
    cp_async_wait<0>();
}

template <class Tile, Epilogue E> PTX_INLINE void linear(const LinearArgs &args) {
    PTX_SMEM(unsigned char, smem);
    const TileAt tile = linear_tile_at(block_x(), ceil_div(args.m, Tile::BM), ceil_div(args.n, Tile::BN));
    const int m0 = tile.m * Tile::BM, n0 = tile.n * Tile::BN;

    Accumulators<Tile> acc = {};
    main_loop<Tile>(acc, smem, args, m0, n0);

    const int row = warp() / Tile::WARPS_N * Tile::WARP_M + lane() / 4;  // in the tile
    const int column = warp() % Tile::WARPS_N * Tile::WARP_N + lane() % 4 * 2;
    float bias[Fragments<Tile>::N][2];
#pragma unroll
    for (int i = 0; i < Fragments<Tile>::N * 2; i++) {
        const int n = n0 + column + i / 2 * 8 + i % 2;
        bias[i / 2][i % 2] = E != Epilogue::EMBED && n < args.n ? fp16_to_f32(args.bias[n]) : 0.0f;
    }
    fp16 *stage = reinterpret_cast<fp16 *>(smem);  // [BM][PITCH]
    if (E == Epilogue::RESIDUAL || E == Epilogue::EMBED) {
        // The main loop's last barrier came after the ring's last read: the stage is free.
        load_extra<Tile, E>(args, stage, m0, n0);
        block_barrier();  // extra has landed for all
    }
    unsigned char *at = smem + (row * Tile::PITCH + column) * 2;
#pragma unroll
    for (int j = 0; j < Fragments<Tile>::N; j++) {
#pragma unroll
        for (int i = 0; i < Fragments<Tile>::M; i++) {
            finish_fragment<Tile, E>(at + (i * 16 * Tile::PITCH + j * 8) * 2, acc[i][j], bias[j]);
        }
    }
    block_barrier();  // the tile is complete before rows are read across warps
    store_tile<Tile, E>(args, stage, m0, n0);
}

using Big = LinearTile128x128;
using Small = LinearTile64x64;
constexpr int BIG_BLOCKS = 2;    // per SM: 255 registers, 64 KB
constexpr int SMALL_BLOCKS = 4;  // per SM: 128 registers, 32 KB

}  // namespace

extern "C" __global__ void __launch_bounds__(Big::THREADS, BIG_BLOCKS) linear_bias_128x128(
    const __grid_constant__ LinearArgs args) {
    linear<Big, Epilogue::BIAS>(args);
}
extern "C" __global__ void __launch_bounds__(Big::THREADS, BIG_BLOCKS) linear_quick_gelu_128x128(
    const __grid_constant__ LinearArgs args) {
    linear<Big, Epilogue::QUICK_GELU>(args);
}
extern "C" __global__ void __launch_bounds__(Big::THREADS, BIG_BLOCKS) linear_gelu_128x128(
    const __grid_constant__ LinearArgs args) {
    linear<Big, Epilogue::GELU>(args);
}
extern "C" __global__ void __launch_bounds__(Big::THREADS, BIG_BLOCKS) linear_residual_128x128(
    const __grid_constant__ LinearArgs args) {
    linear<Big, Epilogue::RESIDUAL>(args);
}
extern "C" __global__ void __launch_bounds__(Big::THREADS, BIG_BLOCKS) linear_embed_128x128(
    const __grid_constant__ LinearArgs args) {
    linear<Big, Epilogue::EMBED>(args);
}
extern "C" __global__ void __launch_bounds__(Big::THREADS, BIG_BLOCKS) linear_scatter_128x128(
    const __grid_constant__ LinearArgs args) {
    linear<Big, Epilogue::SCATTER>(args);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, SMALL_BLOCKS) linear_bias_64x64(
    const __grid_constant__ LinearArgs args) {
    linear<Small, Epilogue::BIAS>(args);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, SMALL_BLOCKS) linear_quick_gelu_64x64(
    const __grid_constant__ LinearArgs args) {
    linear<Small, Epilogue::QUICK_GELU>(args);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, SMALL_BLOCKS) linear_gelu_64x64(
    const __grid_constant__ LinearArgs args) {
    linear<Small, Epilogue::GELU>(args);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, SMALL_BLOCKS) linear_residual_64x64(
    const __grid_constant__ LinearArgs args) {
    linear<Small, Epilogue::RESIDUAL>(args);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, SMALL_BLOCKS) linear_embed_64x64(
    const __grid_constant__ LinearArgs args) {
    linear<Small, Epilogue::EMBED>(args);
}
extern "C" __global__ void __launch_bounds__(Small::THREADS, SMALL_BLOCKS) linear_scatter_64x64(
    const __grid_constant__ LinearArgs args) {
    linear<Small, Epilogue::SCATTER>(args);
}

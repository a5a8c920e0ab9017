// linear.cuh: what all variants of the linear layers share: contract, epilogues, tiles and their order.
//
//     D[M, N] = epilogue( A[M, K] . W[N, K]^T )       fp16 in memory, f32 between, one rounding
//
//       bias         D = acc + bias[n]                                              out [M, out_pitch]
//       quick_gelu   D = quick_gelu(acc + bias[n])                                  out [M, out_pitch]
//       gelu         D = gelu(acc + bias[n])                                        out [M, out_pitch]
//       residual     D = (acc + bias[n]) + extra[m][n]                              out may be extra itself
//       embed        row b T + 1 + p of out = acc + extra[1 + p][n]       m = b P + p, P = group, T = P + 1
//                    row b T        of out = bias[n] + extra[0][n]        class and position embedding
//       scatter      D = acc + bias[n], to row p of every slot of image b           m = b P + p
//
// From accumulators to memory. The ring of the main loop is free by then and becomes the stage,
// fp16 [BM][BN + 8]:
//
//     extra (residual, embed) ──16 B, coalesced──▶ stage ──┐ own elements
//     accumulators, in mma's fragments ────────────────────┴─▶ f32 arithmetic ─▶ round ─▶ stage, in place
//     stage ──▶ 16 B per lane, 16 lanes to a row of 128 ──▶ out, or as many slots as the image fills
//
// The padding of 8 fp16 turns the rows of a fragment by 4 banks each: its 4-byte accesses do not conflict.
//
// Launch contract, checked by the launcher in this order (src/cuda/linear.rs):
//   grid            x = linear_tiles(m, n) of the variant, y = z = 1; block THREADS; SHARED_BYTES of
//                   shared memory
//   sizes           m, n, k >= 1, any; group >= 1 for embed, scatter, a_skip; m a multiple of group for embed
//   a, w            16-byte aligned; a_pitch, w_pitch multiples of 8, >= k; elements k .. round_up(k, 8)
//                   of a row are zero in w and finite in a
//   out, extra      any alignment, pitch >= n: 16-byte accesses where they are possible, else 2-byte ones
//   slots           `first` 2-byte aligned, any pitch >= n; disjoint; slot_begin [m / group rounded up + 1]
//   aliasing        out overlaps no input, except extra of residual at the same pitch
//
// Numerics: one f32 chain per element over k = 0, 16, 32 ..., 16 products at a time in the tensor core; the
// order is the same for both tiles, every M and every N. Zeros after k do not change a sum.
//
// Source: src/cpu/linear.rs and src/cpu/epilogue.rs, which are the oracle.
#pragma once

#include "numerics.cuh"

// Where rows 0 .. rows of an image go. `first` is absolute: one launch serves several sequences, the caller's
// memory and other devices.
struct SlotRows {
    fp16 *first;      // [rows, pitch]
    long long pitch;  // elements
    int rows;
    int pad;
};

// The one parameter of all entry points; #[repr(C)] in src/cuda/linear.rs.
struct LinearArgs {
    fp16 *out;              // [M, out_pitch]; embed [B T, out_pitch]; scatter: unused
    const fp16 *a;          // [.., a_pitch]
    const fp16 *w;          // [N, w_pitch]
    const fp16 *bias;       // [N]; embed: the class embedding [N]
    const fp16 *extra;      // residual [M, extra_pitch]; embed: position table [T, extra_pitch]
    const SlotRows *slots;  // scatter: [slots of all images]
    const int *slot_begin;  // scatter: [B + 1], image b fills slots[slot_begin[b] .. slot_begin[b + 1]]
    int m, n, k;
    int a_pitch, w_pitch, extra_pitch;
    long long out_pitch;
    int group;   // P, rows per image
    int a_skip;  // 1: row m of A is m + m / group + 1, the first row of each image is left out; 0: row m
};
static_assert(sizeof(SlotRows) == 24 && sizeof(LinearArgs) == 96, "layouts shared with the host");

enum class Epilogue { BIAS, QUICK_GELU, GELU, RESIDUAL, EMBED, SCATTER };

// A block's tile and how its warps share it: WARPS_M x WARPS_N of them, of BM / WARPS_M rows and BN / WARPS_N
// columns each.
template <int TILE_M, int TILE_N, int ROWS_OF_WARPS, int COLUMNS_OF_WARPS> struct LinearTile {
    static constexpr int BM = TILE_M, BN = TILE_N, WARPS_M = ROWS_OF_WARPS, WARPS_N = COLUMNS_OF_WARPS;
    static constexpr int BK = 32;
    static constexpr int STAGES = 4;
    static constexpr int THREADS = WARPS_M * WARPS_N * WARP;
    static constexpr int WARP_M = BM / WARPS_M, WARP_N = BN / WARPS_N;
    static constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int PITCH = BN + CHUNK;  // fp16, of the stage of the epilogue
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;

    static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0,
                  "fragments are 16 x 16 for A and pairs of 8 columns for W");
    static_assert(BM * PITCH * 2 <= SHARED_BYTES, "the epilogue's stage lies in the ring");
    static_assert(BM * (BK / CHUNK) % THREADS == 0 && BN * (BK / CHUNK) % THREADS == 0,
                  "all threads copy alike");
    static_assert(BM * (BN / CHUNK) % THREADS == 0, "all threads store alike");
    static_assert(SHARED_BYTES <= 101376, "99 KB is what sm_86 and sm_89 give a block");
};

// Four warps of 64 x 64: a warp reads 128 fp16 of shared memory per step of k for 4096 products. Eight warps
// of 64 x 32 would read 1.5 times as much in all, more than shared memory delivers while the tensor cores of
// sm_80 and sm_90 work.
using LinearTile128x128 = LinearTile<128, 128, 2, 2>;
// For grids that would leave most of the device idle.
using LinearTile64x64 = LinearTile<64, 64, 2, 2>;

// Tiles of M that a wave goes through before it turns to the next columns.
constexpr int LINEAR_GROUP = 16;

template <class Tile> PTX_INLINE int linear_tiles(int m, int n) {
    return ceil_div(m, Tile::BM) * ceil_div(n, Tile::BN);
}

// The order of the tiles: bands of LINEAR_GROUP row tiles, in each band down the rows, then on to the next
// columns. Blocks that run at the same time share 16 tiles of A and about as many of W, which L2 then holds.
//
//         n ─▶                       with bands of 2 (the last may be lower):
//     m   0  2  4  6  8
//     │   1  3  5  7  9
//     ▼  10 11 12 13 14
struct TileAt {
    int m, n;
};
PTX_INLINE TileAt linear_tile_at(int block, int m_tiles, int n_tiles) {
    const int band = block / (LINEAR_GROUP * n_tiles);
    const int within = block - band * LINEAR_GROUP * n_tiles;
    const int left = m_tiles - band * LINEAR_GROUP;
    const int height = left < LINEAR_GROUP ? left : LINEAR_GROUP;
    return TileAt{band * LINEAR_GROUP + within % height, within / height};
}

// ----------------------------------------------------------------------------------------------------------
// Epilogue.

// The row of `extra` that row `row` adds.
template <Epilogue E> PTX_INLINE int extra_row(const LinearArgs &args, int row) {
    return E == Epilogue::EMBED ? 1 + row % args.group : row;
}

// extra -> stage, for the tile at (m0, n0); zeros outside M x N.
template <class Tile, Epilogue E>
PTX_INLINE void load_extra(const LinearArgs &args, fp16 *stage, int m0, int n0) {
    constexpr int ACROSS = Tile::BN / CHUNK;
    const bool aligned = rows_aligned(args.extra, args.extra_pitch);
#pragma unroll 4
    for (int i = thread_x(); i < Tile::BM * ACROSS; i += Tile::THREADS) {
        const int row = m0 + i / ACROSS, column = n0 + i % ACROSS * CHUNK;
        const int left = row < args.m ? args.n - column : 0;
        const int count = left < 0 ? 0 : left < CHUNK ? left : CHUNK;
        const fp16 *from =
            args.extra + static_cast<long long>(extra_row<E>(args, row)) * args.extra_pitch + column;
        fp16 *to = stage + i / ACROSS * Tile::PITCH + i % ACROSS * CHUNK;
        if (aligned && (count == CHUNK || count == 0)) {
            cp_async_16(to, from, count != 0);
        } else {
            for (int j = 0; j < CHUNK; j++) {
                to[j] = j < count ? from[j] : fp16{0};
            }
        }
    }
    cp_async_commit();
    cp_async_wait<0>();
}

template <Epilogue E> PTX_INLINE float finish(float acc, float bias, float extra) {
    switch (E) {
        case Epilogue::QUICK_GELU: return quick_gelu(acc + bias);
        case Epilogue::GELU: return gelu(acc + bias);
        case Epilogue::RESIDUAL: return extra + (acc + bias);
        case Epilogue::EMBED: return acc + extra;
        default: return acc + bias;
    }
}

// Two rows, 8 apart, and two columns of accumulators, at `at` in the stage: a fragment of mma.
template <class Tile, Epilogue E>
PTX_INLINE void finish_fragment(unsigned char *at, const float (&acc)[4], const float (&bias)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        unsigned *to = reinterpret_cast<unsigned *>(at + half * 8 * Tile::PITCH * 2);
        unsigned extra = 0;
        if (E == Epilogue::RESIDUAL || E == Epilogue::EMBED) {
            extra = *to;
        }
        *to = pack_fp16x2(finish<E>(acc[2 * half], bias[0], fp16_lo(extra)),
                          finish<E>(acc[2 * half + 1], bias[1], fp16_hi(extra)));
    }
}

// The class row of one image: eight columns of bias + extra[0], straight from memory.
PTX_INLINE void store_class(const LinearArgs &args, fp16 *to, int column, int count) {
    for (int i = 0; i < count; i++) {
        const float sum = fp16_to_f32(args.bias[column + i]) + fp16_to_f32(args.extra[column + i]);
        to[i] = f32_to_fp16(sum);
    }
}

// Eight elements of row `row`, to wherever the epilogue wants that row.
template <Epilogue E>
PTX_INLINE void store_row(const LinearArgs &args, vec16 values, int row, int column, int count) {
    if (E == Epilogue::SCATTER) {
        const int image = row / args.group, patch = row - image * args.group;
        const int end = args.slot_begin[image + 1];
        for (int slot = args.slot_begin[image]; slot < end; slot++) {
            const SlotRows to = args.slots[slot];
            if (patch < to.rows) {  // else a sequence cut inside the image
                store_chunk(to.first + patch * to.pitch + column, values, count);
            }
        }
    } else if (E == Epilogue::EMBED) {
        const int image = row / args.group, patch = row - image * args.group;
        fp16 *to = args.out +
                   (static_cast<long long>(image) * (args.group + 1) + 1 + patch) * args.out_pitch + column;
        store_chunk(to, values, count);
        if (patch == 0) {
            store_class(args, to - args.out_pitch, column, count);
        }
    } else {
        store_chunk(args.out + row * args.out_pitch + column, values, count);
    }
}

// stage -> memory, 16 bytes per lane, whole rows by neighbouring lanes.
template <class Tile, Epilogue E>
PTX_INLINE void store_tile(const LinearArgs &args, const fp16 *stage, int m0, int n0) {
    constexpr int ACROSS = Tile::BN / CHUNK;
#pragma unroll 2
    for (int i = thread_x(); i < Tile::BM * ACROSS; i += Tile::THREADS) {
        const int row = m0 + i / ACROSS, column = n0 + i % ACROSS * CHUNK;
        const int count = args.n - column < CHUNK ? args.n - column : CHUNK;
        if (row < args.m && count > 0) {
            const vec16 values = load_16(stage + i / ACROSS * Tile::PITCH + i % ACROSS * CHUNK);
            store_row<E>(args, values, row, column, count);
        }
    }
}

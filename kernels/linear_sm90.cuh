// linear_sm90.cuh: the linear layers for Hopper: wgmma, fed by bulk copies. Entries: linear_sm90.cu.
//
//     D[M, N] = epilogue( A[M, K] . W[N, K]^T )        epilogues, order of tiles: linear.cuh
//
// and, where the rows of A stand before a layer norm, that norm as well (gamma is in W, see fold.cu):
//
//     D = epilogue( ((A . W^T) - mean[m] column_sums[n]) rstd[m] )
//
// Who does what. A block is three warp groups and stays for many tiles, block, block + grid, block + 2 grid ...
//
//     group 0   warp 0       one thread has bulk copies fill the ring, tile after tile, as far ahead as there is room
//               warps 1..3   what the epilogue needs of rows and columns: mean and rstd, bias and column sums
//     group 1, 2             multiply, and store:
//
//        cooperative: both at a tile, half of its rows each      ping-pong: a tile each, one multiplies, one stores
//              ┌──────── BN ───────┐                                  group 1   ▓▓▓▓▓▓░░░▓▓▓▓▓▓░░░
//              │ group 1           │ BM / 2 = 64 or 128               group 2         ▓▓▓▓▓▓░░░▓▓▓▓▓▓░░░
//              ├───────────────────┤                                            ▓ multiplies  ░ stores
//              │ group 2           │                                  The ring is filled in the order of tiles:
//              └───────────────────┘                                  that alone makes them take turns.
//
// The ring: STAGES of A [BM][64] and W [BN][64], rows of 128 bytes in the 128-byte swizzle, as copies write them and
// wgmma reads them (ptx_sm90.cuh). Rows beyond M or N and columns beyond K arrive as zeros.
//
// In a cluster of two blocks, whose tiles lie one below the other, each fetches half of W for both: what a multiprocessor
// reads of L2 for a tile of 64 x 256 falls from 40 KB a stage to 24, of 128 x 256 from 48 to 32.
//
//     full[stage]    its bytes are there           empty[stage]    every warp that multiplies is done with it
//     ready[2]       rows and columns are there    taken[2]        the epilogue is done with them
//     turn[2]        ping-pong: the other group has seen its last stage
//
// From sums to memory without shared memory. Of 8 columns a lane of wgmma's fragments has two; four lanes trade, so
// that each has 8 columns of a row, 16 bytes; what a residual adds comes the same way, backwards:
//
//        lane     0  1  2  3       0  1  2  3
//     columns 0   a  b  c  d       a  e  i  m      BN = 32 u: four fragments of a row, 64 bytes together
//             8   e  f  g  h  ──▶  b  f  j  n      the last 16 columns, if they are left over: two fragments of
//            16   i  j  k  l       c  g  k  o      rows g and g + 8, 32 bytes of each
//            24   m  n  o  p       d  h  l  p
//
// Statistics of rows, for the layer norm after this one: of 16 columns each, from the rounded fp16, (mean, sum of
// squares about it). Whatever the tile: so bits do not hang on it. Whoever needs them merges them (Chan), always in the
// same order: eight lanes to a row, lane l those of l, l + 8, ...; then lanes 1, 2 and 4 apart.
//
// Launch contract, checked by the launcher in this order (src/cuda/linear/sm90.rs):
//   grid            x a multiple of CLUSTER, y = z = 1; block THREADS; SHARED_BYTES; in clusters of CLUSTER in x
//   of linear.cuh   sizes, a, w, slots, aliasing; a_skip is 0
//   vectors         N a multiple of 8; out, extra 16-byte aligned, their pitches multiples of 8; slots anywhere
//   maps            a: [M, K] in boxes of BM x 64; w: [N, K] in boxes of BN / CLUSTER x 64; 128-byte swizzle
//   fold            bias and quick_gelu alone: partials [M][K / 16], column_sums [N], bias32 [N]; K a multiple of 16
//   partials_out    residual alone: [rows of out][N / 16], N a multiple of 16; 8-byte aligned
//   drop            residual alone: M a multiple of drop; of every `drop` rows the first is not stored, the others
//                   close ranks: out and partials_out are [M - M / drop, ..]; extra is [M, ..]; out is not extra
//
// Numerics: one f32 chain per element over k = 0, 16, 32 ..., as the portable kernel's: every tile and every schedule
// gives the same bits. Norm: (acc - mean column_sum) rstd + bias, two fused multiply-adds; without a norm mean is 0 and
// rstd 1, which leaves acc + bias.
//
// Launches may overlap: what an earlier one writes or reads is touched only after grid_wait; W, biases and column sums
// are nobody's to write. The ring's first W is under way before that.
//
// Source: warp specialisation and schedules: CUTLASS' description of its Hopper kernels; free N and the order of tiles:
// DeepGEMM's readme; merging: Chan, Golub, LeVeque 1979. The code is our own.
#pragma once

#include "linear.cuh"
#include "ptx_sm90.cuh"
#include "row_part.cuh"

struct LinearSm90Args {
    LinearArgs linear;
    const RowPart *partials;    // [M][K / 16]: A stands before a norm; else null
    const float *column_sums;   // [N], with partials
    const float *bias32;        // [N], with partials; else linear.bias
    RowPart *partials_out;      // [rows of out][N / 16], or null
    float eps;                  // of the norm
    int drop;                   // rows of which the first is dropped; 0: none
};
static_assert(sizeof(LinearSm90Args) == 136, "a layout shared with the host");

template <int TILE_M, int TILE_N, bool TWO_TILES, int BLOCKS = 1> struct HopperTile {
    static constexpr int BM = TILE_M, BN = TILE_N;
    static constexpr bool PINGPONG = TWO_TILES;
    static constexpr int CLUSTER = BLOCKS;  // each has a tile, one below the other, and they share W
    static constexpr int BK = 64;
    static constexpr int GROUP_M = PINGPONG ? BM : BM / 2;  // rows of a warp group
    static constexpr int HIGH = GROUP_M / 64;               // wgmmas, one above the other
    static constexpr int SUMS = BN / 2;                     // of a wgmma, per thread
    static constexpr int A_BYTES = BM * BK * 2, STAGE_BYTES = (BM + BN) * BK * 2;
    static constexpr int GIVEN_BYTES = (BM + BN) * 8;  // (mean, rstd) per row, (bias, column sum) per column
    static constexpr int BARRIERS = 2 * 6 + 6;
    static constexpr int BESIDE = 1024 + 2 * GIVEN_BYTES + BARRIERS * 8;  // 1024: to where the swizzle begins
    static constexpr int ROOM = (232448 - BESIDE) / STAGE_BYTES;
    static constexpr int STAGES = ROOM < 6 ? ROOM : 6;
    static constexpr int THREADS = 3 * WARP_GROUP;
    static constexpr int SHARED_BYTES = BESIDE + STAGES * STAGE_BYTES;
    static constexpr int READERS = (PINGPONG ? 1 : 2) * 4;  // warps that multiply a tile

    static_assert(CLUSTER == 1 || CLUSTER == 2, "blocks that take turns to fetch W for both");
    static_assert(BN / CLUSTER % 8 == 0, "a share of W is whole eights of rows");
    static_assert(GROUP_M == 64 || GROUP_M == 128, "one wgmma high or two");
    static_assert(BN % 16 == 0 && BN >= 16 && BN <= 256, "what wgmma and a box have");
    static_assert(HIGH * SUMS <= 160, "sums, and what the epilogue needs, in 224 registers");
    static_assert(STAGES >= 4 && 2 * STAGES + 6 <= BARRIERS, "a ring that hides the way from L2");
};

namespace hopper {

// Registers of a thread: 56 + 2 x 224 are what a block of 384 has. Merging statistics needs more than 40.
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
static_assert((PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS) * WARP_GROUP <= 65536, "of a multiprocessor");

// Shared memory.
template <class Tile> struct Places {
    unsigned char *ring;  // [STAGES][A [BM][64] | W [BN][64]]
    unsigned char *given; // [2][(mean, rstd) [BM] | (bias, column sum) [BN]]
    Mbarrier *full, *empty;
    Mbarrier *ready, *taken, *turn;  // [2]
};
template <class Tile> PTX_INLINE Places<Tile> places(unsigned char *smem) {
    Places<Tile> at;
    at.ring = align_1024(smem);
    at.given = at.ring + Tile::STAGES * Tile::STAGE_BYTES;
    at.full = reinterpret_cast<Mbarrier *>(at.given + 2 * Tile::GIVEN_BYTES);
    at.empty = at.full + Tile::STAGES;
    at.ready = at.empty + Tile::STAGES;
    at.taken = at.ready + 2;
    at.turn = at.taken + 2;
    return at;
}

// Where in the ring, and how often around: the parity that its mbarriers have.
template <class Tile> struct Cursor {
    int stage = 0, parity = 0;
    PTX_INLINE void next() {
        stage++;
        if (stage == Tile::STAGES) {
            stage = 0, parity ^= 1;
        }
    }
    PTX_INLINE void skip(int steps) {
        const int to = stage + steps;
        parity ^= to / Tile::STAGES & 1;
        stage = to % Tile::STAGES;
    }
};

// The tiles of a block, or of a cluster: first, first + step, .. below count. Of a cluster's two, one below the other,
// the second may lie outside of D: it is computed, of zeros, and not stored.
template <class Tile> struct Tiles {
    int m_tiles, n_tiles, count, first, step, rank;
    PTX_INLINE Tiles(const LinearArgs &args, int block, int blocks)
        : m_tiles(ceil_div(args.m, Tile::BM * Tile::CLUSTER)), n_tiles(ceil_div(args.n, Tile::BN)),
          count(m_tiles * n_tiles), first(block / Tile::CLUSTER), step(blocks / Tile::CLUSTER),
          rank(block % Tile::CLUSTER) {}
    PTX_INLINE TileAt at(int tile) const {
        const TileAt in_tiles = linear_tile_at(tile, m_tiles, n_tiles);
        return TileAt{(in_tiles.m * Tile::CLUSTER + rank) * Tile::BM, in_tiles.n * Tile::BN};
    }
};

// ----------------------------------------------------------------------------------------------------------
// The ring's one writer; of a cluster's rings, two.

// The box of W at (k, n) into `stage`: by a cluster in halves, each by one block for both.
template <class Tile>
PTX_INLINE void load_w(unsigned char *stage, const TensorMap *w, int k, int n, Mbarrier *full) {
    if (Tile::CLUSTER == 1) {
        tma_load_2d(stage + Tile::A_BYTES, w, k, n, full);
    } else {
        const int share = Tile::BN / Tile::CLUSTER * cluster_rank();
        tma_load_2d_multicast(stage + Tile::A_BYTES + share * 128, w, k, n + share, full, 3);
    }
}

template <class Tile>
PTX_INLINE void produce(const Places<Tile> &at, const TensorMap *a, const TensorMap *w, const LinearArgs &args) {
    const Tiles<Tile> tiles(args, block_x(), grid_x());
    const int steps = ceil_div(args.k, Tile::BK);
    Cursor<Tile> cursor;
    // Nobody has to empty the ring's first stages, and W is there before the launches that this one waits for are done.
    const int ahead = steps < Tile::STAGES ? steps : Tile::STAGES;
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.step) {
        const TileAt from = tiles.at(tile);
        const bool first = tile == tiles.first;
        if (first) {
            for (int s = 0; s < ahead; s++) {
                mbarrier_arrive_expect(&at.full[s], Tile::STAGE_BYTES);
                load_w<Tile>(at.ring + s * Tile::STAGE_BYTES, w, s * Tile::BK, from.n, &at.full[s]);
            }
            grid_wait();
        }
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            unsigned char *stage = at.ring + cursor.stage * Tile::STAGE_BYTES;
            Mbarrier *full = &at.full[cursor.stage];
            if (!first || step >= ahead) {
                if (Tile::CLUSTER == 1) {
                    mbarrier_wait(&at.empty[cursor.stage], cursor.parity ^ 1);
                } else {
                    mbarrier_wait_cluster(&at.empty[cursor.stage], cursor.parity ^ 1);
                }
                mbarrier_arrive_expect(full, Tile::STAGE_BYTES);
                load_w<Tile>(stage, w, step * Tile::BK, from.n, full);
            }
            tma_load_2d(stage, a, step * Tile::BK, from.m, full);
            cursor.next();
        }
    }
}

// ----------------------------------------------------------------------------------------------------------
// Rows and columns, by three warps.

struct Moments {
    float count, mean, squares;
};
// Both together: Chan. `share`: of the count that is b's.
PTX_INLINE void merge(Moments &a, const Moments &b, float share) {
    const float distance = b.mean - a.mean;
    a.squares += fma_rn(distance * distance, a.count * share, b.squares);
    a.mean = fma_rn(distance, share, a.mean);
    a.count += b.count;
}

// (mean, rstd) of a row of `parts` parts, in the first of the eight lanes that ask together.
PTX_INLINE RowPart row_norm(const RowPart *row, int parts, float eps, bool live) {
    const int from = lane() % 8;
    Moments own = {0.0f, 0.0f, 0.0f};
    for (int p = from; p < parts && live; p += 8) {
        const vec8 raw = load_8(row + p);
        const Moments part = {static_cast<float>(PART), bits_to_f32(raw.x), bits_to_f32(raw.y)};
        merge(own, part, div_rn(part.count, own.count + part.count));
    }
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2) {
        const Moments other = {shuffle_xor(own.count, apart), shuffle_xor(own.mean, apart),
                               shuffle_xor(own.squares, apart)};
        const float count = own.count + other.count;
        merge(own, other, count > 0.0f ? div_rn(other.count, count) : 0.0f);
    }
    const float variance = live ? div_rn(own.squares, own.count) : 1.0f;
    return RowPart{own.mean, div_rn(1.0f, sqrt_rn(variance + eps))};
}

constexpr int GIVERS = 3;  // warps

template <class Tile, Epilogue E>
PTX_INLINE void give(const Places<Tile> &at, const LinearSm90Args &args) {
    const LinearArgs &linear = args.linear;
    const Tiles<Tile> tiles(linear, block_x(), grid_x());
    const int giver = warp() - 1;
    grid_wait();
    int turn = 0;
#pragma unroll 1
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.step, turn++) {
        const TileAt from = tiles.at(tile);
        unsigned char *rows = at.given + turn % 2 * Tile::GIVEN_BYTES, *columns = rows + Tile::BM * 8;
        mbarrier_wait(&at.taken[turn % 2], turn / 2 % 2 ^ 1);
        for (int i = giver * WARP + lane(); i < Tile::BN; i += GIVERS * WARP) {
            const int n = from.n + i;
            float bias = 0.0f, sum = 0.0f;
            if (n < linear.n && E != Epilogue::EMBED) {
                bias = args.bias32 != nullptr ? args.bias32[n] : fp16_to_f32(linear.bias[n]);
                sum = args.column_sums != nullptr ? args.column_sums[n] : 0.0f;
            }
            store_8(columns + i * 8, vec8{f32_to_bits(bias), f32_to_bits(sum)});
        }
        if (E == Epilogue::BIAS || E == Epilogue::QUICK_GELU) {
            const int parts = linear.k / PART;
            for (int i = giver * 4; i < Tile::BM; i += GIVERS * 4) {  // four rows a warp
                const int row = i + lane() / 8, m = from.m + row;
                RowPart norm = {0.0f, 1.0f};
                if (args.partials != nullptr) {
                    const bool live = m < linear.m;
                    norm = row_norm(args.partials + static_cast<long long>(live ? m : 0) * parts, parts, args.eps, live);
                }
                if (lane() % 8 == 0) {
                    store_8(rows + row * 8, vec8{f32_to_bits(norm.mean), f32_to_bits(norm.squares)});
                }
            }
        }
        mbarrier_arrive(&at.ready[turn % 2]);
    }
}

// ----------------------------------------------------------------------------------------------------------
// From sums to memory.

// Eight columns of a row to the slots of its image, wherever the caller has them: a short loop where 16 bytes do not fit,
// since this stands in the code once for every fragment.
PTX_INLINE void scatter_chunk(const LinearArgs &args, vec16 values, int row, int n) {
    const int image = row / args.group, patch = row - image * args.group, end = args.slot_begin[image + 1];
#pragma unroll 1
    for (int slot = args.slot_begin[image]; slot < end; slot++) {
        const SlotRows to = args.slots[slot];
        if (patch < to.rows) {
            fp16 *at = to.first + patch * to.pitch + n;
            if (reinterpret_cast<unsigned long long>(at) % 16 == 0) {
                store_16(at, values);
                continue;
            }
#pragma unroll 1
            for (int i = 0; i < CHUNK; i++) {
                at[i] = element(values, i);
            }
        }
    }
}

// The row of `out` for row `row`, and whether there is one.
PTX_INLINE bool kept_row(const LinearSm90Args &args, int row, int &to) {
    to = row;
    if (args.drop == 0) {
        return true;
    }
    const int group = row / args.drop;
    to = row - group - 1;
    return row != group * args.drop;
}

// Four fragments' worth of sums: WIDE four of row g (+ 8 for `half`), else two of rows g and g + 8. `column`: of the
// first of them, in the tile.
template <class Tile, Epilogue E, bool WIDE>
PTX_INLINE void store_sums(const LinearSm90Args &args, const float (&sums)[Tile::SUMS], const unsigned char *columns,
                           const RowPart (&norms)[2], int row0, int n0, int column, int half) {
    const LinearArgs &linear = args.linear;
    const int g = lane() / 4, t = lane() % 4;
    const int row = row0 + g + (WIDE ? half : t / 2) * 8, n = n0 + column + (WIDE ? t : t % 2) * CHUNK;
    const bool live = row < linear.m && n < linear.n;  // N is a multiple of 8: all eight, or none
    if (Tile::HIGH * Tile::SUMS >= 128) {
        warp_barrier();  // for ptxas, which would otherwise begin several at once and run out of registers
    }
    unsigned words[4] = {};
    if (E == Epilogue::RESIDUAL || E == Epilogue::EMBED) {
        const fp16 *from =
            linear.extra + static_cast<long long>(extra_row<E>(linear, row)) * linear.extra_pitch + n;
        if (live) {
            const vec16 extra = load_16(from);
            words[0] = extra.x, words[1] = extra.y, words[2] = extra.z, words[3] = extra.w;
        }
        transpose_quad(words);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int fragment = column / 8 + (WIDE ? i : i % 2), own = WIDE ? half : i / 2;
        const vec16 c = load_16(columns + (fragment * 8 + t * 2) * 8);  // (bias, sum) of two columns
        float lo = sums[fragment * 4 + own * 2], hi = sums[fragment * 4 + own * 2 + 1];
        if (E == Epilogue::BIAS || E == Epilogue::QUICK_GELU) {
            lo = fma_rn(-norms[own].mean, bits_to_f32(c.y), lo) * norms[own].squares;
            hi = fma_rn(-norms[own].mean, bits_to_f32(c.w), hi) * norms[own].squares;
        }
        words[i] = pack_fp16x2(finish<E>(lo, bits_to_f32(c.x), fp16_lo(words[i])),
                               finish<E>(hi, bits_to_f32(c.z), fp16_hi(words[i])));
    }
    transpose_quad(words);
    const vec16 values = vec16{words[0], words[1], words[2], words[3]};
    if (E == Epilogue::RESIDUAL) {
        int to;
        const bool kept = kept_row(args, row, to) && live;
        if (kept) {
            store_16(linear.out + to * linear.out_pitch + n, values);
        }
        if (args.partials_out != nullptr) {
            const RowPart part = part_of(values);
            if (kept && t % 2 == 0) {
                store_part(args.partials_out, linear.n, to, n, part);
            }
        }
    } else if (live && E == Epilogue::SCATTER) {
        scatter_chunk(linear, values, row, n);
    } else if (live && E == Epilogue::EMBED) {
        store_row<E>(linear, values, row, n, CHUNK);
    } else if (live) {
        store_16(linear.out + row * linear.out_pitch + n, values);
    }
}

// 64 rows of a tile from `row0` of the warp's 16 on.
template <class Tile, Epilogue E>
PTX_INLINE void store_high(const LinearSm90Args &args, const float (&sums)[Tile::SUMS], const unsigned char *rows,
                           const unsigned char *columns, int m0, int n0) {
    const int first = warp() % 4 * 16;  // of the 64
    RowPart norms[2] = {{0.0f, 1.0f}, {0.0f, 1.0f}};
    if (E == Epilogue::BIAS || E == Epilogue::QUICK_GELU) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const vec8 raw = load_8(rows + (first + half * 8 + lane() / 4) * 8);
            norms[half] = RowPart{bits_to_f32(raw.x), bits_to_f32(raw.y)};
        }
    }
#pragma unroll
    for (int column = 0; column + 32 <= Tile::BN; column += 32) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            store_sums<Tile, E, true>(args, sums, columns, norms, m0 + first, n0, column, half);
        }
    }
    if (Tile::BN % 32 != 0) {
        store_sums<Tile, E, false>(args, sums, columns, norms, m0 + first, n0, Tile::BN - 16, 0);
    }
}

// ----------------------------------------------------------------------------------------------------------
// The tensor cores.

template <class Tile> using Sums = float[Tile::HIGH][Tile::SUMS];

// One stage: 64 of K.
template <class Tile>
PTX_INLINE void multiply_stage(Sums<Tile> &sums, const unsigned char *a, const unsigned char *w, bool first) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::BK / 16; k++) {
#pragma unroll
        for (int i = 0; i < Tile::HIGH; i++) {
            wgmma_ss<Tile::BN>(sums[i], descriptor_k_major(a + i * 8192 + k * 32), descriptor_k_major(w + k * 32),
                               !first || k > 0);
        }
    }
    wgmma_commit();
}

// This warp is done with a stage: to the one who fills it, to both where they fill each other's.
template <class Tile> PTX_INLINE void release(Mbarrier *empty) {
    if (Tile::CLUSTER == 1) {
        if (lane() == 0) {
            mbarrier_arrive(empty);
        }
    } else if (lane() < Tile::CLUSTER) {
        mbarrier_arrive_cluster(empty, lane());
    }
}

template <class Tile>
PTX_INLINE void multiply_tile(Sums<Tile> &sums, const Places<Tile> &at, Cursor<Tile> &cursor, int group, int steps) {
    Mbarrier *before = nullptr;  // empty[] of the stage that is still read
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        mbarrier_wait(&at.full[cursor.stage], cursor.parity);
        const unsigned char *stage = at.ring + cursor.stage * Tile::STAGE_BYTES;
        const unsigned char *a = stage + (Tile::PINGPONG ? 0 : group * Tile::GROUP_M * 128);
        multiply_stage<Tile>(sums, a, stage + Tile::A_BYTES, step == 0);
        wgmma_wait<1>();
        if (before != nullptr) {
            release<Tile>(before);  // a stage behind: the tensor cores always have one more to do
        }
        before = &at.empty[cursor.stage];
        cursor.next();
    }
    if (Tile::PINGPONG && lane() == 0) {
        mbarrier_arrive(&at.turn[1 - group]);
    }
#pragma unroll
    for (int i = 0; i < Tile::HIGH; i++) {
        wgmma_wait<0>(sums[i]);
    }
    release<Tile>(before);
}

template <class Tile, Epilogue E>
PTX_INLINE void consume(const Places<Tile> &at, const LinearSm90Args &args, int group) {
    const Tiles<Tile> tiles(args.linear, block_x(), grid_x());
    const int steps = ceil_div(args.linear.k, Tile::BK);
    Cursor<Tile> cursor;
    grid_wait();
    int turn = 0;
#pragma unroll 1
    for (int tile = tiles.first; tile < tiles.count; tile += tiles.step, turn++) {
        if (Tile::PINGPONG && turn % 2 != group) {
            cursor.skip(steps);
            continue;
        }
        if (Tile::PINGPONG) {
            // Not before the other group has seen all its stages: a parity tells one time around from the next only.
            mbarrier_wait(&at.turn[group], turn / 2 % 2 ^ (group == 0));
        }
        Sums<Tile> sums;
        multiply_tile<Tile>(sums, at, cursor, group, steps);

        const TileAt to = tiles.at(tile);
        const unsigned char *rows = at.given + turn % 2 * Tile::GIVEN_BYTES, *columns = rows + Tile::BM * 8;
        mbarrier_wait(&at.ready[turn % 2], turn / 2 % 2);
#pragma unroll
        for (int i = 0; i < Tile::HIGH; i++) {
            const int high = (Tile::PINGPONG ? 0 : group * Tile::GROUP_M) + i * 64;
            store_high<Tile, E>(args, sums[i], rows + high * 8, columns, to.m + high, to.n);
        }
        mbarrier_arrive(&at.taken[turn % 2]);
    }
}

template <class Tile, Epilogue E>
PTX_INLINE void linear(const TensorMap *a, const TensorMap *w, const LinearSm90Args &args) {
    PTX_SMEM(unsigned char, smem);
    const Places<Tile> at = places<Tile>(smem);
    if (thread_x() == 0) {
        tma_prefetch(a);
        tma_prefetch(w);
        for (int s = 0; s < Tile::STAGES; s++) {
            mbarrier_init(&at.full[s], 1);
            mbarrier_init(&at.empty[s], Tile::READERS * Tile::CLUSTER);
        }
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&at.ready[i], GIVERS * WARP);
            mbarrier_init(&at.taken[i], Tile::READERS * WARP);
            mbarrier_init(&at.turn[i], Tile::READERS);
        }
        fence_mbarrier_init();
    }
    if (Tile::CLUSTER == 1) {
        block_barrier();  // the mbarriers are there for all
    } else {
        cluster_barrier();  // for the other block as well
    }
    grid_launch_dependents();
    const int group = warp() / 4;
    if (group == 0) {
        set_registers_dec<PRODUCER_REGISTERS>();
        if (thread_x() == 0) {
            produce<Tile>(at, a, w, args.linear);
        } else if (warp() > 0) {
            give<Tile, E>(at, args);
        }
    } else {
        set_registers_inc<CONSUMER_REGISTERS>();
        consume<Tile, E>(at, args, group - 1);
    }
    if (Tile::CLUSTER > 1) {
        cluster_barrier();  // nobody returns while the other still writes into its ring, or arrives at its mbarriers
    }
}

}  // namespace hopper

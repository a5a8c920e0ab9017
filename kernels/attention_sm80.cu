// attention_sm80.cu: the attention of attention.cuh for every GPU from sm_80 on.
//
// Who computes what. A block has 4 warps and 64 (attention) or 128 (attention_128) queries of one head; a
// warp has 16 or 32 of them and sees all keys, KEYS = 112 at a time: 11 such tiles hold T = 1226 with 6
// columns to spare.
//
//                  K tile [112][64]                   S, P: registers, never in memory
//                ┌──────────────────┐                 ┌──────────────────┐
//      Q [16]    │                  │   S = Q K^T     │ lane = 4 g + t:  │      O [16][64] += P V
//      warp 0..3 │                  │ ─────────────▶  │ rows g, g + 8    │ ──▶  same rows: fragments of S
//                └──────────────────┘                 │ columns 2t, 2t+1 │      are the A fragments of P V
//                                                     └──────────────────┘
//
// Which of the two: rows per warp set how often a K or V fragment is used, queries per block how often L2 is
// read. 128 queries halve both; 64 fill the device better when heads times images are few. The bits of a row
// are the same.
//
// Shared memory, rows of 128 bytes, chunk c of 16 bytes of row r at place c ^ (r % 8), which makes ldmatrix,
// cp.async and the final transposition free of bank conflicts:
//
//     Q [queries][64] (O at the end) │ K 0 [112][64] │ V 0 [112][64] │ K 1 │ V 1
//
//     copies   Q, K 0, V 0 │  K 1, V 1  │  K 0, V 0  │ ...      a tile ahead, while this one is computed
//     compute              │  tile 0    │  tile 1    │ ...      one barrier per tile: landed, the other free
//
// Launch contract, checked by the launcher in this order (src/cuda/attention.rs):
//   grid        x = ceil(T / queries), y = NH, z = B <= 65535; block 128; SHARED_BYTES of shared memory
//   sizes       tokens >= 1, any; heads >= 1
//   alignment   qkv, out 16 bytes; pitches multiples of 8, qkv_pitch >= 192 heads, out_pitch >= 64 heads
//   aliasing    none
//
// Formula, numerics and source: attention.cuh.

#include "attention.cuh"

namespace {

constexpr int KEYS = 112;  // of a tile; 56 f32 of scores per lane and 16 queries
constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int TILE_BYTES = KEYS * ROW_BYTES;
constexpr float SCALE = 0.125f * LOG2_E;

static_assert(KEYS % 16 == 0, "P V takes 16 keys at a time");
static_assert(THREADS / ACROSS % 8 == 0, "the swizzle of a thread's rows is one and the same");
static_assert(KEYS % (THREADS / ACROSS) == 0, "all threads copy alike");

// M: fragments of 16 queries per warp.
template <int M> constexpr int QUERIES = WARPS * 16 * M;
template <int M> constexpr int SHARED_BYTES = QUERIES<M> * ROW_BYTES + 4 * TILE_BYTES;
static_assert(SHARED_BYTES<2> <= 101376, "99 KB is what sm_86 and sm_89 give a block");

// Chunk `chunk` of row `row`, in bytes.
PTX_INLINE int place(int row, int chunk) { return row * ROW_BYTES + (chunk ^ (row % 8)) * 16; }

// This thread's share of copying rows: chunk `thread % 8` of every 16th row.
constexpr int STEP = THREADS / ACROSS;
PTX_INLINE int copy_row() { return thread_x() / ACROSS; }
PTX_INLINE int copy_chunk() { return thread_x() % ACROSS; }

// Issues rows of Q from `at`, this thread's first; all but the first `left` rows from there on become zeros.
template <int ROWS> PTX_INLINE void copy_queries(unsigned char *to, const fp16 *at, int left, int pitch) {
    to += place(copy_row(), copy_chunk());
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) {
        cp_async_16(to + i * ROW_BYTES, at + static_cast<long long>(i) * pitch, i < left);
    }
}

// The same for a tile of K, and of V, which lies `width` further in each row. Moves `at` to the next tile.
PTX_INLINE void copy_tile(unsigned char *to, const fp16 *&at, int width, int left, int pitch) {
    to += place(copy_row(), copy_chunk());
#pragma unroll
    for (int i = 0; i < KEYS; i += STEP) {
        const bool live = i < left;
        cp_async_16(to + i * ROW_BYTES, at, live);
        cp_async_16(to + i * ROW_BYTES + TILE_BYTES, at + width, live);
        at += static_cast<long long>(STEP) * pitch;
    }
}

// The running state of a warp's 16 M queries.
template <int M> struct Rows {
    float o[M][HS / 8][4];  // P V so far
    RowPair pair[M];
};
template <int M> using Scores = float[M][KEYS / 8][4];

// S = Q K^T.
template <int M> PTX_INLINE void score(Scores<M> &s, const unsigned char *q, const unsigned char *k) {
    // Q: rows 0-7, rows 8-15, both again a chunk further. K: the chunks of 8 keys first.
    const int q_at = place(warp() * 16 * M + lane() % 16, lane() / 16);
    const int k_at = place(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
#pragma unroll
    for (int d = 0; d < HS / 16; d++) {  // two chunks each; the swizzle makes the step an xor
        unsigned a[M][4];
#pragma unroll
        for (int i = 0; i < M; i++) {
            ldmatrix_x4(a[i], q + (q_at ^ (d * 32)) + i * 16 * ROW_BYTES);
        }
#pragma unroll
        for (int j = 0; j < KEYS / 8; j += 2) {
            unsigned b[4];
            ldmatrix_x4(b, k + (k_at ^ (d * 32)) + j * 8 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < M; i++) {
                mma_16816(s[i][j], a[i], {b[0], b[1]});
                mma_16816(s[i][j + 1], a[i], {b[2], b[3]});
            }
        }
    }
}

// O += P V.
template <int M> PTX_INLINE void accumulate(Rows<M> &rows, Scores<M> &p, const unsigned char *v) {
    const int v_at = place(lane() % 16, lane() / 16);
#pragma unroll
    for (int key = 0; key < KEYS / 8; key += 2) {
        unsigned a[M][4];
#pragma unroll
        for (int i = 0; i < M; i++) {
            fragment(a[i], p[i], key / 2);
        }
#pragma unroll
        for (int d = 0; d < HS / 8; d += 2) {
            unsigned b[4];
            ldmatrix_x4_trans(b, v + (v_at ^ (d * 16)) + key * 8 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < M; i++) {
                mma_16816(rows.o[i][d], a[i], {b[0], b[1]});
                mma_16816(rows.o[i][d + 1], a[i], {b[2], b[3]});
            }
        }
    }
}

// O / l, through the warp's own rows of `stage`, to memory.
template <int M>
PTX_INLINE void store(fp16 *out, unsigned char *stage, Rows<M> &rows, int first, int tokens, int pitch) {
    const int row0 = warp() * 16 * M, head = block_y() * HS;
    warp_barrier();  // the warp's last reads of Q, which the stage overwrites
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float scale = inverse(rows.pair[i].sum[half]);
            const int row = row0 + i * 16 + half * 8 + lane() / 4;
#pragma unroll
            for (int j = 0; j < HS / 8; j++) {
                unsigned *to = reinterpret_cast<unsigned *>(stage + place(row, j) + lane() % 4 * 4);
                *to = pack_fp16x2(rows.o[i][j][2 * half] * scale, rows.o[i][j][2 * half + 1] * scale);
            }
        }
    }
    warp_barrier();  // rows are complete before other lanes read them
#pragma unroll
    for (int i = 0; i < 16 * M; i += WARP / ACROSS) {
        const int row = row0 + i + lane() / ACROSS, chunk = lane() % ACROSS;
        if (first + row < tokens) {
            fp16 *to = out + static_cast<long long>(first + row) * pitch + (head + chunk * CHUNK);
            store_16(to, load_16(stage + place(row, chunk)));
        }
    }
}

template <int M>
PTX_INLINE void attend(fp16 *out, const fp16 *qkv, int tokens, int heads, int qkv_pitch, int out_pitch) {
    PTX_SMEM(unsigned char, q);
    unsigned char *tiles = q + QUERIES<M> * ROW_BYTES;  // [2][K, V]
    const int first = block_x() * QUERIES<M>, width = heads * HS;
    const long long image = static_cast<long long>(block_z()) * tokens;
    const fp16 *from = qkv + image * qkv_pitch + block_y() * HS + copy_chunk() * CHUNK;

    // This thread's part of the first tile of K.
    const fp16 *at = from + width + static_cast<long long>(copy_row()) * qkv_pitch;
    copy_queries<QUERIES<M>>(q, at - width + static_cast<long long>(first) * qkv_pitch,
                             tokens - first - copy_row(), qkv_pitch);
    copy_tile(tiles, at, width, tokens - copy_row(), qkv_pitch);
    cp_async_commit();

    Rows<M> rows = {};
#pragma unroll
    for (int i = 0; i < M; i++) {
        rows.pair[i] = new_rows();
    }
    int now = 0;  // offset of this tile's K and V
#pragma unroll 1
    for (int key = 0; key < tokens; key += KEYS) {
        cp_async_wait<0>();
        block_barrier();  // this tile has landed for all; nobody reads the other any more
        const int next = 2 * TILE_BYTES - now;
        if (key + KEYS < tokens) {
            copy_tile(tiles + next, at, width, tokens - (key + KEYS) - copy_row(), qkv_pitch);
            cp_async_commit();
        }
        Scores<M> s = {};
        score<M>(s, q, tiles + now);
        if (key + KEYS > tokens) {
#pragma unroll
            for (int i = 0; i < M; i++) {
                mask(s[i], tokens - key);
            }
        }
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float decay = raise_top(s[i], rows.pair[i], half, SCALE);
                exponentiate(s[i], rows.pair[i], half, SCALE);
                shrink(rows.o[i], half, decay);
            }
        }
        accumulate<M>(rows, s, tiles + now + TILE_BYTES);
        now = next;
    }
    store<M>(out + image * out_pitch, q, rows, first, tokens, out_pitch);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 3) attention(
    fp16 *out, const fp16 *qkv, int tokens, int heads, int qkv_pitch, int out_pitch) {
    attend<1>(out, qkv, tokens, heads, qkv_pitch, out_pitch);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_128(
    fp16 *out, const fp16 *qkv, int tokens, int heads, int qkv_pitch, int out_pitch) {
    attend<2>(out, qkv, tokens, heads, qkv_pitch, out_pitch);
}

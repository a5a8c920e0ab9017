// attention.cuh: what all variants of attention share: the formula, and the softmax of a tile of keys.
//
//     O[t] = softmax over j of (Q[t] . K[j] / 8)  times V        per image and head, non-causal, HS = 64
//
//     qkv [B T, qkv_pitch]: a row is Q, K, V of a token, each C = NH 64 wide, head by head        fp16
//     out [B T, out_pitch]: C wide, head by head                                                  fp16
//
// No T x T matrix: the keys come in tiles, and a row keeps its greatest score so far, the sum of its
// exponentials and O unnormalised. A tile that brings a greater score shrinks both by one factor, `decay`.
//
//     for each tile    S = Q K^T                            tensor core, fragments of f32
//                      top'  = max(top, max S scale)        scale = log2(e) / 8
//                      decay = 2^(top - top')               0 in the first tile: top begins at -inf
//                      P = 2^(S scale - top')               <= 1, in place of S
//                      sum = sum decay + sum of P           of this lane's columns
//                      O = O decay + P V                    P in fp16: fragments of S are those of A
//     at the end       O / sum                              the sums of four lanes, added
//
// A warp's 16 queries, as mma_16816 and wgmma have them; lane = 4 g + t, element 4 j + c of a lane's S:
//
//                keys 8j ..                       S[4j], S[4j+1]     row g,     columns 8j + 2t, + 1
//              ┌────┬────┬────┬────┐              S[4j+2], S[4j+3]   row g + 8, the same columns
//       row g  │ t0 │ t1 │ t2 │ t3 │  ..
//     row g+8  │ t0 │ t1 │ t2 │ t3 │  ..          a row is in four lanes: two shuffles make its maximum
//              └────┴────┴────┴────┘
//
// Numerics: Q K^T in f32 over k = 0, 16, 32, 48; the softmax in f32, base 2, with `scale` in the one
// multiplication of the exponent; maxima are kept as rounded products, so that a factor that rounding leaves
// in the exponentials is the same for a whole row and cancels (logits up to 2^24). P <= 1 is rounded to fp16
// for P V, the row sums add the unrounded P; O / sum is rounded once. Tiles are fixed by T, rows do not mix:
// bits depend on nothing else. Keys beyond T have P = 0 and V = 0. A NaN reaches every output that it should.
//
// Source: online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867); in tiles: FlashAttention-2 (arXiv
// 2307.08691). Oracle: src/cpu/attention.rs, which does not round P.
#pragma once

#include "numerics.cuh"

constexpr int HS = 64;
constexpr int ROW_BYTES = HS * 2, ACROSS = HS / CHUNK;  // of a row of a tile: bytes, chunks

PTX_INLINE float minus_infinity() { return bits_to_f32(0xff800000u); }

// A lane's fragments of N / 8 times 8 columns: flat, as wgmma has them, or by fours, as mma has them.
template <int N> PTX_INLINE float &at(float (&s)[N], int i) { return s[i]; }
template <int N> PTX_INLINE float &at(float (&s)[N][4], int i) { return s[i / 4][i % 4]; }
template <class S> constexpr int ELEMENTS = static_cast<int>(sizeof(S) / sizeof(float));

// What is known of two rows so far: [0] is row g, [1] row g + 8.
struct RowPair {
    float top[2];  // the greatest score, times scale, rounded
    float sum[2];  // of P, this lane's columns
};
PTX_INLINE RowPair new_rows() {
    return RowPair{{minus_infinity(), minus_infinity()}, {0.0f, 0.0f}};
}

// Scores of keys from `keys` on become -inf.
template <class S> PTX_INLINE void mask(S &s, int keys) {
#pragma unroll
    for (int i = 0; i < ELEMENTS<S>; i++) {
        const bool beyond = i / 4 * 8 + lane() % 4 * 2 + i % 2 >= keys;
        at(s, i) = beyond ? minus_infinity() : at(s, i);
    }
}

// One row of the two at a time. Raises its top to that of the tile; what was summed so far shrinks by the answer.
template <class S> PTX_INLINE float raise_top(S &s, RowPair &rows, int half, float scale) {
    float top = max_f32(at(s, 2 * half), at(s, 2 * half + 1));
#pragma unroll
    for (int i = 4 + 2 * half; i < ELEMENTS<S>; i += 4) {
        top = max_f32(top, max_f32(at(s, i), at(s, i + 1)));
    }
    top = max_f32(top, shuffle_xor(top, 1));
    top = max_f32(top, shuffle_xor(top, 2));
    top = max_f32(rows.top[half], top * scale);
    const float decay = exp2_approx(rows.top[half] - top);
    rows.top[half] = top;
    rows.sum[half] *= decay;
    return decay;
}

// Elements from `first` to `end` of S that are of this row become P, and are counted.
template <class S>
PTX_INLINE void exponentiate(S &s, RowPair &rows, int half, float scale, int first = 0, int end = ELEMENTS<S>) {
    float sum = rows.sum[half];
#pragma unroll
    for (int i = first; i < end; i += 4) {
#pragma unroll
        for (int j = i + 2 * half; j < i + 2 * half + 2; j++) {
            at(s, j) = exp2_approx(fma_rn(at(s, j), scale, -rows.top[half]));
            sum += at(s, j);
        }
    }
    rows.sum[half] = sum;
}

// P V of the tiles before.
template <class O> PTX_INLINE void shrink(O &o, int half, float decay) {
#pragma unroll
    for (int i = 2 * half; i < ELEMENTS<O>; i += 4) {
        at(o, i) *= decay;
        at(o, i + 1) *= decay;
    }
}

// 1 / sum of a row, in its four lanes.
PTX_INLINE float inverse(float sum) {
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    return rcp_approx(sum);
}

// P of 16 keys from 16 step on, as the A fragment of P V.
template <class S> PTX_INLINE void fragment(unsigned (&a)[4], S &p, int step) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[i] = pack_fp16x2(at(p, step * 8 + 2 * i), at(p, step * 8 + 2 * i + 1));
    }
}

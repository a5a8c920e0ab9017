// numerics.cuh: what several kernels share: activations, eight fp16 at a time, sums over a warp, trades in a quad.
//
//     quick_gelu(x) = x σ(1.702 x) = x / (1 + e^(-1.702 x))              the tower's
//     gelu(x)       = x Φ(x) = max(x, 0) - g(|x|),   g(a) = a Φ(-a)      the projector's; no tanh anywhere
//
// Numerics: f32 in, f32 out, one rounding to fp16 by the caller. Over all finite fp16 inputs both stay within
// 0.51 ulp of fp16 of the exact value, tails and ±65504 included, under any error that the PTX manual allows
// the two approximate instructions (tested). NaN stays NaN.
//   quick_gelu: two MUFU operations (ex2, rcp) and two multiplications. Where e^(-1.702 x) overflows, 1/inf
//   is 0 and the result -0: the exact value is below half of fp16's smallest number from x = -17 on.
//   gelu: 1 + erf(x / √2) cancels for negative x (at -4 it would cost 4 ulp), so the tail Φ(-a) is computed:
//       Φ(-a) = e^(-a²/2) u Q(u),   u = 1 / (1 + 0.3 a),   Q of degree 9, relative error 3e-9 for a <= 13
//   a² is split into its rounded value and the rest, and e^(-rest/2) = 1 - rest/2.
//
// Source: OpenAI CLIP's QuickGELU; torch.nn.GELU() (erf). The form of gelu and Q are those of
// src/cpu/activation.rs.
#pragma once

#include "ptx.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

PTX_INLINE float quick_gelu(float x) {
    const float e = exp2_approx(x * (-1.702f * LOG2_E));  // e^(-1.702 x)
    return x * rcp_approx(1.0f + e);
}

PTX_INLINE float gelu(float x) {
    // Beyond 13, e^(-a²/2) < 2^-121; the bound keeps a² finite.
    const float a = min_f32(13.0f, x < 0.0f ? -x : x);
    const float square = a * a;
    const float rest = fma_rn(a, a, -square);
    float e = exp2_approx(square * (-0.5f * LOG2_E));
    e = fma_rn(e * rest, -0.5f, e);
    const float u = rcp_approx(fma_rn(a, 0.3f, 1.0f));
    float q = -0.020566171f;
    q = fma_rn(q, u, 0.11211292f);
    q = fma_rn(q, u, -0.2274244f);
    q = fma_rn(q, u, 0.19068659f);
    q = fma_rn(q, u, -0.0784678f);
    q = fma_rn(q, u, 0.09561824f);
    q = fma_rn(q, u, 0.078585745f);
    q = fma_rn(q, u, 0.11019104f);
    q = fma_rn(q, u, 0.11957747f);
    q = fma_rn(q, u, 0.11968638f);
    // A NaN is not below 0 and passes here, whatever min_f32 made of it.
    return (x < 0.0f ? 0.0f : x) - (a * e) * (u * q);
}

// ----------------------------------------------------------------------------------------------------------
// Eight fp16 in 16 bytes.

constexpr int CHUNK = 8;  // fp16 in 16 bytes

PTX_INLINE void unpack(vec16 from, float (&to)[CHUNK]) {
    const unsigned pairs[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = fp16_lo(pairs[i]);
        to[2 * i + 1] = fp16_hi(pairs[i]);
    }
}

PTX_INLINE vec16 pack(const float (&from)[CHUNK]) {
    return vec16{pack_fp16x2(from[0], from[1]), pack_fp16x2(from[2], from[3]), pack_fp16x2(from[4], from[5]),
                 pack_fp16x2(from[6], from[7])};
}

// Element i of eight, still as fp16.
PTX_INLINE fp16 element(vec16 from, int i) {
    const unsigned pair = i < 2 ? from.x : i < 4 ? from.y : i < 6 ? from.z : from.w;
    return fp16{static_cast<unsigned short>(i % 2 ? pair >> 16 : pair & 0xffffu)};
}

// Stores the first `count` of eight at `to`: in one piece where that is possible.
PTX_INLINE void store_chunk(fp16 *to, vec16 from, int count) {
    if (count >= CHUNK && reinterpret_cast<unsigned long long>(to) % 16 == 0) {
        store_16(to, from);
        return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        if (i < count) {
            to[i] = element(from, i);
        }
    }
}

// Whether every row of `pitch` elements from `first` starts at a multiple of 16 bytes.
PTX_INLINE bool rows_aligned(const fp16 *first, long long pitch) {
    return reinterpret_cast<unsigned long long>(first) % 16 == 0 && pitch % CHUNK == 0;
}

// The sum over a warp, in every lane: a butterfly, in which all lanes form the same sums.
PTX_INLINE float warp_sum(float value) {
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        value += shuffle_xor(value, distance);
    }
    return value;
}

// A 4 x 4 transposition across the four lanes of a quad: lane t's r[u] becomes what lane u had in r[t].
PTX_INLINE void transpose_quad(unsigned (&r)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = lane() & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if ((i & bit) == 0) {  // each pair of registers swaps one with the pair of the other lane
                const unsigned got = shuffle_xor(upper ? r[i] : r[i | bit], bit);
                r[i] = upper ? got : r[i];
                r[i | bit] = upper ? r[i | bit] : got;
            }
        }
    }
}

PTX_INLINE int ceil_div(int a, int b) { return a / b + (a % b != 0); }

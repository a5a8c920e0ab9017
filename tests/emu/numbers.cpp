// numbers.cpp: arithmetic of the emulated device.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emu.h"
#include "warp.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace emu {

// ---- the tensor core
// ----------------------------------------------------------------------------------------

namespace {

void mma_portable(float (*d)[8], const unsigned short (*a)[16], const unsigned short (*b)[16]) {
    float columns[16][8]; // [k][n]
    for (int n = 0; n < 8; n++) {
        for (int k = 0; k < 16; k++) {
            columns[k][n] = half_to_float(b[n][k]);
        }
    }
    for (int m = 0; m < 16; m++) {
        for (int k = 0; k < 16; k++) {
            const float x = half_to_float(a[m][k]);
            for (int n = 0; n < 8; n++) {
                d[m][n] = std::fmaf(x, columns[k][n], d[m][n]);
            }
        }
    }
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma,f16c"))) void mma_avx2(float (*d)[8], const unsigned short (*a)[16],
                                                       const unsigned short (*b)[16]) {
    alignas(32) float rows[8][16];    // [n][k]
    alignas(32) float columns[16][8]; // [k][n]
    for (int n = 0; n < 8; n++) {
        for (int half = 0; half < 2; half++) {
            const __m128i packed = _mm_load_si128(reinterpret_cast<const __m128i *>(&b[n][8 * half]));
            _mm256_store_ps(&rows[n][8 * half], _mm256_cvtph_ps(packed));
        }
    }
    for (int k = 0; k < 16; k++) {
        for (int n = 0; n < 8; n++) {
            columns[k][n] = rows[n][k];
        }
    }
    alignas(32) float x[16];
    for (int m = 0; m < 16; m++) {
        for (int half = 0; half < 2; half++) {
            const __m128i packed = _mm_load_si128(reinterpret_cast<const __m128i *>(&a[m][8 * half]));
            _mm256_store_ps(&x[8 * half], _mm256_cvtph_ps(packed));
        }
        __m256 sum = _mm256_load_ps(d[m]);
        for (int k = 0; k < 16; k++) {
            sum = _mm256_fmadd_ps(_mm256_broadcast_ss(&x[k]), _mm256_load_ps(columns[k]), sum);
        }
        _mm256_store_ps(d[m], sum);
    }
}
#endif

using Mma = void (*)(float (*)[8], const unsigned short (*)[16], const unsigned short (*)[16]);

Mma choose_mma() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        return mma_avx2;
    }
#endif
    return mma_portable;
}

const Mma best_mma = choose_mma();

} // namespace

void mma_m16n8k16(float (*d)[8], const unsigned short (*a)[16], const unsigned short (*b)[16]) {
    best_mma(d, a, b);
}

// ---- approximations
// -----------------------------------------------------------------------------------------
//
// The true value, moved by an error that is anywhere inside the bound which the PTX manual gives, and always
// the same for the same input. A kernel whose result is right only when the instruction is exact fails here.

namespace {

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// In -1..1, drawn from the bits of x.
double drawn(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits ^ bits >> 16) * 0x7feb352du;
    bits = (bits ^ bits >> 15) * 0x846ca68bu;
    bits ^= bits >> 16;
    return static_cast<std::int32_t>(bits) * 0x1p-31;
}

// Within `relative` of the exact value, the rounding to f32 included.
float moved(double exact, float x, double relative) {
    return static_cast<float>(exact * (1.0 + (relative - 0x1p-24) * drawn(x)));
}

// One of the two f32 beside the exact value: within 1 ulp.
float beside(double exact, float x) {
    const float nearest = static_cast<float>(exact);
    if (nearest == exact || !std::isfinite(nearest) || drawn(x) < 0.0) {
        return nearest;
    }
    return std::nextafter(nearest, nearest < exact ? INFINITY : -INFINITY);
}

// Into -1..1; a NaN stays one.
float clamped(float x) { return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x; }

} // namespace

float exp2_approx(float x) {
    x = flushed(x);
    if (x == std::floor(x)) {
        return flushed(std::exp2(x)); // whole powers are exact
    }
    return flushed(moved(std::exp2(static_cast<double>(x)), x, 0x1p-22));
}
float rcp_approx(float x) { return flushed(beside(1.0 / flushed(x), x)); }
float rsqrt_approx(float x) {
    return flushed(moved(1.0 / std::sqrt(static_cast<double>(flushed(x))), x, 1.2768e-7));
}
float tanh_approx(float x) { return clamped(moved(std::tanh(static_cast<double>(x)), x, 0x1p-11)); }
float sqrt_rn(float x) { return std::sqrt(x); }
float erf_f32(float x) { return clamped(moved(std::erf(static_cast<double>(x)), x, 0x1p-23)); }

} // namespace emu

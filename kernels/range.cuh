// range.cuh: weights of a checkpoint to fp16, and what is said about those that do not fit.
//
//     out = fp16(scale * in), to nearest even     in: bf16, f16 or f32; |in| <= 65504 fits, NaN does not
//
// The rule is that of src/checkpoint/convert.rs:
//     REFUSE     what does not fit is reported by the index of the first; the output is then of no use
//     SATURATE   magnitudes beyond ±65504, infinities too, become ±65504 and are counted; a NaN is refused
//
// The report is merged by atomic minimum and addition, so it does not depend on the order of blocks. The host
// sets it to {NOTHING, 0} before the launch. It is touched only by threads that found something.
#pragma once

#include "numerics.cuh"

struct RangeReport {
    unsigned long long first;  // least index of a value that the policy refuses; NOTHING if there is none
    unsigned count;            // values beyond ±65504, infinities included, NaN not
    unsigned pad;
};
static_assert(sizeof(RangeReport) == 16, "a layout shared with the host");

constexpr unsigned long long NOTHING = ~0ull;
constexpr int REFUSE = 0, SATURATE = 1;
constexpr float FP16_MAX = 65504.0f;

// Values as a checkpoint stores them; `wide` is exact.
struct bf16 {
    unsigned short bits;
};
PTX_INLINE float wide(bf16 x) { return bf16_to_f32(x.bits); }
PTX_INLINE float wide(fp16 x) { return fp16_to_f32(x); }
PTX_INLINE float wide(float x) { return x; }

// Eight 2-byte values in one load, eight f32 in two.
PTX_INLINE void load_wide(float (&to)[CHUNK], const fp16 *from) { unpack(load_16(from), to); }
PTX_INLINE void load_wide(float (&to)[CHUNK], const bf16 *from) {
    const vec16 chunk = load_16(from);
    const unsigned pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = bits_to_f32(pairs[i] << 16);
        to[2 * i + 1] = bits_to_f32(pairs[i] & 0xffff0000u);
    }
}
PTX_INLINE void load_wide(float (&to)[CHUNK], const float *from) {
    const vec16 low = load_16(from), high = load_16(from + 4);
    const unsigned bits[CHUNK] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        to[i] = bits_to_f32(bits[i]);
    }
}

// What one thread found.
struct RangeNote {
    unsigned long long first;
    unsigned count;
};

// Values 0 .. count of a run, from `from` on, whose first has index `index`, as fp16; zeros after them.
template <class T>
PTX_INLINE vec16 narrow(const T *from, int count, bool aligned, unsigned long long index, int policy,
                        float scale, RangeNote &note) {
    float x[CHUNK];
    if (aligned && count >= CHUNK) {
        load_wide(x, from);
    } else {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            x[i] = i < count ? wide(from[i]) : 0.0f;
        }
    }
    bool fits = true;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        fits = fits && x[i] <= FP16_MAX && x[i] >= -FP16_MAX;
    }
    if (!fits) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const bool nan = x[i] != x[i], beyond = x[i] > FP16_MAX || x[i] < -FP16_MAX;
            const unsigned long long at = index + static_cast<unsigned>(i);
            note.count += beyond;
            if ((nan || (beyond && policy == REFUSE)) && at < note.first) {
                note.first = at;
            }
            if (beyond && policy == SATURATE) {
                x[i] = x[i] > 0.0f ? FP16_MAX : -FP16_MAX;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        x[i] *= scale;
    }
    return pack(x);
}

PTX_INLINE void report_range(RangeReport *report, RangeNote note) {
    if (note.first != NOTHING) {
        atomic_min_u64(&report->first, note.first);
    }
    if (note.count != 0) {
        atomic_add_u32(&report->count, note.count);
    }
}

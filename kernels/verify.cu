// verify.cu: completeness of a sequence: one pass over its rows, a few numbers back.
//
//     verify_rows    check[r] = { first channel of row r that is NaN or infinite, or -1;
//                                 1 if an element is the poison 0x7d5a, that is, if it was not written;
//                                 Euclidean norm }                 rows [count, pitch] fp16, `hidden` wide
//     verify_slots   mean_norm[s] = mean of check[r].norm over the rows of slot s; 0 for an empty slot
//
// Who computes what: one warp per row, and per slot; 4 of them to a block. Lane i has the chunks (8 elements)
// i, i + 32, i + 64 ... of a row, and the rows i, i + 32 ... of a slot.
//
// Launch contract, checked by the launcher in this order (src/cuda/verify.rs):
//   grid        x = ceil(count / 4) or ceil(slots / 4), y = z = 1; block 128; no shared memory
//   sizes       count, hidden, slots >= 1; pitch >= hidden; slots within the rows that were checked
//   alignment   rows 2 bytes; 16-byte loads where rows are 16-byte aligned
//   aliasing    none
//
// Numerics: f32, lanes add in order, then in a butterfly: the numbers depend on the values alone. Poison is
// also a NaN: a row with both says so twice, and the host names the poison first. A row that is not finite
// has no norm.
//
// Source: src/sequence.rs, `verify`, the oracle (which adds in f64).

#include "numerics.cuh"

struct RowCheck {
    int bad_channel;
    int poisoned;
    float norm;
};
struct SlotRange {
    int offset, len;  // rows
};
static_assert(sizeof(RowCheck) == 12 && sizeof(SlotRange) == 8, "layouts shared with the host");

namespace {

constexpr int THREADS = 128, WARPS = THREADS / WARP;
constexpr unsigned POISON = 0x7d5a, INFINITE = 0x7c00, MAGNITUDE = 0x7fff;
constexpr int NONE = 0x7fffffff;

// The first `count` of eight elements, zeros after them.
PTX_INLINE vec16 load_chunk(const fp16 *from, int count, bool aligned) {
    if (aligned && count >= CHUNK) {
        return load_16(from);
    }
    unsigned bits[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        bits[i] = i < count ? from[i].bits : 0;
    }
    return vec16{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                 bits[6] | bits[7] << 16};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) verify_rows(
    RowCheck *check, const fp16 *rows, long long pitch, int count, int hidden) {
    const int row = block_x() * WARPS + warp();
    const bool live = row < count, aligned = rows_aligned(rows, pitch);
    const fp16 *from = rows + (live ? row : 0) * pitch;  // a warp without a row goes along, for the shuffles
    int bad = NONE;
    bool poisoned = false;
    float squares = 0.0f;
    for (int column = lane() * CHUNK; column < hidden; column += WARP * CHUNK) {
        const vec16 chunk = load_chunk(from + column, hidden - column, aligned);
        float x[CHUNK];
        unpack(chunk, x);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const unsigned bits = element(chunk, i).bits;
            poisoned = poisoned || bits == POISON;
            if ((bits & MAGNITUDE) >= INFINITE && column + i < bad) {
                bad = column + i;
            }
            squares = fma_rn(x[i], x[i], squares);
        }
    }
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const int other = shuffle_xor(bad, distance);
        bad = other < bad ? other : bad;
    }
    poisoned = warp_any(poisoned);
    squares = warp_sum(squares);
    if (live && lane() == 0) {
        check[row] = RowCheck{bad == NONE ? -1 : bad, poisoned ? 1 : 0, sqrt_rn(squares)};
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) verify_slots(
    float *mean_norm, const RowCheck *check, const SlotRange *ranges, int slots) {
    const int slot = block_x() * WARPS + warp();
    const SlotRange range = slot < slots ? ranges[slot] : SlotRange{0, 0};
    float sum = 0.0f;
    for (int i = lane(); i < range.len; i += WARP) {
        sum += check[range.offset + i].norm;
    }
    sum = warp_sum(sum);
    if (slot < slots && lane() == 0) {
        mean_norm[slot] = div_rn(sum, static_cast<float>(range.len > 0 ? range.len : 1));
    }
}

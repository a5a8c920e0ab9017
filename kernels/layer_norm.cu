// layer_norm.cu: layer norm over channels, row by row.
//
//     y[r][c] = (x[r][c] - mean_r) / sqrt(variance_r + eps) * weight[c] + bias[c]    fp16, f32 between
//
//     x, y [rows, pitch]      weight, bias [width]      parts [rows][width / 16] or null: statistics of y (row_part.cuh)
//
// Who computes what: one warp per row, 4 rows per block. Lane i has the chunks (8 fp16, 16 bytes) i, i + 32,
// i + 64 ... of its row; the first KEPT of them stay in registers between the passes (width <= 1024: all of
// them), later ones are read again from L1:
//
//     row   │chunk 0│  1  │  2  │ ... │ 31  │ 32  │ 33  │ ...
//     lane      0      1     2          31     0     1
//
//     sum of x ──all lanes──▶ mean ──▶ sum of (x - mean)² ──all lanes──▶ scale ──▶ y, 16 bytes per lane
//
// Launch contract, checked by the launcher in this order (src/cuda/layer_norm.rs):
//   grid        x = ceil(rows / 4), y = z = 1; block 128; no shared memory
//   sizes       rows >= 1; width a multiple of 8, >= 8, of 16 with parts; pitch a multiple of 8, >= width
//   alignment   y, x, weight, bias 16 bytes; parts 8
//   aliasing    y may be x (each lane writes what it read), not a part of it
//
// Numerics: two passes in f32, the mean first, so that a mean many deviations from 0 costs nothing (E[x²] -
// mean² would cancel). A lane adds its elements in order, then lanes add in a butterfly, in which all lanes
// form the same sums. Square root and division are correctly rounded; one rounding to fp16. What lies between
// width and pitch is neither read nor written.
//
// Source: src/cpu/layer_norm.rs, the oracle.

#include "row_part.cuh"

namespace {

constexpr int ROWS = 4;  // of a block
constexpr int THREADS = ROWS * WARP;
constexpr int KEPT = 4;  // chunks of a lane in registers: 16 of them

PTX_INLINE float add_all(float sum, vec16 chunk) {
    float x[CHUNK];
    unpack(chunk, x);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        sum += x[i];
    }
    return sum;
}

PTX_INLINE float add_squares(float sum, vec16 chunk, float mean) {
    float x[CHUNK];
    unpack(chunk, x);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        const float d = x[i] - mean;
        sum = fma_rn(d, d, sum);
    }
    return sum;
}

PTX_INLINE vec16 normalise(vec16 chunk, vec16 weight, vec16 bias, float mean, float scale) {
    float x[CHUNK], w[CHUNK], b[CHUNK];
    unpack(chunk, x), unpack(weight, w), unpack(bias, b);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        x[i] = fma_rn((x[i] - mean) * scale, w[i], b[i]);
    }
    return pack(x);
}

// Statistics of what two neighbouring lanes stored, if somebody wants them.
PTX_INLINE void leave_part(RowPart *parts, vec16 stored, int row, int width, int column, bool live) {
    if (parts == nullptr) {
        return;
    }
    const RowPart part = part_of(stored);
    if (live && lane() % 2 == 0) {
        store_part(parts, width, row, column, part);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm(
    fp16 *y, RowPart *parts, const fp16 *x, const fp16 *weight, const fp16 *bias, int rows, int width, int pitch,
    float eps) {
    const int row = block_x() * ROWS + warp();
    const int end = row < rows ? width : 0;  // a warp without a row reads nothing, and shuffles along
    const long long start = static_cast<long long>(row) * pitch;
    const fp16 *from = x + start;
    const int first = lane() * CHUNK;
    constexpr int STRIDE = WARP * CHUNK;

    vec16 kept[KEPT];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        if (first + i * STRIDE < end) {
            kept[i] = load_16(from + first + i * STRIDE);
        }
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        if (first + i * STRIDE < end) {
            sum = add_all(sum, kept[i]);
        }
    }
#pragma unroll 1
    for (int c = first + KEPT * STRIDE; c < end; c += STRIDE) {
        sum = add_all(sum, load_16(from + c));
    }
    const float mean = div_rn(warp_sum(sum), static_cast<float>(width));

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        if (first + i * STRIDE < end) {
            squares = add_squares(squares, kept[i], mean);
        }
    }
#pragma unroll 1
    for (int c = first + KEPT * STRIDE; c < end; c += STRIDE) {
        squares = add_squares(squares, load_16(from + c), mean);
    }
    const float variance = div_rn(warp_sum(squares), static_cast<float>(width));
    const float scale = div_rn(1.0f, sqrt_rn(variance + eps));
    fp16 *to = y + start;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int c = first + i * STRIDE;
        vec16 stored = {};
        if (c < end) {
            stored = normalise(kept[i], load_16(weight + c), load_16(bias + c), mean, scale);
            store_16(to + c, stored);
        }
        leave_part(parts, stored, row, width, c, c < end);
    }
#pragma unroll 1  // none at the tower's width; unrolled, ptxas spills them on sm_120
    for (int from_c = KEPT * STRIDE; from_c < width; from_c += STRIDE) {  // all lanes: parts are two lanes'
        const int c = first + from_c;
        vec16 stored = {};
        if (c < end) {
            stored = normalise(load_16(from + c), load_16(weight + c), load_16(bias + c), mean, scale);
            store_16(to + c, stored);
        }
        leave_part(parts, stored, row, width, c, c < end);
    }
}

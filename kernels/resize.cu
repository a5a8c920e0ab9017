// resize.cu: Pillow's resampling, one pass per launch, byte for byte.
//
//     out = clip_0_255( (2^21 + sum over k < count[i] of weights[i][k] in[first[i] + k]) >> 22 )   int32
//
//     resize_horizontal   in [rows, in_pitch] u8, RGB ─▶ out [rows, out_pitch], pixel i of width_out
//     resize_vertical     in [.., in_pitch] u8        ─▶ out [rows_out, out_pitch], row i
//     first, count [n_out] int32       weights [n_out, taps] int32, 22 bits after the point, made by the host
//
// Who computes what:
//
//     horizontal: a thread has one output pixel in ROWS = 4 neighbouring rows, so that a weight is read once
//                 for 12 products; the 128 threads of a block have neighbouring pixels: windows overlap in L1
//     vertical:   a thread has 4 neighbouring bytes of one output row; a block 512 of them, and one window of
//                 rows for all, so that loads are whole lines and weights are the same for all lanes
//
// Launch contract, checked by the launcher in this order (src/cuda/resize.rs):
//   grid        horizontal: x = ceil(rows / 4), y = ceil(width_out / 128); vertical: x = rows_out,
//               y = ceil(row_bytes / 512); z = 1, block 128, no shared memory; y <= 65535
//   tables      first[i] >= 0, count[i] <= taps, windows within the rows and columns of `in`; `first` of the
//               vertical pass counts rows of `in`, whichever row of the image that starts with
//   alignment   any; the vertical pass moves 4 bytes at a time where in, out and pitches are multiples of 4
//   pitches     bytes, >= the bytes of a row; what lies between is not touched
//   aliasing    none
//
// Numerics: integers that fit into 32 bits (the host's weights sum to 2^22 and are below 2^24), so no order
// changes a byte. Which pass comes first does change bytes: that is the host's choice (src/image/resize.rs).
//
// Source: Pillow, src/libImaging/Resample.c; src/image/resize.rs is the oracle.

#include "numerics.cuh"

namespace {

using u8 = unsigned char;

constexpr int THREADS = 128;
constexpr int ROWS = 4;  // of a thread in the horizontal pass
constexpr int COLOURS = 3;
constexpr int ACROSS = 4;  // bytes of a thread in the vertical pass
constexpr int PRECISION = 22;
constexpr int START = 1 << (PRECISION - 1);  // half a unit of the result

PTX_INLINE u8 clip(int sum) {
    const int value = sum >> PRECISION;
    return static_cast<u8>(value < 0 ? 0 : value > 255 ? 255 : value);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) resize_horizontal(
    u8 *out, const u8 *in, const int *first, const int *count, const int *weights, int taps, int width_out,
    int rows, int in_pitch, int out_pitch) {
    const int x = block_y() * THREADS + thread_x(), row = block_x() * ROWS;
    if (x >= width_out) {
        return;
    }
    const int live = rows - row < ROWS ? rows - row : ROWS, pixels = count[x];
    const int *weight = weights + static_cast<long long>(x) * taps;
    const u8 *from = in + static_cast<long long>(row) * in_pitch + static_cast<long long>(first[x]) * COLOURS;
    int sums[ROWS][COLOURS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int c = 0; c < COLOURS; c++) {
            sums[r][c] = START;
        }
    }
#pragma unroll 2
    for (int k = 0; k < pixels; k++) {
        const int w = weight[k];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r < live) {
                const u8 *pixel = from + static_cast<long long>(r) * in_pitch + k * COLOURS;
#pragma unroll
                for (int c = 0; c < COLOURS; c++) {
                    sums[r][c] += w * pixel[c];
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r < live) {
            u8 *to = out + static_cast<long long>(row + r) * out_pitch + static_cast<long long>(x) * COLOURS;
#pragma unroll
            for (int c = 0; c < COLOURS; c++) {
                to[c] = clip(sums[r][c]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) resize_vertical(
    u8 *out, const u8 *in, const int *first, const int *count, const int *weights, int taps, int row_bytes,
    int rows_out, int in_pitch, int out_pitch) {
    const int y = block_x(), x = (block_y() * THREADS + thread_x()) * ACROSS;
    if (y >= rows_out || x >= row_bytes) {
        return;
    }
    const int window = count[y];
    const int *weight = weights + static_cast<long long>(y) * taps;
    const u8 *from = in + static_cast<long long>(first[y]) * in_pitch + x;
    u8 *to = out + static_cast<long long>(y) * out_pitch + x;
    const unsigned long long places =
        reinterpret_cast<unsigned long long>(in) | reinterpret_cast<unsigned long long>(out);
    const bool aligned = ((places | static_cast<unsigned>(in_pitch | out_pitch)) & 3) == 0;
    const int bytes = row_bytes - x < ACROSS ? row_bytes - x : ACROSS;
    int sums[ACROSS] = {START, START, START, START};
    if (aligned && bytes == ACROSS) {
#pragma unroll 4
        for (int k = 0; k < window; k++) {
            const unsigned samples = *reinterpret_cast<const unsigned *>(from);
            const int w = weight[k];
#pragma unroll
            for (int i = 0; i < ACROSS; i++) {
                sums[i] += w * static_cast<int>(samples >> (8 * i) & 0xff);
            }
            from += in_pitch;
        }
        *reinterpret_cast<unsigned *>(to) = clip(sums[0]) | clip(sums[1]) << 8 | clip(sums[2]) << 16 |
                                            static_cast<unsigned>(clip(sums[3])) << 24;
        return;
    }
    for (int k = 0; k < window; k++) {
        const int w = weight[k];
#pragma unroll
        for (int i = 0; i < ACROSS; i++) {
            if (i < bytes) {
                sums[i] += w * from[i];
            }
        }
        from += in_pitch;
    }
#pragma unroll
    for (int i = 0; i < ACROSS; i++) {
        if (i < bytes) {
            to[i] = clip(sums[i]);
        }
    }
}

// fold.cu: the weights of a layer norm, taken into the linear layer that follows it.
//
//     LN(x) W^T + b = rstd (x (gamma W)^T - mean column_sums) + (b + beta W^T)
//
//     w            [N, pitch]   W becomes gamma W, rounded to fp16: what the linear layer multiplies
//     column_sums  [N]          of that rounded gamma W, over K: with the sums of the exact one a mean far from 0
//                               would not cancel (at 30 deviations that costs 20 times the error)
//     bias32       [N]          b + beta W^T, of W as it was
//     beyond       [1]          counts the elements of gamma W that fp16 does not hold; the caller sets it to 0
//
// A warp has a row: lanes 8 elements each, side by side.
//
// Launch contract, checked by the launcher in this order (src/cuda/fold.rs):
//   grid        x = ceil(N / 4), y = z = 1; block 128; no shared memory
//   sizes       n >= 1, k >= 1 and a multiple of 8; pitch a multiple of 8, >= k
//   alignment   w, gamma, beta 16 bytes
//   dry run     column_sums null: nothing is written but `beyond`
//   aliasing    none
//
// Numerics: products in f32, rounded once; sums in f32, a lane's in order, lanes in a butterfly.
//
// Source: the algebra is that of CUTLASS' example 37 (gemm + layer norm + gemm).

#include "numerics.cuh"

namespace {

constexpr int ROWS = 4;  // of a block
constexpr int THREADS = ROWS * WARP;

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) fold_norm(
    fp16 *w, float *column_sums, float *bias32, const fp16 *gamma, const fp16 *beta, const fp16 *bias,
    unsigned *beyond, int n, int k, int pitch) {
    const int row = block_x() * ROWS + warp();
    const int end = row < n ? k : 0;  // a warp without a row reads nothing, and shuffles along
    fp16 *own = w + static_cast<long long>(row) * pitch;
    float sum = 0.0f, shift = 0.0f, count = 0.0f;
    for (int c = lane() * CHUNK; c < end; c += WARP * CHUNK) {
        float x[CHUNK], g[CHUNK], b[CHUNK];
        unpack(load_16(own + c), x), unpack(load_16(gamma + c), g), unpack(load_16(beta + c), b);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            shift = fma_rn(b[i], x[i], shift);
            x[i] *= g[i];
        }
        const vec16 rounded = pack(x);
        unpack(rounded, x);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            sum += x[i];
            count += (f32_to_bits(x[i]) & 0x7fffffffu) >= 0x7f800000u ? 1.0f : 0.0f;
        }
        if (column_sums != nullptr) {
            store_16(own + c, rounded);
        }
    }
    sum = warp_sum(sum), shift = warp_sum(shift), count = warp_sum(count);
    if (lane() == 0 && row < n) {
        if (column_sums != nullptr) {
            column_sums[row] = sum;
            bias32[row] = fp16_to_f32(bias[row]) + shift;
        }
        if (count > 0.0f) {
            atomic_add_u32(beyond, static_cast<unsigned>(count));
        }
    }
}

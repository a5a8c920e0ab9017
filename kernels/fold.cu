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
// The first `scaled` rows are multiplied by `scale` as well, bias included: 1/8 of the queries' rows, which attention
// then need not. Without gamma there is no norm: W and b [N] are scaled in place, and that is all.
//
// A warp has a row: lanes 8 elements each, side by side.
//
// Launch contract, checked by the launcher in this order (src/cuda/fold.rs):
//   grid        x = ceil(N / 4), y = z = 1; block 128; no shared memory
//   sizes       n >= 1, k >= 1 and a multiple of 8; pitch a multiple of 8, >= k; scaled <= n
//   alignment   w, gamma, beta 16 bytes
//   norm        gamma, beta, column_sums, bias32 are there or null together
//   dry run     nothing is written but `beyond`
//   aliasing    none
//
// Numerics: products in f32, rounded once; sums in f32, a lane's in order, lanes in a butterfly.
//
// Source: the algebra is that of CUTLASS' example 37 (gemm + layer norm + gemm).

#include "numerics.cuh"

namespace {

constexpr int ROWS = 4;  // of a block
constexpr int THREADS = ROWS * WARP;

PTX_INLINE bool is_finite(float x) { return (f32_to_bits(x) & 0x7fffffffu) < 0x7f800000u; }

}  // namespace

struct FoldArgs {
    fp16 *w;             // [N, pitch]
    fp16 *bias;          // [N]
    float *column_sums;  // [N]
    float *bias32;       // [N]
    const fp16 *gamma;   // [K]
    const fp16 *beta;    // [K]
    unsigned *beyond;    // [1]
    int n, k, pitch, scaled;
    float scale;
    int dry;
};
static_assert(sizeof(FoldArgs) == 80, "a layout shared with the host");

extern "C" __global__ void __launch_bounds__(THREADS) fold_norm(const __grid_constant__ FoldArgs args) {
    const int row = block_x() * ROWS + warp();
    const int end = row < args.n ? args.k : 0;  // a warp without a row reads nothing, and shuffles along
    const float scale = row < args.scaled ? args.scale : 1.0f;
    fp16 *own = args.w + static_cast<long long>(row) * args.pitch;
    float sum = 0.0f, shift = 0.0f, count = 0.0f;
    for (int c = lane() * CHUNK; c < end; c += WARP * CHUNK) {
        float x[CHUNK], given[CHUNK];
        unpack(load_16(own + c), given);
        if (args.gamma != nullptr) {
            float g[CHUNK], b[CHUNK];
            unpack(load_16(args.gamma + c), g), unpack(load_16(args.beta + c), b);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                shift = fma_rn(b[i], given[i], shift);
                x[i] = given[i] * g[i] * scale;
            }
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                x[i] = given[i] * scale;
            }
        }
        const vec16 rounded = pack(x);
        unpack(rounded, x);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            sum += x[i];
            count += is_finite(given[i]) && !is_finite(x[i]) ? 1.0f : 0.0f;
        }
        if (args.dry == 0) {
            store_16(own + c, rounded);
        }
    }
    sum = warp_sum(sum), shift = warp_sum(shift), count = warp_sum(count);
    if (lane() != 0 || row >= args.n) {
        return;
    }
    const float bias = fp16_to_f32(args.bias[row]);
    if (args.dry == 0 && args.gamma != nullptr) {
        args.column_sums[row] = sum;
        args.bias32[row] = (bias + shift) * scale;
    } else if (args.dry == 0) {
        args.bias[row] = f32_to_fp16(bias * scale);
    }
    if (count > 0.0f) {
        atomic_add_u32(args.beyond, static_cast<unsigned>(count));
    }
}

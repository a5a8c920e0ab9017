// micro.cu: small kernels, each right or wrong in one way, that the emulated device must run or report.
#include "gemm.cuh"

// ---- right
// --------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(128) micro_copy(float *out, const float *in, int n) {
    const int i = block_x() * block_dim_x() + thread_x();
    if (i < n) {
        out[i] = in[i];
    }
}

// out[i] = in[n - 1 - i] through shared memory, one block.
template <bool BARRIER> PTX_INLINE void reverse(float *out, const float *in, int n) {
    PTX_SMEM(float, tile);
    tile[thread_x()] = in[thread_x()];
    if (BARRIER) {
        block_barrier();
    }
    out[thread_x()] = tile[n - 1 - thread_x()];
}
extern "C" __global__ void micro_reverse(float *out, const float *in, int n) { reverse<true>(out, in, n); }

// The sum of each warp by shuffles; a vote; a look-up in a constant table; an argument by value.
struct SumArgs {
    float *out;
    const float *in;
    int pad;
    double scale;
};
extern "C" __global__ void micro_sum(const __grid_constant__ SumArgs args) {
    constexpr float TABLE[4] = {1.0f, 10.0f, 100.0f, 1000.0f};
    const int i = block_x() * block_dim_x() + thread_x();
    float sum = args.in[i];
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
        sum += shuffle_xor(sum, mask);
    }
    if (warp_any(sum < 0.0f)) {
        sum = -sum;
    }
    args.out[i] = sum * TABLE[block_x() % 4] * static_cast<float>(args.scale);
}

extern "C" __global__ void micro_count(unsigned *count, unsigned long long *least, const float *in, int n) {
    const int i = block_x() * block_dim_x() + thread_x();
    if (i < n && in[i] < 0.0f) {
        atomic_add_u32(count, 1);
        atomic_min_u64(least, static_cast<unsigned long long>(i));
    }
}

extern "C" __global__ void micro_gemm(
    fp16 *d, const fp16 *a, const fp16 *b, int n, int k) {
    gemm<NONE>(d, a, b, n, k);
}

// Neighbouring lanes exchange through shared memory, ordered by the warp's own barrier.
template <bool BARRIER> PTX_INLINE void exchange(float *out, const float *in) {
    PTX_SMEM(float, tile);
    for (int round = 0; round < 3; round++) {
        tile[thread_x()] = in[thread_x()] + static_cast<float>(round);
        if (BARRIER) {
            warp_barrier();
        }
        out[thread_x()] = tile[thread_x() ^ 1];
        if (BARRIER) {
            warp_barrier();
        }
    }
}
extern "C" __global__ void micro_exchange(float *out, const float *in, int n) { exchange<true>(out, in); }

// Through global memory and a barrier, in place, one block: out[i] = out[n - 1 - i] of before.
template <bool BARRIER> PTX_INLINE void reverse_in_place(float *out, const float *in, int n) {
    out[thread_x()] = in[thread_x()];
    block_barrier();
    const float x = out[n - 1 - thread_x()];
    if (BARRIER) {
        block_barrier();
    }
    out[thread_x()] = x;
}
extern "C" __global__ void micro_reverse_in_place(
    float *out, const float *in, int n) {
    reverse_in_place<true>(out, in, n);
}

// ---- wrong: values or races
// ---------------------------------------------------------------------------------

extern "C" __global__ void micro_reverse_no_barrier(
    float *out, const float *in, int n) {
    reverse<false>(out, in, n);
}
extern "C" __global__ void micro_gemm_no_barrier(
    fp16 *d, const fp16 *a, const fp16 *b, int n, int k) {
    gemm<NO_BARRIER>(d, a, b, n, k);
}
extern "C" __global__ void micro_gemm_early_refill(
    fp16 *d, const fp16 *a, const fp16 *b, int n, int k) {
    gemm<EARLY_REFILL>(d, a, b, n, k);
}
extern "C" __global__ void micro_gemm_wait_off(
    fp16 *d, const fp16 *a, const fp16 *b, int n, int k) {
    gemm<WAIT_OFF_BY_ONE>(d, a, b, n, k);
}
extern "C" __global__ void micro_gemm_swizzle(
    fp16 *d, const fp16 *a, const fp16 *b, int n, int k) {
    gemm<WRONG_SWIZZLE>(d, a, b, n, k);
}
extern "C" __global__ void micro_gemm_beyond(
    fp16 *d, const fp16 *a, const fp16 *b, int n, int k) {
    gemm<BEYOND_N>(d, a, b, n, k);
}

extern "C" __global__ void micro_exchange_no_barrier(
    float *out, const float *in, int n) {
    exchange<false>(out, in);
}
extern "C" __global__ void micro_in_place_no_barrier(
    float *out, const float *in, int n) {
    reverse_in_place<false>(out, in, n);
}
// Several warps read what one thread then writes.
extern "C" __global__ void micro_read_and_replaced(float *out, const float *in, int n) {
    PTX_SMEM(float, buffer);
    buffer[thread_x()] = 1.0f;
    block_barrier();
    const float first = buffer[0];
    warp_barrier(); // for one of them
    if (thread_x() == 40) {
        buffer[0] = first + 1.0f;
    }
    if (block_x() == 0) {
        out[thread_x()] = first;
    }
}
// Blocks of one launch: two write the same place; one reads what another writes; one writes what another
// read.
extern "C" __global__ void micro_blocks_write(
    float *out, const float *in, int n) {
    out[thread_x() % n] = in[thread_x()];
}
extern "C" __global__ void micro_blocks_read(float *out, const float *in, int n) {
    const int i = block_x() * 16 + thread_x();
    out[i] = in[i] + (block_x() == 1 && thread_x() == 0 ? out[0] : 0.0f);
}
extern "C" __global__ void micro_blocks_shift(float *out, const float *in, int n) {
    const int i = block_x() * 16 + thread_x();
    const float x = out[i + 1 < n ? i + 1 : i];
    block_barrier();
    out[i] = x + in[i];
}

// ---- wrong: addresses
// ---------------------------------------------------------------------------------------

extern "C" __global__ void micro_copy_beyond(float *out, const float *in, int n) {
    const int i = block_x() * block_dim_x() + thread_x();
    if (i <= n) {  // for <
        out[i] = in[0];
    }
}
extern "C" __global__ void micro_read_before(
    float *out, const float *in, int n) {
    out[thread_x()] = in[thread_x() - 1];
}
extern "C" __global__ void micro_shared_beyond(float *out, const float *in, int n) {
    PTX_SMEM(float, tile);
    tile[thread_x() + 193] = in[thread_x()];
    block_barrier();
    out[thread_x()] = tile[n - 1 - thread_x()];
}
extern "C" __global__ void micro_misaligned_16(
    float *out, const float *in, int n) {
    store_16(out + 4 * thread_x(), load_16(in + 4 * thread_x() + 1));
}
extern "C" __global__ void micro_misaligned_4(
    float *out, const float *in, int n) {
    out[thread_x()] = *reinterpret_cast<const float *>(reinterpret_cast<const char *>(in) + 2);
}
extern "C" __global__ void micro_misaligned_async(float *out, const float *in, int n) {
    PTX_SMEM(float, tile);
    cp_async_16(tile + 4 * thread_x(), in + 4 * thread_x() + 2, true);
    cp_async_commit();
    cp_async_wait<0>();
    out[thread_x()] = tile[thread_x() * 4];
}

extern "C" __global__ void micro_uninitialised(float *out, const float *in, int n) {
    PTX_SMEM(float, tile);
    if (thread_x() != 9) {
        tile[thread_x()] = in[thread_x()];
    }
    block_barrier();
    out[thread_x()] = tile[n - 1 - thread_x()];
}

// ---- wrong: control flow
// ------------------------------------------------------------------------------------

extern "C" __global__ void micro_barrier_in_branch(float *out, const float *in, int n) {
    PTX_SMEM(float, tile);
    tile[thread_x()] = in[thread_x()];
    if (thread_x() < n / 2) {
        block_barrier();
        out[thread_x()] = tile[thread_x()];
    } else {
        out[thread_x()] = 2.0f;
        block_barrier();
    }
}
extern "C" __global__ void micro_early_return(float *out, const float *in, int n) {
    if (thread_x() == n - 3) {
        return;
    }
    block_barrier();
    out[thread_x()] = in[thread_x()];
}
extern "C" __global__ void micro_half_warp(float *out, const float *in, int n) {
    float x = in[thread_x()];
    if (lane() < 16) {
        x += shuffle_xor(x, 8);
    }
    out[thread_x()] = x;
}
extern "C" __global__ void micro_two_ways(float *out, const float *in, int n) {
    float x = in[thread_x()];
    if (lane() < 16) {
        x += shuffle_xor(x, 8);
    } else {
        x += shuffle(x, 3);
    }
    out[thread_x()] = x;
}
extern "C" __global__ void micro_deadlock(float *out, const float *in, int n) {
    float x = in[thread_x()];
    if (warp() == 0) {
        block_barrier();  // warp 1 waits in a barrier of its own, then everyone waits for everyone
    }
    if (lane() != 5) {
        x += shuffle_xor(x, 1);
    } else {
        block_barrier();
    }
    out[thread_x()] = x;
}
extern "C" __global__ void micro_exit_in_flight(float *out, const float *in, int n) {
    PTX_SMEM(float, tile);
    cp_async_16(tile + 4 * thread_x(), in + 4 * thread_x(), true);
    cp_async_commit();
    out[thread_x()] = in[thread_x()];
}

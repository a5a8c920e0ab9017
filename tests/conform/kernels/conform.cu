// conform.cu: every function of kernels/ptx.cuh by itself, its raw results to memory.
//
// tests/conform/conform.py runs these on a GPU, where they say what the hardware does, and on the emulated
// device, which must do the same. One kernel per primitive and one signature for all:
//
//     conform_NAME(out, in, n)     n: elements, cases or threads; tests/conform/primitives.py knows which,
//                                  what `in` holds, the launch, and what `out` must hold
//
// Every kernel is right on any launch of whole warps unless a comment says which one it wants.
#include "ptx.cuh"

namespace {

PTX_INLINE int first() { return block_x() * block_dim_x() + thread_x(); }
PTX_INLINE int all() { return grid_x() * block_dim_x(); }
PTX_INLINE float as_f32(unsigned bits) { return bits_to_f32(bits); }

// f over f32 bits, one, two or three at a time.
template <float (*f)(float)> PTX_INLINE void each(unsigned *out, const unsigned *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[i] = f32_to_bits(f(as_f32(in[i])));
    }
}
template <float (*f)(float, float)> PTX_INLINE void each(unsigned *out, const unsigned *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[i] = f32_to_bits(f(as_f32(in[2 * i]), as_f32(in[2 * i + 1])));
    }
}
template <float (*f)(float, float, float)> PTX_INLINE void each(unsigned *out, const unsigned *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[i] = f32_to_bits(f(as_f32(in[3 * i]), as_f32(in[3 * i + 1]), as_f32(in[3 * i + 2])));
    }
}

} // namespace

// Any grid; out: nine numbers for each thread, blocks in the order x, y, z.
extern "C" __global__ void conform_who(int *out, const unsigned *, int) {
    const int block = (block_z() * grid_y() + block_y()) * grid_x() + block_x();
    int *to = out + (block * block_dim_x() + thread_x()) * 9;
    to[0] = thread_x(), to[1] = block_x(), to[2] = block_y(), to[3] = block_z();
    to[4] = grid_x(), to[5] = grid_y(), to[6] = block_dim_x(), to[7] = lane(), to[8] = warp();
}

// -----------------------------------------------------------------------------------------------------------
// Conversions.

extern "C" __global__ void conform_f32_bits(unsigned *out, const unsigned *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[i] = f32_to_bits(bits_to_f32(in[i]));
    }
}
extern "C" __global__ void conform_fp16_to_f32(unsigned *out, const fp16 *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[i] = f32_to_bits(fp16_to_f32(in[i]));
    }
}
extern "C" __global__ void conform_f32_to_fp16(fp16 *out, const unsigned *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[i] = f32_to_fp16(as_f32(in[i]));
    }
}
extern "C" __global__ void conform_pack_fp16x2(unsigned *out, const unsigned *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[i] = pack_fp16x2(as_f32(in[2 * i]), as_f32(in[2 * i + 1]));
    }
}
extern "C" __global__ void conform_fp16_lo_hi(unsigned *out, const unsigned *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[2 * i] = f32_to_bits(fp16_lo(in[i]));
        out[2 * i + 1] = f32_to_bits(fp16_hi(in[i]));
    }
}
extern "C" __global__ void conform_bf16_to_f32(unsigned *out, const unsigned short *in, int n) {
    for (int i = first(); i < n; i += all()) {
        out[i] = f32_to_bits(bf16_to_f32(in[i]));
    }
}

// -----------------------------------------------------------------------------------------------------------
// Arithmetic.

extern "C" __global__ void conform_exp2_approx(unsigned *out, const unsigned *in, int n) { each<exp2_approx>(out, in, n); }
extern "C" __global__ void conform_rcp_approx(unsigned *out, const unsigned *in, int n) { each<rcp_approx>(out, in, n); }
extern "C" __global__ void conform_rsqrt_approx(unsigned *out, const unsigned *in, int n) { each<rsqrt_approx>(out, in, n); }
extern "C" __global__ void conform_tanh_approx(unsigned *out, const unsigned *in, int n) { each<tanh_approx>(out, in, n); }
extern "C" __global__ void conform_erf_f32(unsigned *out, const unsigned *in, int n) { each<erf_f32>(out, in, n); }
extern "C" __global__ void conform_sqrt_rn(unsigned *out, const unsigned *in, int n) { each<sqrt_rn>(out, in, n); }
extern "C" __global__ void conform_div_rn(unsigned *out, const unsigned *in, int n) { each<div_rn>(out, in, n); }
extern "C" __global__ void conform_max_f32(unsigned *out, const unsigned *in, int n) { each<max_f32>(out, in, n); }
extern "C" __global__ void conform_min_f32(unsigned *out, const unsigned *in, int n) { each<min_f32>(out, in, n); }
extern "C" __global__ void conform_fma_rn(unsigned *out, const unsigned *in, int n) { each<fma_rn>(out, in, n); }

// -----------------------------------------------------------------------------------------------------------
// Memory.

extern "C" __global__ void conform_global_16(vec16 *out, const vec16 *in, int n) {
    for (int i = first(); i < n; i += all()) {
        store_16(out + i, load_16(in + (n - 1 - i)));
    }
}
extern "C" __global__ void conform_global_8(vec8 *out, const vec8 *in, int n) {
    for (int i = first(); i < n; i += all()) {
        store_8(out + i, load_8(in + (n - 1 - i)));
    }
}
extern "C" __global__ void conform_streaming_16(vec16 *out, const vec16 *in, int n) {
    for (int i = first(); i < n; i += all()) {
        store_16(out + i, load_16_streaming(in + (n - 1 - i)));
    }
}
// One block of n threads, 16 n bytes of shared memory; n a power of 2. In by 16 bytes, out by 8, swapped.
extern "C" __global__ void conform_shared_16_8(vec8 *out, const vec16 *in, int n) {
    PTX_SMEM(vec16, tile);
    const int i = thread_x();
    store_16(tile + (i ^ 5), load_16(in + i));
    block_barrier(); // all of the tile is there
    const vec8 *halves = reinterpret_cast<const vec8 *>(tile);
    store_8(out + 2 * i, load_8(halves + (2 * i + 1)));
    store_8(out + 2 * i + 1, load_8(halves + 2 * i));
    block_barrier(); // all halves are read
    vec8 *to = reinterpret_cast<vec8 *>(tile);
    store_8(to + 2 * i, load_8(reinterpret_cast<const vec8 *>(in) + (2 * n - 1 - 2 * i)));
    store_8(to + 2 * i + 1, load_8(reinterpret_cast<const vec8 *>(in) + (2 * n - 2 - 2 * i)));
    const vec16 own = load_16(tile + i);
    store_8(out + 2 * (n + i), vec8{own.x, own.y});
    store_8(out + 2 * (n + i) + 1, vec8{own.z, own.w});
}

// out: 64 cells for everybody, n cells of one thread each, the n old values of those.
extern "C" __global__ void conform_atomic_min_u64(unsigned long long *out, const unsigned long long *in, int n) {
    for (int i = first(); i < n; i += all()) {
        atomic_min_u64(out + i % 64, in[i]);
        out[64 + n + i] = atomic_min_u64(out + 64 + i, in[i]);
    }
}
extern "C" __global__ void conform_atomic_add_u32(unsigned *out, const unsigned *in, int n) {
    for (int i = first(); i < n; i += all()) {
        atomic_add_u32(out + i % 64, in[i]);
        out[64 + n + i] = atomic_add_u32(out + 64 + i, in[i]);
    }
}

// One block of n threads, 4 n bytes of shared memory: distances from its start, which a multiple of 128 is.
extern "C" __global__ void conform_smem_address(unsigned *out, const unsigned *, int n) {
    PTX_SMEM(unsigned, words);
    const unsigned start = smem_address(words);
    out[thread_x()] = smem_address(words + thread_x()) - start;
    if (thread_x() == 0) {
        out[n] = start % 128;
    }
}

// -----------------------------------------------------------------------------------------------------------
// cp.async. One block of n threads.

// 16 n bytes of shared memory. in: n chunks, then n words. Chunk i lands at place i ^ 3, or zeros if its word is 0.
extern "C" __global__ void conform_cp_async_16(vec16 *out, const vec16 *in, int n) {
    PTX_SMEM(vec16, tile);
    const int i = thread_x();
    const int *copied = reinterpret_cast<const int *>(in + n);
    cp_async_16(tile + (i ^ 3), in + i, copied[i] != 0);
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier(); // everybody's chunks are there
    store_16(out + i, load_16(tile + i));
}

// 80 n bytes of shared memory. Five chunks a thread in groups of 1, 2, none and 1; one more after the first wait.
extern "C" __global__ void conform_cp_async_groups(vec16 *out, const vec16 *in, int n) {
    PTX_SMEM(vec16, tile);
    const int i = thread_x();
    const auto issue = [&](int place) { cp_async_16(tile + (place * n + i), in + (place * n + i), true); };
    const auto keep = [&](int place) { store_16(out + (place * n + i), load_16(tile + (place * n + i))); };
    issue(0);
    cp_async_commit();
    issue(1);
    issue(2);
    cp_async_commit();
    cp_async_commit();
    issue(3);
    cp_async_commit();
    cp_async_wait<2>();
    keep(0);
    keep(1);
    keep(2);
    issue(4);
    cp_async_commit();
    cp_async_wait<1>();
    keep(3);
    cp_async_wait<0>();
    keep(4);
}

// -----------------------------------------------------------------------------------------------------------
// Warp and block.

// One block of n threads, 8 n bytes of shared memory, n >= 64. Sixteen rounds of passing values on, two buffers.
extern "C" __global__ void conform_block_barrier(unsigned *out, const unsigned *in, int n) {
    PTX_SMEM(unsigned, words);
    unsigned value = in[thread_x()];
    for (int round = 0; round < 16; round++) {
        unsigned *buffer = words + round % 2 * n;
        buffer[thread_x()] = value;
        block_barrier(); // the buffer is whole, and all have read the other one
        value = buffer[(thread_x() + 37) % n] * 3 + static_cast<unsigned>(round);
    }
    out[thread_x()] = value;
}
// The same within each warp.
extern "C" __global__ void conform_warp_barrier(unsigned *out, const unsigned *in, int n) {
    PTX_SMEM(unsigned, words);
    unsigned value = in[thread_x()];
    for (int round = 0; round < 16; round++) {
        unsigned *buffer = words + round % 2 * n + warp() * WARP;
        buffer[lane()] = value;
        warp_barrier(); // as above
        value = buffer[(lane() + 5) % WARP] * 3 + static_cast<unsigned>(round);
    }
    out[thread_x()] = value;
}

// One warp, 32 words in; out: [3][32 masks][32 lanes], as unsigned, int and float.
extern "C" __global__ void conform_shuffle_xor(unsigned *out, const unsigned *in, int) {
    const unsigned value = in[lane()];
    for (int mask = 0; mask < WARP; mask++) {
        unsigned *to = out + mask * WARP + lane();
        to[0] = shuffle_xor(value, mask);
        to[WARP * WARP] = static_cast<unsigned>(shuffle_xor(static_cast<int>(value), mask));
        to[2 * WARP * WARP] = f32_to_bits(shuffle_xor(as_f32(value), mask));
    }
}
// The same; lane l takes from lane (l k + k) % 32, for k = 0..32.
extern "C" __global__ void conform_shuffle(unsigned *out, const unsigned *in, int) {
    const unsigned value = in[lane()];
    for (int k = 0; k < WARP; k++) {
        const int from = (lane() * k + k) % WARP;
        unsigned *to = out + k * WARP + lane();
        to[0] = shuffle(value, from);
        to[WARP * WARP] = static_cast<unsigned>(shuffle(static_cast<int>(value), from));
        to[2 * WARP * WARP] = f32_to_bits(shuffle(as_f32(value), from));
    }
}
// One warp, n votes; out: [n][32 lanes] of the ballot, then of the answer to warp_any.
extern "C" __global__ void conform_ballot(unsigned *out, const unsigned *in, int n) {
    for (int vote = 0; vote < n; vote++) {
        const bool yes = in[vote * WARP + lane()] != 0;
        out[vote * WARP + lane()] = warp_ballot(yes);
        out[(n + vote) * WARP + lane()] = warp_any(yes) ? 1 : 0;
    }
}

// -----------------------------------------------------------------------------------------------------------
// Tensor cores.

// One warp, 1024 bytes of shared memory. in: 64 rows of 16 bytes, then for each case the row each lane names;
// out: [n][32 lanes][4].
template <bool TRANS> PTX_INLINE void load_matrices(vec16 *out, const vec16 *in, int n) {
    PTX_SMEM(vec16, rows);
    store_16(rows + lane(), load_16(in + lane()));
    store_16(rows + WARP + lane(), load_16(in + WARP + lane()));
    warp_barrier(); // the rows are there
    const int *which = reinterpret_cast<const int *>(in + 2 * WARP);
    for (int i = 0; i < n; i++) {
        unsigned r[4];
        if (TRANS) {
            ldmatrix_x4_trans(r, rows + which[i * WARP + lane()]);
        } else {
            ldmatrix_x4(r, rows + which[i * WARP + lane()]);
        }
        store_16(out + (i * WARP + lane()), vec16{r[0], r[1], r[2], r[3]});
    }
}
extern "C" __global__ void conform_ldmatrix_x4(vec16 *out, const vec16 *in, int n) { load_matrices<false>(out, in, n); }
extern "C" __global__ void conform_ldmatrix_x4_trans(vec16 *out, const vec16 *in, int n) { load_matrices<true>(out, in, n); }

// Warps take cases in turn. in: [n][10][32 lanes], registers a 0..4, b 0..2, d 0..4; out: [n][4][32 lanes].
extern "C" __global__ void conform_mma_16816(unsigned *out, const unsigned *in, int n) {
    for (int i = first() / WARP; i < n; i += all() / WARP) {
        const unsigned *from = in + i * 10 * WARP + lane();
        unsigned a[4], b[2];
        float d[4];
        for (int j = 0; j < 4; j++) {
            a[j] = from[j * WARP];
            d[j] = as_f32(from[(6 + j) * WARP]);
        }
        b[0] = from[4 * WARP];
        b[1] = from[5 * WARP];
        mma_16816(d, a, b);
        for (int j = 0; j < 4; j++) {
            out[(i * 4 + j) * WARP + lane()] = f32_to_bits(d[j]);
        }
    }
}

// -----------------------------------------------------------------------------------------------------------
// The ways of the layers: cp.async into swizzled rows, ldmatrix out of them. One block of 128 threads. out: for
// each step of 16 columns or rows, each warp, each lane, four registers.

// linear_sm80: a stage of 128 rows of 64 bytes, 8192 bytes; chunk c of row r at place c ^ (r / 2 % 4). Warp w reads
// rows 32 w .. 32 w + 16 as an A and the next 16 as a W; the second half of the columns by an xor.
extern "C" __global__ void conform_swizzle_64(vec16 *out, const vec16 *in, int) {
    PTX_SMEM(unsigned char, stage);
    const int row = thread_x() / 4, chunk = thread_x() % 4;
    unsigned char *to = stage + row * 64 + (chunk ^ (row / 2 % 4)) * 16;
    for (int i = 0; i < 4; i++) {
        cp_async_16(to + i * 32 * 64, in + (row + i * 32) * 4 + chunk, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier(); // the stage is whole
    const int a_row = warp() * 32 + lane() % 16, a_chunk = lane() / 16;
    const int b_row = warp() * 32 + 16 + lane() / 16 * 8 + lane() % 8, b_chunk = lane() / 8 % 2;
    const int a_at = a_row * 64 + (a_chunk ^ (a_row / 2 % 4)) * 16;
    const int b_at = b_row * 64 + (b_chunk ^ (b_row / 2 % 4)) * 16;
    for (int half = 0; half < 2; half++) {
        unsigned a[4], b[4];
        ldmatrix_x4(a, stage + (a_at ^ (half * 32)));
        ldmatrix_x4(b, stage + (b_at ^ (half * 32)));
        store_16(out + (half * 2 * 128 + thread_x()), vec16{a[0], a[1], a[2], a[3]});
        store_16(out + ((half * 2 + 1) * 128 + thread_x()), vec16{b[0], b[1], b[2], b[3]});
    }
}

// attention_sm80: 64 rows of 128 bytes, 8192 bytes; chunk c of row r at place c ^ (r % 8). Warp w reads rows
// 16 w .. 16 w + 16, as Q, as K and, transposed, as V.
extern "C" __global__ void conform_swizzle_128(vec16 *out, const vec16 *in, int) {
    PTX_SMEM(unsigned char, stage);
    const auto place = [](int row, int chunk) { return row * 128 + (chunk ^ (row % 8)) * 16; };
    const int row = thread_x() / 8, chunk = thread_x() % 8;
    for (int i = 0; i < 64; i += 16) {
        cp_async_16(stage + place(row, chunk) + i * 128, in + (row + i) * 8 + chunk, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier(); // the stage is whole
    const unsigned char *own = stage + warp() * 16 * 128;
    const int q_at = place(lane() % 16, lane() / 16);
    const int k_at = place(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
    for (int d = 0; d < 4; d++) {
        unsigned q[4], k[4], v[4];
        ldmatrix_x4(q, own + (q_at ^ (d * 32)));
        ldmatrix_x4(k, own + (k_at ^ (d * 32)));
        ldmatrix_x4_trans(v, own + (q_at ^ (d * 32)));
        store_16(out + (d * 3 * 128 + thread_x()), vec16{q[0], q[1], q[2], q[3]});
        store_16(out + ((d * 3 + 1) * 128 + thread_x()), vec16{k[0], k[1], k[2], k[3]});
        store_16(out + ((d * 3 + 2) * 128 + thread_x()), vec16{v[0], v[1], v[2], v[3]});
    }
}

// D[16, 16] = A[16, 16] B[16, 16], one warp, 1024 bytes of shared memory: A's rows, then B's, through ldmatrix and
// mma to D[row][column]. Small integers, so every order of the sum gives the same.
extern "C" __global__ void conform_product(unsigned *out, const vec16 *in, int) {
    PTX_SMEM(vec16, rows);
    store_16(rows + lane(), load_16(in + lane()));
    store_16(rows + WARP + lane(), load_16(in + WARP + lane()));
    warp_barrier(); // both are there
    unsigned a[4], b[4];
    ldmatrix_x4(a, rows + lane() % 16 * 2 + lane() / 16);
    ldmatrix_x4_trans(b, rows + WARP + lane() % 16 * 2 + lane() / 16);
    for (int half = 0; half < 2; half++) {
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_16816(d, a, {b[2 * half], b[2 * half + 1]});
        for (int j = 0; j < 4; j++) {
            out[(lane() / 4 + j / 2 * 8) * 16 + half * 8 + lane() % 4 * 2 + j % 2] = f32_to_bits(d[j]);
        }
    }
}

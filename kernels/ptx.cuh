// ptx.cuh: every instruction of the machine that the kernels name themselves, one to a function.
//
// Kernels are compiled twice from the same text:
//
//     nvcc ──▶ device bodies below: one PTX instruction in inline asm     ──▶ a GPU
//     g++  ──▶ host bodies below: a call into emu:: (tests/emu/emu.h)     ──▶ the emulated device of the tests
//
// This file is the only one that knows that. A kernel includes it (and our other .cuh files), and nothing
// else: no cuda_fp16.h, no asm, no __CUDA_ARCH__, no __shared__ arrays, no C++ atomics. Plain loads and
// stores through ordinary pointers are ordinary C++ on both sides; the emulated device sees them through
// compiler hooks.
//
// Manners shared by all functions here:
//   * A collective (shuffle, ballot, ldmatrix, mma, *_barrier) is reached by all 32 lanes of the warp
//     (block_barrier: by all threads of the block), from the same line. Lanes that left early are a fault.
//   * fp16 is a bag of 16 bits. Arithmetic happens in f32, rounding is named where it happens.
//   * Addresses of 16-byte accesses are multiples of 16; of 8-byte accesses multiples of 8.
//
// What only one architecture has is in a file of its own: ptx_sm90.cuh.
#pragma once

#if defined(__CUDACC__)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "these kernels need cp.async and mma.m16n8k16: compile for sm_80 or later"
#endif

#define PTX_INLINE __device__ __forceinline__

// Declares `type *name`: the block's dynamic shared memory, 128-byte aligned. Its size is the launch's.
extern __shared__ __align__(128) unsigned char ptx_smem_raw[];
#define PTX_SMEM(type, name) type *name = reinterpret_cast<type *>(ptx_smem_raw)

#else // ---- g++: the emulated device ----

#include "../tests/emu/emu.h"

#define __global__ __attribute__((noinline))
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define PTX_INLINE inline __attribute__((always_inline))
#define PTX_SMEM(type, name) type *name = reinterpret_cast<type *>(emu::shared_memory())

#endif

constexpr int WARP = 32;            // lanes
constexpr unsigned ALL_LANES = ~0u; // the mask of a whole warp

struct fp16 {
    unsigned short bits;
};
struct alignas(8) vec8 {
    unsigned int x, y;
};
struct alignas(16) vec16 {
    unsigned int x, y, z, w;
};
static_assert(sizeof(fp16) == 2 && sizeof(vec8) == 8 && sizeof(vec16) == 16, "layouts shared with the host");

// -----------------------------------------------------------------------------------------------------------
// Who am I. All values are int: grids and blocks of this project stay below 2^31.

#if defined(__CUDACC__)
PTX_INLINE int thread_x() { return static_cast<int>(threadIdx.x); }
PTX_INLINE int block_x() { return static_cast<int>(blockIdx.x); }
PTX_INLINE int block_y() { return static_cast<int>(blockIdx.y); }
PTX_INLINE int block_z() { return static_cast<int>(blockIdx.z); }
PTX_INLINE int grid_x() { return static_cast<int>(gridDim.x); }
PTX_INLINE int grid_y() { return static_cast<int>(gridDim.y); }
PTX_INLINE int block_dim_x() { return static_cast<int>(blockDim.x); }
#else
PTX_INLINE int thread_x() { return emu::thread_x(); }
PTX_INLINE int block_x() { return emu::block_x(); }
PTX_INLINE int block_y() { return emu::block_y(); }
PTX_INLINE int block_z() { return emu::block_z(); }
PTX_INLINE int grid_x() { return emu::grid_x(); }
PTX_INLINE int grid_y() { return emu::grid_y(); }
PTX_INLINE int block_dim_x() { return emu::block_dim_x(); }
#endif
PTX_INLINE int lane() { return thread_x() & (WARP - 1); }
PTX_INLINE int warp() { return thread_x() / WARP; }

// -----------------------------------------------------------------------------------------------------------
// Bits.

PTX_INLINE float bits_to_f32(unsigned bits) {
#if defined(__CUDACC__)
    return __uint_as_float(bits);
#else
    return __builtin_bit_cast(float, bits);
#endif
}
PTX_INLINE unsigned f32_to_bits(float value) {
#if defined(__CUDACC__)
    return __float_as_uint(value);
#else
    return __builtin_bit_cast(unsigned, value);
#endif
}

// fp16 -> f32: exact.
PTX_INLINE float fp16_to_f32(fp16 h) {
#if defined(__CUDACC__)
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
    return f;
#else
    return emu::half_to_float(h.bits);
#endif
}

// f32 -> fp16: to nearest, ties to even; overflow becomes infinity.
PTX_INLINE fp16 f32_to_fp16(float f) {
    fp16 h;
#if defined(__CUDACC__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
#else
    h.bits = emu::float_to_half(f);
#endif
    return h;
}

// Two f32 -> two fp16 in one register: `lo` in bits 0..16 (the lower address), `hi` in bits 16..32.
PTX_INLINE unsigned pack_fp16x2(float lo, float hi) {
#if defined(__CUDACC__)
    unsigned packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
    return packed;
#else
    return emu::float_to_half(lo) | static_cast<unsigned>(emu::float_to_half(hi)) << 16;
#endif
}
PTX_INLINE float fp16_lo(unsigned packed) {
    return fp16_to_f32(fp16{static_cast<unsigned short>(packed & 0xffffu)});
}
PTX_INLINE float fp16_hi(unsigned packed) {
    return fp16_to_f32(fp16{static_cast<unsigned short>(packed >> 16)});
}

// bf16 is the upper half of an f32: exact.
PTX_INLINE float bf16_to_f32(unsigned short bits) { return bits_to_f32(static_cast<unsigned>(bits) << 16); }

// -----------------------------------------------------------------------------------------------------------
// Arithmetic whose rounding matters. `*_approx` has the error that the PTX manual states; the emulated device
// answers with some value inside that error (always the same one for the same input).

#if defined(__CUDACC__)
#define PTX_UNARY(name, instruction)                    \
    PTX_INLINE float name(float x) {                    \
        float y;                                        \
        asm(instruction " %0, %1;" : "=f"(y) : "f"(x)); \
        return y;                                       \
    }
#else
#define PTX_UNARY(name, instruction) \
    PTX_INLINE float name(float x) { return emu::name(x); }
#endif
PTX_UNARY(exp2_approx, "ex2.approx.ftz.f32")    // 2^x, 2^-22 relative; subnormals flushed
PTX_UNARY(rcp_approx, "rcp.approx.ftz.f32")     // 1/x, 1 ulp; subnormals flushed
PTX_UNARY(rsqrt_approx, "rsqrt.approx.ftz.f32") // 1/sqrt(x), 2^-22.9 relative; subnormals flushed
PTX_UNARY(tanh_approx, "tanh.approx.f32")       // 2^-11 relative: too coarse for 1 ulp of fp16
PTX_UNARY(sqrt_rn, "sqrt.rn.f32")               // correctly rounded
#undef PTX_UNARY

PTX_INLINE float fma_rn(float a, float b, float c) {
#if defined(__CUDACC__)
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
#else
    return __builtin_fmaf(a, b, c);
#endif
}
PTX_INLINE float div_rn(float a, float b) {
#if defined(__CUDACC__)
    float d;
    asm("div.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
#else
    return a / b;
#endif
}
// The larger (smaller) of two, +0 above -0; if one is NaN, the other.
PTX_INLINE float max_f32(float a, float b) {
#if defined(__CUDACC__)
    float d;
    asm("max.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
#else
    return emu::larger(a, b);
#endif
}
PTX_INLINE float min_f32(float a, float b) {
#if defined(__CUDACC__)
    float d;
    asm("min.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
#else
    return -emu::larger(-a, -b);
#endif
}
// erf(x), the libraries' own: 2 ulp on the device.
PTX_INLINE float erf_f32(float x) {
#if defined(__CUDACC__)
    return erff(x);
#else
    return emu::erf_f32(x);
#endif
}

// -----------------------------------------------------------------------------------------------------------
// Memory: 16 and 8 bytes at once, aligned. Shared or global; the compiler finds out which.

PTX_INLINE vec16 load_16(const void *from) {
#if defined(__CUDACC__)
    const uint4 v = *static_cast<const uint4 *>(from);
    return vec16{v.x, v.y, v.z, v.w};
#else
    vec16 v;
    emu::load(&v, from, 16);
    return v;
#endif
}
PTX_INLINE void store_16(void *to, vec16 v) {
#if defined(__CUDACC__)
    *static_cast<uint4 *>(to) = make_uint4(v.x, v.y, v.z, v.w);
#else
    emu::store(to, &v, 16);
#endif
}
PTX_INLINE vec8 load_8(const void *from) {
#if defined(__CUDACC__)
    const uint2 v = *static_cast<const uint2 *>(from);
    return vec8{v.x, v.y};
#else
    vec8 v;
    emu::load(&v, from, 8);
    return v;
#endif
}
PTX_INLINE void store_8(void *to, vec8 v) {
#if defined(__CUDACC__)
    *static_cast<uint2 *>(to) = make_uint2(v.x, v.y);
#else
    emu::store(to, &v, 8);
#endif
}
// Global memory that nobody writes during this launch, and that is read once: not kept in L1.
PTX_INLINE vec16 load_16_streaming(const void *from) {
#if defined(__CUDACC__)
    vec16 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(__cvta_generic_to_global(from)));
    return v;
#else
    vec16 v;
    emu::load_constant(&v, from, 16);
    return v;
#endif
}

// Global memory, relaxed, device scope. Both return the old value.
PTX_INLINE unsigned long long atomic_min_u64(unsigned long long *at, unsigned long long value) {
#if defined(__CUDACC__)
    unsigned long long old;
    asm volatile("atom.global.min.u64 %0, [%1], %2;"
                 : "=l"(old)
                 : "l"(__cvta_generic_to_global(at)), "l"(value)
                 : "memory");
    return old;
#else
    return emu::atomic_min_u64(at, value);
#endif
}
PTX_INLINE unsigned atomic_add_u32(unsigned *at, unsigned value) {
#if defined(__CUDACC__)
    unsigned old;
    asm volatile("atom.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(__cvta_generic_to_global(at)), "r"(value)
                 : "memory");
    return old;
#else
    return emu::atomic_add_u32(at, value);
#endif
}

// The address of shared memory as the instructions below want it: 32 bits, from the start of the window.
PTX_INLINE unsigned smem_address(const void *in_shared) {
#if defined(__CUDACC__)
    return static_cast<unsigned>(__cvta_generic_to_shared(in_shared));
#else
    return emu::shared_address(in_shared);
#endif
}

// -----------------------------------------------------------------------------------------------------------
// cp.async: global -> shared past the registers. The life of one copy, seen by the thread that issued it:
//
//     cp_async_16   the destination is undefined from here on, the source must stay as it is
//     cp_async_commit   all copies issued since the last commit become one group
//     cp_async_wait<N>  all but the newest N groups have landed, for THIS thread; others need a barrier after it

// 16 bytes from `from`, or zeros: then `from` may be any 16-byte aligned address. Bypasses L1.
//
// No sizes in between, though the PTX manual has them: what ptxas 13.0 makes for sm_80 to sm_120 has a predicate and
// no size, so that 1..=15 copy, and read, all 16.
PTX_INLINE void cp_async_16(void *to_shared, const void *from, bool copy) {
#if defined(__CUDACC__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(smem_address(to_shared)), "l"(__cvta_generic_to_global(from)), "r"(copy ? 16 : 0)
                 : "memory");
#else
    emu::cp_async_16(to_shared, from, copy);
#endif
}
PTX_INLINE void cp_async_commit() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emu::cp_async_commit();
#endif
}
template <int N> PTX_INLINE void cp_async_wait() {
    static_assert(N >= 0, "a number of groups that may still be in flight");
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    emu::cp_async_wait(N);
#endif
}

// -----------------------------------------------------------------------------------------------------------
// Warp and block.

// __syncthreads: all threads of the block arrive; what each wrote before is seen by all after.
PTX_INLINE void block_barrier() {
#if defined(__CUDACC__)
    asm volatile("bar.sync 0;" ::: "memory");
#else
    emu::block_barrier();
#endif
}
// __syncwarp: the same for the 32 lanes of the warp.
PTX_INLINE void warp_barrier() {
#if defined(__CUDACC__)
    asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
#else
    emu::warp_barrier();
#endif
}

PTX_INLINE unsigned shuffle_xor(unsigned value, int lane_mask) {
#if defined(__CUDACC__)
    unsigned got;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(got) : "r"(value), "r"(lane_mask));
    return got;
#else
    return emu::shuffle_xor(value, lane_mask);
#endif
}
PTX_INLINE unsigned shuffle(unsigned value, int from_lane) {
#if defined(__CUDACC__)
    unsigned got;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(got) : "r"(value), "r"(from_lane));
    return got;
#else
    return emu::shuffle(value, from_lane);
#endif
}
PTX_INLINE int shuffle_xor(int value, int lane_mask) {
    return static_cast<int>(shuffle_xor(static_cast<unsigned>(value), lane_mask));
}
PTX_INLINE float shuffle_xor(float value, int lane_mask) {
    return bits_to_f32(shuffle_xor(f32_to_bits(value), lane_mask));
}
PTX_INLINE int shuffle(int value, int from_lane) {
    return static_cast<int>(shuffle(static_cast<unsigned>(value), from_lane));
}
PTX_INLINE float shuffle(float value, int from_lane) {
    return bits_to_f32(shuffle(f32_to_bits(value), from_lane));
}

// Bit i: did lane i say yes.
PTX_INLINE unsigned warp_ballot(bool yes) {
#if defined(__CUDACC__)
    unsigned votes;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }"
                 : "=r"(votes)
                 : "r"(static_cast<unsigned>(yes)));
    return votes;
#else
    return emu::ballot(yes);
#endif
}
PTX_INLINE bool warp_any(bool yes) { return warp_ballot(yes) != 0; }

// -----------------------------------------------------------------------------------------------------------
// Tensor cores. Fragment maps, g = lane / 4, t = lane % 4; each register holds two fp16, lower column first:
//
//     ldmatrix_x4: four 8x8 matrices of 16-byte rows. Lane i passes the address of row i % 8 of matrix i / 8.
//                  r[j] of a lane = matrix j, row g, columns 2t, 2t+1 (trans: rows 2t, 2t+1 of column g).
//
//     mma_16816:   D[16x8] += A[16x16] . B[16x8], fp16 in, f32 sums.
//                  a[0] A[g][2t..]   a[1] A[g+8][2t..]   a[2] A[g][2t+8..]   a[3] A[g+8][2t+8..]
//                  b[0] B[2t..][g]   b[1] B[2t+8..][g]          (two rows of one column)
//                  d[0..2] D[g][2t..]                    d[2..4] D[g+8][2t..]

PTX_INLINE void ldmatrix_x4(unsigned (&r)[4], const void *row_in_shared) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address(row_in_shared))
                 : "memory");
#else
    const emu::Quad q = emu::ldmatrix_x4(row_in_shared);
    r[0] = q.r0, r[1] = q.r1, r[2] = q.r2, r[3] = q.r3;
#endif
}
PTX_INLINE void ldmatrix_x4_trans(unsigned (&r)[4], const void *row_in_shared) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address(row_in_shared))
                 : "memory");
#else
    const emu::Quad q = emu::ldmatrix_x4_trans(row_in_shared);
    r[0] = q.r0, r[1] = q.r1, r[2] = q.r2, r[3] = q.r3;
#endif
}

PTX_INLINE void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(__CUDACC__)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    const emu::FloatQuad q = emu::mma_16816({d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, b[0], b[1]);
    d[0] = q.f0, d[1] = q.f1, d[2] = q.f2, d[3] = q.f3;
#endif
}

// emu.h: the emulated device as a kernel sees it, through kernels/ptx.cuh and nothing else.
//
// Everything here is a plain call that the engine (engine.cpp, warp.cpp) answers for the CUDA thread that is
// running now. Small values travel by value, so that fragments stay in registers and the memory hooks
// (hooks.cpp) see only what the kernel really loads and stores. The calls are never inlined: their return
// address is the line that a report names.
#pragma once

namespace emu {

struct Quad {
    unsigned r0, r1, r2, r3;
};
struct FloatQuad {
    float f0, f1, f2, f3;
};

// Constant for the life of a CUDA thread, so the compiler may call them once.
__attribute__((const)) int thread_x();
__attribute__((const)) int block_x();
__attribute__((const)) int block_y();
__attribute__((const)) int block_z();
__attribute__((const)) int grid_x();
__attribute__((const)) int grid_y();
__attribute__((const)) int block_dim_x();
__attribute__((const)) unsigned char *shared_memory();

unsigned shared_address(const void *in_shared);

__attribute__((const)) float exp2_approx(float x);
__attribute__((const)) float rcp_approx(float x);
__attribute__((const)) float rsqrt_approx(float x);
__attribute__((const)) float tanh_approx(float x);
__attribute__((const)) float sqrt_rn(float x);
__attribute__((const)) float erf_f32(float x);

// `bytes` in one access; the address is a multiple of it. load_constant: global memory that this launch never
// writes.
void load(void *to_registers, const void *from, int bytes);
void store(void *to, const void *from_registers, int bytes);
void load_constant(void *to_registers, const void *from, int bytes);

unsigned long long atomic_min_u64(unsigned long long *at, unsigned long long value);
unsigned atomic_add_u32(unsigned *at, unsigned value);

void cp_async_16(void *to_shared, const void *from, bool copy);
void cp_async_commit();
void cp_async_wait(int groups_left);

void block_barrier();
void warp_barrier();
unsigned shuffle_xor(unsigned value, int lane_mask);
unsigned shuffle(unsigned value, int from_lane);
unsigned ballot(bool yes);
Quad ldmatrix_x4(const void *row_in_shared);
Quad ldmatrix_x4_trans(const void *row_in_shared);
FloatQuad mma_16816(FloatQuad d, Quad a, unsigned b0, unsigned b1);

// Hopper's (kernels/ptx_sm90.cuh, async.h).
void mbarrier_init(void *at, int arrivals);
void mbarrier_invalidate(void *at);
void fence_mbarrier_init();
void mbarrier_arrive(void *at, int bytes);
void mbarrier_wait(void *at, int parity);
void fence_proxy_async();
void tma_prefetch(const void *map);
void tma_load_2d(void *to_shared, const void *map, int x, int y, void *mbarrier);
void tma_load_3d(void *to_shared, const void *map, int x, int y, int z, void *mbarrier);
__attribute__((const)) int cluster_rank(); // clusters: cluster.cpp
void cluster_barrier();
void mbarrier_arrive_cluster(void *at, int rank);
void mbarrier_wait_cluster(void *at, int parity);
void tma_load_2d_multicast(void *to_shared, const void *map, int x, int y, void *mbarrier, unsigned mask);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left, float *d);
void wgmma_ss(float *d, unsigned long long a, unsigned long long b, int n, bool b_n_major, bool add);
void wgmma_rs(float *d, Quad a, unsigned long long b, int n, bool b_n_major, bool add);
void set_registers(int count, bool more);
void named_barrier(int id, int threads, bool waits);
void grid_wait();
void grid_launch_dependents();

// fp16 -> f32, exact: subnormals by renormalising through a float multiply.
inline __attribute__((always_inline)) float half_to_float(unsigned short half) {
    const unsigned sign = (half & 0x8000u) << 16;
    const unsigned magnitude = half & 0x7fffu;
    // Place the fields in an f32 whose exponent is 112 too small, then scale by 2^112.
    const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
    const unsigned bits = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude & 0x3ffu) << 13
                                               : __builtin_bit_cast(unsigned, scaled);
    return __builtin_bit_cast(float, bits | sign);
}

// The larger, +0 above -0; if one is NaN, the other. Without a branch: the compiler would have a collective after it
// twice, once for each way, and lanes would seem to be in different ones.
inline __attribute__((always_inline)) float larger(float a, float b) {
    const unsigned bits_a = __builtin_bit_cast(unsigned, a), bits_b = __builtin_bit_cast(unsigned, b);
    const unsigned b_wins =
        static_cast<unsigned>(a < b) | static_cast<unsigned>(a != a) | (static_cast<unsigned>(a == b) & bits_a >> 31);
    return __builtin_bit_cast(float, b_wins != 0 ? bits_b : bits_a);
}

// f32 -> fp16, to nearest, ties to even. A NaN becomes the quiet 0x7fff, as on the device.
inline __attribute__((always_inline)) unsigned short float_to_half(float value) {
    const unsigned bits = __builtin_bit_cast(unsigned, value);
    const unsigned sign = bits >> 16 & 0x8000u;
    const unsigned magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return 0x7fff;
    }
    if (magnitude >= 0x477ff000u) { // 65520 and more round to infinity
        return static_cast<unsigned short>(sign | 0x7c00u);
    }
    unsigned half;
    if (magnitude < 0x38800000u) { // below 2^-14: adding 0.5 makes the f32 adder round at 2^-24
        const float rounded = __builtin_bit_cast(float, magnitude) + 0.5f;
        half = __builtin_bit_cast(unsigned, rounded) - 0x3f000000u;
    } else {
        const unsigned odd = magnitude >> 13 & 1u;
        half = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
    }
    return static_cast<unsigned short>(sign | half);
}

} // namespace emu

// ptx_sm90.cuh: the instructions that only Hopper has, one to a function, as in ptx.cuh.
//
// For files compiled for sm_90a and nothing else. tests/emu/async.h says what the emulated device holds against kernels.
// The life of one stage of a ring between a producer and its consumers:
//
//     producer   mbarrier_wait(empty)     the consumers are done with the stage
//                mbarrier_arrive_expect   so many bytes belong to this phase of `full`
//                tma_load_2d ..           each counts its bytes down when they are there
//     consumer   mbarrier_wait(full)      all bytes of the phase have come
//                wgmma_fence              the registers of sums are as they should be
//                wgmma_ss ..              four steps of 16 along K
//                wgmma_commit, wgmma_wait done reading: only now
//                mbarrier_arrive(empty)
//
// In a cluster of blocks a producer may send its tile to all of them; then `empty` counts the consumers of all: see
// "Clusters" below.
//
// wgmma_* and set_registers_* are reached by all warps of a warp group (128 threads from a multiple of 128) in the same
// order; sums are touched by nothing between wgmma_* and its wgmma_wait, and every group begins with a wgmma_fence.
#pragma once

#include "ptx.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma and setmaxnreg exist on sm_90a alone: compile this file for it and for nothing else"
#endif

constexpr int WARP_GROUP = 128; // threads

// What cuTensorMapEncodeTiled writes. A kernel takes it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};
// A phase, its arrivals and its bytes; lives in shared memory and is touched by the functions below alone.
struct alignas(8) Mbarrier {
    unsigned long long opaque;
};
static_assert(sizeof(TensorMap) == 128 && sizeof(Mbarrier) == 8, "layouts of the driver and of PTX");

// The first 1024-byte boundary of shared memory at or after `at`: tiles of the 128-byte swizzle begin at one.
PTX_INLINE unsigned char *align_1024(unsigned char *at) { return at + (0u - smem_address(at)) % 1024u; }

// -----------------------------------------------------------------------------------------------------------
// mbarrier. A phase ends when `arrivals` threads have come and no expected byte is missing.

// By one thread; then fence_mbarrier_init and a block_barrier before anyone else uses it.
PTX_INLINE void mbarrier_init(Mbarrier *at, int arrivals) {
#if defined(__CUDACC__)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(at)), "r"(arrivals) : "memory");
#else
    emu::mbarrier_init(at, arrivals);
#endif
}
// The bytes are plain memory again.
PTX_INLINE void mbarrier_invalidate(Mbarrier *at) {
#if defined(__CUDACC__)
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(smem_address(at)) : "memory");
#else
    emu::mbarrier_invalidate(at);
#endif
}
// What this thread initialised is seen by bulk copies.
PTX_INLINE void fence_mbarrier_init() {
#if defined(__CUDACC__)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    emu::fence_mbarrier_init();
#endif
}
PTX_INLINE void mbarrier_arrive(Mbarrier *at) {
#if defined(__CUDACC__)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(at)) : "memory");
#else
    emu::mbarrier_arrive(at, 0);
#endif
}
// The same, and `bytes` more belong to the phase.
PTX_INLINE void mbarrier_arrive_expect(Mbarrier *at, int bytes) {
#if defined(__CUDACC__)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(at)), "r"(bytes)
                 : "memory");
#else
    emu::mbarrier_arrive(at, bytes);
#endif
}
// Until the phase of this parity is over: 0 for the first, then 1, 0, ... Parity 1 is over from the start.
PTX_INLINE void mbarrier_wait(Mbarrier *at, int parity) {
#if defined(__CUDACC__)
    asm volatile(
        "{ .reg .pred done;\n"
        "AGAIN%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN%=; }" ::"r"(smem_address(at)),
        "r"(parity)
        : "memory");
#else
    emu::mbarrier_wait(at, parity);
#endif
}
// What this thread wrote by ordinary stores is seen by the tensor core and by bulk copies: by those that other threads
// issue, after a barrier.
PTX_INLINE void fence_proxy_async() {
#if defined(__CUDACC__)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    emu::fence_proxy_async();
#endif
}

// -----------------------------------------------------------------------------------------------------------
// Bulk copies of tensors. Coordinates are of the box's first element: x along a row, y the row, z the plane of rows;
// what lies outside of the tensor, in any dimension, arrives as zeros and counts all the same.

PTX_INLINE void tma_prefetch(const TensorMap *map) {
#if defined(__CUDACC__)
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
    emu::tma_prefetch(map);
#endif
}
// By one thread. `to_shared`: a multiple of 128, of 1024 with the 128-byte swizzle.
PTX_INLINE void tma_load_2d(void *to_shared, const TensorMap *map, int x, int y, Mbarrier *full) {
#if defined(__CUDACC__)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :
        : "r"(smem_address(to_shared)), "l"(map), "r"(x), "r"(y), "r"(smem_address(full))
        : "memory");
#else
    emu::tma_load_2d(to_shared, map, x, y, full);
#endif
}
// The same of a map of three dimensions.
PTX_INLINE void tma_load_3d(void *to_shared, const TensorMap *map, int x, int y, int z, Mbarrier *full) {
#if defined(__CUDACC__)
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4}], [%5];"
                 :
                 : "r"(smem_address(to_shared)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(smem_address(full))
                 : "memory");
#else
    emu::tma_load_3d(to_shared, map, x, y, z, full);
#endif
}

// -----------------------------------------------------------------------------------------------------------
// Clusters: blocks that run together, here two, next to each other in x; what the launch says (cluster {2, 1, 1}), the
// kernel knows as a constant. Each block has shared memory and mbarriers of its own, laid out alike: `at` and `to_shared`
// are addresses in this block, and stand for the same bytes of another.
//
//     begin   mbarrier_init .., fence_mbarrier_init, cluster_barrier: only then may another block use the mbarriers
//     a step  mbarrier_wait_cluster(empty)   the consumers of all blocks that the copy goes to are done with the stage
//             mbarrier_arrive_expect(full)   the bytes that land in this block, whoever sends them
//             tma_load_2d_multicast          counts at `full` in each block of the mask
//     end     cluster_barrier: a block that returns takes with it the mbarriers that others still arrive at

// The place of this block in its cluster: block_x() % 2.
PTX_INLINE int cluster_rank() {
#if defined(__CUDACC__)
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return emu::cluster_rank();
#endif
}
// Until all threads of all blocks of the cluster have come; what they wrote before is seen after.
PTX_INLINE void cluster_barrier() {
#if defined(__CUDACC__)
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
    emu::cluster_barrier();
#endif
}
// mbarrier_arrive at the mbarrier of the same address in the block `rank`, which may be this one. Who waits for it calls
// mbarrier_wait_cluster.
PTX_INLINE void mbarrier_arrive_cluster(Mbarrier *at, int rank) {
#if defined(__CUDACC__)
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(smem_address(at)),
                 "r"(rank)
                 : "memory");
#else
    emu::mbarrier_arrive_cluster(at, rank);
#endif
}
// mbarrier_wait where other blocks arrive: sees what their threads did before.
PTX_INLINE void mbarrier_wait_cluster(Mbarrier *at, int parity) {
#if defined(__CUDACC__)
    asm volatile(
        "{ .reg .pred done;\n"
        "AGAIN%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN%=; }" ::"r"(smem_address(at)),
        "r"(parity)
        : "memory");
#else
    emu::mbarrier_wait_cluster(at, parity);
#endif
}
// tma_load_2d into each block whose bit is set in `mask`: to the same address, counted at the mbarrier of the same
// address.
PTX_INLINE void tma_load_2d_multicast(void *to_shared, const TensorMap *map, int x, int y, Mbarrier *full,
                                      unsigned short mask) {
#if defined(__CUDACC__)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 :
                 : "r"(smem_address(to_shared)), "l"(map), "r"(x), "r"(y), "r"(smem_address(full)), "h"(mask)
                 : "memory");
#else
    emu::tma_load_2d_multicast(to_shared, map, x, y, full, mask);
#endif
}

// -----------------------------------------------------------------------------------------------------------
// wgmma: D[64 x N] += A[64 x 16] . B[16 x N], fp16 in, f32 sums, by 128 threads. Warp w of the group holds rows
// 16w..16w+16 of D, and of A when that is in registers, as mma_16816 does: d[4j..4j+4] are the d of columns 8j..8j+8.
//
// Operands in shared memory are tiles of rows of 128 bytes, 8 rows to 1024 bytes, where the 16-byte chunk c of row r
// lies at c ^ r % 8: what a bulk copy with the 128-byte swizzle makes of a box of 64 fp16.
//
//     K-major   a row is one m (or n), 64 k long    next 8 rows 1024 bytes on     16 k on: + 32 bytes
//     N-major   a row is one k, 64 n long           next 8 k 1024 bytes on        16 k on: + 2048 bytes
//                                                   next 64 n: + `columns_64` bytes

// bits 0..14 address, 16..30 leading, 32..46 stride offset, each / 16; 62..64: 1, the 128-byte swizzle
PTX_INLINE unsigned long long matrix_descriptor(const void *tile, int leading, int stride) {
    return static_cast<unsigned long long>((smem_address(tile) & 0x3ffffu) >> 4) |
           static_cast<unsigned long long>(leading >> 4) << 16 | static_cast<unsigned long long>(stride >> 4) << 32 |
           1ull << 62;
}
PTX_INLINE unsigned long long descriptor_k_major(const void *tile) { return matrix_descriptor(tile, 16, 1024); }
PTX_INLINE unsigned long long descriptor_n_major(const void *tile, int columns_64) {
    return matrix_descriptor(tile, columns_64, 1024);
}

// That of what lies `bytes` further, without the arithmetic of an address.
PTX_INLINE unsigned long long descriptor_after(unsigned long long matrix, int bytes) {
    return matrix + static_cast<unsigned long long>(bytes >> 4);
}

PTX_INLINE void wgmma_fence() {
#if defined(__CUDACC__)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    emu::wgmma_fence();
#endif
}
PTX_INLINE void wgmma_commit() {
#if defined(__CUDACC__)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emu::wgmma_commit();
#endif
}
// All but the newest GROUPS groups are done: what they read may be written again. Says nothing of sums.
template <int GROUPS> PTX_INLINE void wgmma_wait() {
#if defined(__CUDACC__)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#else
    emu::wgmma_wait(GROUPS, nullptr);
#endif
}
// The same. `d`: the sums that are read next, which no compiler then reads before.
template <int GROUPS, int COUNT> PTX_INLINE void wgmma_wait(float (&d)[COUNT]) {
#if defined(__CUDACC__)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
#else
    emu::wgmma_wait(GROUPS, d);
#endif
}

// After the wait of what wgmma_rs reads from registers: until here no compiler uses those for something else.
template <int COUNT> PTX_INLINE void wgmma_keep(unsigned (&a)[COUNT]) {
#if defined(__CUDACC__)
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+r"(a[i])::"memory");
    }
#endif
}

#if defined(__CUDACC__)
// Lists of 8, 16, .. 128 operands: their places in the text, and the sums themselves.
#define PTX_P1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PTX_P2 PTX_P1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PTX_P3 PTX_P2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PTX_P4 PTX_P3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PTX_P5 PTX_P4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PTX_P6 PTX_P5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PTX_P7 PTX_P6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PTX_P8 PTX_P7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PTX_P9 PTX_P8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define PTX_P10 PTX_P9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define PTX_P11 PTX_P10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PTX_P12 PTX_P11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define PTX_P13 PTX_P12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define PTX_P14 PTX_P13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define PTX_P15 PTX_P14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define PTX_P16 PTX_P15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PTX_F(i)                                                                          \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define PTX_F1 PTX_F(0)
#define PTX_F2 PTX_F1, PTX_F(8)
#define PTX_F3 PTX_F2, PTX_F(16)
#define PTX_F4 PTX_F3, PTX_F(24)
#define PTX_F5 PTX_F4, PTX_F(32)
#define PTX_F6 PTX_F5, PTX_F(40)
#define PTX_F7 PTX_F6, PTX_F(48)
#define PTX_F8 PTX_F7, PTX_F(56)
#define PTX_F9 PTX_F8, PTX_F(64)
#define PTX_F10 PTX_F9, PTX_F(72)
#define PTX_F11 PTX_F10, PTX_F(80)
#define PTX_F12 PTX_F11, PTX_F(88)
#define PTX_F13 PTX_F12, PTX_F(96)
#define PTX_F14 PTX_F13, PTX_F(104)
#define PTX_F15 PTX_F14, PTX_F(112)
#define PTX_F16 PTX_F15, PTX_F(120)
// One shape: its N, the lists' length and the places of the operands that follow the sums.
#define PTX_WGMMA_SS(n, c, p0, p1, p2, p3)                                                                   \
    if constexpr (N == n) {                                                                                  \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #p2 ", 0;\n"                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" PTX_P##c "}, %" #p0 ", %" #p1 \
                     ", add, 1, 1, 0, %" #p3 "; }"                                                           \
                     : PTX_F##c                                                                              \
                     : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(B_N_MAJOR ? 1 : 0));                  \
    }
#define PTX_WGMMA_RS(n, c, p0, p1, p2, p3, p4, p5, p6)                                                        \
    if constexpr (N == n) {                                                                                  \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #p5 ", 0;\n"                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" PTX_P##c "}, {%" #p0 ", %" #p1 \
                     ", %" #p2 ", %" #p3 "}, %" #p4 ", add, 1, 1, %" #p6 "; }"                                \
                     : PTX_F##c                                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),       \
                       "n"(B_N_MAJOR ? 1 : 0));                                                              \
    }
#endif

// `add`: whether to add to what the sums hold. A by its descriptor, or in registers; B by its descriptor.
template <int N, bool B_N_MAJOR = false>
PTX_INLINE void wgmma_ss(float (&d)[N / 2], unsigned long long a, unsigned long long b, bool add) {
    static_assert(N % 16 == 0 && N >= 16 && N <= 256, "columns, in steps that this project uses");
#if defined(__CUDACC__)
    PTX_WGMMA_SS(16, 1, 8, 9, 10, 11)
    PTX_WGMMA_SS(32, 2, 16, 17, 18, 19)
    PTX_WGMMA_SS(48, 3, 24, 25, 26, 27)
    PTX_WGMMA_SS(64, 4, 32, 33, 34, 35)
    PTX_WGMMA_SS(80, 5, 40, 41, 42, 43)
    PTX_WGMMA_SS(96, 6, 48, 49, 50, 51)
    PTX_WGMMA_SS(112, 7, 56, 57, 58, 59)
    PTX_WGMMA_SS(128, 8, 64, 65, 66, 67)
    PTX_WGMMA_SS(144, 9, 72, 73, 74, 75)
    PTX_WGMMA_SS(160, 10, 80, 81, 82, 83)
    PTX_WGMMA_SS(176, 11, 88, 89, 90, 91)
    PTX_WGMMA_SS(192, 12, 96, 97, 98, 99)
    PTX_WGMMA_SS(208, 13, 104, 105, 106, 107)
    PTX_WGMMA_SS(224, 14, 112, 113, 114, 115)
    PTX_WGMMA_SS(240, 15, 120, 121, 122, 123)
    PTX_WGMMA_SS(256, 16, 128, 129, 130, 131)
#else
    emu::wgmma_ss(d, a, b, N, B_N_MAJOR, add);
#endif
}
template <int N, bool B_N_MAJOR = false>
PTX_INLINE void wgmma_rs(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, bool add) {
    static_assert(N % 16 == 0 && N >= 16 && N <= 256, "columns, in steps that this project uses");
#if defined(__CUDACC__)
    PTX_WGMMA_RS(16, 1, 8, 9, 10, 11, 12, 13, 14)
    PTX_WGMMA_RS(32, 2, 16, 17, 18, 19, 20, 21, 22)
    PTX_WGMMA_RS(48, 3, 24, 25, 26, 27, 28, 29, 30)
    PTX_WGMMA_RS(64, 4, 32, 33, 34, 35, 36, 37, 38)
    PTX_WGMMA_RS(80, 5, 40, 41, 42, 43, 44, 45, 46)
    PTX_WGMMA_RS(96, 6, 48, 49, 50, 51, 52, 53, 54)
    PTX_WGMMA_RS(112, 7, 56, 57, 58, 59, 60, 61, 62)
    PTX_WGMMA_RS(128, 8, 64, 65, 66, 67, 68, 69, 70)
    PTX_WGMMA_RS(144, 9, 72, 73, 74, 75, 76, 77, 78)
    PTX_WGMMA_RS(160, 10, 80, 81, 82, 83, 84, 85, 86)
    PTX_WGMMA_RS(176, 11, 88, 89, 90, 91, 92, 93, 94)
    PTX_WGMMA_RS(192, 12, 96, 97, 98, 99, 100, 101, 102)
    PTX_WGMMA_RS(208, 13, 104, 105, 106, 107, 108, 109, 110)
    PTX_WGMMA_RS(224, 14, 112, 113, 114, 115, 116, 117, 118)
    PTX_WGMMA_RS(240, 15, 120, 121, 122, 123, 124, 125, 126)
    PTX_WGMMA_RS(256, 16, 128, 129, 130, 131, 132, 133, 134)
#else
    emu::wgmma_rs(d, {a[0], a[1], a[2], a[3]}, b, N, B_N_MAJOR, add);
#endif
}
#if defined(__CUDACC__)
#undef PTX_WGMMA_SS
#undef PTX_WGMMA_RS
#endif

// -----------------------------------------------------------------------------------------------------------
// The block: registers from one warp group to another, barriers of some of its threads, the launch after this one.

// Gives registers back, down to COUNT a thread.
template <int COUNT> PTX_INLINE void set_registers_dec() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
#if defined(__CUDACC__)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#else
    emu::set_registers(COUNT, false);
#endif
}
// Waits for registers until this thread has COUNT.
template <int COUNT> PTX_INLINE void set_registers_inc() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
#if defined(__CUDACC__)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#else
    emu::set_registers(COUNT, true);
#endif
}
// Barriers 1 to 15, of whole warps. A named_barrier waits until `threads` have come to it, a named_arrive does not.
PTX_INLINE void named_barrier(int id, int threads) {
#if defined(__CUDACC__)
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emu::named_barrier(id, threads, true);
#endif
}
PTX_INLINE void named_arrive(int id, int threads) {
#if defined(__CUDACC__)
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emu::named_barrier(id, threads, false);
#endif
}
// Until the launches before this one, in its stream, are done and their writes seen: by this thread, and by those that a
// barrier orders after it. In each block of a programmatic launch (src/cuda/launch.rs) some thread must come here; in
// another launch it does nothing.
PTX_INLINE void grid_wait() {
#if defined(__CUDACC__)
    asm volatile("griddepcontrol.wait;" ::: "memory");
#else
    emu::grid_wait();
#endif
}
// The launch after this one may begin, once each block has a thread that came here or is done. It says nothing of what
// this one wrote: that one's grid_wait does.
PTX_INLINE void grid_launch_dependents() {
#if defined(__CUDACC__)
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#else
    emu::grid_launch_dependents();
#endif
}

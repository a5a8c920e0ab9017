// hopper_sm90.cu: entries of hopper.cuh that are right, for the emulated device and for sm_90a.
#include "hopper.cuh"

extern "C" __global__ void __launch_bounds__(HOPPER_THREADS, 1) hopper_gemm(
    fp16 *d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int n, int k) {
    hopper_body<RIGHT, false>(d, &a, &b, n, k);
}
extern "C" __global__ void __launch_bounds__(HOPPER_THREADS, 1) hopper_gemm_registers(
    fp16 *d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int n, int k) {
    hopper_body<RIGHT, true>(d, &a, &b, n, k);
}

// Every width that the primitives know.
#define WIDTH(n)                                                                                     \
    extern "C" __global__ void __launch_bounds__(WARP_GROUP, 1) hopper_width_##n(                    \
        float *out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b) {      \
        hopper_width<n>(out, &a, &b);                                                                \
    }
#define WIDTHS(EACH)                                                                                 \
    EACH(16) EACH(32) EACH(48) EACH(64) EACH(80) EACH(96) EACH(112) EACH(128) EACH(144) EACH(160)    \
    EACH(176) EACH(192) EACH(208) EACH(224) EACH(240) EACH(256)
WIDTHS(WIDTH)

#define BOX(rank)                                                                                             \
    extern "C" __global__ void __launch_bounds__(WARP_GROUP, 1) hopper_box_##rank##d(                         \
        fp16 *out, const __grid_constant__ TensorMap map, int bytes, int x, int y, int z) {                   \
        hopper_box<rank>(out, &map, bytes, x, y, z);                                                          \
    }
BOX(2)
BOX(3)

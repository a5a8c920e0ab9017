// cluster_sm90.cu: entries of cluster.cuh that are right, for the emulated device and for sm_90a. Launched in clusters.
#include "cluster.cuh"

extern "C" __global__ void __launch_bounds__(HOPPER_THREADS, 1) cluster_gemm(
    fp16 *d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int m, int n, int k) {
    cluster_body<CLUSTER_RIGHT>(d, &a, &b, m, n, k);
}
extern "C" __global__ void __launch_bounds__(WARP_GROUP, 1) cluster_ranks(int *out) { cluster_ranks_body(out); }

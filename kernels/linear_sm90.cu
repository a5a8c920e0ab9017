// linear_sm90.cu: entries of the linear layers for Hopper. All of it is in linear_sm90.cuh.
//
// A table: which tiles there are for which epilogue, BM x BN, `_pp` where two tiles take turns, `_c2` where two blocks
// share W. At most 48 of them. Which
// one runs is src/cuda/linear/sm90.rs' to choose, from shape and device; the same table stands there.

#include "linear_sm90.cuh"

#define LINEAR_SM90_PARAMETERS                                                   \
    const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap w, \
        const __grid_constant__ LinearSm90Args args

constexpr int THREADS = 3 * WARP_GROUP;

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_bias_64x192_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 192, true, 2>, Epilogue::BIAS>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_bias_64x240_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 240, true, 2>, Epilogue::BIAS>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_bias_64x256_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 256, true, 2>, Epilogue::BIAS>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_bias_128x240(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 240, false>, Epilogue::BIAS>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_bias_128x256(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 256, false>, Epilogue::BIAS>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_bias_128x256_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 256, false, 2>, Epilogue::BIAS>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_quick_gelu_64x256_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 256, true, 2>, Epilogue::QUICK_GELU>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_quick_gelu_128x128_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 128, true, 2>, Epilogue::QUICK_GELU>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_quick_gelu_128x160_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 160, true, 2>, Epilogue::QUICK_GELU>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_quick_gelu_128x256(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 256, false>, Epilogue::QUICK_GELU>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_quick_gelu_128x256_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 256, false, 2>, Epilogue::QUICK_GELU>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_gelu_64x224_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 224, true, 2>, Epilogue::GELU>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_gelu_64x256_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 256, true, 2>, Epilogue::GELU>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_gelu_128x160_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 160, true, 2>, Epilogue::GELU>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_residual_64x176_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 176, true, 2>, Epilogue::RESIDUAL>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_residual_64x192_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 192, true, 2>, Epilogue::RESIDUAL>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_residual_64x208_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 208, true, 2>, Epilogue::RESIDUAL>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_residual_64x256_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 256, true, 2>, Epilogue::RESIDUAL>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_residual_128x128_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 128, true, 2>, Epilogue::RESIDUAL>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_residual_128x176_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 176, false, 2>, Epilogue::RESIDUAL>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_residual_128x208(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 208, false>, Epilogue::RESIDUAL>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_residual_128x208_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 208, false, 2>, Epilogue::RESIDUAL>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_embed_64x192_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 192, true, 2>, Epilogue::EMBED>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_embed_64x208_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 208, true, 2>, Epilogue::EMBED>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_embed_64x256_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 256, true, 2>, Epilogue::EMBED>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_scatter_64x256_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<64, 256, true, 2>, Epilogue::SCATTER>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_scatter_128x160_pp_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 160, true, 2>, Epilogue::SCATTER>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_scatter_128x256(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 256, false>, Epilogue::SCATTER>(&a, &w, args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90_scatter_128x256_c2(LINEAR_SM90_PARAMETERS) {
    hopper::linear<HopperTile<128, 256, false, 2>, Epilogue::SCATTER>(&a, &w, args);
}

// linear_sm90_entries.h: Hopper's linear layers in small tiles, for what a tile can be: both groups at it or taking turns,
// sums of one wgmma or two, a last half of 32 columns or none, two blocks that share W. All six for bias; for the others
// those that differ for them. A file of its own so that tests/kernel_mutants can compile it by itself.
#pragma once

#include "linear_sm90.cuh"

#define TILES_BIAS(TILE)                          \
    TILE(bias_128x48, BIAS, 128, 48, false, 1)    \
    TILE(bias_256x32, BIAS, 256, 32, false, 1)    \
    TILE(bias_64x32_pp, BIAS, 64, 32, true, 1)    \
    TILE(bias_128x16_pp, BIAS, 128, 16, true, 1)  \
    TILE(bias_128x48_c2, BIAS, 128, 48, false, 2) \
    TILE(bias_64x32_pp_c2, BIAS, 64, 32, true, 2)
#define TILES_QUICK_GELU(TILE)                             \
    TILE(quick_gelu_128x48, QUICK_GELU, 128, 48, false, 1) \
    TILE(quick_gelu_64x32_pp_c2, QUICK_GELU, 64, 32, true, 2)
#define TILES_GELU(TILE)                         \
    TILE(gelu_64x48_pp, GELU, 64, 48, true, 1)   \
    TILE(gelu_256x32_c2, GELU, 256, 32, false, 2)
#define TILES_RESIDUAL(TILE)                              \
    TILE(residual_128x48, RESIDUAL, 128, 48, false, 1)    \
    TILE(residual_128x16_pp, RESIDUAL, 128, 16, true, 1)  \
    TILE(residual_64x32_pp_c2, RESIDUAL, 64, 32, true, 2)
#define TILES_EMBED(TILE)                        \
    TILE(embed_64x48_pp, EMBED, 64, 48, true, 1) \
    TILE(embed_128x32_c2, EMBED, 128, 32, false, 2)
#define TILES_SCATTER(TILE)                              \
    TILE(scatter_128x48, SCATTER, 128, 48, false, 1)     \
    TILE(scatter_64x32_pp_c2, SCATTER, 64, 32, true, 2)

// All of them, unless the compiler is told otherwise: EACH(BIAS).
#ifndef EPILOGUES
#define EPILOGUES EACH(BIAS) EACH(QUICK_GELU) EACH(GELU) EACH(RESIDUAL) EACH(EMBED) EACH(SCATTER)
#endif

#define ENTRY(name, epilogue, ...)                                                     \
    extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP, 1)                    \
        name(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap w, \
             const __grid_constant__ LinearSm90Args args) {                            \
        hopper::linear<HopperTile<__VA_ARGS__>, Epilogue::epilogue>(&a, &w, args);     \
    }
#define EACH(epilogue) TILES_##epilogue(ENTRY)
EPILOGUES
#undef EACH

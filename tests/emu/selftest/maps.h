// maps.h: maps of the matrices that the tests of Hopper's kernels multiply.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "harness.h"
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace {

// A map of a row-major [rows][columns] fp16 matrix, in boxes of 64 columns with the 128-byte swizzle.
TensorMap map_of(const emu::Array<fp16> &x, int rows, int columns, int pitch, int box_rows, bool swizzle = true) {
    TensorMap map;
    const std::uint64_t sizes[2] = {static_cast<std::uint64_t>(columns), static_cast<std::uint64_t>(rows)};
    const std::uint64_t strides[1] = {static_cast<std::uint64_t>(pitch) * 2};
    const std::uint32_t box[2] = {64, static_cast<std::uint32_t>(box_rows)};
    if (const char *wants = emu::encode_tensor_map(&map, 2, reinterpret_cast<std::uint64_t>(x.get()), sizes, strides,
                                                   box, swizzle)) {
        std::printf("FAILED: the map wants %s\n", wants);
        std::exit(1);
    }
    return map;
}

} // namespace

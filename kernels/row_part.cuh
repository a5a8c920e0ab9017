// row_part.cuh: statistics of parts of rows, from the kernel that stores a row to the one that has its layer norm folded in.
//
// Of every 16 columns of a row [rows][width / 16] (mean, sum of squares about it), from the fp16 that was stored. Parts are
// as wide whatever tile made them, so that bits do not hang on it; linear_sm90.cuh merges them.
#pragma once

#include "numerics.cuh"

struct RowPart {
    float mean, squares;
};
static_assert(sizeof(RowPart) == 8, "a layout shared with the host");

constexpr int PART = 16;  // columns

// (mean, sum of squares about it) of 16 columns of a row, of which this lane has 8 and the next one the others.
PTX_INLINE RowPart part_of(vec16 stored) {
    float x[CHUNK];
    unpack(stored, x);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        sum += x[i];
    }
    sum += shuffle_xor(sum, 1);
    const float mean = sum * (1.0f / PART);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        squares = fma_rn(x[i] - mean, x[i] - mean, squares);
    }
    squares += shuffle_xor(squares, 1);
    return RowPart{mean, squares};
}

// At column `column`, a multiple of 16, of row `row`.
PTX_INLINE void store_part(RowPart *parts, int width, long long row, int column, RowPart part) {
    store_8(parts + row * (width / PART) + column / PART, vec8{f32_to_bits(part.mean), f32_to_bits(part.squares)});
}

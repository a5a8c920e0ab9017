// patches.cu: resized pixels to normalised patch rows, the A of the patch embedding.
//
//     out[p][(c patch + ky) patch + kx] = table[c][ rgb[gy patch + ky][gx patch + kx][c] ]   p = gy grid + gx
//
//     rgb [grid patch, rgb_pitch] u8, 3 bytes a pixel   table [3][256] fp16, (u8 / 255 - mean) / std
//     out [grid², out_pitch] fp16; columns 3 patch² .. out_pitch become zeros
//
// Who computes what: a block has PATCHES neighbouring patches, and of each the 16-byte chunks of its row, one
// to a thread in turn: neighbours write neighbouring chunks. The pixels of a block come from L1: PATCHES ·
// patch columns of `patch` rows. The table is looked up in shared memory, where lanes that want different
// bytes meet in few banks.
//
//     thread 0    1    2  ...  73 │ 74   75 ...              ViT-L/14: 588 + 4 columns = 74 chunks a patch
//     patch  p    p    p       p  │ p+1  p+1
//     chunk  0    1    2       73 │ 0    1
//
// Launch contract, checked by the launcher in this order (src/cuda/patches.rs):
//   grid        x = ceil(grid² / 8), y = z = 1; block 128; dynamic shared memory 1536 bytes
//   sizes       grid, patch >= 1; out_pitch a multiple of 8, >= 3 patch²; rgb_pitch >= 3 grid patch, bytes
//   alignment   out and table 16 bytes; rgb any
//   aliasing    none
//
// Numerics: none; the arithmetic is in the table, made once by the host. Source: src/cpu/patches.rs, the
// oracle.

#include "numerics.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int PATCHES = 8;  // of a block
constexpr int COLOURS = 3, BYTES = 256;
constexpr int TABLE_BYTES = COLOURS * BYTES * 2;  // the launch's dynamic shared memory
static_assert(TABLE_BYTES == 1536 && TABLE_BYTES / 16 <= THREADS, "one chunk of the table to a thread");

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) patches(
    fp16 *out, const unsigned char *rgb, const fp16 *table, int grid, int patch, int out_pitch,
    int rgb_pitch) {
    PTX_SMEM(fp16, values);  // [3][256]
    if (thread_x() < TABLE_BYTES / 16) {
        store_16(values + thread_x() * CHUNK, load_16(table + thread_x() * CHUNK));
    }
    block_barrier();  // the table is complete

    const int square = patch * patch, chunks = out_pitch / CHUNK;
    const int first = block_x() * PATCHES;
    for (int i = thread_x(); i < PATCHES * chunks; i += THREADS) {
        const int p = first + i / chunks, column = i % chunks * CHUNK;
        if (p >= grid * grid) {
            break;
        }
        const unsigned char *corner =
            rgb + static_cast<long long>(p / grid * patch) * rgb_pitch + p % grid * patch * COLOURS;
        int c = column / square, y = column % square / patch, x = column % square % patch;
        unsigned bits[CHUNK];
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            bits[j] = 0;
            if (c < COLOURS) {
                const unsigned char *row = corner + static_cast<long long>(y) * rgb_pitch;
                bits[j] = values[c * BYTES + row[x * COLOURS + c]].bits;
            }
            if (++x == patch) {
                x = 0;
                if (++y == patch) {
                    y = 0, c++;
                }
            }
        }
        store_16(out + static_cast<long long>(p) * out_pitch + column,
                 vec16{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                       bits[6] | bits[7] << 16});
    }
}

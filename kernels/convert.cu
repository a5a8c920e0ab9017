// convert.cu: a matrix of weights, as the checkpoint stores it, to fp16 rows of the device's pitch.
//
//     out[r][c] = fp16(scale in[r][c]), c < columns;   0, columns <= c < out_pitch      range rule: range.cuh
//
//     in [rows, columns] bf16 | f16 | f32, packed      out [rows, out_pitch] fp16
//
// Who computes what: a thread has 8 neighbouring columns of a row, 16 bytes of output; threads are numbered
// along the rows of the output, so that neighbours write neighbouring chunks:
//
//     chunk of the output   0 │ 1 │ 2 │ ... │ out_pitch / 8 - 1 ┊ out_pitch / 8 │ ...
//     row, columns          0: 0-7, 8-15, ...            0s     ┊ 1: 0-7
//
// Launch contract, checked by the launcher in this order (src/cuda/convert.rs):
//   grid        x = ceil(rows * ceil(out_pitch / 8) / 256), y = z = 1; block 256; no shared memory
//   sizes       rows, columns >= 1; out_pitch >= columns
//   alignment   in: of its elements; out 2 bytes; 16-byte accesses where they are possible
//   report      {NOTHING, 0} or that of earlier launches; indices are those of `in`, row * columns + column
//   aliasing    none
//
// Numerics: widening is exact, one rounding to nearest even after the multiplication by scale (a power of two
// changes nothing but the exponent). The range is checked before scaling, as stored.
//
// Source: src/checkpoint/convert.rs, the oracle.

#include "range.cuh"

namespace {

constexpr int THREADS = 256;

template <class T>
PTX_INLINE void convert(fp16 *out, const T *in, long long rows, int columns, long long out_pitch, int policy,
                        float scale, RangeReport *report) {
    const long long across = (out_pitch + CHUNK - 1) / CHUNK;
    const long long chunk = static_cast<long long>(block_x()) * THREADS + thread_x();
    const long long row = chunk / across, column = (chunk - row * across) * CHUNK;
    if (row >= rows) {
        return;
    }
    const bool aligned = reinterpret_cast<unsigned long long>(in) % 16 == 0 && columns * sizeof(T) % 16 == 0;
    const long long index = row * columns + column;
    const long long left = column < columns ? columns - column : 0;
    const int count = left < CHUNK ? static_cast<int>(left) : CHUNK;
    RangeNote note = {NOTHING, 0};
    const vec16 values =
        narrow(in + index, count, aligned, static_cast<unsigned long long>(index), policy, scale, note);
    const long long room = out_pitch - column;
    store_chunk(out + row * out_pitch + column, values, room < CHUNK ? static_cast<int>(room) : CHUNK);
    report_range(report, note);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) convert_bf16(
    fp16 *out, const void *in, long long rows, int columns, long long out_pitch, int policy, float scale,
    RangeReport *report) {
    convert(out, static_cast<const bf16 *>(in), rows, columns, out_pitch, policy, scale, report);
}
extern "C" __global__ void __launch_bounds__(THREADS) convert_f16(
    fp16 *out, const void *in, long long rows, int columns, long long out_pitch, int policy, float scale,
    RangeReport *report) {
    convert(out, static_cast<const fp16 *>(in), rows, columns, out_pitch, policy, scale, report);
}
extern "C" __global__ void __launch_bounds__(THREADS) convert_f32(
    fp16 *out, const void *in, long long rows, int columns, long long out_pitch, int policy, float scale,
    RangeReport *report) {
    convert(out, static_cast<const float *>(in), rows, columns, out_pitch, policy, scale, report);
}

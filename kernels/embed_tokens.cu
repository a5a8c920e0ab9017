// embed_tokens.cu: text rows: rows of the embedding table, straight into the sequence.
//
//     rows[i].to[0 .. hidden] = fp16(table[rows[i].id])        for i < count; the range rule: range.cuh
//
//     table [vocab, hidden] bf16 | f16 | f32, as stored        rows [count], each with its own destination
//
// Who computes what: one block per row, a thread has every 128th chunk of 8 elements of it.
//
// Launch contract, checked by the launcher in this order (src/cuda/embed_tokens.rs):
//   grid        x = count, y = z = 1; block 128; no shared memory
//   rows        0 <= id < vocab (a row with another id is left as it is, and completeness finds it); `to`
//               2-byte aligned, with room for `hidden` elements; no two rows overlap
//   alignment   table: of its elements; 16-byte accesses where they are possible
//   report      {NOTHING, 0} or that of earlier launches; indices are those of the table,
//               id * hidden + column
//
// Numerics: exact, but for one rounding to nearest even. Source: src/checkpoint/embedding.rs, the oracle.

#include "range.cuh"

struct TextRow {
    fp16 *to;  // [hidden]
    int id;
    int pad;
};
static_assert(sizeof(TextRow) == 16, "a layout shared with the host");

namespace {

constexpr int THREADS = 128;

template <class T>
PTX_INLINE void embed_tokens(const TextRow *rows, int count, const T *table, int vocab, int hidden,
                             int policy, RangeReport *report) {
    if (block_x() >= count) {
        return;
    }
    const TextRow row = rows[block_x()];
    if (row.id < 0 || row.id >= vocab) {
        return;
    }
    const long long start = static_cast<long long>(row.id) * hidden;
    const bool aligned =
        reinterpret_cast<unsigned long long>(table) % 16 == 0 && hidden * sizeof(T) % 16 == 0;
    RangeNote note = {NOTHING, 0};
    for (int column = thread_x() * CHUNK; column < hidden; column += THREADS * CHUNK) {
        const int here = hidden - column < CHUNK ? hidden - column : CHUNK;
        const vec16 values = narrow(table + start + column, here, aligned,
                                    static_cast<unsigned long long>(start + column), policy, 1.0f, note);
        store_chunk(row.to + column, values, here);
    }
    report_range(report, note);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) embed_tokens_bf16(
    const TextRow *rows, int count, const void *table, int vocab, int hidden, int policy,
    RangeReport *report) {
    embed_tokens(rows, count, static_cast<const bf16 *>(table), vocab, hidden, policy, report);
}
extern "C" __global__ void __launch_bounds__(THREADS) embed_tokens_f16(
    const TextRow *rows, int count, const void *table, int vocab, int hidden, int policy,
    RangeReport *report) {
    embed_tokens(rows, count, static_cast<const fp16 *>(table), vocab, hidden, policy, report);
}
extern "C" __global__ void __launch_bounds__(THREADS) embed_tokens_f32(
    const TextRow *rows, int count, const void *table, int vocab, int hidden, int policy,
    RangeReport *report) {
    embed_tokens(rows, count, static_cast<const float *>(table), vocab, hidden, policy, report);
}

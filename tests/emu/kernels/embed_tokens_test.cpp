// embed_tokens.cu: rows to scattered places, unaligned too, an id that is none, the report.

#include "embed_tokens.cu"
#include "harness.h"

#include "check.h"

using namespace check;

namespace {

void test(int hidden, int pitch, int shift, int policy, unsigned long long seed) {
    Random random(seed + static_cast<unsigned>(hidden));
    const int vocab = 40, count = 30;
    emu::Array<float> table(static_cast<std::size_t>(vocab) * hidden);
    for (std::size_t i = 0; i < table.size(); i++) {
        table[i] = static_cast<float>(random.normal());
    }
    table[7 * hidden + hidden - 1] = 1e6f, table[9 * hidden] = -INFINITY, table[5 * hidden + 3] = NAN;
    emu::Array<fp16> sequence(static_cast<std::size_t>(2 * count) * pitch + shift);
    sequence.poison();
    std::vector<fp16> expected = sequence.copy();
    std::vector<TextRow> rows;
    unsigned beyond = 0;
    unsigned long long first = NOTHING;
    for (int i = 0; i < count; i++) {
        const int id = i == 3 ? vocab : i == 4 ? -1 : random.below(vocab), at = 2 * i + random.below(2);
        rows.push_back(TextRow{sequence.get() + shift + at * pitch, id, 0});
        if (id < 0 || id >= vocab) {
            continue;
        }
        for (int c = 0; c < hidden; c++) {
            const float x = table[id * hidden + c];
            const bool over = std::fabs(x) > 65504;
            beyond += over;
            if (std::isnan(x) || (over && policy == REFUSE)) {
                first = std::min(first, static_cast<unsigned long long>(id * hidden + c));
            }
            expected[shift + at * pitch + c] =
                half(over && policy == SATURATE ? std::copysign(65504.0f, x) : x);
        }
    }
    emu::Array<TextRow> device_rows(rows);
    emu::Array<RangeReport> report(1);
    report[0] = RangeReport{NOTHING, 0, 0};
    emu::harness_demand(EMU_LAUNCH_SEED(seed, embed_tokens_f32, (count), (128), 0, device_rows.get(), count,
                                        table.get(), vocab, hidden, policy, report.get()));
    for (std::size_t i = 0; i < sequence.size(); i++) {
        demand(sequence[i].bits == expected[i].bits, "embed_tokens_f32");
    }
    demand(report[0].first == first && report[0].count == beyond, "the report");
    std::printf("hidden %d: first %lld, %u beyond\n", hidden, static_cast<long long>(first), beyond);
}

}  // namespace

int main() {
    for (const unsigned long long seed : seeds(4)) {
        for (const int policy : {REFUSE, SATURATE}) {
            test(64, 64, 0, policy, seed);
            test(17, 19, 1, policy, seed);
            test(2056, 2056, 0, policy, seed);
            test(8, 11, 3, policy, seed);
        }
    }
    return 0;
}

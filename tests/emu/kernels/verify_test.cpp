// verify.cu: planted poison, infinities and NaN, norms, aligned or not.

#include "verify.cu"
#include "harness.h"

#include "check.h"

using namespace check;

namespace {

void test(int count, int hidden, int pitch, int shift, unsigned long long seed) {
    Random random(seed + static_cast<unsigned>(hidden));
    emu::Array<fp16> rows(static_cast<std::size_t>(count) * pitch + shift);  // NaN between the rows
    std::vector<RowCheck> expected;
    for (int r = 0; r < count; r++) {
        fp16 *row = rows.get() + shift + r * pitch;
        double squares = 0;
        for (int c = 0; c < hidden; c++) {
            row[c] = half(random.normal() * 20);
            squares += std::pow(value(row[c]), 2);
        }
        RowCheck check = {-1, 0, static_cast<float>(std::sqrt(squares))};
        if (r % 3 == 1) {
            const int at = random.below(hidden);
            const unsigned short bad[] = {0x7c00, 0xfc00, 0x7e00, 0x7d5a};
            row[at].bits = bad[r / 3 % 4];
            for (const int later : {std::min(at + 1, hidden - 1), hidden - 1}) {  // in its chunk; far off
                row[later].bits = r % 2 && later > at ? 0x7c00 : row[later].bits;
            }
            check = {at, row[at].bits == 0x7d5a, NAN};
        }
        expected.push_back(check);
    }
    emu::Array<RowCheck> check(count);
    emu::harness_demand(EMU_LAUNCH_SEED(seed, verify_rows, ((count + 3) / 4), (128), 0, check.get(),
                                        rows.get() + shift, static_cast<long long>(pitch), count, hidden));
    for (int r = 0; r < count; r++) {
        demand(check[r].bad_channel == expected[r].bad_channel && check[r].poisoned == expected[r].poisoned,
               "verify_rows");
        demand(expected[r].bad_channel >= 0 || std::fabs(check[r].norm / expected[r].norm - 1) < 1e-5,
               "norms");
    }
    for (int r = 0; r < count; r++) {
        check[r].norm = static_cast<float>(r);
    }
    emu::Array<SlotRange> ranges(
        std::vector<SlotRange>{{0, 0}, {0, count}, {count - 1, 1}, {2, 3}, {0, 1}, {1, count / 2}});
    emu::Array<float> means(ranges.size());
    emu::harness_demand(EMU_LAUNCH_SEED(seed, verify_slots, (2), (128), 0, means.get(), check.get(),
                                        ranges.get(), static_cast<int>(ranges.size())));
    for (std::size_t s = 0; s < ranges.size(); s++) {
        const double mean = ranges[s].len ? ranges[s].offset + (ranges[s].len - 1) / 2.0 : 0;
        demand(std::fabs(means[s] - mean) < 1e-4, "verify_slots");
    }
    std::printf("%d rows of %d: as planted\n", count, hidden);
}

}  // namespace

int main() {
    for (const unsigned long long seed : seeds(3)) {
        test(30, 64, 64, 0, seed), test(97, 17, 19, 1, seed), test(6, 4096, 4096, 0, seed),
            test(6, 300, 301, 0, seed), test(6, 300, 304, 0, seed);
    }
    return 0;
}

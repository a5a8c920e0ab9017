// convert.cu: every value of the 16-bit types, f32 around every fp16, padding, both policies, the report.

#include "convert.cu"
#include "harness.h"

#include "check.h"

#include <cstring>

using namespace check;

namespace {

using Entry = void (*)(fp16 *, const void *, long long, int, long long, int, float, RangeReport *);

// fp16 by long division: the nearest, the even one of two; what does not fit saturates.
unsigned short expected(double x, int policy, double scale) {
    if (std::isnan(x)) {
        return 0x7fff;
    }
    if (policy == SATURATE) {
        x = std::fmax(-65504.0, std::fmin(65504.0, x));
    }
    x *= scale;
    const double magnitude = std::fabs(x);
    unsigned bits = 0x7c00;
    if (magnitude < 65520) {
        const double unit = ulp(x);  // x is a whole number of these, or between two
        const double steps = std::nearbyint(magnitude / unit);
        const int exponent = std::max(std::ilogb(std::fmax(magnitude, 0x1p-14)) + 14, 0);
        bits = static_cast<unsigned>(exponent * 1024 + steps);
    }
    return static_cast<unsigned short>(bits | (std::signbit(x) ? 0x8000u : 0u));
}

template <auto kernel, class T> void test(const char *name, const std::vector<T> &values, long long rows,
                                          int columns, int shift, int policy, unsigned long long seed,
                                          float scale = 1) {
    const long long out_pitch = round_up(columns, 8) + (shift ? 3 : 0);
    emu::Array<T> in(values.size() + shift);
    std::memcpy(in.get() + shift, values.data(), values.size() * sizeof(T));
    emu::Array<fp16> out(static_cast<std::size_t>(rows * out_pitch + shift));
    emu::Array<RangeReport> report(1);
    report[0] = RangeReport{NOTHING, 0, 0};
    out.poison();
    const long long chunks = rows * ((out_pitch + 7) / 8);
    emu::harness_demand(
        emu::launch_seed<kernel>(name, seed, emu::Dim(static_cast<unsigned>((chunks + 255) / 256)),
                                 emu::Dim(256), 0, static_cast<Entry>(kernel), out.get() + shift,
                                 in.get() + shift, rows, columns, out_pitch, policy, scale, report.get()));
    unsigned long long first = NOTHING;
    unsigned count = 0;
    for (long long r = 0; r < rows; r++) {
        for (int c = 0; c < out_pitch; c++) {
            const unsigned short got = out[shift + r * out_pitch + c].bits;
            if (c >= columns) {
                demand(got == 0, "padding is zero");
                continue;
            }
            const unsigned long long at = r * columns + c;
            const double x = wide(values[at]);
            const bool beyond = std::fabs(x) > 65504;
            count += beyond;
            if (first == NOTHING && (std::isnan(x) || (beyond && policy == REFUSE))) {
                first = at;
            }
            if (got != expected(x, policy, scale)) {
                fail(std::string(name) + " of " + std::to_string(x));
            }
        }
    }
    demand(report[0].first == first && report[0].count == count, "the report:", name);
    std::printf("%s %lld x %d: first %lld, %u beyond\n", name, rows, columns, static_cast<long long>(first),
                count);
}

}  // namespace

int main() {
    std::vector<bf16> brain;
    std::vector<fp16> halves;
    std::vector<float> floats;
    for (int i = 0; i < 65536; i++) {
        brain.push_back(bf16{static_cast<unsigned short>(i)}),
            halves.push_back(fp16{static_cast<unsigned short>(i)});
    }
    for (int i = 0; i < 0x7c00; i++) {
        const float x = static_cast<float>(value(fp16{static_cast<unsigned short>(i)}));
        const float tie = x + static_cast<float>(ulp(x)) / 2;
        for (const float y : {x, tie, std::nextafterf(tie, INFINITY), std::nextafterf(tie, 0), -tie}) {
            floats.push_back(y);
        }
    }
    const std::vector<float> few(floats.end() - 58800, floats.end());
    std::vector<float> lone(48, 1.0f);  // a NaN among numbers that fit
    lone[37] = NAN;
    for (const unsigned long long seed : seeds(2)) {
        for (const int policy : {REFUSE, SATURATE}) {
            test<convert_f32>("convert_f32", lone, 2, 24, 0, policy, seed);
            test<convert_f32>("convert_f32", few, 100, 588, 0, policy, seed, 0.125f);
            test<convert_bf16>("convert_bf16", brain, 3855, 17, 0, policy, seed);
            test<convert_bf16>("convert_bf16", brain, 3855, 17, 1, policy, seed);
            test<convert_bf16>("convert_bf16", brain, 64, 1024, 0, policy, seed);
            test<convert_f16>("convert_f16", halves, 64, 1024, 0, policy, seed);
            test<convert_f16>("convert_f16", halves, 1, 65535, 1, policy, seed);
            test<convert_f32>("convert_f32", floats, 31, 5120, 0, policy, seed);
            test<convert_f32>("convert_f32", floats, 248 * 5, 128, 1, policy, seed);
        }
    }
    return 0;
}

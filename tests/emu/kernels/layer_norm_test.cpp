// layer_norm.cu against f64: rows of tiny variance, of a mean 30 deviations away, in place, of many widths.

#include "layer_norm.cu"
#include "harness.h"

#include "check.h"

using namespace check;

namespace {

void test(int rows, int width, int gap, double mean, double deviation, bool in_place,
          unsigned long long seed) {
    Random random(seed + static_cast<unsigned>(width));
    const int pitch = width + gap;
    const double eps = 1e-5;
    emu::Array<fp16> x(static_cast<std::size_t>(rows) * pitch), y(x.size()), weight(width), bias(width);
    for (int i = 0; i < width; i++) {
        weight[i] = half(1 + 0.3 * random.normal()), bias[i] = half(random.normal());
        for (int r = 0; r < rows; r++) {
            x[r * pitch + i] = half(mean + deviation * random.normal());
        }
    }
    const std::vector<fp16> before = x.copy();
    y.poison();
    emu::Array<fp16> &out = in_place ? x : y;
    std::vector<fp16> rest = out.copy();
    const bool with_parts = width % PART == 0 && (seed + static_cast<unsigned>(rows)) % 2 == 0;
    emu::Array<RowPart> parts(static_cast<std::size_t>(rows) * (width / PART) + 1);
    emu::harness_demand(EMU_LAUNCH_SEED(seed, layer_norm, ((rows + 3) / 4), (128), 0, out.get(),
                                        with_parts ? parts.get() : nullptr, x.get(), weight.get(), bias.get(),
                                        rows, width, pitch, static_cast<float>(eps)));
    Errors errors;
    for (int r = 0; r < rows; r++) {
        double m = 0, v = 0;
        for (int i = 0; i < width; i++) {
            m += value(before[r * pitch + i]) / width;
        }
        for (int i = 0; i < width; i++) {
            v += std::pow(value(before[r * pitch + i]) - m, 2) / width;
        }
        for (int i = 0; i < width; i++) {
            const int at = r * pitch + i;
            const double normal = (value(before[at]) - m) / std::sqrt(v + eps);
            errors.add(value(out[at]), normal * value(weight[i]) + value(bias[i]), 4e-5);
            rest[at] = out[at];
        }
        for (int p = 0; p < width / PART && with_parts; p++) {
            double own = 0, squares = 0;
            for (int i = p * PART; i < (p + 1) * PART; i++) {
                own += value(out[r * pitch + i]) / PART;
            }
            for (int i = p * PART; i < (p + 1) * PART; i++) {
                squares += std::pow(value(out[r * pitch + i]) - own, 2);
            }
            const RowPart got = parts[static_cast<std::size_t>(r * (width / PART) + p)];
            demand(std::fabs(got.mean - own) <= 2e-6 * (1 + std::fabs(own)), "means of parts");
            demand(std::fabs(got.squares - squares) <= 1e-5 * (1 + squares), "sums of squares of parts");
        }
    }
    for (std::size_t i = 0; i < out.size(); i++) {
        demand(out[i].bits == rest[i].bits, "layer_norm wrote where nothing is to be written");
    }
    std::printf("rows %d width %4d mean %g deviation %g: %.3f ulp, %.2e\n", rows, width, mean, deviation,
                errors.worst, errors.relative());
    demand(errors.worst <= 0.51 && errors.relative() < 4e-4, "layer_norm");
}

}  // namespace

int main() {
    for (const unsigned long long seed : seeds(2)) {
        for (const int width : {8, 64, 128, 1024, 1032, 1600}) {
            test(5, width, 8 * (width % 3), 0, 1, false, seed);
            test(3, width, 0, 0.5, 0.00316, true, seed);  // variance 1e-5, as much as eps
            test(4, width, 0, 30, 1, false, seed);        // mean 30 deviations away
            test(2, width, 0, -3000, 100, true, seed);
        }
    }
    return 0;
}

// quick_gelu and gelu of numerics.cuh against f64, over every fp16 input, and beyond: sums are f32.

#include "numerics.cuh"
#include "harness.h"

#include "check.h"

using namespace check;

extern "C" __global__ void activate(float *quick, float *exact, float scale) {
    for (int i = 0; i < 128; i++) {
        const int at = (block_x() * WARP + thread_x()) * 128 + i;
        const float x = scale * fp16_to_f32(fp16{static_cast<unsigned short>(at)});
        quick[at] = quick_gelu(x), exact[at] = gelu(x);
    }
}

int main() {
    emu::Array<float> quick(65536), exact(65536);
    for (const unsigned long long seed : seeds(3)) {
        emu::harness_demand(EMU_LAUNCH_SEED(seed, activate, (16), (32), 0, quick.get(), exact.get(), 1.0f));
        Errors errors[2];
        int count = 0;
        for (int i = 0; i < 65536; i++) {
            const double x = value(fp16{static_cast<unsigned short>(i)});
            if (std::isnan(x)) {
                demand(std::isnan(quick[i]) && std::isnan(exact[i]), "a NaN became a number");
            }
            if (!std::isfinite(x)) {
                continue;
            }
            count++;
            errors[0].add(value(half(quick[i])), x / (1 + std::exp(-1.702 * x)));
            errors[1].add(value(half(exact[i])), x * 0.5 * std::erfc(-x / std::sqrt(2.0)));
        }
        std::printf("%d inputs, seed %llu: quick_gelu %.4f ulp, gelu %.4f ulp\n", count, seed,
                    errors[0].worst, errors[1].worst);
        demand(count == 63488 && errors[0].worst < 0.51 && errors[1].worst < 0.51, "within 0.51 ulp");
        emu::harness_demand(
            EMU_LAUNCH_SEED(seed, activate, (16), (32), 0, quick.get(), exact.get(), 0x1p100f));
        for (int i = 0; i < 65536; i++) {
            const double x = value(fp16{static_cast<unsigned short>(i)});
            const double all_or_nothing = x > 0 ? INFINITY : 0;
            demand(!std::isfinite(x) || (value(half(quick[i])) == all_or_nothing &&
                                         value(half(exact[i])) == all_or_nothing),
                   "sums beyond fp16");
        }
    }
    return 0;
}

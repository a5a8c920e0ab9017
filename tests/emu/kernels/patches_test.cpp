// patches.cu against its formula: every bit.

#include "patches.cu"
#include "harness.h"

#include "check.h"

using namespace check;

namespace {

void cut(int grid, int patch, int gap, unsigned long long seed) {
    Random random(seed);
    const int side = grid * patch, rgb_pitch = 3 * side + gap, len = 3 * patch * patch,
              out_pitch = round_up(len, 8) + 8 * (gap % 2);
    emu::Array<unsigned char> rgb(static_cast<std::size_t>(side) * rgb_pitch, 0);
    for (std::size_t i = 0; i < rgb.size(); i++) {
        rgb[i] = static_cast<unsigned char>(random.below(256));
    }
    emu::Array<fp16> table(768), out(static_cast<std::size_t>(grid) * grid * out_pitch);
    for (int i = 0; i < 768; i++) {
        table[i] = half(random.normal());
    }
    out.poison();
    emu::harness_demand(EMU_LAUNCH_SEED(seed, patches, ((grid * grid + 7) / 8), (128), 1536, out.get(),
                                        rgb.get(), table.get(), grid, patch, out_pitch, rgb_pitch));
    for (int p = 0; p < grid * grid; p++) {
        for (int i = 0; i < out_pitch; i++) {
            const int c = i / (patch * patch), y = p / grid * patch + i / patch % patch,
                      x = p % grid * patch + i % patch;
            const unsigned short expected =
                i < len ? table[c * 256 + rgb[y * rgb_pitch + 3 * x + c]].bits : 0;
            demand(out[p * out_pitch + i].bits == expected, "patches");
        }
    }
    std::printf("patches of %dx%d, patch %d: equal\n", grid, grid, patch);
}

}  // namespace

int main() {
    for (const unsigned long long seed : seeds(2)) {
        cut(5, 14, 0, seed), cut(3, 14, 1, seed), cut(1, 1, 0, seed), cut(4, 3, 5, seed);
    }
    return 0;
}

// Both passes of resize.cu against the recipe in 64-bit integers: every byte.

#include "resize.cu"
#include "harness.h"

#include "check.h"

#include <algorithm>

using namespace check;

namespace {

// Pillow's windows and weights.
struct Axis {
    std::vector<int> first, count, weights;
    int taps = 0;
    Axis(int n_in, int n_out) {
        const double scale = static_cast<double>(n_in) / n_out, stretch = std::fmax(scale, 1),
                     reach = 2 * stretch;
        auto cubic = [](double x) {
            x = std::fabs(x);
            return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
        };
        std::vector<std::vector<int>> all;
        for (int i = 0; i < n_out; i++) {
            const double centre = (i + 0.5) * scale;
            const int low = std::max(static_cast<int>(centre - reach + 0.5), 0);
            const int high = std::min(static_cast<int>(centre + reach + 0.5), n_in);
            std::vector<double> exact;
            double sum = 0;
            for (int k = low; k < high; k++) {
                exact.push_back(cubic((k - centre + 0.5) / stretch));
                sum += exact.back();
            }
            all.emplace_back();
            for (const double w : exact) {
                all.back().push_back(static_cast<int>(w / sum * (1 << 22) + (w < 0 ? -0.5 : 0.5)));
            }
            first.push_back(low), count.push_back(high - low);
            taps = std::max(taps, high - low);
        }
        for (const auto &row : all) {
            weights.insert(weights.end(), row.begin(), row.end());
            weights.insert(weights.end(), static_cast<std::size_t>(taps) - row.size(),
                           0x7fffffff);  // never read
        }
    }
};

unsigned char clipped(long long sum) {
    return static_cast<unsigned char>(std::min(std::max(sum >> 22, 0ll), 255ll));
}

void resize(int w, int h, int w_out, int h_out, int gap, int out_gap, unsigned long long seed) {
    Random random(seed);
    const Axis across(w, w_out), down(h, h_out);
    const int in_pitch = 3 * w + gap, mid_pitch = round_up(3 * w_out, 4) + gap,
              out_pitch = 3 * w_out + out_gap;
    emu::Array<unsigned char> in(static_cast<std::size_t>(h) * in_pitch, 0);
    emu::Array<unsigned char> mid(static_cast<std::size_t>(h) * mid_pitch, 0xaa);
    emu::Array<unsigned char> out(static_cast<std::size_t>(h_out) * out_pitch, 0x55);
    for (std::size_t i = 0; i < in.size(); i++) {
        in[i] = static_cast<unsigned char>(random.below(4) ? random.below(256) : random.below(2) * 255);
    }
    emu::Array<int> first(across.first), count(across.count), weights(across.weights);
    emu::harness_demand(EMU_LAUNCH_SEED(seed, resize_horizontal, ((h + 3) / 4, (w_out + 127) / 128), (128), 0,
                                        mid.get(), in.get(), first.get(), count.get(), weights.get(),
                                        across.taps, w_out, h, in_pitch, mid_pitch));
    emu::Array<int> first2(down.first), count2(down.count), weights2(down.weights);
    emu::harness_demand(EMU_LAUNCH_SEED(seed, resize_vertical, (h_out, (3 * w_out + 511) / 512), (128), 0,
                                        out.get(), mid.get(), first2.get(), count2.get(), weights2.get(),
                                        down.taps, 3 * w_out, h_out, mid_pitch, out_pitch));
    for (int y = 0; y < h; y++) {
        for (int i = 0; i < mid_pitch; i++) {
            long long sum = 1 << 21;
            for (int k = 0; i < 3 * w_out && k < across.count[i / 3]; k++) {
                sum += static_cast<long long>(across.weights[i / 3 * across.taps + k]) *
                       in[y * in_pitch + 3 * (across.first[i / 3] + k) + i % 3];
            }
            demand(mid[y * mid_pitch + i] == (i < 3 * w_out ? clipped(sum) : 0xaa), "horizontal pass");
        }
    }
    for (int y = 0; y < h_out; y++) {
        for (int i = 0; i < out_pitch; i++) {
            long long sum = 1 << 21;
            for (int k = 0; i < 3 * w_out && k < down.count[y]; k++) {
                sum += static_cast<long long>(down.weights[y * down.taps + k]) *
                       mid[(down.first[y] + k) * mid_pitch + i];
            }
            demand(out[y * out_pitch + i] == (i < 3 * w_out ? clipped(sum) : 0x55), "vertical pass");
        }
    }
    std::printf("resize %dx%d to %dx%d: equal\n", w, h, w_out, h_out);
}

}  // namespace

int main() {
    for (const unsigned long long seed : seeds(2)) {
        resize(37, 53, 14, 20, 0, 0, seed);
        resize(20, 9, 150, 31, 1, 1, seed);
        resize(1, 300, 7, 5, 3, 3, seed);
        resize(300, 1, 4, 9, 4, 4, seed);
        resize(200, 7, 180, 7, 0, 0, seed);
        resize(30, 9, 62, 11, 4, 2, seed);  // aligned, and rows that end inside four bytes
    }
    return 0;
}

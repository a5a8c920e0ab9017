// linear_case.h: a linear layer in memory, and what must come of it, for the kernels of every architecture.
#pragma once

#include "harness.h"

#include "check.h"
#include "linear.cuh"

namespace check {

struct Case {
    int m, n, k, group;
    int out_extra;  // pitch of out and extra is n + out_extra
    int skip;       // a_skip
    int shift;      // elements by which out, extra and slots are moved off a 16-byte boundary
};

inline double activation(Epilogue e, double x) {
    switch (e) {
        case Epilogue::QUICK_GELU: return x / (1 + std::exp(-1.702 * x));
        case Epilogue::GELU: return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
        default: return x;
    }
}

// Fills memory, has `launch` run the kernel on it, compares. Returns what was written to, all of it.
template <Epilogue E, class Launch>
std::vector<fp16> test(const char *name, Case c, unsigned long long seed, Launch launch) {
    Random random(seed * 977 + static_cast<unsigned>(c.m * 31 + c.n * 7 + c.k));
    const bool embed = E == Epilogue::EMBED, scatter = E == Epilogue::SCATTER;
    const int images = (c.m + c.group - 1) / c.group, tokens = c.group + 1;
    const int k8 = round_up(c.k, 8), a_pitch = k8 + 8 * random.below(2), w_pitch = k8 + 8 * random.below(2);
    const int pitch = c.n + c.out_extra;
    const int a_rows = c.skip ? c.m + (c.m - 1) / c.group + 1 : c.m;
    // What lies beyond round_up(k, 8) stays NaN: it must not be read, or must not count.
    emu::Array<fp16> a(static_cast<std::size_t>(a_rows) * a_pitch),
        w(static_cast<std::size_t>(c.n) * w_pitch);
    emu::Array<fp16> bias(c.n);
    const int extra_rows = embed ? tokens : c.m, out_rows = embed ? images * tokens : c.m;
    emu::Array<fp16> extra(static_cast<std::size_t>(extra_rows) * pitch + c.shift);
    emu::Array<fp16> out(static_cast<std::size_t>(out_rows) * pitch + c.shift);
    for (int r = 0; r < a_rows; r++) {
        for (int i = 0; i < k8; i++) {
            a[r * a_pitch + i] = i < c.k ? half(random.normal()) : half(3);
        }
    }
    for (int r = 0; r < c.n; r++) {
        for (int i = 0; i < k8; i++) {
            w[r * w_pitch + i] = i < c.k ? half(random.normal() / std::sqrt(c.k)) : half(0);
        }
        bias[r] = half(random.normal());
    }
    for (std::size_t i = 0; i < extra.size(); i++) {
        extra[i] = half(random.normal());
    }
    const std::vector<fp16> before = extra.copy();

    // Slots: image i fills i % 3 of them, the last one cut short.
    std::vector<int> begin{0};
    std::vector<SlotRows> slots;
    emu::Array<fp16> sequence(static_cast<std::size_t>(2 * images + 1) * c.group * (pitch + 8) + c.shift);
    std::vector<int> image_of;
    for (int image = 0; image < images; image++) {
        for (int s = 0; s < (image + 1) % 3; s++) {
            fp16 *first =
                sequence.get() + c.shift + slots.size() * static_cast<std::size_t>(c.group * (pitch + 8));
            // Sequences of different pitches, none that of `out`.
            slots.push_back(SlotRows{first, pitch + 8 - s, s == 1 ? c.group - 1 : c.group, 0});
            image_of.push_back(image);
        }
        begin.push_back(static_cast<int>(slots.size()));
    }
    if (slots.empty()) {
        slots.push_back(SlotRows{sequence.get(), pitch, 0, 0});
    }
    emu::Array<SlotRows> slot_table(slots);
    emu::Array<int> slot_begin(begin);

    LinearArgs args = {};
    const bool in_place = E == Epilogue::RESIDUAL;
    args.out = (in_place ? extra.get() : out.get()) + c.shift;
    args.a = a.get(), args.w = w.get(), args.bias = bias.get(), args.extra = extra.get() + c.shift;
    args.slots = slot_table.get(), args.slot_begin = slot_begin.get();
    args.m = c.m, args.n = c.n, args.k = c.k, args.a_pitch = a_pitch, args.w_pitch = w_pitch;
    args.extra_pitch = pitch, args.out_pitch = pitch, args.group = c.group, args.a_skip = c.skip;
    out.poison(), sequence.poison();
    const std::vector<fp16> blank = out.copy(), blank_sequence = sequence.copy();
    emu::harness_demand(launch(args));

    std::vector<double> sums(static_cast<std::size_t>(c.m) * c.n),
        weight(static_cast<std::size_t>(c.n) * c.k);
    for (int n = 0; n < c.n; n++) {
        for (int i = 0; i < c.k; i++) {
            weight[n * c.k + i] = value(w[n * w_pitch + i]);
        }
    }
    for (int m = 0; m < c.m; m++) {
        std::vector<double> row(c.k);
        for (int i = 0; i < c.k; i++) {
            row[i] = value(a[(c.skip ? m + m / c.group + 1 : m) * a_pitch + i]);
        }
        for (int n = 0; n < c.n; n++) {
            sums[m * c.n + n] = dot(row.data(), weight.data() + n * c.k, c.k);
        }
    }
    Errors errors;
    const double slack = 4e-6;
    std::vector<fp16> expected_rest = scatter ? blank_sequence : in_place ? before : blank;
    std::vector<fp16> got = scatter ? sequence.copy() : in_place ? extra.copy() : out.copy();
    auto compare = [&](std::size_t at, double expected) {
        errors.add(value(got[at]), expected, slack);
        expected_rest[at] = got[at];
    };
    for (int m = 0; m < c.m; m++) {
        for (int n = 0; n < c.n; n++) {
            const double sum = sums[m * c.n + n], with_bias = sum + value(bias[n]);
            const int image = m / c.group, patch = m % c.group;
            if (scatter) {
                for (int s = begin[image]; s < begin[image + 1]; s++) {
                    if (patch < slots[s].rows) {
                        compare(slots[s].first - sequence.get() +
                                    static_cast<std::size_t>(patch * slots[s].pitch) + n,
                                with_bias);
                    }
                }
            } else if (embed) {
                const std::size_t row = static_cast<std::size_t>(image) * tokens + 1 + patch;
                compare(c.shift + row * pitch + n, sum + value(before[c.shift + (1 + patch) * pitch + n]));
                if (patch == 0) {
                    compare(c.shift + (row - 1) * pitch + n, value(bias[n]) + value(before[c.shift + n]));
                }
            } else if (in_place) {
                const std::size_t at = c.shift + static_cast<std::size_t>(m) * pitch + n;
                compare(at, with_bias + value(before[at]));
            } else {
                compare(c.shift + static_cast<std::size_t>(m) * pitch + n, activation(E, with_bias));
            }
        }
    }
    for (std::size_t i = 0; i < got.size(); i++) {
        demand(got[i].bits == expected_rest[i].bits, "nothing written between and beyond rows:", name);
    }
    std::printf("%-26s m %3d n %3d k %3d seed %llu: %.3f ulp, %.2e\n", name, c.m, c.n, c.k, seed,
                errors.worst, errors.relative());
    // Of one element alone, rounding may cost 2^-11.
    demand(errors.worst <= 0.52 && errors.relative() < (c.m * c.n > 1 ? 4e-4 : 5e-4), "close:", name);
    return got;
}

}  // namespace check

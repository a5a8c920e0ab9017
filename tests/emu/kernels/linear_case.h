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

// A linear layer in memory. What lies beyond round_up(k, 8) in A and W stays NaN: it must not be read, or must not count.
template <Epilogue E> class Layer {
  public:
    Layer(Case of, unsigned long long seed) : c(of), random(seed * 977 + static_cast<unsigned>(c.m * 31 + c.n * 7 + c.k)) {
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
        before = extra.copy();

        // Slots: image i fills i % 3 of them, the last one cut short.
        for (int image = 0; image < images; image++) {
            for (int s = 0; s < (image + 1) % 3; s++) {
                fp16 *first =
                    sequence.get() + c.shift + slots.size() * static_cast<std::size_t>(c.group * (pitch + 8));
                // Sequences of different pitches, none that of `out`.
                slots.push_back(SlotRows{first, pitch + 8 - s, s == 1 ? c.group - 1 : c.group, 0});
            }
            begin.push_back(static_cast<int>(slots.size()));
        }
        if (slots.empty()) {
            slots.push_back(SlotRows{sequence.get(), pitch, 0, 0});
        }
    }

    // Has `launch` run the kernel. Returns what was written to, all of it.
    template <class Launch> std::vector<fp16> run(Launch launch) {
        emu::Array<SlotRows> slot_table(slots);
        emu::Array<int> slot_begin(begin);
        LinearArgs args = {};
        args.out = (IN_PLACE ? extra.get() : out.get()) + c.shift;
        args.a = a.get(), args.w = w.get(), args.bias = bias.get(), args.extra = extra.get() + c.shift;
        args.slots = slot_table.get(), args.slot_begin = slot_begin.get();
        args.m = c.m, args.n = c.n, args.k = c.k, args.a_pitch = a_pitch, args.w_pitch = w_pitch;
        args.extra_pitch = pitch, args.out_pitch = pitch, args.group = c.group, args.a_skip = c.skip;
        out.poison(), sequence.poison();
        std::copy(before.begin(), before.end(), extra.get());
        if (blank.empty()) {
            blank = SCATTER ? sequence.copy() : IN_PLACE ? before : out.copy();
        }
        emu::harness_demand(launch(args));
        return SCATTER ? sequence.copy() : IN_PLACE ? extra.copy() : out.copy();
    }

    // What an earlier launch may be at when this one begins: all but weights.
    void overlap(emu::Before &earlier) const {
        earlier.writes(a).writes(extra).writes(out).reads(out).writes(sequence).reads(sequence);
    }

    // What a run left, against f64.
    __attribute__((no_sanitize("thread"))) void compare(const char *name, const std::vector<fp16> &got,
                                                        unsigned long long seed) const {
        Errors errors;
        std::vector<fp16> rest = blank;
        const auto is = [&](std::size_t at, double expected) {
            errors.add(value(got[at]), expected, 4e-6);
            rest[at] = got[at];
        };
        const std::vector<double> rows = values(a.get(), a.size()), columns = values(w.get(), w.size());
        const std::vector<double> biases = values(bias.get(), bias.size()), added = values(before.data(), before.size());
        for (int m = 0; m < c.m; m++) {
            const int image = m / c.group, patch = m % c.group;
            const double *row = rows.data() + static_cast<std::size_t>(c.skip ? m + m / c.group + 1 : m) * a_pitch;
            for (int n = 0; n < c.n; n++) {
                const double sum = dot(row, columns.data() + static_cast<std::size_t>(n) * w_pitch, c.k);
                const double with_bias = sum + biases[n];
                if (SCATTER) {
                    for (int s = begin[image]; s < begin[image + 1]; s++) {
                        if (patch < slots[s].rows) {
                            is(slots[s].first - sequence.get() + static_cast<std::size_t>(patch * slots[s].pitch) + n,
                               with_bias);
                        }
                    }
                } else if (EMBED) {
                    const std::size_t to = static_cast<std::size_t>(image) * tokens + 1 + patch;
                    is(c.shift + to * pitch + n, sum + added[c.shift + (1 + patch) * pitch + n]);
                    if (patch == 0) {
                        is(c.shift + (to - 1) * pitch + n, biases[n] + added[c.shift + n]);
                    }
                } else {
                    const std::size_t at = c.shift + static_cast<std::size_t>(m) * pitch + n;
                    is(at, IN_PLACE ? with_bias + added[at] : activation(E, with_bias));
                }
            }
        }
        demand(same_bits(got, rest), "nothing written between and beyond rows:", name);
        std::printf("%-26s m %3d n %3d k %3d seed %llu: %.3f ulp, %.2e\n", name, c.m, c.n, c.k, seed, errors.worst,
                    errors.relative());
        // Of one element alone, rounding may cost 2^-11.
        demand(errors.worst <= 0.52 && errors.relative() < (c.m * c.n > 1 ? 4e-4 : 5e-4), "close:", name);
    }

  private:
    static constexpr bool EMBED = E == Epilogue::EMBED, SCATTER = E == Epilogue::SCATTER;
    static constexpr bool IN_PLACE = E == Epilogue::RESIDUAL;

    const Case c;
    Random random;
    const int images = (c.m + c.group - 1) / c.group, tokens = c.group + 1, k8 = round_up(c.k, 8);
    const int a_pitch = k8 + 8 * random.below(2), w_pitch = k8 + 8 * random.below(2), pitch = c.n + c.out_extra;
    const int a_rows = c.skip ? c.m + (c.m - 1) / c.group + 1 : c.m;
    emu::Array<fp16> a{static_cast<std::size_t>(a_rows) * a_pitch}, w{static_cast<std::size_t>(c.n) * w_pitch};
    emu::Array<fp16> bias{static_cast<std::size_t>(c.n)};
    emu::Array<fp16> extra{static_cast<std::size_t>(EMBED ? tokens : c.m) * pitch + c.shift};
    emu::Array<fp16> out{static_cast<std::size_t>(EMBED ? images * tokens : c.m) * pitch + c.shift};
    emu::Array<fp16> sequence{static_cast<std::size_t>(2 * images + 1) * c.group * (pitch + 8) + c.shift};
    std::vector<fp16> before, blank;  // extra, and what is written to, as they were
    std::vector<int> begin{0};
    std::vector<SlotRows> slots;
};

// Fills memory, has `launch` run the kernel on it, compares. Returns what was written to, all of it.
template <Epilogue E, class Launch>
std::vector<fp16> test(const char *name, Case c, unsigned long long seed, Launch launch) {
    Layer<E> layer(c, seed);
    const std::vector<fp16> got = layer.run(launch);
    layer.compare(name, got, seed);
    return got;
}

}  // namespace check

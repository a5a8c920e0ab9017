// fold.cu against f64: tails of rows and columns, gaps between rows, scaled rows, no norm, dry runs; what is beyond fp16,
// and what was not finite before.

#include "fold.cu"
#include "harness.h"

#include "check.h"

using namespace check;

namespace {

constexpr unsigned short PLUS = 0x7c00, MINUS = 0xfc00, NOT_A_NUMBER = 0x7e01;
constexpr unsigned COUNTED = 7;  // before: it is added to

struct Case {
    int n, k, gap, scaled;
    float scale;
    bool norm, dry;
};

struct Fold {
    Case c;
    int pitch = c.k + c.gap;
    emu::Array<fp16> w{static_cast<std::size_t>(c.n) * pitch}, bias{static_cast<std::size_t>(c.n)};
    emu::Array<fp16> gamma{static_cast<std::size_t>(c.k)}, beta{static_cast<std::size_t>(c.k)};
    emu::Array<float> sums{static_cast<std::size_t>(c.n)}, bias32{static_cast<std::size_t>(c.n)};
    emu::Array<unsigned> beyond{1};

    // Gaps between rows hold infinities: they count nowhere.
    Fold(Case of, unsigned long long seed) : c(of) {
        Random random(seed + static_cast<unsigned>(c.n * 31 + c.k));
        w.fill(fp16{PLUS}), beyond.fill(COUNTED);
        for (int i = 0; i < c.k; i++) {
            gamma[i] = half(1 + 0.3 * random.normal()), beta[i] = half(random.normal());
            for (int r = 0; r < c.n; r++) {
                w[at(r, i)] = half(random.normal());
            }
        }
        for (int r = 0; r < c.n; r++) {
            bias[r] = half(random.normal());
        }
        sums.poison(), bias32.poison();
    }
    std::size_t at(int row, int column) const { return static_cast<std::size_t>(row) * pitch + column; }
    void run(unsigned long long seed) {
        FoldArgs args = {};
        args.w = w.get(), args.bias = bias.get(), args.beyond = beyond.get();
        if (c.norm) {
            args.column_sums = sums.get(), args.bias32 = bias32.get(), args.gamma = gamma.get(), args.beta = beta.get();
        }
        args.n = c.n, args.k = c.k, args.pitch = pitch, args.scaled = c.scaled, args.scale = c.scale, args.dry = c.dry;
        emu::harness_demand(EMU_LAUNCH_SEED(seed, fold_norm, ((c.n + ROWS - 1) / ROWS), (THREADS), 0, args));
    }
};

template <class T> void untouched(const emu::Array<T> &array, const std::vector<T> &before, const char *what) {
    const std::vector<T> after = array.copy();
    demand(std::memcmp(after.data(), before.data(), before.size() * sizeof(T)) == 0, "not to be written:", what);
}

void close(double got, double expected, double size, const char *what) {
    demand(std::fabs(got - expected) <= 4e-7 * size, "close:", what);
}

void test(Case c, unsigned long long seed) {
    Fold fold(c, seed);
    const std::vector<fp16> before = fold.w.copy(), bias = fold.bias.copy();
    const std::vector<float> sums = fold.sums.copy(), bias32 = fold.bias32.copy();
    fold.run(seed);
    demand(fold.beyond[0] == COUNTED, "all of it fits");
    if (c.dry) {
        untouched(fold.w, before, "W of a dry run");
    }
    if (c.dry || c.norm) {
        untouched(fold.bias, bias, "the bias");
    }
    if (c.dry || !c.norm) {
        untouched(fold.sums, sums, "column sums"), untouched(fold.bias32, bias32, "bias32");
    }
    Errors errors;
    std::vector<fp16> rest = before;
    for (int r = 0; r < c.n && !c.dry; r++) {
        const double scale = r < c.scaled ? static_cast<double>(c.scale) : 1;
        double sum = 0, sum_size = 0, shift = value(bias[r]), shift_size = std::fabs(shift);
        for (int i = 0; i < c.k; i++) {
            const double given = value(before[fold.at(r, i)]), got = value(fold.w[fold.at(r, i)]);
            errors.add(got, given * (c.norm ? value(fold.gamma[i]) : 1) * scale);
            rest[fold.at(r, i)] = fold.w[fold.at(r, i)];
            sum += got, sum_size += std::fabs(got);
            shift += value(fold.beta[i]) * given, shift_size += std::fabs(value(fold.beta[i]) * given);
        }
        if (c.norm) {
            close(static_cast<double>(fold.sums[r]), sum, sum_size, "the sum of what was stored");
            close(static_cast<double>(fold.bias32[r]), shift * scale, shift_size * scale, "the bias and beta W");
        } else {
            errors.add(value(fold.bias[r]), value(bias[r]) * scale);
        }
    }
    untouched(fold.w, rest, "gaps between rows");
    std::printf("n %d k %4d gap %2d scaled %d%s%s: %.3f ulp\n", c.n, c.k, c.gap, c.scaled, c.norm ? "" : " no norm",
                c.dry ? " dry" : "", errors.worst);
    demand(errors.worst <= 0.501, "fold");
}

// Products about the end of fp16: 65520 and more are beyond it. Weights that were not finite stay so, and do not count.
void ends_of_fp16(bool norm, bool dry, unsigned long long seed) {
    Fold fold({6, 1040, 8, 3, norm ? 0.125f : 4.0f, norm, dry}, seed);
    unsigned expected = 0;
    const auto plant = [&](int row, int column, double w, double gamma, bool beyond) {
        for (int r = 0; r < fold.c.n && norm; r++) {  // the others at such a gamma would be beyond it too
            fold.w[fold.at(r, column)] = half(0);
        }
        fold.w[fold.at(row, column)] = half(w), fold.gamma[column] = half(gamma);
        expected += beyond;
    };
    if (norm) {
        plant(4, 0, 65504, 1, false);
        plant(5, 1, -65504, 1, false);
        plant(4, 9, 40000, 1.637, false);   // 65488
        plant(4, 10, 40000, 1.6376953125, false);  // 65507.8: the largest number is nearer
        plant(4, 11, 40000, 1.638671875, true);    // 65546.9
        plant(5, 1039, -300, 300, true);
        plant(3, 257, 60000, 60000, true);
        plant(3, 258, 60000, -60000, true);
        plant(0, 259, 300, 300, false);     // an eighth of it
        plant(2, 300, 60000, 60000, true);  // an eighth is still too much
        plant(5, 777, 0, INFINITY, true);   // no number, in all rows
        expected += static_cast<unsigned>(fold.c.n) - 1;
    } else {
        plant(0, 0, 16376, 9, false);
        plant(2, 1039, -16384, 9, true);
        plant(1, 258, 40000, 9, true);
        plant(3, 258, 65504, 9, false);     // not scaled
    }
    const struct {
        int row, column;
        unsigned short bits;
    } odd[] = {{0, 700, PLUS}, {1, 701, MINUS}, {4, 702, NOT_A_NUMBER}, {5, 703, PLUS}};
    for (const auto &o : odd) {
        fold.gamma[o.column] = half(2);
        fold.w[fold.at(o.row, o.column)] = fp16{o.bits};
    }
    const std::vector<fp16> before = fold.w.copy();
    fold.run(seed);
    demand(fold.beyond[0] == COUNTED + expected, "what fp16 does not hold is counted");
    if (dry) {
        untouched(fold.w, before, "W of a dry run");
        return;
    }
    for (const auto &o : odd) {
        const unsigned bits = fold.w[fold.at(o.row, o.column)].bits;
        demand(o.bits == NOT_A_NUMBER ? (bits & 0x7fff) > PLUS : bits == o.bits, "what is not finite stays so");
    }
}

}  // namespace

int main() {
    for (const unsigned long long seed : seeds(2)) {
        const Case cases[] = {
            {1, 8, 0, 0, 0.125f, true, false},      {5, 264, 8, 3, 0.125f, true, false},
            {6, 1032, 24, 6, 0.3f, true, false},    {4, 256, 0, 4, 0.125f, true, false},
            {9, 1600, 8, 5, 0.125f, true, false},   {7, 1040, 0, 4, 0.125f, false, false},
            {5, 16, 16, 1, 0.3f, false, false},     {6, 520, 8, 3, 0.125f, true, true},
            {6, 520, 8, 3, 0.125f, false, true},
        };
        for (const Case &c : cases) {
            test(c, seed);
        }
        for (const bool dry : {false, true}) {
            ends_of_fp16(true, dry, seed);
            ends_of_fp16(false, dry, seed);
        }
    }
    return 0;
}

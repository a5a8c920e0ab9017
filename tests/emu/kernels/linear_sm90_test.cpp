// Hopper's linear layers against f64: every epilogue, both schedules, tiles of all kinds, few blocks for many tiles;
// norms folded in, statistics of rows, dropped rows.

#include "linear_sm90.cuh"

#include <algorithm>

#include "linear_case.h"
#include "tensor_map.h"

using namespace check;

// Small tiles, for what a tile can be: sums of one wgmma or two, a last half of 32 columns or none.
#define ENTRY(name, epilogue, ...)                                                                           \
    extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP, 1)                                          \
        name(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap w,                       \
             const __grid_constant__ LinearSm90Args args) {                                                  \
        hopper::linear<HopperTile<__VA_ARGS__>, Epilogue::epilogue>(&a, &w, args);                           \
    }
#define TILES(kernel, epilogue)                      \
    ENTRY(kernel##_128x48, epilogue, 128, 48, false) \
    ENTRY(kernel##_256x32, epilogue, 256, 32, false) \
    ENTRY(kernel##_64x32_pp, epilogue, 64, 32, true) \
    ENTRY(kernel##_128x16_pp, epilogue, 128, 16, true) \
    ENTRY(kernel##_128x48_c2, epilogue, 128, 48, false, 2) \
    ENTRY(kernel##_64x32_pp_c2, epilogue, 64, 32, true, 2)
#ifndef EPILOGUES
#define EPILOGUES            \
    EACH(BIAS, bias)             \
    EACH(QUICK_GELU, quick_gelu) \
    EACH(GELU, gelu)             \
    EACH(RESIDUAL, residual)     \
    EACH(EMBED, embed)           \
    EACH(SCATTER, scatter)
#endif
#define EACH(epilogue, kernel) TILES(kernel, epilogue)
EPILOGUES
#undef EACH

namespace {

// [rows][columns], rows `pitch` apart, in boxes of 64 columns.
TensorMap map_of(const fp16 *first, int rows, int columns, int pitch, int box_rows) {
    TensorMap map;
    const std::uint64_t sizes[2] = {static_cast<std::uint64_t>(columns), static_cast<std::uint64_t>(rows)};
    const std::uint64_t strides[1] = {static_cast<std::uint64_t>(pitch) * 2};
    const std::uint32_t box[2] = {64, static_cast<std::uint32_t>(box_rows)};
    const char *wants = emu::encode_tensor_map(&map, 2, reinterpret_cast<std::uint64_t>(first), sizes, strides, box, true);
    demand(wants == nullptr, "a map wants", wants == nullptr ? "" : wants);
    return map;
}

template <class Tile, auto kernel>
emu::Fault launch(const char *name, const LinearSm90Args &args, unsigned long long seed) {
    const LinearArgs &l = args.linear;
    // One block, or cluster, for all tiles, some, or one for each.
    const int tiles = hopper::Tiles<Tile>(l, 0, 1).count, some = seed % 3 == 0 ? 1 : seed % 3 == 1 ? (tiles + 2) / 3 : tiles;
    return emu::launch_cluster_seed<kernel>(
        name, seed, Tile::CLUSTER, emu::Dim(some * Tile::CLUSTER), emu::Dim(Tile::THREADS), Tile::SHARED_BYTES, kernel,
        map_of(l.a, l.m, l.k, l.a_pitch, Tile::BM), map_of(l.w, l.n, l.k, l.w_pitch, Tile::BN / Tile::CLUSTER), args);
}

template <class Tile, Epilogue E, auto kernel>
std::vector<fp16> run(const char *name, Case c, unsigned long long seed) {
    return test<E>(name, c, seed, [&](const LinearArgs &linear) {
        LinearSm90Args args = {};
        args.linear = linear;
        return launch<Tile, kernel>(name, args, seed);
    });
}

bool same_bits(const std::vector<fp16> &a, const std::vector<fp16> &b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](fp16 x, fp16 y) { return x.bits == y.bits; });
}

// A matrix of fp16 with rows of a mean far from 0 and a few channels far out, as towers have them.
struct Rows {
    int rows, width;
    emu::Array<fp16> x;
    Rows(int r, int w, double mean, double outlier, Random &random)
        : rows(r), width(w), x(static_cast<std::size_t>(r) * w) {
        for (int i = 0; i < r; i++) {
            for (int j = 0; j < w; j++) {
                x[static_cast<std::size_t>(i * w + j)] =
                    half(mean + random.normal() + (j % 37 == 5 ? outlier * (i % 2 ? 1 : -1) : 0));
            }
        }
    }
    double at(int r, int c) const { return value(x[static_cast<std::size_t>(r * width + c)]); }
};

// The norm folded into bias and quick_gelu: W is gamma W already, as fold.cu makes it. Partials as the kernel before
// it leaves them, made here in f32.
template <class Tile, Epilogue E, auto kernel> void folds_the_norm(const char *name, unsigned long long seed) {
    struct Of {
        int m, n, k;
        double mean, outlier;
    };
    for (const Of of : {Of{70, 56, 208, 0, 0}, Of{65, 40, 48, 30, 0}, Of{130, 72, 848, 0.5, 300}}) {
        Random random(seed + 77);
        const Rows a(of.m, of.k, of.mean, of.outlier, random);
        emu::Array<fp16> w(static_cast<std::size_t>(of.n) * of.k), out(static_cast<std::size_t>(of.m) * of.n);
        emu::Array<float> sums(of.n), bias(of.n);
        const int parts = of.k / PART;
        emu::Array<RowPart> partials(static_cast<std::size_t>(of.m) * parts);
        for (int n = 0; n < of.n; n++) {
            double sum = 0;
            for (int k = 0; k < of.k; k++) {
                const fp16 x = half(random.normal() / std::sqrt(of.k));
                w[static_cast<std::size_t>(n * of.k + k)] = x;
                sum += value(x);
            }
            sums[n] = static_cast<float>(sum), bias[n] = static_cast<float>(random.normal());
        }
        std::vector<double> mean(of.m), rstd(of.m);
        for (int m = 0; m < of.m; m++) {
            double sum = 0, squares = 0;
            for (int k = 0; k < of.k; k++) {
                sum += a.at(m, k);
            }
            mean[m] = sum / of.k;
            for (int k = 0; k < of.k; k++) {
                squares += (a.at(m, k) - mean[m]) * (a.at(m, k) - mean[m]);
            }
            rstd[m] = 1 / std::sqrt(squares / of.k + 1e-5);
            for (int p = 0; p < parts; p++) {
                double own = 0, about = 0;
                for (int k = p * PART; k < (p + 1) * PART; k++) {
                    own += a.at(m, k) / PART;
                }
                for (int k = p * PART; k < (p + 1) * PART; k++) {
                    about += (a.at(m, k) - own) * (a.at(m, k) - own);
                }
                partials[static_cast<std::size_t>(m * parts + p)] =
                    RowPart{static_cast<float>(own), static_cast<float>(about)};
            }
        }
        LinearSm90Args args = {};
        args.linear.out = out.get(), args.linear.a = a.x.get(), args.linear.w = w.get();
        args.linear.m = of.m, args.linear.n = of.n, args.linear.k = of.k, args.linear.group = 1;
        args.linear.a_pitch = args.linear.w_pitch = of.k, args.linear.out_pitch = of.n;
        args.partials = partials.get(), args.column_sums = sums.get(), args.bias32 = bias.get(), args.eps = 1e-5f;
        out.poison();
        emu::harness_demand(launch<Tile, kernel>(name, args, seed));
        Errors errors;
        for (int m = 0; m < of.m; m++) {
            for (int n = 0; n < of.n; n++) {
                double sum = 0, size = 0;
                for (int k = 0; k < of.k; k++) {
                    const double wk = value(w[static_cast<std::size_t>(n * of.k + k)]);
                    sum += (a.at(m, k) - mean[m]) * wk;
                    size += std::fabs(a.at(m, k) * wk);
                }
                // f32's sums go through numbers of `size` before they cancel.
                errors.add(value(out[static_cast<std::size_t>(m * of.n + n)]),
                           activation(E, sum * rstd[m] + static_cast<double>(bias[n])), 4e-6 + 1.5e-7 * size * rstd[m]);
            }
        }
        std::printf("%-26s m %3d n %3d k %3d mean %.1f: %.3f ulp, %.2e\n", name, of.m, of.n, of.k, of.mean, errors.worst,
                    errors.relative());
        demand(errors.worst <= 0.52 && errors.relative() < 5e-4, "close:", name);
    }
}

// A residual that leaves statistics, and drops the first row of each image.
template <class Tile, auto kernel> void leaves_statistics(const char *name, unsigned long long seed, int drop) {
    const int m = drop == 0 ? 131 : 13 * drop, n = 80, k = 72, parts = n / PART;
    Random random(seed + 5);
    const Rows a(m, k, 0, 0, random), w(n, k, 0, 0, random), extra(m, n, 30, 300, random);
    emu::Array<fp16> bias(n);
    bias.fill(half(0.5));
    const int kept = drop == 0 ? m : m - m / drop;
    emu::Array<fp16> out(static_cast<std::size_t>(kept) * n);
    emu::Array<RowPart> partials(static_cast<std::size_t>(kept) * parts);
    LinearSm90Args args = {};
    args.linear.out = out.get(), args.linear.a = a.x.get(), args.linear.w = w.x.get(), args.linear.bias = bias.get();
    args.linear.extra = extra.x.get(), args.linear.extra_pitch = n;
    args.linear.m = m, args.linear.n = n, args.linear.k = k, args.linear.group = 1;
    args.linear.a_pitch = args.linear.w_pitch = k, args.linear.out_pitch = n;
    args.drop = drop;
    out.poison();
    emu::harness_demand(launch<Tile, kernel>(name, args, seed));
    const std::vector<fp16> alone = out.copy();
    args.partials_out = partials.get();
    out.poison(), partials.poison();
    emu::harness_demand(launch<Tile, kernel>(name, args, seed + 1));
    demand(same_bits(out.copy(), alone), "statistics change nothing else:", name);
    Errors errors;
    for (int row = 0; row < kept; row++) {
        const int from = drop == 0 ? row : row / (drop - 1) * drop + 1 + row % (drop - 1);
        for (int column = 0; column < n; column++) {
            double sum = 0.5 + extra.at(from, column);
            for (int i = 0; i < k; i++) {
                sum += a.at(from, i) * w.at(column, i);
            }
            errors.add(value(out[static_cast<std::size_t>(row * n + column)]), sum, 4e-5);
        }
        for (int p = 0; p < parts; p++) {
            double mean = 0, squares = 0;
            const auto x = [&](int i) { return value(out[static_cast<std::size_t>(row * n + p * PART + i)]); };
            for (int i = 0; i < PART; i++) {
                mean += x(i) / PART;
            }
            for (int i = 0; i < PART; i++) {
                squares += (x(i) - mean) * (x(i) - mean);
            }
            const RowPart got = partials[static_cast<std::size_t>(row * parts + p)];
            demand(std::fabs(got.mean - mean) <= 2e-6 * (1 + std::fabs(mean)), "means:", name);
            demand(std::fabs(got.squares - squares) <= 1e-5 * (1 + squares), "sums of squares:", name);
        }
    }
    demand(errors.worst <= 0.52, "close:", name);
}

// Whatever the shape and the number of blocks, each tile is somebody's, once; those outside of D are a cluster's alone.
template <class Tile> void covers() {
    LinearArgs args = {};
    for (args.m = 1; args.m < 40 * Tile::BM; args.m += 3 * Tile::BM + 5) {
        for (args.n = 8; args.n < 9 * Tile::BN; args.n += Tile::BN + 8) {
            const int m_tiles = ceil_div(args.m, Tile::BM), n_tiles = ceil_div(args.n, Tile::BN);
            for (int blocks = Tile::CLUSTER; blocks <= 132; blocks += 10 * Tile::CLUSTER) {
                std::vector<int> seen(static_cast<std::size_t>((m_tiles + 1) * n_tiles));
                for (int block = 0; block < blocks; block++) {
                    const hopper::Tiles<Tile> tiles(args, block, blocks);
                    for (int tile = tiles.first; tile < tiles.count; tile += tiles.step) {
                        const TileAt at = tiles.at(tile);
                        demand(at.m % Tile::BM == 0 && at.n % Tile::BN == 0, "tiles lie side by side");
                        const int m = at.m / Tile::BM, n = at.n / Tile::BN;
                        demand(m < m_tiles + (Tile::CLUSTER > 1) && n < n_tiles, "a tile lies outside");
                        demand(seen[static_cast<std::size_t>(m * n_tiles + n)]++ == 0, "a tile is done twice");
                    }
                }
                for (int i = 0; i < m_tiles * n_tiles; i++) {
                    demand(seen[static_cast<std::size_t>(i)] == 1, "a tile is left out");
                }
            }
        }
    }
}

template <Epilogue E, auto coop, auto high, auto pair, auto flat, auto coop2, auto pair2>
void all(const char *name, unsigned long long seed) {
    const Case cases[] = {
        {150, 136, 840, 50, 0, 0, 0}, {70, 200, 40, 35, 8, 0, 0}, {258, 24, 592, 43, 16, 0, 8},
        {1, 8, 1, 1, 0, 0, 0},        {64, 64, 289, 16, 0, 0, 0},
    };
    using Coop = HopperTile<128, 48, false>;
    using High = HopperTile<256, 32, false>;
    using Pair = HopperTile<64, 32, true>;
    using Flat = HopperTile<128, 16, true>;
    using Coop2 = HopperTile<128, 48, false, 2>;
    using Pair2 = HopperTile<64, 32, true, 2>;
    for (Case c : cases) {
        c.shift = E == Epilogue::SCATTER ? static_cast<int>(seed) % 9 : c.shift;
        c.out_extra += E == Epilogue::SCATTER ? static_cast<int>(seed) % 4 : 0;
        const auto one = run<Coop, E, coop>((std::string(name) + "_128x48").c_str(), c, seed);
        demand(same_bits(one, run<High, E, high>((std::string(name) + "_256x32").c_str(), c, seed)) &&
                   same_bits(one, run<Pair, E, pair>((std::string(name) + "_64x32_pp").c_str(), c, seed)) &&
                   same_bits(one, run<Flat, E, flat>((std::string(name) + "_128x16_pp").c_str(), c, seed)) &&
                   same_bits(one, run<Coop2, E, coop2>((std::string(name) + "_128x48_c2").c_str(), c, seed)) &&
                   same_bits(one, run<Pair2, E, pair2>((std::string(name) + "_64x32_pp_c2").c_str(), c, seed)),
               "bits hang on the tile:", name);
    }
    if constexpr (E == Epilogue::BIAS || E == Epilogue::QUICK_GELU) {
        folds_the_norm<Coop, E, coop>(name, seed);
        folds_the_norm<Pair, E, pair>(name, seed);
        folds_the_norm<Flat, E, flat>(name, seed);
        folds_the_norm<Pair2, E, pair2>(name, seed);
    }
    if constexpr (E == Epilogue::RESIDUAL) {
        for (const int drop : {0, 10, 2}) {
            leaves_statistics<Coop, coop>(name, seed, drop);
            leaves_statistics<Pair, pair>(name, seed, drop);
        }
    }
}

}  // namespace

int main() {
    for (const unsigned long long seed : seeds(3)) {
#define EACH(epilogue, kernel) \
    all<Epilogue::epilogue, kernel##_128x48, kernel##_256x32, kernel##_64x32_pp, kernel##_128x16_pp, kernel##_128x48_c2, \
        kernel##_64x32_pp_c2>(#kernel, seed);
        EPILOGUES
    }
    covers<HopperTile<128, 48, false>>();
    covers<HopperTile<64, 32, true, 2>>();
    return 0;
}

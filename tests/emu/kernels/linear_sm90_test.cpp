// Hopper's linear layers against f64: every epilogue, both schedules, tiles of all kinds, few blocks for many tiles;
// norms folded in, statistics of rows, dropped rows. Each launch begins while an earlier one still writes what it reads.

#include <algorithm>

#include "linear_sm90_entries.h"

#include "linear_case.h"
#include "tensor_map.h"

using namespace check;

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

// An entry. `blocks` % 3: one block, or cluster, for all tiles, some, or one for each.
struct Entry {
    const char *name;
    emu::Fault (*launch)(const char *name, const LinearSm90Args &args, unsigned long long seed, unsigned long long blocks);
};

template <class Tile, auto kernel>
emu::Fault launch(const char *name, const LinearSm90Args &args, unsigned long long seed, unsigned long long blocks) {
    const LinearArgs &l = args.linear;
    const int tiles = hopper::Tiles<Tile>(l, 0, 1).count;
    const int some = blocks % 3 == 0 ? 1 : blocks % 3 == 1 ? (tiles + 2) / 3 : tiles;
    return emu::launch_cluster_seed<kernel>(
        name, seed, Tile::CLUSTER, emu::Dim(some * Tile::CLUSTER), emu::Dim(Tile::THREADS), Tile::SHARED_BYTES, kernel,
        map_of(l.a, l.m, l.k, l.a_pitch, Tile::BM), map_of(l.w, l.n, l.k, l.w_pitch, Tile::BN / Tile::CLUSTER), args);
}

// All tiles, which agree on every bit.
template <Epilogue E> void shapes(const std::vector<Entry> &entries, unsigned long long seed) {
    Case cases[] = {
        {70, 72, 840, 35, 0, 0, 0},   // the ring goes round twice in a tile
        {70, 200, 40, 35, 8, 0, 0},   // and here over many
        {258, 24, 136, 43, 16, 0, 8}, // a second tile of 256 has two rows
        {1, 8, 1, 1, 0, 0, 0},
        {64, 64, 289, 16, 0, 0, 0},
    };
    unsigned long long blocks = seed;
    for (Case c : cases) {
        c.shift = E == Epilogue::SCATTER ? static_cast<int>(seed) % 9 : c.shift;
        c.out_extra += E == Epilogue::SCATTER ? static_cast<int>(seed) % 4 : 0;
        Layer<E> layer(c, seed);
        std::vector<fp16> first;
        for (const Entry &entry : entries) {
            const std::vector<fp16> got = layer.run([&](const LinearArgs &linear) {
                LinearSm90Args args = {};
                args.linear = linear;
                emu::Before before;
                layer.overlap(before);
                return entry.launch(entry.name, args, seed, blocks++);
            });
            if (first.empty()) {
                layer.compare(entry.name, got, seed);
                first = got;
            }
            demand(same_bits(got, first), "bits hang on the tile:", entry.name);
        }
    }
}

// Rows of a mean far from 0 and a few channels far out, as towers have them.
struct Rows {
    emu::Array<fp16> x;
    std::vector<double> at;
    Rows(int rows, int width, double mean, double outlier, Random &random, double deviation = 1)
        : x(static_cast<std::size_t>(rows) * width) {
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < width; j++) {
                x[static_cast<std::size_t>(i * width + j)] =
                    half(mean + deviation * random.normal() + (j % 37 == 5 ? outlier * (i % 2 ? 1 : -1) : 0));
            }
        }
        at = values(x.get(), x.size());
    }
};

// (mean, sum of squares about it) of `count` numbers.
struct About {
    double mean = 0, squares = 0;
    __attribute__((no_sanitize("thread"))) About(const double *x, int count) {
        for (int i = 0; i < count; i++) {
            mean += x[i] / count;
        }
        for (int i = 0; i < count; i++) {
            squares += (x[i] - mean) * (x[i] - mean);
        }
    }
};

// The norm folded into bias and quick_gelu: W is gamma W already, as fold.cu makes it. Partials as the kernel before
// it leaves them, made here in f32.
template <Epilogue E> void folds_the_norm(const Entry &entry, unsigned long long seed) {
    const struct {
        int m, n, k;
        double mean, outlier, deviation;
    } cases[] = {
        {70, 56, 208, 0, 0, 1}, {65, 40, 48, 30, 0, 1}, {66, 72, 848, 0.5, 300, 1},
        {6, 8, 32, 0.5, 0, 0.00316},  // a variance as small as eps
    };
    unsigned long long blocks = seed;
    for (const auto &of : cases) {
        Random random(seed + 77);
        const int m = of.m, n = of.n, k = of.k, parts = k / PART;
        const Rows a(m, k, of.mean, of.outlier, random, of.deviation), w(n, k, 0, 0, random, 1 / std::sqrt(k));
        emu::Array<fp16> out(static_cast<std::size_t>(m) * n);
        emu::Array<float> sums(n), bias(n);
        emu::Array<RowPart> partials(static_cast<std::size_t>(m) * parts);
        for (int j = 0; j < n; j++) {
            sums[j] = static_cast<float>(About(&w.at[static_cast<std::size_t>(j * k)], k).mean * k);
            bias[j] = static_cast<float>(random.normal());
        }
        for (int p = 0; p < m * parts; p++) {
            const About part(&a.at[static_cast<std::size_t>(p * PART)], PART);
            partials[static_cast<std::size_t>(p)] =
                RowPart{static_cast<float>(part.mean), static_cast<float>(part.squares)};
        }
        LinearSm90Args args = {};
        args.linear.out = out.get(), args.linear.a = a.x.get(), args.linear.w = w.x.get();
        args.linear.m = m, args.linear.n = n, args.linear.k = k, args.linear.group = 1;
        args.linear.a_pitch = args.linear.w_pitch = k, args.linear.out_pitch = n;
        args.partials = partials.get(), args.column_sums = sums.get(), args.bias32 = bias.get(), args.eps = 1e-5f;
        out.poison();
        {
            emu::Before before;
            before.writes(a.x).writes(partials).reads(out);
            emu::harness_demand(entry.launch(entry.name, args, seed, blocks++));
        }
        const std::vector<double> got = values(out.get(), out.size());
        std::vector<double> centred(k), row_sizes(k), sizes(w.at.size());
        std::transform(w.at.begin(), w.at.end(), sizes.begin(), [](double x) { return std::fabs(x); });
        Errors errors;
        for (int i = 0; i < m; i++) {
            const double *row = &a.at[static_cast<std::size_t>(i * k)];
            const About all(row, k);
            const double rstd = 1 / std::sqrt(all.squares / k + 1e-5);
            std::transform(row, row + k, centred.begin(), [&](double x) { return x - all.mean; });
            std::transform(row, row + k, row_sizes.begin(), [](double x) { return std::fabs(x); });
            for (int j = 0; j < n; j++) {
                const std::size_t at = static_cast<std::size_t>(j * k);
                const double sum = dot(centred.data(), &w.at[at], k), size = dot(row_sizes.data(), &sizes[at], k);
                // f32's sums go through numbers of `size` before they cancel.
                errors.add(got[static_cast<std::size_t>(i * n + j)],
                           activation(E, sum * rstd + static_cast<double>(bias[j])), 4e-6 + 1.5e-7 * size * rstd);
            }
        }
        std::printf("%-26s m %3d n %3d k %3d mean %.1f: %.3f ulp, %.2e\n", entry.name, m, n, k, of.mean, errors.worst,
                    errors.relative());
        demand(errors.worst <= 0.52 && errors.relative() < 5e-4, "close:", entry.name);
    }
}

// A residual that leaves statistics, and drops the first row of each image.
void leaves_statistics(const Entry &entry, unsigned long long seed, int drop) {
    const int m = drop == 0 ? 131 : 13 * drop, n = 80, k = 72, parts = n / PART;
    Random random(seed + 5);
    const Rows a(m, k, 0, 0, random), w(n, k, 0, 0, random, 1 / std::sqrt(k)), extra(m, n, 30, 300, random);
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
    emu::Before before;
    before.writes(a.x).writes(extra.x).reads(out).reads(partials);
    out.poison();
    emu::harness_demand(entry.launch(entry.name, args, seed, seed));
    const std::vector<fp16> alone = out.copy();
    args.partials_out = partials.get();
    out.poison(), partials.poison();
    emu::harness_demand(entry.launch(entry.name, args, seed, seed + 1));
    demand(same_bits(out.copy(), alone), "statistics change nothing else:", entry.name);
    const std::vector<double> got = values(out.get(), out.size());
    Errors errors;
    for (int row = 0; row < kept; row++) {
        const int from = drop == 0 ? row : row / (drop - 1) * drop + 1 + row % (drop - 1);
        for (int column = 0; column < n; column++) {
            const double sum = dot(&a.at[static_cast<std::size_t>(from * k)], &w.at[static_cast<std::size_t>(column * k)], k);
            errors.add(got[static_cast<std::size_t>(row * n + column)],
                       sum + 0.5 + extra.at[static_cast<std::size_t>(from * n + column)], 4e-5);
        }
        for (int p = 0; p < parts; p++) {
            const About is(&got[static_cast<std::size_t>(row * n + p * PART)], PART);
            const RowPart part = partials[static_cast<std::size_t>(row * parts + p)];
            demand(std::fabs(part.mean - is.mean) <= 2e-6 * (1 + std::fabs(is.mean)), "means:", entry.name);
            demand(std::fabs(part.squares - is.squares) <= 2e-6 * (1 + is.squares), "sums of squares:", entry.name);
        }
    }
    demand(errors.worst <= 0.52, "close:", entry.name);
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

template <Epilogue E> void all(const std::vector<Entry> &entries, unsigned long long seed) {
    shapes<E>(entries, seed);
    for (const Entry &entry : entries) {
        if (E == Epilogue::BIAS || E == Epilogue::QUICK_GELU) {
            folds_the_norm<E>(entry, seed);
        }
        for (const int drop : {0, 10, 2}) {
            if (E == Epilogue::RESIDUAL) {
                leaves_statistics(entry, seed, drop);
            }
        }
    }
}

}  // namespace

int main() {
    for (const unsigned long long seed : seeds(3)) {
#define ENTRY_OF(name, epilogue, ...) Entry{#name, launch<HopperTile<__VA_ARGS__>, name>},
#define EACH(epilogue) all<Epilogue::epilogue>({TILES_##epilogue(ENTRY_OF)}, seed);
        EPILOGUES
    }
    covers<HopperTile<128, 48, false, 1>>();
    covers<HopperTile<64, 32, true, 2>>();
    return 0;
}

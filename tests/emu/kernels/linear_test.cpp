// Every epilogue of both tiles of linear_sm80.cu against f64: tails in M, N and K, odd pitches, several slots
// per image.

#include "linear_sm80.cu"

#include <algorithm>

#include "linear_case.h"

using namespace check;

namespace {

template <class Tile, Epilogue E, auto kernel>
std::vector<fp16> run(const char *name, Case c, unsigned long long seed) {
    return test<E>(name, c, seed, [&](const LinearArgs &args) {
        return emu::launch_seed<kernel>(name, seed, emu::Dim(linear_tiles<Tile>(c.m, c.n)),
                                        emu::Dim(Tile::THREADS), Tile::SHARED_BYTES, kernel, args);
    });
}

// Both tiles, which agree on every bit.
#define TEST(epilogue, kernel)                                                                          \
    do {                                                                                                \
        const auto big = run<LinearTile128x128, Epilogue::epilogue, kernel##_128x128>(                  \
            #kernel "_128x128", c, seed);                                                               \
        const auto small =                                                                              \
            run<LinearTile64x64, Epilogue::epilogue, kernel##_64x64>(#kernel "_64x64", c, seed);        \
        demand(std::equal(big.begin(), big.end(), small.begin(),                                        \
                          [](fp16 a, fp16 b) { return a.bits == b.bits; }),                             \
               #kernel " depends on the tile");                                                         \
    } while (0)

// All of them, unless the compiler is told otherwise, as tests/kernel_mutants does: they take a second each.
#ifndef EPILOGUES
#define EPILOGUES                        \
    TEST(BIAS, linear_bias);             \
    TEST(QUICK_GELU, linear_quick_gelu); \
    TEST(GELU, linear_gelu);             \
    TEST(RESIDUAL, linear_residual);     \
    TEST(EMBED, linear_embed);           \
    TEST(SCATTER, linear_scatter);
#endif

}  // namespace

int main() {
    const Case cases[] = {
        {150, 136, 300, 50, 0, 0, 0}, {70, 200, 40, 35, 8, 1, 0}, {66, 17, 588, 33, 0, 0, 0},
        {129, 65, 8, 43, 5, 1, 3},    {1, 1, 1, 1, 0, 0, 1},      {64, 64, 289, 16, 3, 0, 8},
    };
    for (const Case c : cases) {
        for (const unsigned long long seed : seeds(3)) {
            EPILOGUES
        }
    }
    // The order of the tiles reaches each exactly once.
    for (int m = 1; m < 70; m++) {
        for (int n = 1; n < 40; n++) {
            std::vector<int> seen(static_cast<std::size_t>(m * n));
            for (int i = 0; i < m * n; i++) {
                const TileAt at = linear_tile_at(i, m, n);
                demand(at.m >= 0 && at.m < m && at.n >= 0 && at.n < n, "a tile lies outside");
                demand(seen[at.m * n + at.n]++ == 0, "a tile is done twice");
            }
        }
    }
    return 0;
}

// constants.cpp: numbers that the Rust launchers mirror from the kernels' headers, for a test that compares
// them.
//
//     long long emu_constant("linear_128x128.shared_bytes")     -1: no such name
#include <cstring>

#if __has_include("../../../kernels/linear.cuh")
#include "../../../kernels/linear.cuh"
#define LINEAR(stem, Tile)                                                                                  \
    {stem ".bm", Tile::BM}, {stem ".bn", Tile::BN}, {stem ".bk", Tile::BK}, {stem ".stages", Tile::STAGES}, \
        {stem ".threads", Tile::THREADS}, {stem ".shared_bytes", Tile::SHARED_BYTES},
#endif

namespace {

struct Constant {
    const char *name;
    long long value;
};
constexpr Constant CONSTANTS[] = {
#if defined(LINEAR)
    LINEAR("linear_128x128", LinearTile128x128)
        LINEAR("linear_64x64", LinearTile64x64){"linear.group", LINEAR_GROUP},
    {"linear.args_bytes", sizeof(LinearArgs)},
#endif
    {"warp", 32},
};

} // namespace

extern "C" __attribute__((visibility("default"))) long long emu_constant(const char *name) {
    for (const Constant &c : CONSTANTS) {
        if (std::strcmp(c.name, name) == 0) {
            return c.value;
        }
    }
    return -1;
}

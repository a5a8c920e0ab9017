// Both kernels of attention_sm80.cu against f64, over several key tiles with a tail, with small and with
// large logits.

#include "attention_sm80.cu"
#include "harness.h"

#include "attention_check.h"

using namespace check;

namespace {

template <auto kernel, int queries>
std::vector<fp16> test(const char *name, int shared, AttentionCase c, unsigned long long seed) {
    emu::Array<fp16> qkv(c.rows() * c.pitch()), out(c.rows() * c.out_pitch());
    fill(qkv, c, seed);
    out.poison();
    const std::vector<fp16> before = out.copy();
    emu::harness_demand(emu::launch_seed<kernel>(
        name, seed, emu::Dim((c.tokens + queries - 1) / queries, c.heads, c.images), emu::Dim(THREADS),
        shared, kernel, out.get(), qkv.get(), c.tokens, c.heads, c.pitch(), c.out_pitch()));
    compare(out, qkv, c, before, name);
    return out.copy();
}

}  // namespace

int main() {
    const AttentionCase cases[] = {
        {2, 2, 50, 0, 1},
        {1, 2, 113, 8, 1.5},
        {4, 4, 1, 0, 60},  // half of the logits far below 0, and no other key
        {1, 1, 1, 0, 1},
        {1, 1, 111, 0, 1},
        {1, 1, 223, 0, 1},
        {1, 1, 224, 0, 12},
        {1, 1, 130, 0, 60},
        {1, 1, 240, 0, 1},
        {1, 1, 250, 0, 0},
        {1, 1, 340, 16, 2},
    };
    for (const AttentionCase &c : cases) {
        for (const unsigned long long seed : seeds(3)) {
            const auto few = test<attention, 64>("attention", SHARED_BYTES<1>, c, seed);
            const auto many = test<attention_128, 128>("attention_128", SHARED_BYTES<2>, c, seed);
            for (std::size_t i = 0; i < few.size(); i++) {
                demand(few[i].bits == many[i].bits, "the two kernels agree on every bit");
            }
        }
    }
    return 0;
}

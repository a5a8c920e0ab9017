// Both kernels of attention_sm80.cu against f64, over several key tiles with a tail, with small and with
// large logits.

#include "attention_sm80.cu"
#include "harness.h"

#include "check.h"

using namespace check;

namespace {

struct Case {
    int images, heads, tokens, slack;  // slack: elements that rows are longer than needed
    double spread;                     // of q and k: logits spread by spread² / 8 · 8
};

template <auto kernel, int queries>
std::vector<fp16> test(const char *name, int shared, Case c, unsigned long long seed) {
    Random random(seed * 31 + static_cast<unsigned>(c.tokens));
    const int width = c.heads * 64, pitch = 3 * width + c.slack, out_pitch = width + c.slack;
    const std::size_t rows = static_cast<std::size_t>(c.images) * c.tokens;
    emu::Array<fp16> qkv(rows * pitch), out(rows * out_pitch);
    for (std::size_t r = 0; r < rows; r++) {
        for (int i = 0; i < 3 * width; i++) {
            qkv[r * pitch + i] = half(random.normal() * (i < 2 * width ? c.spread : 1));
        }
    }
    out.poison();
    std::vector<fp16> rest = out.copy();
    emu::harness_demand(emu::launch_seed<kernel>(
        name, seed, emu::Dim((c.tokens + queries - 1) / queries, c.heads, c.images), emu::Dim(THREADS),
        shared, kernel, out.get(), qkv.get(), c.tokens, c.heads, pitch, out_pitch));
    Errors errors;
    for (int image = 0; image < c.images; image++) {
        for (int head = 0; head < c.heads; head++) {
            const fp16 *base = qkv.get() + static_cast<std::size_t>(image) * c.tokens * pitch + head * 64;
            std::vector<double> parts[3];  // Q, K, V [T][64]
            for (int part = 0; part < 3; part++) {
                for (int t = 0; t < c.tokens; t++) {
                    for (int d = 0; d < 64; d++) {
                        parts[part].push_back(value(base[t * pitch + part * width + d]));
                    }
                }
            }
            const double *q = parts[0].data(), *k = parts[1].data(), *v = parts[2].data();
            for (int t = 0; t < c.tokens; t++) {
                std::vector<double> p(c.tokens), o(64);
                double top = -INFINITY, sum = 0;
                for (int j = 0; j < c.tokens; j++) {
                    p[j] = dot(q + t * 64, k + j * 64, 64) / 8;
                    top = std::fmax(top, p[j]);
                }
                for (int j = 0; j < c.tokens; j++) {
                    p[j] = std::exp(p[j] - top), sum += p[j];
                    add_scaled(o.data(), p[j], v + j * 64, 64);
                }
                for (int d = 0; d < 64; d++) {
                    const std::size_t at =
                        (static_cast<std::size_t>(image) * c.tokens + t) * out_pitch + head * 64 + d;
                    errors.add(value(out[at]), o[d] / sum);
                    rest[at] = out[at];
                }
            }
        }
    }
    for (std::size_t i = 0; i < out.size(); i++) {
        demand(out[i].bits == rest[i].bits, "nothing written between and beyond rows:", name);
    }
    std::printf("%-14s B %d NH %d T %3d spread %g seed %llu: %.2e\n", name, c.images, c.heads, c.tokens,
                c.spread, seed, errors.relative());
    demand(errors.relative() < (c.spread > 30 ? 2e-3 : 5e-4), "close:", name);
    return out.copy();
}

}  // namespace

int main() {
    const Case cases[] = {
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
    for (const Case c : cases) {
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

// attention_check.h: what the tests of attention share: random Q, K, V, and outputs against f64.
#pragma once

#include "check.h"

namespace check {

struct AttentionCase {
    int images, heads, tokens, slack;  // slack: elements that rows are longer than needed
    double spread;                     // of q and k: logits spread by spread² / 8 · 8
    int width() const { return heads * 64; }
    int pitch() const { return 3 * width() + slack; }
    int out_pitch() const { return width() + slack; }
    std::size_t rows() const { return static_cast<std::size_t>(images) * tokens; }
};

// Rows of Q, K, V. What lies between the rows stays NaN.
inline void fill(const emu::Array<fp16> &qkv, const AttentionCase &c, unsigned long long seed) {
    Random random(seed * 31 + static_cast<unsigned>(c.tokens));
    for (std::size_t r = 0; r < c.rows(); r++) {
        for (int i = 0; i < 3 * c.width(); i++) {
            qkv[r * c.pitch() + i] = half(random.normal() * (i < 2 * c.width() ? c.spread : 1));
        }
    }
}

// Every output against softmax(Q K^T / 8) V; those that must not be finite are not. `before`: what the memory
// of `out` held, which is still there between and beyond the rows.
inline void compare(const emu::Array<fp16> &out, const emu::Array<fp16> &qkv, const AttentionCase &c,
                      std::vector<fp16> before, const char *name) {
    const int pitch = c.pitch(), width = c.width();
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
                        (static_cast<std::size_t>(image) * c.tokens + t) * c.out_pitch() + head * 64 + d;
                    before[at] = out[at];
                    if (std::isfinite(o[d] / sum)) {
                        errors.add(value(out[at]), o[d] / sum);
                    } else {
                        demand(!std::isfinite(value(out[at])), "NaN and infinity reach the output:", name);
                    }
                }
            }
        }
    }
    for (std::size_t i = 0; i < out.size(); i++) {
        demand(out[i].bits == before[i].bits, "nothing written between and beyond rows:", name);
    }
    std::printf("%-18s B %d NH %d T %3d spread %g: %.2e\n", name, c.images, c.heads, c.tokens, c.spread,
                errors.relative());
    demand(errors.relative() < (c.spread > 30 ? 2e-3 : 5e-4), "close:", name);
}

}  // namespace check

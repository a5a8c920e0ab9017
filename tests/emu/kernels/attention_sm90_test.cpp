// Both kernels of attention_sm90.cu against f64: tails of queries and keys, tasks that follow one another in a
// block, images that must not see each other, and the same bits however the work is shared.

#include "attention_sm90.cu"
#include "harness.h"
#include "tensor_map.h"

#include "attention_check.h"

using namespace check;

namespace {

constexpr float SCALE = 0.125f * LOG2_E;

TensorMap map(const emu::Array<fp16> &qkv, const AttentionCase &c, int rows) {
    const std::uint64_t pitch = static_cast<std::uint64_t>(c.pitch()) * 2, tokens = c.tokens;
    const std::uint64_t sizes[] = {3ull * c.width(), tokens, static_cast<std::uint64_t>(c.images)};
    const std::uint64_t strides[] = {pitch, tokens * pitch};
    const std::uint32_t box[] = {64, static_cast<std::uint32_t>(rows), 1};
    TensorMap to;
    const char *wrong = emu::encode_tensor_map(&to, 3, reinterpret_cast<std::uint64_t>(qkv.get()), sizes, strides,
                                               box, true);
    demand(wrong == nullptr, "a tensor map wants", wrong);
    return to;
}

// Runs it in at most `blocks` blocks.
template <auto kernel, int GROUPS>
void run(const char *name, const emu::Array<fp16> &out, const emu::Array<fp16> &qkv, const AttentionCase &c,
         unsigned long long seed, int blocks, float scale = SCALE) {
    const int tasks = (c.tokens + QUERIES<GROUPS> - 1) / QUERIES<GROUPS> * c.heads * c.images;
    emu::Before before;  // an earlier launch still writes Q, K and V, and reads what is written here
    before.writes(qkv).reads(out);
    emu::harness_demand(emu::launch_seed<kernel>(
        name, seed, emu::Dim(std::min(blocks, tasks)), emu::Dim(THREADS<GROUPS>), SHARED_BYTES<GROUPS>, kernel,
        out.get(), map(qkv, c, GROUP_QUERIES), map(qkv, c, KEYS), c.tokens, c.heads, c.images, c.out_pitch(),
        scale));
}

template <auto kernel, int GROUPS>
std::vector<fp16> test(const char *name, const emu::Array<fp16> &qkv, const AttentionCase &c,
                       unsigned long long seed, int blocks) {
    emu::Array<fp16> out(c.rows() * c.out_pitch());
    out.poison();
    const std::vector<fp16> before = out.copy();
    run<kernel, GROUPS>(name, out, qkv, c, seed, blocks);
    compare(out, qkv, c, before, name);
    return out.copy();
}

void same(const std::vector<fp16> &a, const std::vector<fp16> &b, const char *what) {
    for (std::size_t i = 0; i < a.size(); i++) {
        demand(a[i].bits == b[i].bits, "the same bits:", what);
    }
}

// Both kernels, in blocks that do one task and in blocks that do several.
void both(const emu::Array<fp16> &qkv, const AttentionCase &c, unsigned long long seed, int blocks) {
    const auto some = test<attention_sm90, 2>("attention_sm90", qkv, c, seed, blocks);
    const auto more = test<attention_sm90_192, 3>("attention_sm90_192", qkv, c, seed, blocks);
    same(some, more, "both kernels");
}

// The second head of images one by one: nothing depends on the others.
void alone(unsigned long long seed) {
    const AttentionCase all{3, 2, 120, 8, 1.5};
    emu::Array<fp16> qkv(all.rows() * all.pitch()), out(all.rows() * all.out_pitch());
    fill(qkv, all, seed);
    // The image in the middle is NaN: none of it may reach the others.
    for (std::size_t i = 0; i < static_cast<std::size_t>(all.tokens) * all.pitch(); i++) {
        qkv[i + static_cast<std::size_t>(all.tokens) * all.pitch()] = fp16{0x7e00};
    }
    out.poison();
    run<attention_sm90, 2>("attention_sm90", out, qkv, all, seed, 5);
    for (const int image : {0, 2}) {
        const AttentionCase one{1, 1, all.tokens, 0, 1.5};
        emu::Array<fp16> part(one.rows() * one.pitch()), result(one.rows() * one.out_pitch());
        const std::size_t first = static_cast<std::size_t>(image) * all.tokens;
        for (int t = 0; t < all.tokens; t++) {
            for (int i = 0; i < 192; i++) {
                part[t * 192 + i] = qkv[(first + t) * all.pitch() + i / 64 * 128 + 64 + i % 64];
            }
        }
        run<attention_sm90, 2>("attention_sm90", result, part, one, seed, 100);
        for (int i = 0; i < all.tokens * 64; i++) {
            demand(result[i].bits == out[(first + i / 64) * all.out_pitch() + 64 + i % 64].bits,
                   "an image's bits do not depend on its neighbours");
        }
    }
}

// Queries divided by 8, and a scale without that.
void folded(unsigned long long seed) {
    const AttentionCase c{1, 1, 120, 0, 2};
    emu::Array<fp16> qkv(c.rows() * c.pitch()), plain(c.rows() * 64), divided(c.rows() * 64);
    fill(qkv, c, seed);
    for (std::size_t i = 0; i < qkv.size(); i++) {
        qkv[i] = i % 192 < 64 ? half(std::ldexp(std::round(std::ldexp(value(qkv[i]), 6)), -6)) : qkv[i];
    }
    run<attention_sm90, 2>("attention_sm90", plain, qkv, c, seed, 1);
    for (std::size_t i = 0; i < qkv.size(); i++) {
        qkv[i] = i % 192 < 64 ? half(value(qkv[i]) / 8) : qkv[i];
    }
    run<attention_sm90, 2>("attention_sm90", divided, qkv, c, seed, 1, LOG2_E);
    same(plain.copy(), divided.copy(), "1/8 in the scale or in Q");
}

// What is not finite, in the tail of keys and before; a head for K, one for infinite K, one for Q and V.
void not_finite(unsigned long long seed) {
    const AttentionCase c{1, 3, 120, 0, 1};
    emu::Array<fp16> qkv(c.rows() * c.pitch());
    fill(qkv, c, seed);
    const auto plant = [&](int token, int part, int head, int column, unsigned short bits) {
        qkv[token * c.pitch() + (part * 3 + head) * 64 + column] = fp16{bits};
    };
    constexpr unsigned short NAN_16 = 0x7e00, PLUS = 0x7c00, MINUS = 0xfc00;
    plant(119, 1, 0, 7, NAN_16);  // K: all rows
    plant(0, 1, 1, 0, PLUS);      // K: +inf for some rows; -inf, a key less, for the others
    plant(115, 1, 1, 2, MINUS);   // the same in the last tile
    plant(117, 0, 2, 6, NAN_16);  // Q: a row
    plant(3, 0, 2, 0, MINUS);     // Q: a row
    plant(119, 2, 2, 0, NAN_16);  // V: a column
    plant(5, 2, 2, 20, PLUS);
    both(qkv, c, seed, 2);
}

}  // namespace

int main() {
    const struct {
        AttentionCase c;
        int blocks;
    } cases[] = {
        {{2, 2, 50, 0, 1}, 3},      // 4 tasks in 3 blocks, all of one tile
        {{2, 3, 1, 0, 60}, 1},      // half of the logits far below 0, and no other key; rings go round
        {{1, 1, 1, 8, 1}, 1},
        {{1, 2, 7, 0, 1}, 2},
        {{1, 1, 64, 0, 0}, 1},
        {{1, 1, 111, 0, 1}, 1},
        {{2, 1, 112, 16, 12}, 1},   // no tail of keys
        {{1, 2, 113, 8, 1.5}, 1},   // a tail of one
        {{1, 1, 130, 0, 60}, 1},
        {{1, 2, 177, 0, 1}, 3},
        {{1, 1, 224, 0, 12}, 2},
        {{1, 1, 353, 16, 2}, 1},    // tasks of 4 tiles in one block, tails of both
    };
    for (const auto &[c, blocks] : cases) {
        for (const unsigned long long seed : seeds(2)) {
            emu::Array<fp16> qkv(c.rows() * c.pitch());
            fill(qkv, c, seed);
            both(qkv, c, seed, blocks);
        }
    }
    for (const unsigned long long seed : seeds(2)) {
        alone(seed);
        folded(seed);
    }
    for (const unsigned long long seed : seeds(1)) {
        not_finite(seed);
    }
    return 0;
}

// warpgroup.cpp: wgmma, warp by warp: warp w of a group of four has rows 16w..16w+16. See async.h.
//
// Nothing is multiplied before a wait asks for it, and sums are poison until then. Every lane of the fragment is where
// mma_16816 has it, so the tensor core is the same, eight columns at a time.
#include <cstring>
#include <string>

#include "async.h"
#include "memory.h"
#include "report.h"
#include "warp.h"

#define CALLER __builtin_return_address(0)

namespace emu {

namespace {

// A matrix of the 128-byte swizzle, as its descriptor says.
struct Matrix {
    unsigned start, leading, stride; // bytes
    bool n_major;
    Matrix(std::uint64_t d, bool n_major_)
        : start(static_cast<unsigned>(d & 0x3fff) << 4), leading(static_cast<unsigned>(d >> 16 & 0x3fff) << 4),
          stride(static_cast<unsigned>(d >> 32 & 0x3fff) << 4), n_major(n_major_) {}
    // Of the element, from the start of the block's shared memory; wraps below it, for nothing lies there.
    unsigned at(unsigned n, unsigned k) const {
        const unsigned plain = n_major ? start + n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128
                                       : start + n / 8 * stride + n % 8 * 128 + k * 2;
        return (plain ^ (plain >> 7 & 7) << 4) - shared_address(hot.executor->shared);
    }
};

// Marks what a wgmma reads: `rows` of m or n from `first` on, 16 k.
void check_operand(Async &a, const Matrix &m, unsigned first, unsigned rows, std::uint32_t serial, const void *pc) {
    const unsigned outer = m.n_major ? 16 : rows, inner = m.n_major ? rows : 16;
    for (unsigned i = 0; i < outer; i++) {
        for (unsigned j = 0; j < inner; j += 8) {
            const unsigned at = m.n_major ? m.at(first + j, i) : m.at(first + i, j);
            a.check_read(at / 16, serial, pc);
        }
    }
}

void check_descriptor(Async &a, std::uint64_t d, const void *pc) {
    if (d >> 62 != 1 || (d >> 49 & 7) != 0) {
        a.ex.fail(719, "matrix descriptor", "not of the 128-byte swizzle with base offset 0", pc);
    }
}

} // namespace

void Async::issue(Thread *lanes) {
    const unsigned warp = lanes[0].index / LANES;
    WarpAsync &w = warps[warp];
    const auto &x = lanes[0].wgmma;
    const void *pc = lanes[0].pc;
    last_multiply = pc;
    if (!w.fenced) {
        ex.fail(719, "missing wgmma_fence", "a group of wgmma begins without one", pc);
    }
    check_descriptor(*this, x.b, pc);
    if (!x.a_kept) {
        check_descriptor(*this, x.a, pc);
    }
    auto &all = shapes[warp / 4];
    const Shape shape{x.a_kept ? 0 : x.a, x.b, x.n, x.b_n_major, x.add};
    if (w.multiplies == all.size()) {
        all.push_back(shape);
    }
    const Shape &first = all[w.multiplies++];
    if (first.a != shape.a || first.b != shape.b || first.n != shape.n || first.b_n_major != shape.b_n_major ||
        first.add != shape.add) {
        ex.fail(719, "warp group divergence",
                "warps of one group multiply different things in wgmma number " + std::to_string(w.multiplies), pc);
    }
    for (int i = 1; i < LANES; i++) {
        const auto &y = lanes[i].wgmma;
        if (y.a != x.a || y.b != x.b || y.n != x.n || y.add != x.add) {
            ex.fail(719, "warp divergence", "lanes of one warp multiply different things", pc);
        }
    }
    const std::uint32_t serial = ++w.issued;
    if (!x.a_kept) {
        check_operand(*this, Matrix(x.a, false), warp % 4 * 16, 16, serial, pc);
    }
    check_operand(*this, Matrix(x.b, x.b_n_major), 0, static_cast<unsigned>(x.n), serial, pc);

    Sums *sums = nullptr;
    for (const auto &s : w.sums) {
        sums = s->at[0] == x.d ? s.get() : sums;
    }
    const int count = x.n / 2;
    if (sums == nullptr) {
        w.sums.push_back(std::make_unique<Sums>());
        sums = w.sums.back().get();
        sums->count = count;
        sums->users = 0;
        sums->values.resize(static_cast<std::size_t>(LANES * count));
        for (int i = 0; i < LANES; i++) {
            sums->at[i] = lanes[i].wgmma.d;
            std::memcpy(&sums->values[static_cast<std::size_t>(i * count)], sums->at[i], count * sizeof(float));
            poison(sums->at[i], count * sizeof(float));
        }
    } else if (sums->count != count) {
        ex.fail(719, "wgmma in flight", "sums of another shape are still under way in the same registers", pc);
    }
    sums->users++;
    Multiply m{serial, w.group, x.a, x.b, {}, x.n, x.b_n_major, x.add, x.a_kept, pc, sums};
    for (int i = 0; i < LANES; i++) {
        m.kept[i] = lanes[i].wgmma.kept;
    }
    w.pending.push_back(m);
}

void Async::multiply(Multiply &m, unsigned warp) {
    alignas(32) unsigned short a[16][16], b[8][16]; // [m][k], [n][k]
    alignas(32) float d[16][8];                     // [m][n]
    const Matrix ma(m.a, false), mb(m.b, m.b_n_major);
    for (unsigned i = 0; i < LANES; i++) {
        const unsigned g = i / 4, t = i % 4;
        const unsigned kept[4] = {m.kept[i].r0, m.kept[i].r1, m.kept[i].r2, m.kept[i].r3};
        for (unsigned j = 0; j < 4; j++) {
            const unsigned row = g + j % 2 * 8, k = 2 * t + j / 2 * 8;
            const unsigned char *shared = ex.shared + (m.a_kept ? 0 : ma.at(warp % 4 * 16 + row, k));
            std::memcpy(&a[row][k], m.a_kept ? static_cast<const void *>(&kept[j]) : shared, 4);
        }
    }
    for (unsigned j = 0; j < static_cast<unsigned>(m.n) / 8; j++) {
        for (unsigned n = 0; n < 8; n++) {
            for (unsigned k = 0; k < 16; k++) {
                std::memcpy(&b[n][k], ex.shared + mb.at(j * 8 + n, k), 2);
            }
        }
        const auto lane = [&](unsigned i) { return &m.sums->values[i * static_cast<unsigned>(m.sums->count) + j * 4]; };
        for (unsigned i = 0; i < LANES; i++) {
            for (unsigned r = 0; r < 4; r++) {
                d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2] = m.add ? lane(i)[r] : 0.0f;
            }
        }
        mma_m16n8k16(d, a, b);
        for (unsigned i = 0; i < LANES; i++) {
            for (unsigned r = 0; r < 4; r++) {
                lane(i)[r] = d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
            }
        }
    }
}

void Async::wait(Thread *lanes, unsigned groups_left) {
    const unsigned warp = lanes[0].index / LANES;
    WarpAsync &w = warps[warp];
    std::size_t done = 0;
    for (; done < w.pending.size() && w.group - w.pending[done].group > groups_left; done++) {
        Multiply &m = w.pending[done];
        multiply(m, warp);
        w.clock.of[ex.rank].retired[warp] = m.serial;
        if (--m.sums->users > 0) {
            continue;
        }
        Sums *s = m.sums;
        for (int i = 0; i < LANES; i++) {
            for (int j = 0; j < 2 * s->count; j++) {
                std::uint16_t half;
                std::memcpy(&half, reinterpret_cast<unsigned char *>(s->at[i]) + 2 * j, 2);
                if (half != POISON) {
                    ex.fail(719, "wgmma in flight", "its sums were written to before its wgmma_wait", m.pc);
                }
            }
            std::memcpy(s->at[i], &s->values[static_cast<std::size_t>(i * s->count)], s->count * sizeof(float));
        }
        for (std::size_t i = 0; i < w.sums.size(); i++) {
            if (w.sums[i].get() == s) {
                w.sums.erase(w.sums.begin() + static_cast<std::ptrdiff_t>(i));
                break;
            }
        }
    }
    w.pending.erase(w.pending.begin(), w.pending.begin() + static_cast<std::ptrdiff_t>(done));
}

namespace {

void come(float *d, Quad kept, std::uint64_t a, std::uint64_t b, int n, bool n_major, bool add, bool a_kept,
          const void *pc) {
    hot.self->wgmma = {d, a, b, kept, n, n_major, add, a_kept};
    collect(hot.self, Op::Wgmma, pc);
}

} // namespace

void wgmma_ss(float *d, unsigned long long a, unsigned long long b, int n, bool b_n_major, bool add) {
    come(d, Quad{}, a, b, n, b_n_major, add, false, CALLER);
}
void wgmma_rs(float *d, Quad a, unsigned long long b, int n, bool b_n_major, bool add) {
    come(d, a, 0, b, n, b_n_major, add, true, CALLER);
}
void wgmma_fence() { collect(hot.self, Op::WgmmaFence, CALLER); }
void wgmma_commit() { collect(hot.self, Op::WgmmaCommit, CALLER); }
void wgmma_wait(int groups_left, float *) {
    hot.self->word = {0, static_cast<unsigned>(groups_left)};
    collect(hot.self, Op::WgmmaWait, CALLER);
}

} // namespace emu

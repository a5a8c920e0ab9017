"""What each micro-kernel is given and what it must answer, by an expectation that owes nothing to the kernels.

Three rules, by what a primitive does:

    bits     bytes moved: every bit
    f16 f32  arithmetic that IEEE 754 settles: every bit, but that any NaN is as good as another (the PTX ISA
             settles no payload; a difference is noted)
    near     each number within a bound of the exact result, and two devices within twice that of one another

Fragments are those of the PTX ISA's tables, "Matrix fragments for mma.m16n8k16" and "ldmatrix", taken from there,
not from kernels/ptx.cuh.
"""

import functools
import math
from fractions import Fraction

from floats import F16, F32, LEAST, NORMAL, Noise, f16, f32, f32_bits, nearest, pack, ulp, unpack

SEED = 20261124
NAN = 0x7FFFFFFF
ALL = []  # every Primitive for all devices, in the order of kernels/ptx.cuh


class Primitive:
    def __init__(
        self, name, rule, data, n, size, expect, launch=(24, 256, 0), initial=None, only_on=None, kernel=None, maps=(),
        cluster=1,
    ):  # fmt: skip
        self.name, self.rule, self.data, self.n, self.size = name, rule, data, n, size
        self.kernel = "conform_" + (kernel or name)
        self.only_on = only_on  # a compute capability, whose kernels are in a module of their own
        self.maps = maps  # of tensors in `data`: (byte, sizes, pitches in bytes, box, whether swizzled)
        self.cluster = cluster  # blocks along x that run together
        self.expected = functools.lru_cache(None)(expect)  # the bytes, or for `near` a list of (value, bound)
        grid, self.block, self.shared = launch
        self.grid = grid if isinstance(grid, tuple) else (grid, 1, 1)
        self.initial = initial if initial is not None else b"\xa5" * size  # what `out` holds before
        if only_on is None:
            ALL.append(self)


def noise(name):
    return Noise(SEED + sum(ord(letter) << 8 * (i % 4) for i, letter in enumerate(name)))


# -------------------------------------------------------------------------------------------------- conversions

EVERY_16 = range(1 << 16)
SPECIAL = [
    0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF,
    0x477FEFFF, 0x477FF000, 0x477FF001, 0x33000000, 0x33000001, 0x38800000, 0x387FFFFF, 0x40490FDB, 0x42FE0000,
]  # fmt: skip
SPECIAL += [bits | 1 << 31 for bits in SPECIAL]


def to_f16(words):
    """f32 bits -> fp16 bits, by struct's own rounding."""
    values = [f32(bits) for bits in words]
    small = iter(unpack("H", pack("e", (v for v in values if abs(v) < 65520.0))))
    sign = lambda bits: bits >> 16 & 0x8000  # noqa: E731
    return [
        next(small) if abs(v) < 65520.0 else 0x7FFF if v != v else 0x7C00 | sign(bits) for v, bits in zip(values, words)
    ]


def around_f16():
    """Every finite fp16, the middle between it and the next, and that middle's neighbours; signs take turns."""
    exact = [f16(h) for h in range(0x7C00)] + [65536.0]
    words = []
    for h in range(0x7C00):
        middle = f32_bits((exact[h] + exact[h + 1]) / 2)
        words += [f32_bits(exact[h]) | (h & 1) << 31, middle | (h >> 1 & 1) << 31, middle + 1 | (h & 1) << 31, middle - 1]
    return words + SPECIAL + noise("around").words(4096)


def from_f16():
    """Every fp16 -> f32 bits."""
    exact = unpack("I", pack("f", unpack("e", pack("H", EVERY_16))))
    return [NAN if h & 0x7FFF > 0x7C00 else bits for h, bits in zip(EVERY_16, exact)]


def who():
    blocks = [(x, y, z) for z in range(4) for y in range(2) for x in range(3)]
    words = [word for x, y, z in blocks for t in range(64) for word in (t, x, y, z, 3, 2, 64, t % 32, t // 32)]
    Primitive("who", "bits", bytes(16), 0, 4 * len(words), lambda: pack("i", words), ((3, 2, 4), 64, 0))


def conversions():
    words = SPECIAL + noise("f32_bits").words(4096)
    Primitive("f32_bits", "bits", pack("I", words), len(words), 4 * len(words), lambda: pack("I", words))
    sweep = pack("H", EVERY_16)
    Primitive("fp16_to_f32", "f32", sweep, 1 << 16, 4 << 16, lambda: pack("I", from_f16()))
    around = around_f16()
    Primitive("f32_to_fp16", "f16", pack("I", around), len(around), 2 * len(around), lambda: pack("H", to_f16(around)))
    pairs = len(around) // 2
    Primitive(
        "pack_fp16x2", "f16", pack("I", around[: 2 * pairs]), pairs, 4 * pairs,
        lambda: pack("H", to_f16(around[: 2 * pairs])),
    )  # fmt: skip
    Primitive("fp16_lo_hi", "f32", sweep, 1 << 15, 4 << 16, lambda: pack("I", from_f16()))
    Primitive("bf16_to_f32", "bits", sweep, 1 << 16, 4 << 16, lambda: pack("I", (bits << 16 for bits in EVERY_16)))


# --------------------------------------------------------------------------------------------------- arithmetic


def flushed(value, bound):
    """The rule of `.ftz` for results: what is clearly below the least normal number is a zero of its sign."""
    if abs(value) < NORMAL * (1 - 2.0**-20):
        return math.copysign(0.0, value), 0.0
    if abs(value) < NORMAL * (1 + 2.0**-20):
        return value, abs(value)
    return value, bound


def exp2_approx(x):
    if x >= 128.0:
        return math.inf, 0.0
    value = 2.0 ** max(x, -1000.0)
    return flushed(value, value * 2.0**-22)  # PTX ISA, ex2.approx.ftz.f32: relative 2^-22


def rcp_approx(x):
    if abs(x) < NORMAL:
        return math.copysign(math.inf, x), 0.0
    value = 1 / x if not math.isinf(x) else math.copysign(0.0, x)
    return flushed(value, ulp(value))  # PTX ISA, rcp.approx.ftz.f32: 1 ulp


def rsqrt_approx(x):
    if abs(x) < NORMAL:
        return math.copysign(math.inf, x), 0.0
    if x < 0:
        return math.nan, 0.0
    value = 1 / math.sqrt(x) if not math.isinf(x) else 0.0
    return value, value * 2.0**-22.9  # PTX ISA, rsqrt.approx.ftz.f32: relative 2^-22.9


def tanh_approx(x):
    value = math.tanh(x)
    return value, max(abs(value) * 2.0**-11, LEAST) if value else 0.0  # PTX ISA, tanh.approx.f32: relative 2^-11


def erf_f32(x):
    value = math.erf(x)
    return value, 2 * ulp(value) if value else 0.0  # CUDA C++ Programming Guide, erff: 2 ulp


def near(f, words):
    return [(math.nan, 0.0) if x != x else f(x) for x in map(f32, words)]


def fma(a, b, c):
    if any(x != x or math.isinf(x) for x in (a, b, c)):
        product = a * b  # inf, or NaN of inf times 0; a finite one cannot matter beside an infinite c
        return NAN if math.isnan(product + c) else f32_bits(c if math.isinf(c) else product)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    sign = math.copysign(1, a) * math.copysign(1, b) < 0
    return nearest(exact, F32, (sign and math.copysign(1, c) < 0) if not exact else None)


def div(a, b):
    if a != a or b != b or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return NAN
    negative = (math.copysign(1, a) < 0) != (math.copysign(1, b) < 0)
    if b == 0 or math.isinf(a):
        return 0x7F800000 | negative << 31
    return nearest(0 if math.isinf(b) else Fraction(a) / Fraction(b), F32, negative)


def larger(a, b):
    """PTX ISA, max: a NaN gives way; +0 is larger than -0."""
    if a != a or b != b:
        return NAN if a != a and b != b else f32_bits(b if a != a else a)
    return f32_bits(a if (a, math.copysign(1, a)) > (b, math.copysign(1, b)) else b)


def smaller(a, b):
    if a != a or b != b:
        return larger(a, b)
    return f32_bits(a if (a, math.copysign(1, a)) < (b, math.copysign(1, b)) else b)


def root(x):
    if x != x or x < 0:
        return NAN
    return f32_bits(x) if x == 0 or math.isinf(x) else nearest(math.sqrt(x), F32)  # f64 is wide enough to round twice


def arithmetic():
    # Every bf16, so every exponent with either sign, and places where the function bends.
    ranges = {
        exp2_approx: (-127.0, 128.0), rcp_approx: (1.0, 4.0), rsqrt_approx: (1.0, 4.0), tanh_approx: (-5.0, 5.0),
        erf_f32: (-4.0, 4.0),
    }  # fmt: skip
    for f, (low, high) in ranges.items():
        random = noise(f.__name__)
        words = [bits << 16 for bits in EVERY_16] + SPECIAL
        words += unpack("I", pack("f", (random.uniform(low, high) for _ in range(4096))))
        Primitive(f.__name__, "near", pack("I", words), len(words), 4 * len(words), lambda f=f, w=words: near(f, w))

    def exact(name, f, count):
        random = noise(name)
        # Bits at random; sizes near one another; and everything special with everything special.
        words = random.words(count * 1000)
        words += unpack("I", pack("f", (random.uniform(-4, 4) for _ in range(count * 1000))))
        size = len(SPECIAL)
        words += [SPECIAL[i // size**k % size] for i in range(size ** min(count, 2)) for k in range(count)]
        parts = lambda: zip(*(map(f32, words[k::count]) for k in range(count)))  # noqa: E731
        n = len(words) // count
        Primitive(name, "f32", pack("I", words), n, 4 * n, lambda: pack("I", (f(*part) for part in parts())))

    for name, f, count in [
        ("sqrt_rn", root, 1), ("div_rn", div, 2), ("max_f32", larger, 2), ("min_f32", smaller, 2), ("fma_rn", fma, 3),
    ]:  # fmt: skip
        exact(name, f, count)


# ------------------------------------------------------------------------------------------------------- memory


def reversed_by(size, data):
    return b"".join(data[i : i + size] for i in range(len(data) - size, -1, -size))


def swapped_halves(data):
    return b"".join(data[i + 8 : i + 16] + data[i : i + 8] for i in range(0, len(data), 16))


def memory():
    random = noise("memory")
    data = random.bytes(16 * 1000)
    for name, size in [("global_16", 16), ("global_8", 8), ("streaming_16", 16)]:
        Primitive(name, "bits", data, len(data) // size, len(data), lambda size=size: reversed_by(size, data))

    tile = data[: 16 * 128]
    chunks = [tile[16 * (i ^ 5) :][:16] for i in range(128)]
    # The second half: 8 bytes at a time in reverse, so each pair as it lies, the pairs in reverse.
    Primitive(
        "shared_16_8", "bits", tile, 128, 2 * len(tile),
        lambda: swapped_halves(b"".join(chunks)) + reversed_by(8, tile), (1, 128, 16 * 128),
    )  # fmt: skip

    n = 512
    wide = [random.bits() for _ in range(n)]
    start = [random.bits() | 1 << 63 for _ in range(64)] + [random.bits() for _ in range(n)]
    least = [min([start[cell], *wide[cell::64]]) for cell in range(64)]
    own = [min(a, b) for a, b in zip(start[64:], wide)]
    Primitive(
        "atomic_min_u64", "bits", pack("Q", wide), n, 8 * (64 + 2 * n), lambda: pack("Q", least + own + start[64:]),
        (4, 64, 0), pack("Q", start + [0] * n),
    )  # fmt: skip
    words, start32 = random.words(n), random.words(64 + n)
    total = [(start32[cell] + sum(words[cell::64])) % 2**32 for cell in range(64)]
    sums = [(a + b) % 2**32 for a, b in zip(start32[64:], words)]
    Primitive(
        "atomic_add_u32", "bits", pack("I", words), n, 4 * (64 + 2 * n), lambda: pack("I", total + sums + start32[64:]),
        (4, 64, 0), pack("I", start32 + [0] * n),
    )  # fmt: skip

    addresses = pack("I", [*range(0, 512, 4), 0])
    Primitive("smem_address", "bits", bytes(16), 128, 4 * 129, lambda: addresses, (1, 128, 512))

    copied = [random.bits(1) for _ in range(128)]
    landed = [data[16 * i : 16 * i + 16] if copy else bytes(16) for i, copy in enumerate(copied)]
    Primitive(
        "cp_async_16", "bits", data[: 16 * 128] + pack("i", copied), 128, 16 * 128,
        lambda: b"".join(landed[i ^ 3] for i in range(128)), (1, 128, 16 * 128),
    )  # fmt: skip
    groups = data[: 5 * 16 * 64]
    Primitive("cp_async_groups", "bits", groups, 64, len(groups), lambda: groups, (1, 64, len(groups)))


# ------------------------------------------------------------------------------------------------ warp and block


def passed_on(values, step, group):
    for round_ in range(16):
        values = [
            (values[i // group * group + (i % group + step) % group] * 3 + round_) % 2**32 for i in range(len(values))
        ]
    return values


def warps():
    random = noise("warps")
    words = random.words(256)
    for name, step, group in [("block_barrier", 37, 256), ("warp_barrier", 5, 32)]:
        expect = lambda step=step, group=group: pack("I", passed_on(words, step, group))  # noqa: E731
        Primitive(name, "bits", pack("I", words), 256, 1024, expect, (1, 256, 2048))

    lanes = range(32)
    values = [*SPECIAL[:8], *random.words(24)]
    for name, source in [("shuffle_xor", lambda k, lane: lane ^ k), ("shuffle", lambda k, lane: (lane * k + k) % 32)]:
        moved = [values[source(k, lane)] for k in lanes for lane in lanes]
        Primitive(name, "bits", pack("I", values), 32, 3 * 4096, lambda moved=moved: pack("I", 3 * moved), (1, 32, 0))

    masks = [0, ~0 % 2**32, 1, 1 << 31, *random.words(28)]
    votes = [(mask >> lane & 1) * (random.bits(32) | 1) for mask in masks for lane in lanes]
    answers = [mask for mask in masks for _ in lanes] + [int(mask != 0) for mask in masks for _ in lanes]
    Primitive("ballot", "bits", pack("I", votes), len(masks), 4 * len(answers), lambda: pack("I", answers), (1, 32, 0))


# ------------------------------------------------------------------------------------------------- tensor cores


def pair(low, high):
    return low | high << 16


def fragment(matrices, lane, transposed=False):
    """PTX ISA, ldmatrix: what a lane gets of four 8x8 matrices."""
    row, column = lane // 4, lane % 4 * 2
    if transposed:
        return [pair(m[column][row], m[column + 1][row]) for m in matrices]
    return [pair(m[row][column], m[row][column + 1]) for m in matrices]


def quarters(rows, top, left, order):
    """Four 8x8 matrices of a table of fp16, at (row, column) steps of 8 from a corner."""
    return [[rows[top + 8 * r + i][left + 8 * c : left + 8 * c + 8] for i in range(8)] for r, c in order]


def table(data, columns):
    words = unpack("H", data)
    return [words[i : i + columns] for i in range(0, len(words), columns)]


A_ORDER = [(0, 0), (1, 0), (0, 1), (1, 1)]  # rows 0-7 and 8-15, then both again 8 columns further
W_ORDER = [(0, 0), (0, 1), (1, 0), (1, 1)]  # the columns of rows 0-7 first


def in_lanes(steps):
    """Fragments of steps, each for every warp and lane, as memory holds them."""
    return pack("I", (word for step in steps for lane in step for word in lane))


def swizzles():
    random = noise("swizzles")
    stage = random.bytes(8192)
    wide, rows = table(stage, 32), table(stage, 64)

    def each(make):
        return [make(warp, lane) for warp in range(4) for lane in range(32)]

    def linear():
        steps = []
        for half in range(2):
            steps.append(each(lambda w, lane: fragment(quarters(wide, 32 * w, 16 * half, A_ORDER), lane)))
            steps.append(each(lambda w, lane: fragment(quarters(wide, 32 * w + 16, 16 * half, W_ORDER), lane)))
        return in_lanes(steps)

    def attention():
        steps = []
        for d in range(4):
            steps.append(each(lambda w, lane: fragment(quarters(rows, 16 * w, 16 * d, A_ORDER), lane)))
            steps.append(each(lambda w, lane: fragment(quarters(rows, 16 * w, 16 * d, W_ORDER), lane)))
            steps.append(each(lambda w, lane: fragment(quarters(rows, 16 * w, 16 * d, A_ORDER), lane, True)))
        return in_lanes(steps)

    Primitive("swizzle_64", "bits", stage, 0, 4 * 128 * 16, linear, (1, 128, 8192))
    Primitive("swizzle_128", "bits", stage, 0, 12 * 128 * 16, attention, (1, 128, 8192))


def matrices():
    random = noise("matrices")
    data = random.bytes(1024)
    cases = [[*range(32)], [*range(31, -1, -1)], [7] * 32, [2 * lane for lane in range(32)]]
    cases += [[random.below(64) for _ in range(32)] for _ in range(12)]

    def expected(transposed):
        rows = table(data, 8)
        steps = []
        for case in cases:
            named = [[rows[case[8 * m + i]] for i in range(8)] for m in range(4)]
            steps.append([fragment(named, lane, transposed) for lane in range(32)])
        return in_lanes(steps)

    chosen = data + pack("i", (row for case in cases for row in case))
    for name, transposed in [("ldmatrix_x4", False), ("ldmatrix_x4_trans", True)]:
        expect = lambda transposed=transposed: expected(transposed)  # noqa: E731
        Primitive(name, "bits", chosen, len(cases), len(cases) * 512, expect, (1, 32, 1024))


# mma.m16n8k16, element i of a lane: (row, column) of A, B and C.
A_OF = [lambda g, t, i=i: (g if i in (0, 1, 4, 5) else g + 8, 2 * t + i % 2 + (8 if i >= 4 else 0)) for i in range(8)]
B_OF = [lambda g, t, i=i: (2 * t + i % 2 + (8 if i >= 2 else 0), g) for i in range(4)]
C_OF = [lambda g, t, i=i: (g if i < 2 else g + 8, 2 * t + i % 2) for i in range(4)]
LANES = [(lane // 4, lane % 4) for lane in range(32)]


def registers(a, b, c):
    """A [16][16] and B [16][8] in fp16 bits, C [16][8] in f32 bits -> [10 registers][32 lanes]."""
    at = lambda m, place: m[place[0]][place[1]]  # noqa: E731
    words = []
    for j in range(4):
        words += [pair(at(a, A_OF[2 * j](g, t)), at(a, A_OF[2 * j + 1](g, t))) for g, t in LANES]
    for j in range(2):
        words += [pair(at(b, B_OF[2 * j](g, t)), at(b, B_OF[2 * j + 1](g, t))) for g, t in LANES]
    for i in range(4):
        words += [at(c, C_OF[i](g, t)) for g, t in LANES]
    return words


def sum_of(a, b, c):
    """The exact element, and how far the tensor core may be from it.

    Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores" (PeerJ CS, 2021): products are
    exact; those of 8 columns (16 on later chips) and the sum so far are aligned to the largest of them and cut off
    there, then added. Two such steps of nine terms cut off less than 2^-23 of the largest term each, and 2^-23 of
    each sum. A sum in order, rounded, as the emulated device does it, stays within that as well."""
    products = [x * y for x, y in zip(a, b)]
    terms = [c, *products]
    if any(x != x or math.isinf(x) for x in terms):
        total = sum(terms)
        return total, 0.0
    total, so_far, largest = math.fsum(terms), c, max(map(abs, terms))
    for product in products:
        so_far += product
        largest = max(largest, abs(so_far))
    return total, max(20 * 2.0**-23 * largest, LEAST)


def mma_cases():
    """name -> function of (row or column, k) or of (row, column) for A, B, C; fp16 and f32 bits."""
    random = noise("mma")
    half = lambda low, high: nearest(random.uniform(low, high), F16)  # noqa: E731
    single = lambda low, high: nearest(random.uniform(low, high), F32)  # noqa: E731
    odd = lambda options, other: options[random.below(len(options))] if random.below(20) == 0 else other()  # noqa: E731
    clear = lambda bits: bits ^ 0x4000 if bits & 0x7C00 == 0x7C00 else bits  # noqa: E731
    finite = lambda: clear(random.bits(16))  # noqa: E731
    small = lambda: random.bits(1) << 15 | random.bits(10)  # noqa: E731
    ones = lambda: half(-1, 1)  # noqa: E731
    zero = lambda: random.bits(1) << 15  # noqa: E731
    wild16, wild32 = [0x7C00, 0xFC00, 0x7E00, 0, 0x8000, 0x7BFF], [0x7F800000, 0xFF800000, 0x7FC00000, 0, 1 << 31]
    whole = lambda: nearest(random.below(33) - 16, F16)  # noqa: E731
    wild = lambda: odd(wild16, ones)  # noqa: E731
    # Each: an element of A, one of B, one of C.
    yield "random", ones, ones, lambda: single(-1, 1)
    yield "layers", lambda: half(-4, 4), lambda: half(-0.06, 0.06), lambda: single(-8, 8)
    yield "integers", whole, whole, lambda: nearest(random.below(99), F32)
    yield "large", lambda: half(-65504, 65504), lambda: half(-65504, 65504), lambda: single(-1e10, 1e10)
    yield "subnormal inputs", small, ones, lambda: single(-(2.0**-14), 2.0**-14)
    yield "subnormal products", small, small, lambda: single(-(2.0**-40), 2.0**-40)
    yield "subnormal sums", zero, ones, lambda: random.bits(1) << 31 | random.bits(23)
    yield "every exponent", finite, finite, lambda: single(-1, 1)
    yield "a large sum", ones, ones, lambda: single(-(2.0**20), 2.0**20)
    yield "the largest sum", lambda: half(-65504, 65504), ones, lambda: 0x7F7FFFFF
    yield "NaN and infinity", wild, wild, lambda: odd(wild32, lambda: single(-1, 1))
    yield "zeros", zero, zero, lambda: random.bits(1) << 31


def products():
    cases = []
    random = noise("mma cases")

    def wanted():
        found = []
        for a, b, c in cases:
            rows = [list(map(f16, row)) for row in a]
            columns = list(zip(*(map(f16, row) for row in b)))
            for i in range(4):
                for m, n in (C_OF[i](g, t) for g, t in LANES):
                    found.append(sum_of(rows[m], columns[n], f32(c[m][n])))
        return found

    def fill(make, rows, columns):
        return [[make() for _ in range(columns)] for _ in range(rows)]

    for _, of_a, of_b, of_c in mma_cases():
        for _ in range(4):
            cases.append((fill(of_a, 16, 16), fill(of_b, 16, 8), fill(of_c, 16, 8)))
    # Cancellation: the second half of k undoes the first but for a little, and C undoes what is left.
    for scale in (1.0, 2.0**-7, 256.0):
        for _ in range(4):
            a = [[nearest(random.uniform(-2, 2) * scale, F16) for _ in range(8)] for _ in range(16)]
            b = [[nearest(random.uniform(-2, 2), F16) for _ in range(8)] for _ in range(8)]
            second = [[bits ^ 0x8000 ^ (random.below(8) == 0) for bits in row] for row in a]
            c = [[nearest(random.uniform(-1, 1) * 2.0**-12 * scale, F32) for _ in range(8)] for _ in range(16)]
            cases.append(([row + other for row, other in zip(a, second)], b + b, c))
    data, n = pack("I", (word for case in cases for word in registers(*case))), len(cases)
    Primitive("mma_16816", "near", data, n, n * 512, wanted, (8, 128, 0))

    whole = [[random.below(17) - 8 for _ in range(16)] for _ in range(32)]
    a, b = whole[:16], whole[16:]
    exact = [sum(a[m][k] * b[k][n] for k in range(16)) for m in range(16) for n in range(16)]
    data = pack("e", (float(x) for row in whole for x in row))
    Primitive("product", "bits", data, 0, 1024, lambda: pack("f", map(float, exact)), (1, 32, 1024))


def every():
    """All primitives, made once."""
    if not ALL:
        for make in (who, conversions, arithmetic, memory, warps, matrices, products, swizzles):
            make()
    return ALL

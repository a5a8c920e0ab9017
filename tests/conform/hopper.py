"""The same as primitives.py for kernels/ptx_sm90.cuh: what only devices of compute capability 9.0 have.

Layouts and fragments are those of the PTX ISA's chapters on tensors ("Swizzling modes") and on wgmma ("Register
fragments", "Matrix descriptor format"), taken from there, not from kernels/ptx_sm90.cuh.
"""

import math
from operator import mul

from floats import F16, F32, f16, f32, nearest, pack, unpack
from primitives import A_OF, C_OF, Primitive, noise, pair, passed_on

HOPPER = []  # every Primitive of this file


def own(name, *rest, **more):
    HOPPER.append(Primitive(name, *rest, only_on="9.0", **more))


def swizzled(data):
    """Rows of 128 bytes whose 16-byte chunk c of row r lies at c ^ r % 8; the first begins at a multiple of 1024."""
    out = bytearray(data)
    for at in range(0, len(data), 16):
        to = at ^ (at // 128 % 8) << 4
        out[to : to + 16] = data[at : at + 16]
    return bytes(out)


# ------------------------------------------------------------------------------------------- addresses and waiting


def addresses():
    own("align_1024", "bits", bytes(16), 128, 8 * 128, lambda: pack("I", [0, 1] * 128), (1, 128, 1024 + 128))

    random = noise("descriptors")
    offsets = [(16, 1024), (0, 0), (8192, 1024), (0x3FFF0, 0x3FFF0)]
    offsets += [(random.below(1 << 14) * 16, random.below(1 << 14) * 16) for _ in range(28)]

    def descriptor(i, leading, stride):
        return i | leading // 16 << 16 | stride // 16 << 32 | 1 << 62  # bits 62 and 63: 1, swizzle of 128 bytes

    def expected():
        return pack(
            "Q", (descriptor(i, *each) for i, (leading, stride) in enumerate(offsets)
                  for each in ((leading, stride), (16, 1024), (leading, 1024))),
        )  # fmt: skip

    n = len(offsets)
    own("descriptors", "bits", pack("i", sum(offsets, ())), n, 24 * n, expected, (1, n, 16 * n))


def waiting():
    random = noise("waiting")
    words = random.words(256)

    def by_mbarrier():
        first, *others = passed_on(words, 96, 256)
        return pack("I", [(first + 1) % 2**32, *others])

    def by_named_barriers():
        values = passed_on(words, 37, 64)
        return pack("I", ((values[i - 64] + value) % 2**32 for i, value in enumerate(values)))

    own("mbarrier", "bits", pack("I", words), 256, 1024, by_mbarrier, (1, 256, 2048 + 8))
    own("named_barrier", "bits", pack("I", words), 256, 1024, by_named_barriers, (1, 256, 2048))

    def by_registers():
        found = [words[i] for i in range(128)]
        for i in range(128, 384):
            total = 0
            for j in range(159, -1, -1):
                total = (total * 31 + words[(i + j) % 256]) % 2**32
            found.append(total)
        return pack("I", found)

    own("set_registers", "bits", pack("I", words), 256, 4 * 384, by_registers, (1, 384, 0))
    own("grid_wait", "bits", pack("I", words), 256, 1024, lambda: pack("I", words[::-1]), (3, 64, 0))


# ----------------------------------------------------------------------------------------------------- bulk copies

BOX = 4096  # bytes


class Tensor:
    """[depth][rows][columns] of fp16 with pitches in bytes; what lies between is noise of its own."""

    def __init__(self, name, columns, rows, depth, pitch, plane):
        self.sizes, self.pitches = (columns, rows, depth), (pitch, plane)
        self.data = noise(name).bytes(plane * depth)

    def at(self, x, y, z):
        inside = all(0 <= place < size for place, size in zip((x, y, z), self.sizes))
        start = z * self.pitches[1] + y * self.pitches[0] + 2 * x
        return self.data[start : start + 2] if inside else bytes(2)

    def box(self, corner, box, swizzle):
        x0, y0, z0 = corner
        width, rows, planes = box
        plain = b"".join(
            self.at(x0 + x, y0 + y, z0 + z) for z in range(planes) for y in range(rows) for x in range(width)
        )
        return swizzled(plain) if swizzle else plain


def boxes(name, rank, tensor, box, swizzle, corners):
    data = pack("i", (place for corner in corners for place in (*corner, 0)[:4])) + tensor.data
    assert 2 * math.prod(box) == BOX
    own(
        name, "bits", data, len(corners), BOX * len(corners),
        lambda: b"".join(tensor.box(corner, box, swizzle) for corner in corners), (1, 160, 2 * BOX + 1024 + 32),
        kernel=f"tma_load_{rank}d",
        maps=[(16 * len(corners), tensor.sizes[:rank], tensor.pitches[: rank - 1], box[:rank], swizzle)],
    )  # fmt: skip


def copies():
    flat = Tensor("tensor of two dimensions", 100, 50, 1, 208, 50 * 208)
    corners = [(0, 0, 0), (64, 0, 0), (0, 32, 0), (64, 32, 0), (-8, -3, 0), (3, 19, 0), (99, 49, 0), (100, 0, 0)]
    corners += [(0, 50, 0), (-64, 5, 0), (-63, -31, 0), (1 << 30, 0, 0), (0, -(1 << 30), 0)]
    boxes("tma_load_2d", 2, flat, (64, 32, 1), True, corners)
    boxes("tma_load_2d_plain", 2, flat, (128, 16, 1), False, corners)
    # Planes that lie one right after the other: rows beyond one are zeros, not the next one's.
    deep = Tensor("tensor of three dimensions", 72, 50, 5, 144, 50 * 144)
    corners = [(0, 0, 0), (0, 48, 0), (8, 40, 3), (64, -2, 1), (0, 0, 4), (0, 0, -1), (5, 33, -2), (-1, 49, 4)]
    corners.append((0, 0, 5))
    boxes("tma_load_3d", 3, deep, (64, 32, 1), True, corners)
    boxes("tma_load_3d_planes", 3, deep, (64, 8, 4), True, corners)
    boxes("tma_load_3d_plain", 3, deep, (32, 16, 4), False, corners)


def clusters():
    def ranks():
        return pack("I", [block % 2 for block in range(6) for _ in range(64)])

    own("cluster_rank", "bits", bytes(16), 0, 4 * 6 * 64, ranks, (6, 64, 0), cluster=2)

    tensor = Tensor("tensor for two blocks", 100, 50, 1, 208, 50 * 208)
    corners = [(0, 0, 64, 16), (64, 40, 0, 34), (3, -5, -8, 7), (0, 50, 20, 0), (100, 3, 99, 49)]
    box = (64, BOX // 2 // 128, 1)

    def both():
        sent = b"".join(tensor.box((*to, 0), box, True) for corner in corners for to in (corner[:2], corner[2:]))
        return sent * 2

    own(
        "tma_load_2d_multicast", "bits", pack("i", sum(corners, ())) + tensor.data, len(corners),
        2 * BOX * len(corners), both, (2, 160, 2 * BOX + 1024 + 32),
        maps=[(16 * len(corners), tensor.sizes[:2], tensor.pitches[:1], box[:2], True)], cluster=2,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ wgmma

THREADS = [(t // 32 * 16, t % 32 // 4, t % 4) for t in range(128)]  # a warp's first row, and a lane's g and t


def operands(a, b, c):
    """A [64][64] and B [N][64] in fp16 bits, C [64][N] in f32 bits -> all that the kernels take."""
    rows = lambda m: b"".join(pack("H", row) for row in m)  # noqa: E731
    by_k = list(zip(*b))
    blocks = []  # 64 n of all k; what the last has beyond N is NaN
    for n in range(0, len(b), 64):
        blocks.append(b"".join(pack("H", (*row[n : n + 64], *[0x7FFF] * (64 - len(row[n : n + 64])))) for row in by_k))
    kept = []
    for step in range(4):
        for j in range(4):
            for top, g, t in THREADS:
                (m, k), (_, other) = A_OF[2 * j](g, t), A_OF[2 * j + 1](g, t)
                kept.append(pair(a[top + m][16 * step + k], a[top + m][16 * step + other]))
    start = sums_in_registers(c)
    return swizzled(rows(a)) + swizzled(rows(b)) + b"".join(map(swizzled, blocks)) + pack("I", kept) + pack("I", start)


def sums_in_registers(d):
    """[64][N] -> [N / 2][128 threads]: elements 4 j to 4 j + 4 are those of columns 8 j to 8 j + 8."""
    found = []
    for i in range(len(d[0]) // 2):
        for top, g, t in THREADS:
            m, n = C_OF[i % 4](g, t)
            found.append(d[top + m][i // 4 * 8 + n])
    return found


def wgmma():
    random = noise("wgmma")
    whole = lambda rows, columns, size: [  # noqa: E731
        [random.below(2 * size + 1) - size for _ in range(columns)] for _ in range(rows)
    ]
    bits = lambda m, form: [[nearest(x, form) for x in row] for row in m]  # noqa: E731
    shared = lambda n: (1, 128, 1024 + 8192 + n * 128 + (n + 63) // 64 * 8192)  # noqa: E731

    # Whole numbers, so that every order of the sum gives the same.
    for n in (16, 64, 80, 176, 208, 256):
        a, b, c = whole(64, 64, 8), whole(n, 64, 8), whole(64, n, 99)

        def expected(a=a, b=b, c=c):
            plain = [[sum(map(mul, row, column)) for column in b] for row in a]
            added = [[x + y for x, y in zip(*rows)] for rows in zip(plain, c)]
            ways = (plain, added, added, plain)
            return pack("f", (float(x) for way in ways for x in sums_in_registers(way)))

        data = operands(bits(a, F16), bits(b, F16), bits(c, F32))
        own(f"wgmma_{n}", "bits", data, 0, 4 * n * 64 * 4, expected, shared(n))
        if n == 16:
            part = lambda k: [[sum(map(mul, row[k : k + 16], column[k : k + 16])) for column in b] for row in a]  # noqa: E731
            steps = [part(k) for k in (0, 16, 32)]
            groups = pack("f", (float(x) for step in steps for x in sums_in_registers(step)))
            own("wgmma_groups", "bits", data, 0, len(groups), lambda groups=groups: groups, shared(n))

    # Any numbers: each step of 16 k cuts off less than primitives.sum_of says of mma's.
    half = lambda: nearest(random.uniform(-1, 1), F16)  # noqa: E731
    a, b = [[half() for _ in range(64)] for _ in range(64)], [[half() for _ in range(64)] for _ in range(64)]
    c = [[nearest(random.uniform(-1, 1), F32) for _ in range(64)] for _ in range(64)]

    def near():
        rows, columns = [list(map(f16, row)) for row in a], [list(map(f16, column)) for column in b]

        def element(m, n, added):
            products = list(map(mul, rows[m], columns[n]))
            so_far = largest = f32(c[m][n]) if added else 0.0
            for product in products:
                so_far += product
                largest = max(largest, abs(product), abs(so_far))
            return math.fsum([*products, f32(c[m][n]) if added else 0.0]), 4 * 20 * 2.0**-23 * largest

        ways = [[[element(m, n, added) for n in range(64)] for m in range(64)] for added in (False, True)]
        return [x for added in (0, 1, 1, 0) for x in sums_in_registers(ways[added])]

    own("wgmma_sums", "near", operands(a, b, c), 0, 4 * 64 * 64 * 4, near, shared(64), kernel="wgmma_64")


def every_of_hopper():
    """All of them, made once."""
    if not HOPPER:
        for make in (addresses, waiting, copies, clusters, wgmma):
            make()
    return HOPPER

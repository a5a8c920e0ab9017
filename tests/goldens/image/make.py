"""Makes the odd image files of this directory, and what Pillow makes of them.

    python make.py            # writes the files beside this script, and goldens.json

needs Pillow 13 (goldens.json has its hashes), and a second interpreter with Pillow 12 named by PILLOW12 for the resize
rule of Pillow up to 12. Every pixel is drawn here; every writer that Pillow lacks (odd depths, odd layouts) is here too.
OUT and SIZE in the environment make the same files elsewhere, larger, to look at more of them.
"""

import hashlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

from PIL import Image, ImageOps

warnings.simplefilter("ignore")
HERE = Path(__file__).resolve().parent
OUT = Path(os.environ.get("OUT", HERE))
W, H = (int(side) for side in os.environ.get("SIZE", "21x17").split("x"))
SIDE = 24  # pixels a side after the resize
RNG = random.Random(20240607)


# ---------------------------------------------------------------------------------------------------- pictures


def rgb(w=W, h=H, seed=0):
    """A slanted gradient with a bright disc and some noise: edges, flats and extremes."""
    rng = random.Random(seed)
    data = bytearray()
    for y in range(h):
        for x in range(w):
            inside = (x - w / 3) ** 2 + (y - h / 2) ** 2 < (min(w, h) / 3) ** 2
            r, g, b = 255 * x // max(w - 1, 1), 255 * y // max(h - 1, 1), 255 * (x + y) // max(w + h - 2, 1)
            if inside:
                r, g, b = 255 - r // 2, 240, 20
            data += bytes(min(255, max(0, v + rng.randrange(-9, 10))) for v in (r, g, b))
    return Image.frombytes("RGB", (w, h), bytes(data))


def alpha(w=W, h=H):
    return Image.frombytes("L", (w, h), bytes(255 * ((x * 7 + y * 3) % 40) // 39 for y in range(h) for x in range(w)))


def rgba(w=W, h=H):
    image = rgb(w, h).convert("RGBA")
    image.putalpha(alpha(w, h))
    return image


def grey16(w=W, h=H, seed=5):
    """Sixteen bits, a third of them below 256 so that clipping shows."""
    rng = random.Random(seed)
    return [[rng.choice([rng.randrange(256), rng.randrange(65536), 255, 256]) for _ in range(w)] for _ in range(h)]


def indices(colours, w=W, h=H):
    return [[(x * 3 + y * y + x * y // 5) % colours for x in range(w)] for y in range(h)]


def palette(colours):
    rng = random.Random(colours)
    return [tuple(rng.randrange(256) for _ in range(3)) for _ in range(colours)]


def pack(row, bits):
    """Samples of up to 8 bits, most significant first."""
    out, acc, held = bytearray(), 0, 0
    for v in row:
        acc, held = acc << bits | v, held + bits
        while held >= 8:
            held -= 8
            out.append(acc >> held & 255)
    if held:
        out.append(acc << (8 - held) & 255)
    return bytes(out)


# ---------------------------------------------------------------------------------------------------- writers

FILES = {}


def put(name, data):
    assert name not in FILES, name
    FILES[name] = data


def save(name, image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    put(name, buffer.getvalue())


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def png(rows, bits, colour, extra=(), interlaced=False, after=(), idat=None):
    """rows: per pixel one sample or a tuple of samples; filters rotate where there are whole bytes."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]

    def line(pixels):
        flat = [s for p in pixels for s in (p if isinstance(p, tuple) else (p,))]
        return b"".join(struct.pack(">H", s) for s in flat) if bits == 16 else pack(flat, bits)

    def filtered(rows):
        out, before = b"", None
        step = max(1, samples * bits // 8)
        for n, row in enumerate(rows):
            row = line(row)
            above = before or bytes(len(row))
            kind = n % 5
            enc = bytearray()
            for i, v in enumerate(row):
                a = row[i - step] if i >= step else 0
                b = above[i]
                c = above[i - step] if i >= step else 0
                p = a + b - c
                paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
                enc.append((v - [0, a, b, (a + b) // 2, paeth][kind]) & 255)
            out += bytes([kind]) + bytes(enc)
            before = row
        return out

    h, w = len(rows), len(rows[0])
    if interlaced:
        raw = b"".join(
            filtered([[rows[y][x] for x in range(x0, w, dx)] for y in range(y0, h, dy)])
            for x0, y0, dx, dy in ADAM7
            if x0 < w and y0 < h
        )
    else:
        raw = filtered(rows)
    data = zlib.compress(raw)
    head = struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, interlaced)
    parts = [chunk(b"IDAT", data[i : i + (idat or len(data))]) for i in range(0, len(data), idat or len(data))]
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(*e) for e in extra) + b"".join(parts)
        + b"".join(chunk(*e) for e in after) + chunk(b"IEND", b"")
    )


def pixels(image):
    w, h = image.size
    return [[image.getpixel((x, y)) for x in range(w)] for y in range(h)]


def exif(orientation, order="<"):
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IHHHIHH", 8, 1, 274, 3, 1, orientation, 0) + bytes(4)


def bmp(w, h, bits, rows, compression=0, colours=(), masks=b"", header=40, top_down=False, entry=4, declared=None):
    """rows: the pixel bytes of each row as stored, or all bytes for run lengths."""
    if isinstance(rows, bytes):
        data = rows
    else:
        rows = rows if top_down else rows[::-1]
        data = b"".join(row + bytes(-len(row) % 4) for row in rows)
    table = b"".join(bytes((b, g, r) + (0,) * (entry - 3)) for r, g, b in colours)
    if header == 12:
        head = struct.pack("<IHHHH", 12, w, h, 1, bits)
    else:
        count = len(colours) if declared is None else declared
        head = struct.pack("<IiiHHIIIIII", header, w, -h if top_down else h, 1, bits, compression, len(data), 2835, 2835, count, 0)
        if header > 40:
            head += masks + bytes(header - 40 - len(masks))
            masks = b""
    offset = 14 + len(head) + len(masks) + len(table)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + head + masks + table + data


def bits16(image, mask):
    r, g, b = ((m.bit_length(), bin(m).count("1")) for m in mask)

    def word(p):
        return sum((v >> (8 - n)) << (top - n) for v, (top, n) in zip(p, (r, g, b)))

    return [b"".join(struct.pack("<H", word(p)) for p in row) for row in pixels(image)]


def tiff(w, h, parts, tags, order="<", big=False):
    """parts: the bytes of each strip or tile; tags: number -> (type, values). Offsets and counts are filled in."""
    offset_tag, count_tag = (324, 325) if 322 in tags else (273, 279)
    at = 16 if big else 8
    offsets, body = [], b""
    for part in parts:
        offsets.append(at + len(body))
        body += part + bytes(len(part) % 2)
    tags = {256: (4, [w]), 257: (4, [h]), offset_tag: (4, offsets), count_tag: (4, [len(p) for p in parts]), **tags}
    size = {1: "B", 3: "H", 4: "I", 7: "B"}
    width, number = ("Q", "Q") if big else ("I", "H")
    first = at + len(body)
    entries, values = b"", b""
    beyond = first + struct.calcsize(order + number) + len(tags) * (20 if big else 12) + struct.calcsize(order + width)
    for tag in sorted(tags):
        kind, numbers = tags[tag]
        value = struct.pack(order + str(len(numbers)) + size[kind], *numbers)
        inline = struct.calcsize(order + width)
        entries += struct.pack(order + "HH" + width, tag, kind, len(numbers))
        if len(value) <= inline:
            entries += value.ljust(inline, b"\0")
        else:
            entries += struct.pack(order + width, beyond + len(values))
            values += value + bytes(len(value) % 2)
    directory = struct.pack(order + number, len(tags)) + entries + struct.pack(order + width, 0)
    mark = b"II" if order == "<" else b"MM"
    head = mark + (struct.pack(order + "HHHQ", 43, 8, 0, first) if big else struct.pack(order + "HI", 42, first))
    return head + body + directory + values


def pack_bits(data):
    out = b""
    for i in range(0, len(data), 100):
        part = data[i : i + 100]
        if len(set(part)) == 1 and len(part) > 1:
            out += bytes([257 - len(part), part[0]])
        else:
            out += bytes([len(part) - 1]) + part
    return out


def gif_lzw(data, bits):
    """LZW that clears its table before codes would widen: every decoder agrees on it."""
    clear, codes, held, acc, out = 1 << bits, [], 0, 0, bytearray()
    for i, v in enumerate(data):
        if i % max(1, clear - 2) == 0:
            codes.append(clear)
        codes.append(v)
    for code in codes + [clear + 1]:
        acc |= code << held
        held += bits + 1
        while held >= 8:
            out.append(acc & 255)
            acc, held = acc >> 8, held - 8
    if held:
        out.append(acc & 255)
    return bytes(out)


def gif(w, h, frames, colours=None, background=0, end=b";"):
    """frames: (left, top, rows, options) with options palette, transparent, interlaced."""
    flags = 0x80 | (len(colours).bit_length() - 2) if colours else 0
    out = b"GIF89a" + struct.pack("<HHBBB", w, h, flags, background, 0) + bytes(v for c in colours or () for v in c)
    for left, top, rows, options in frames:
        if "transparent" in options:
            out += b"!\xf9\x04" + struct.pack("<BHB", 1, 10, options["transparent"]) + b"\0"
        local = options.get("palette")
        flags = (0x80 | (len(local).bit_length() - 2) if local else 0) | (0x40 if options.get("interlaced") else 0)
        fh, fw = len(rows), len(rows[0])
        out += b"," + struct.pack("<HHHHB", left, top, fw, fh, flags) + bytes(v for c in local or () for v in c)
        if options.get("interlaced"):
            rows = [rows[y] for a, s in ((0, 8), (4, 8), (2, 4), (1, 2)) for y in range(a, fh, s)]
        bits = max(2, (len(local or colours or range(256)) - 1).bit_length())
        data = gif_lzw([v for row in rows for v in row], bits)
        out += bytes([bits]) + b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255)) + b"\0"
    return out + end


# ---------------------------------------------------------------------------------------------------- the files


def make_jpeg():
    image = rgb(3 * W + 4, 2 * H + 1)  # not a multiple of any MCU
    for name, options in {
        "444": {"subsampling": 0}, "422": {"subsampling": 1}, "420": {"subsampling": 2},
        "progressive": {"progressive": True}, "progressive_444": {"progressive": True, "subsampling": 0, "quality": 95},
        "optimised": {"optimize": True, "quality": 20}, "restarts": {"restart_marker_blocks": 3},
        "restart_rows": {"restart_marker_rows": 1, "subsampling": 0}, "quality_100": {"quality": 100, "subsampling": 0},
        "quality_1": {"quality": 1}, "stored_as_rgb": {"keep_rgb": True},
    }.items():
        save(f"{name}.jpg", image, format="JPEG", **({"quality": 80} | options))
    save("grey.jpg", image.convert("L"), format="JPEG")
    save("grey_progressive.jpg", image.convert("L"), format="JPEG", progressive=True)
    save("cmyk.jpg", image.convert("CMYK"), format="JPEG", quality=90)
    cmyk = FILES["cmyk.jpg"]
    assert b"Adobe" in cmyk[:64]
    # the same bytes called YCCK, and called nothing
    put("ycck.jpg", cmyk.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2", 1))
    put("cmyk_unmarked.jpg", cmyk.replace(b"\xff\xee\0\x0eAdobe", b"\xff\xec\0\x0eAdobe", 1))
    save("one_pixel.jpg", rgb(1, 1), format="JPEG")
    save("row.jpg", rgb(70, 1), format="JPEG")
    save("column.jpg", rgb(1, 70), format="JPEG")
    plain = FILES["420.jpg"]
    put("trailing.jpg", plain + b"trailing bytes \xff\xd8\xff" * 3)
    put("stray_before_marker.jpg", plain[:2] + b"\xff\xff\xff" + plain[2:])
    put("no_end.jpg", plain[:-2])
    put("no_end_progressive.jpg", FILES["progressive.jpg"][:-2])
    put("no_end_restarts.jpg", FILES["restarts.jpg"][:-2])
    for name in ("420", "progressive", "restarts", "grey", "cmyk"):
        put(f"cut_{name}.jpg", FILES[f"{name}.jpg"][: len(FILES[f"{name}.jpg"]) * 3 // 4])
    put("cut_and_ended.jpg", plain[: len(plain) * 3 // 4] + b"\xff\xd9")
    for n in range(1, 9):
        save(f"exif_{n}.jpg", rgb(W, H + 6), format="JPEG", exif=b"Exif\0\0" + exif(n, "<>"[n % 2]))
    frame = plain.index(b"\xff\xc0")
    put("twelve_bits.jpg", plain[: frame + 4] + b"\x0c" + plain[frame + 5 :])
    put("lossless.jpg", plain[: frame + 1] + b"\xc3" + plain[frame + 2 :])
    # one component a scan, still sequential: the same coefficients, entropy-coded apart, are what `jpegtran -scans` makes
    put("tables_only.jpg", plain[: plain.index(b"\xff\xda")] + b"\xff\xd9")


def make_png():
    for bits in (1, 2, 4):
        put(f"grey_{bits}.png", png(indices(1 << bits), bits, 0))
        put(f"palette_{bits}.png", png(indices(1 << bits), bits, 3, [(b"PLTE", bytes(v for c in palette(1 << bits) for v in c))]))
        put(f"grey_{bits}_interlaced.png", png(indices(1 << bits), bits, 0, interlaced=True))
        put(f"palette_{bits}_interlaced.png", png(indices(1 << bits), bits, 3, [(b"PLTE", bytes(v for c in palette(1 << bits) for v in c))], interlaced=True))
    put("grey_8.png", png(pixels(rgb().convert("L")), 8, 0))
    put("grey_16.png", png(grey16(), 16, 0))
    put("grey_16_interlaced.png", png(grey16(), 16, 0, interlaced=True))
    put("grey_16_key.png", png(grey16(), 16, 0, [(b"tRNS", struct.pack(">H", 255))]))
    put("grey_2_key.png", png(indices(4), 2, 0, [(b"tRNS", struct.pack(">H", 2))]))
    put("grey_8_key.png", png(indices(9), 8, 0, [(b"tRNS", struct.pack(">H", 3))]))
    put("rgb_8.png", png(pixels(rgb()), 8, 2, idat=100))
    put("rgb_8_interlaced.png", png(pixels(rgb()), 8, 2, interlaced=True))
    key = rgb().getpixel((3, 3))
    put("rgb_8_key.png", png(pixels(rgb()), 8, 2, [(b"tRNS", struct.pack(">HHH", *key))]))
    wide = [[tuple(v * 256 + (v * 7 + x) % 256 for v in p) for x, p in enumerate(row)] for row in pixels(rgb())]
    put("rgb_16.png", png(wide, 16, 2))
    put("rgb_16_interlaced.png", png(wide, 16, 2, interlaced=True))
    put("rgb_16_key.png", png(wide, 16, 2, [(b"tRNS", struct.pack(">HHH", *wide[2][2]))]))
    put("rgba_8.png", png(pixels(rgba()), 8, 6))
    put("rgba_8_interlaced.png", png(pixels(rgba()), 8, 6, interlaced=True))
    put("rgba_16.png", png([[tuple(v * 256 + 200 for v in p) for p in row] for row in pixels(rgba())], 16, 6))
    put("grey_alpha_8.png", png(pixels(rgba().convert("LA")), 8, 4))
    put("grey_alpha_16.png", png([[(v[0] * 256 + 130, v[1] * 256 + 9) for v in row] for row in pixels(rgba().convert("LA"))], 16, 4))
    table = palette(200)
    put("palette_8.png", png(indices(200), 8, 3, [(b"PLTE", bytes(v for c in table for v in c))]))
    put("palette_8_alpha.png", png(indices(200), 8, 3, [(b"PLTE", bytes(v for c in table for v in c)), (b"tRNS", bytes(range(0, 240, 2)))]))
    put("palette_8_hole.png", png(indices(200), 8, 3, [(b"PLTE", bytes(v for c in table for v in c)), (b"tRNS", b"\xff\xff\0")]))
    put("palette_short.png", png(indices(16), 4, 3, [(b"PLTE", bytes(v for c in palette(9) for v in c))]))
    for n in (3, 6, 7):
        put(f"exif_{n}.png", png(pixels(rgb()), 8, 2, [(b"eXIf", exif(n, ">"))]))
    put("exif_8_late.png", png(pixels(rgb()), 8, 2, after=[(b"eXIf", exif(8, "<"))]))
    frames = [rgb(seed=s) for s in range(3)]
    save("animated.png", frames[0], format="PNG", save_all=True, append_images=frames[1:], duration=50)
    save("animated_default.png", frames[0], format="PNG", save_all=True, append_images=frames[1:], default_image=True)
    for w, h in ((1, 1), (1, 9), (2, 3), (9, 1), (5, 5)):
        put(f"interlaced_{w}x{h}.png", png(pixels(rgb(w, h)), 8, 2, interlaced=True))
    plain = FILES["rgb_8.png"]
    put("no_end.png", plain[:-12])
    put("half_an_end.png", plain[:-5])
    put("trailing.png", plain + b"more")
    put("cut.png", plain[: len(plain) * 2 // 3])
    put("cut_interlaced.png", FILES["rgb_8_interlaced.png"][:-300])
    put("huge.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(100000))) + chunk(b"IEND", b""))


def make_bmp():
    image = rgb()
    for bits, colours in ((1, 2), (4, 16), (4, 11), (8, 256), (8, 100)):
        rows = [pack(row, bits) for row in indices(colours)]
        put(f"palette_{bits}_{colours}.bmp", bmp(W, H, bits, rows, colours=palette(colours)))
    rows = [pack(row, 8) for row in indices(256)]
    put("grey_8.bmp", bmp(W, H, 8, rows, colours=[(i, i, i) for i in range(256)]))
    put("grey_8_top_down.bmp", bmp(W, H, 8, rows, colours=[(i, i, i) for i in range(256)], top_down=True))
    put("bilevel.bmp", bmp(W, H, 1, [pack(row, 1) for row in indices(2)], colours=[(0, 0, 0), (255, 255, 255)]))
    put("bilevel_inverted.bmp", bmp(W, H, 1, [pack(row, 1) for row in indices(2)], colours=[(255, 255, 255), (0, 0, 0)]))
    put("all_colours_undeclared.bmp", bmp(W, H, 4, [pack(row, 4) for row in indices(16)], colours=palette(16), declared=0))
    put("core_8.bmp", bmp(W, H, 8, rows, colours=palette(256), header=12, entry=3))
    bgr = [b"".join(bytes(p[::-1]) for p in row) for row in pixels(image)]
    put("rgb_24.bmp", bmp(W, H, 24, bgr))
    put("rgb_24_top_down.bmp", bmp(W, H, 24, bgr, top_down=True))
    put("core_24.bmp", bmp(W, H, 24, bgr, header=12))
    put("v5_24.bmp", bmp(W, H, 24, bgr, header=124))
    put("rgb_16_555.bmp", bmp(W, H, 16, bits16(image, (0x7C00, 0x3E0, 0x1F))))
    put("rgb_16_565.bmp", bmp(W, H, 16, bits16(image, (0xF800, 0x7E0, 0x1F)), 3, masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F)))
    put("rgb_16_555_fields.bmp", bmp(W, H, 16, bits16(image, (0x7C00, 0x3E0, 0x1F)), 3, masks=struct.pack("<III", 0x7C00, 0x3E0, 0x1F)))
    bgrx = [b"".join(bytes((p[2], p[1], p[0], p[3])) for p in row) for row in pixels(rgba())]
    put("rgbx_32.bmp", bmp(W, H, 32, bgrx))
    put("rgbx_32_fields.bmp", bmp(W, H, 32, bgrx, 3, masks=struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)))
    for name, masks in {
        "bgra": (0xFF0000, 0xFF00, 0xFF, 0xFF000000), "rgba": (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        "abgr": (0xFF000000, 0xFF0000, 0xFF00, 0xFF), "xbgr": (0xFF000000, 0xFF0000, 0xFF00, 0), "zero": (0, 0, 0, 0),
    }.items():
        put(f"v5_32_{name}.bmp", bmp(W, H, 32, bgrx, 3, masks=struct.pack("<IIII", *masks), header=124))

    def runs(rows, wide):
        out = b""
        for n, row in enumerate(rows[::-1]):
            x = 0
            while x < len(row):
                run = 1
                while x + run < len(row) and row[x + run] == row[x] and run < 200:
                    run += 1
                literal = row[x : x + 5]
                if run == 1 and len(literal) >= 3:
                    data = bytes(literal) if wide == 8 else pack(literal, 4)
                    out += bytes([0, len(literal)]) + data + bytes(len(data) % 2)
                    x += len(literal)
                else:
                    out += bytes([run, row[x] if wide == 8 else row[x] * 17])
                    x += run
            out += b"\0\0" if n + 1 < len(rows) else b"\0\1"
        return out

    blocks = [[(x // 4 + y // 3) % 16 if y % 3 else (x * 5) % 16 for x in range(W)] for y in range(H)]
    put("rle_8.bmp", bmp(W, H, 8, runs(blocks, 8), 1, colours=palette(16)))
    put("rle_4.bmp", bmp(W, H, 4, runs(blocks, 4), 2, colours=palette(16)))
    # a row left early, a jump, and runs past the end of a row
    jump = b"\5\1\0\0" + b"\0\2\4\2" + bytes([W, 2]) + b"\0\0" + (bytes([W + 9, 3]) + b"\0\0") * (H - 4) + b"\0\1"
    put("rle_8_jump.bmp", bmp(W, H, 8, jump, 1, colours=palette(16)))
    put("rle_8_short.bmp", bmp(W, H, 8, b"\5\1\0\0\3\2\0\1", 1, colours=palette(16)))
    put("cut.bmp", FILES["rgb_24.bmp"][:-200])
    put("last_padding_cut.bmp", FILES["rgb_24.bmp"][: -(-len(bgr[0]) % 4) or None])
    put("huge.bmp", bmp(60000, 60000, 24, b"\0" * 100))


def make_gif():
    table = palette(64)
    rows = indices(64)
    put("plain.gif", gif(W, H, [(0, 0, rows, {})], table))
    put("interlaced.gif", gif(W, H, [(0, 0, rows, {"interlaced": True})], table))
    put("transparent.gif", gif(W, H, [(0, 0, rows, {"transparent": 7})], table))
    put("local_palette.gif", gif(W, H, [(0, 0, indices(16), {"palette": palette(16)})], table))
    put("only_local_palette.gif", gif(W, H, [(0, 0, indices(16), {"palette": palette(16)})]))
    put("no_palette.gif", gif(W, H, [(0, 0, indices(256), {})]))
    small = [row[: W - 9] for row in rows[: H - 6]]
    put("offset.gif", gif(W, H, [(5, 4, small, {})], table, background=3))
    put("offset_transparent.gif", gif(W, H, [(5, 4, small, {"transparent": 9})], table, background=3))
    put("outside.gif", gif(W - 4, H - 3, [(0, 0, rows, {})], table))
    put("animated.gif", gif(W, H, [(0, 0, rows, {}), (2, 2, small, {"transparent": 1})], table))
    put("no_end.gif", gif(W, H, [(0, 0, rows, {})], table, end=b""))
    put("cut.gif", FILES["plain.gif"][: len(FILES["plain.gif"]) * 3 // 4])
    put("few_codes.gif", gif(W, H, [(0, 0, rows, {})], table).replace(struct.pack("<HHHHB", 0, 0, W, H, 0), struct.pack("<HHHHB", 0, 0, W, H - 1, 0)))
    put("too_few_codes.gif", gif(W, H, [(0, 0, rows, {})], table).replace(struct.pack("<HHHHB", 0, 0, W, H, 0), struct.pack("<HHHHB", 0, 0, W, H + 1, 0)))
    save("by_pillow.gif", rgb(2 * W, 2 * H).quantize(64), format="GIF")


def make_webp():
    save("lossless.webp", rgb(), format="WEBP", lossless=True)
    save("lossless_alpha.webp", rgba(), format="WEBP", lossless=True, exact=True)
    frames = [rgba()] + [rgb(seed=s).convert("RGBA") for s in (1, 2)]
    save("animated.webp", frames[0], format="WEBP", save_all=True, append_images=frames[1:], lossless=True, exact=True)
    save("exif_6.webp", rgb(), format="WEBP", lossless=True, exif=b"Exif\0\0" + exif(6))
    save("lossy.webp", rgb(3 * W, 2 * H), format="WEBP", quality=70)
    save("lossy_alpha.webp", rgba(), format="WEBP", quality=70)
    for name in ("lossless", "lossy"):
        put(f"cut_{name}.webp", FILES[f"{name}.webp"][: len(FILES[f"{name}.webp"]) * 2 // 3])


def make_tiff():
    image, seen = rgb(), pixels(rgb())
    flat = [b"".join(bytes(p) for p in row) for row in seen]
    colour = {258: (3, [8, 8, 8]), 262: (3, [2]), 277: (3, [3])}

    def strips(rows, n):
        return [b"".join(rows[i : i + n]) for i in range(0, len(rows), n)]

    put("rgb.tiff", tiff(W, H, strips(flat, 5), {**colour, 278: (3, [5])}))
    put("rgb_big_endian.tiff", tiff(W, H, strips(flat, 5), {**colour, 278: (3, [5])}, ">"))
    put("rgb_bigtiff.tiff", tiff(W, H, strips(flat, 5), {**colour, 278: (3, [5])}, big=True))
    put("deflate.tiff", tiff(W, H, [zlib.compress(s) for s in strips(flat, 6)], {**colour, 278: (3, [6]), 259: (3, [8])}))
    put("pack_bits.tiff", tiff(W, H, [pack_bits(s) for s in strips(flat, 6)], {**colour, 278: (3, [6]), 259: (3, [32773])}))

    def differences(row, step):
        return row[:step] + bytes((row[i] - row[i - step]) & 255 for i in range(step, len(row)))

    put("deflate_predicted.tiff", tiff(W, H, [zlib.compress(b"".join(differences(r, 3) for r in flat))], {**colour, 259: (3, [8]), 317: (3, [2])}))

    def tiles(rows, step, side=16):
        """Tiles of side × side pixels of `step` bytes, padded with 0x55."""
        out = []
        for top in range(0, H, side):
            for left in range(0, W, side):
                tile = b""
                for y in range(top, top + side):
                    row = rows[y][left * step : (left + side) * step] if y < H else b""
                    tile += row.ljust(side * step, b"\x55")
                out.append(tile)
        return out

    tiled = {322: (3, [16]), 323: (3, [16])}
    put("tiled.tiff", tiff(W, H, tiles(flat, 3), {**colour, **tiled}))
    put("tiled_deflate.tiff", tiff(W, H, [zlib.compress(t) for t in tiles(flat, 3)], {**colour, **tiled, 259: (3, [8])}))
    bands = [[bytes(p[c] for p in row) for row in seen] for c in range(3)]
    put("planar.tiff", tiff(W, H, [s for b in bands for s in strips(b, 6)], {**colour, 278: (3, [6]), 284: (3, [2])}))
    put("planar_deflate.tiff", tiff(W, H, [zlib.compress(s) for b in bands for s in strips(b, 6)], {**colour, 278: (3, [6]), 284: (3, [2]), 259: (3, [8])}))
    put("planar_tiled.tiff", tiff(W, H, [zlib.compress(t) for b in bands for t in tiles(b, 1)], {**colour, **tiled, 284: (3, [2]), 259: (3, [8])}))
    for order, name in (("<", "little"), (">", "big")):
        wide = [b"".join(struct.pack(order + "3H", *(v * 256 + (v * 5) % 256 for v in p)) for p in row) for row in seen]
        tags = {**colour, 258: (3, [16, 16, 16])}
        put(f"rgb_16_{name}.tiff", tiff(W, H, [b"".join(wide)], tags, order))
        put(f"rgb_16_{name}_deflate.tiff", tiff(W, H, [zlib.compress(b"".join(wide))], {**tags, 259: (3, [8])}, order))
        grey = [b"".join(struct.pack(order + "H", v) for v in row) for row in grey16()]
        tags = {258: (3, [16]), 262: (3, [1])}
        put(f"grey_16_{name}.tiff", tiff(W, H, [b"".join(grey)], tags, order))
        put(f"grey_16_{name}_deflate.tiff", tiff(W, H, [zlib.compress(b"".join(grey))], {**tags, 259: (3, [8])}, order))
        signed = [b"".join(struct.pack(order + "h", v - 300) for v in (min(p, 32000) for p in row)) for row in grey16()]
        put(f"grey_16_signed_{name}.tiff", tiff(W, H, [b"".join(signed)], {**tags, 339: (3, [2])}, order))
        deep = [b"".join(struct.pack(order + "i", v * 3 - 300) for v in row) for row in grey16()]
        put(f"grey_32_signed_{name}.tiff", tiff(W, H, [b"".join(deep)], {**tags, 258: (3, [32]), 339: (3, [2])}, order))
        floats = [b"".join(struct.pack(order + "f", v / 2 - 20.3) for v in row) for row in grey16()]
        put(f"grey_float_{name}.tiff", tiff(W, H, [b"".join(floats)], {**tags, 258: (3, [32]), 339: (3, [3])}, order))
    for bits in (1, 2, 4, 8):
        rows = [pack(row, bits) for row in indices(1 << bits)]
        for photometric in (0, 1):
            tags = {258: (3, [bits]), 262: (3, [photometric])}
            put(f"grey_{bits}_{photometric}.tiff", tiff(W, H, [b"".join(rows)], tags))
        table = palette(1 << bits)
        colours = [c[i] * 257 for i in range(3) for c in table]
        put(f"palette_{bits}.tiff", tiff(W, H, [b"".join(rows)], {258: (3, [bits]), 262: (3, [3]), 320: (3, colours)}))
        put(f"palette_{bits}_deflate.tiff", tiff(W, H, [zlib.compress(b"".join(rows))], {258: (3, [bits]), 262: (3, [3]), 320: (3, colours), 259: (3, [8])}))
    twelve = [pack(row, 12) for row in [[v % 4096 for v in r] for r in grey16()]]
    put("grey_12.tiff", tiff(W, H, [b"".join(twelve)], {258: (3, [12]), 262: (3, [1])}))
    mirrored = bytes(int(f"{v:08b}"[::-1], 2) for v in range(256))
    put("bits_reversed.tiff", tiff(W, H, [b"".join(pack(r, 1) for r in indices(2)).translate(mirrored)], {258: (3, [1]), 262: (3, [1]), 266: (3, [2])}))
    four = [b"".join(bytes(p) for p in row) for row in pixels(rgba())]
    for extra, name in ((0, "x"), (1, "premultiplied"), (2, "alpha")):
        tags = {258: (3, [8] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, [extra])}
        put(f"rgb_{name}.tiff", tiff(W, H, [b"".join(four)], tags))
    put("rgb_alpha_unnamed.tiff", tiff(W, H, [b"".join(four)], {258: (3, [8] * 4), 262: (3, [2]), 277: (3, [4])}))
    put("cmyk.tiff", tiff(W, H, [b"".join(four)], {258: (3, [8] * 4), 262: (3, [5]), 277: (3, [4])}))
    wide = [b"".join(struct.pack("<4H", *(v * 256 + 77 for v in p)) for p in row) for row in pixels(rgba())]
    put("cmyk_16.tiff", tiff(W, H, [b"".join(wide)], {258: (3, [16] * 4), 262: (3, [5]), 277: (3, [4])}))
    put("rgba_16.tiff", tiff(W, H, [b"".join(wide)], {258: (3, [16] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, [2])}))
    put("rgba_16_premultiplied.tiff", tiff(W, H, [b"".join(wide)], {258: (3, [16] * 4), 262: (3, [2]), 277: (3, [4]), 338: (3, [1])}))
    two = [b"".join(bytes(p) for p in row) for row in pixels(rgba().convert("LA"))]
    put("grey_alpha.tiff", tiff(W, H, [b"".join(two)], {258: (3, [8] * 2), 262: (3, [1]), 277: (3, [2]), 338: (3, [2])}))
    put("grey_x.tiff", tiff(W, H, [b"".join(two)], {258: (3, [8] * 2), 262: (3, [1]), 277: (3, [2]), 338: (3, [0])}))
    for n in (2, 5, 6):
        put(f"orientation_{n}.tiff", tiff(W, H, [b"".join(flat)], {**colour, 274: (3, [n])}))
    save("lzw_by_libtiff.tiff", rgb(2 * W, H), format="TIFF", compression="tiff_lzw")
    save("lzw_predicted.tiff", rgb(2 * W, H), format="TIFF", compression="tiff_lzw", tiffinfo={317: 2})
    save("jpeg.tiff", rgb(2 * W, 2 * H), format="TIFF", compression="jpeg")
    save("jpeg_grey.tiff", rgb(2 * W, 2 * H).convert("L"), format="TIFF", compression="jpeg")
    save("jpeg_ycbcr.tiff", rgb(2 * W, 2 * H).convert("YCbCr"), format="TIFF", compression="jpeg")
    save("jpeg_cmyk.tiff", rgb(2 * W, 2 * H).convert("CMYK"), format="TIFF", compression="jpeg")
    save("group_4.tiff", rgb(3 * W, 2 * H).convert("1"), format="TIFF", compression="group4")
    save("group_3.tiff", rgb(3 * W, 2 * H).convert("1"), format="TIFF", compression="group3")
    save("pages.tiff", rgb(), format="TIFF", save_all=True, append_images=[rgb(seed=3)])
    put("cut.tiff", tiff(W, H, [b"".join(flat)[:-100]], {**colour}))
    put("cut_deflate.tiff", tiff(W, H, [zlib.compress(b"".join(flat))[:-150]], {**colour, 259: (3, [8])}))
    put("huge.tiff", tiff(60000, 60000, [bytes(100)], {**colour}))


# ---------------------------------------------------------------------------------------------------- what Pillow says


def sha(image):
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:32]


def describe(path):
    """Hashes of the pixels as stored, upright, over white, and resized; or that Pillow refuses the file."""
    try:
        image = Image.open(path)
        image.load()
        plain = image.convert("RGB")
        result = {"mode": image.mode, "size": list(plain.size), "rgb": sha(plain)}
        result["resized"] = sha(plain.resize((SIDE, SIDE), Image.BICUBIC))
        upright = ImageOps.exif_transpose(Image.open(path))
        if upright.getexif().get(274, 1) == 1 and sha(upright) != result["rgb"]:
            result["upright"] = sha(upright)
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            over = image.convert("RGBA")
            white = Image.new("RGB", over.size, (255, 255, 255))
            white.paste(over.convert("RGB"), mask=over.getchannel("A"))
            result["over_white"] = sha(white)
        return result
    except Exception as error:
        return {"refused": type(error).__name__}


if __name__ == "__main__":
    if len(sys.argv) > 1:  # the other Pillow: describe what is there
        print(json.dumps({path: describe(path) for path in sys.argv[1:]}))
        sys.exit()
    for make in (make_jpeg, make_png, make_bmp, make_gif, make_webp, make_tiff):
        make()
    OUT.mkdir(exist_ok=True, parents=True)
    for name, data in FILES.items():
        (OUT / name).write_bytes(data)
    goldens = {name: describe(OUT / name) for name in sorted(FILES)}
    if other := os.environ.get("PILLOW12"):
        paths = {str(OUT / name): name for name in FILES}
        for path, old in json.loads(subprocess.check_output([other, __file__, *paths])).items():
            new = goldens[paths[path]]
            if (old.get("rgb"), old.get("over_white")) != (new.get("rgb"), new.get("over_white")):
                print(f"{paths[path]}: Pillow 12 says {old}, 13 {new}", file=sys.stderr)
            if "resized" in old:
                new["resized_pillow12"] = old["resized"]
    (OUT / "goldens.json").write_text(json.dumps(goldens, indent=1, sort_keys=True) + "\n")
    print(len(FILES), "files,", sum(map(len, FILES.values())), "bytes")

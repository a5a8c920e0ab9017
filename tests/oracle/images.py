"""Runs `imagehere preprocess` on pictures that no test has seen and compares the pixels with Pillow's.

    python tests/oracle/images.py target/release/imagehere [--cases N] [--seed S] [--file F]...

Each case draws a size, a mode, a format and its knobs (JPEG subsampling, quality, progressive, restart markers,
grey, CMYK; PNG bilevel, grey, palette with and without transparency, 16-bit; GIF, BMP, TIFF with its
compressions, WebP) and a target size, saves it with Pillow and compares `preprocess --size N` with
`Image.open(f).convert("RGB")`, upright, resized BICUBIC. Lossless formats and JPEG must be byte-equal; lossy WebP
may differ by 2 levels. `--file` adds files, resized to 490. Exits 1 on a difference.

The interpreter's Pillow decides which rule is asked for: up to 12 `--resample pillow`, from 13 `pillow13`.
"""

import argparse
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
import PIL
from PIL import Image, ImageOps

RESAMPLE = "pillow13" if int(PIL.__version__.split(".")[0]) >= 13 else "pillow"


def draw(rng, path):
    """Saves a random picture at `path` + its ending; (path, description, levels it may differ by)."""
    width, height = (rng.choice([1, 3, 20, 100, 300, 700]) + rng.randint(0, 15) for _ in range(2))
    seed = np.random.default_rng(rng.randrange(2**32))
    noise = seed.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = Image.fromarray(noise[: height // 9 + 1, : width // 9 + 1]).resize((width, height), Image.Resampling.BICUBIC)
    image = Image.blend(coarse, Image.fromarray(noise), rng.choice([0.0, 0.1, 0.6]))
    alpha = Image.fromarray(seed.choice(np.array([0, 128, 255], np.uint8), (height, width)))
    kind = rng.choice(["jpeg"] * 5 + ["png"] * 5 + ["gif", "bmp", "tiff", "tiff", "webp", "webp lossy"])
    options, levels = {}, 0
    if kind == "jpeg":
        mode = rng.choice(["RGB", "RGB", "RGB", "L", "CMYK"])
        options = dict(quality=rng.randint(5, 100), progressive=rng.random() < 0.4, optimize=rng.random() < 0.3)
        if mode == "RGB":
            options["subsampling"] = rng.randint(0, 2)
        if rng.random() < 0.3:
            options["restart_marker_blocks"] = rng.randint(1, 20)
        if rng.random() < 0.5:
            exif = Image.Exif()
            exif[0x0112] = rng.randint(1, 8)
            options["exif"] = exif
    elif kind == "png":
        mode = rng.choice(["1", "L", "LA", "P", "P transparent", "RGB", "RGBA", "I;16"])
    elif kind == "gif":
        mode = rng.choice(["L", "P", "1"])
    elif kind == "bmp":
        mode = rng.choice(["1", "L", "P", "RGB"])
    elif kind == "tiff":
        mode = rng.choice(["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
        options["compression"] = rng.choice([None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    else:
        mode = rng.choice(["RGB", "RGBA"])
        lossy = kind.endswith("lossy")
        options, levels, kind = dict(lossless=not lossy, quality=rng.randint(20, 95)), 2 * lossy, "webp"
    if mode == "P transparent":
        image = image.quantize(rng.choice([2, 16, 256]))
        options["transparency"] = rng.randint(0, 1)
    elif mode == "P":
        image = image.quantize(rng.choice([2, 4, 16, 256]))
    elif mode == "I;16":
        image = Image.fromarray(seed.integers(0, 65536, (height, width)).astype(np.uint16))
    elif mode in ("RGBA", "LA"):
        image = image.convert(mode[:-1])
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    path = path.with_suffix("." + kind)
    image.save(path, **options)
    shown = {k: v for k, v in options.items() if k != "exif"}
    return path, f"{kind} {mode} {width}x{height} {shown}", levels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()) // 60 * 1000, help="of the first case (default: the clock)")
    parser.add_argument("--file", type=pathlib.Path, action="append", default=[])
    args = parser.parse_args()
    failures, counts = 0, {}
    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        for case in range(args.cases + len(args.file)):
            rng = random.Random(args.seed + case)
            if case < args.cases:
                path, what, levels = draw(rng, temp / f"case{case}")
                size = rng.choice([14, 70, 224, 336, 490, rng.randint(1, 500)])
            else:
                path, what, levels, size = args.file[case - args.cases], "", 0, 490
            out = temp / f"out{case}"
            command = [args.binary, "preprocess", "--image", path, "--size", str(size), "--resample", RESAMPLE, "--out", out]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode != 0:
                problem = f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
            else:
                want = ImageOps.exif_transpose(Image.open(path)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
                got, want = (np.asarray(i, dtype=np.int16) for i in (Image.open(out / "000.png"), want))
                apart = np.abs(got - want) if got.shape == want.shape else None
                problem = None
                if apart is None or got.ndim != 3:
                    problem = f"shape {got.shape}, not {want.shape}"
                elif apart.max() > levels:
                    problem = f"{(apart > 0).mean():.1%} of the samples differ, by up to {apart.max()} levels"
            kind = " ".join(what.split(" ")[:2]) or path.name
            total, bad = counts.get(kind, (0, 0))
            counts[kind] = (total + 1, bad + (problem is not None))
            if problem:
                failures += 1
                print(f"FAIL seed {args.seed + case}: {what or path} -> {size}: {problem}", flush=True)
    for kind, (total, bad) in sorted(counts.items()):
        print(f"{kind:24} {total - bad:4} of {total:4} equal")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

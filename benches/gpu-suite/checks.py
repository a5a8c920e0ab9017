"""What is checked besides the tests: the instructions themselves, full-size features, accesses of memory."""

import glob
import json
import os
import pathlib
import random
import shutil
import struct
import sys
import time
import zlib

from device import HERE, Skipped, environment, tail


def png(path, side, rgb):
    """Writes [side, side, 3] u8."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    rows = b"".join(b"\0" + rgb[3 * side * y : 3 * side * (y + 1)] for y in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pathlib.Path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    )


def pictures(side, seed):
    """Noise, and something smooth with a little noise."""
    source = random.Random(seed)
    noise = source.getrandbits(24 * side * side).to_bytes(3 * side * side, "little")
    smooth = bytearray()
    for y in range(side):
        for x in range(side):
            grain = noise[y * side + x] >> 5
            smooth += bytes(((x * 200 // side) + grain, (y * 200 // side) + grain, 120 + grain))
    return [noise, bytes(smooth)]


# -------------------------------------------------------------------------------------------------------- conform


def conform(run, seconds, result):
    """Every primitive by itself: leaves this device's answers in DIR/conform/CAPABILITY, to be kept as goldens."""
    capability = run.device["capability"]
    place = run.out / "conform" / capability
    command = [sys.executable, HERE / "conform/conform.py", "--check", "--store", place]
    kept = HERE / "goldens/conform" / capability
    if (kept / "manifest.json").exists():
        command += ["--compare", kept]
    else:
        result["goldens"] = f"none kept for {capability}"
    # The emulated device has these kernels in a library of its own.
    for folder in environment()["LD_LIBRARY_PATH"].split(":"):
        library = pathlib.Path(folder, "conform/libcuda.so")
        if run.device["name"].startswith("emulated") and library.exists():
            command += ["--driver", library]
            break
    status, said, _ = run.command(command, seconds)
    result["said"] = said.splitlines()
    if status == 3:
        raise Skipped(tail(said, 1)[0])
    if status != 0:
        wrong = [line.split(":")[0] for line in said.splitlines() if ": NOT " in line]
        result.update(status="cut" if status is None else "failed", failed=wrong, end=tail(said))


# --------------------------------------------------------------------------------------------------------- golden


def encode_pictures(run, model, name, seconds, seed, **extra):
    """Encodes two pictures of the tower's size with the program itself: status, what it said, the sequence's path."""
    place = pathlib.Path(run.place.name)
    rgb = place / "pixels.rgb"
    if not rgb.exists():
        side = json.loads((model / "config.json").read_text())["img_size"]
        shown = pictures(side, seed)
        for i, picture in enumerate(shown):
            png(place / f"{i}.png", side, picture)
        rgb.write_bytes(b"".join(shown))
    out = place / f"{name}.safetensors"
    command = [
        HERE / "bin/imagehere", "encode", "--model", model, "--device", "cuda", "--out", out,
        "--prompt", "<ImageHere>" * 2, "--image", place / "0.png", "--image", place / "1.png",
    ]  # fmt: skip
    status, said, _ = run.command(command, seconds, **extra)
    return status, said, out


def judge(run, model, sequences, seconds):
    """Sequences of those pictures against torch in f32: status, what was said, what was found by name."""
    script = [sys.executable, HERE / "torch_golden.py", model, pathlib.Path(run.place.name) / "pixels.rgb", *sequences]
    status, said, _ = run.command([*script, "--device", run.torch_device], seconds)
    if status == 3:
        raise Skipped(tail(said, 1)[0])
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return status, said, {entry.pop("name"): entry for entry in found}


def has_torch(run):
    return run.command([sys.executable, "-c", "import torch"], 60)[0] == 0


def golden(run, seconds, result):
    """The model at its real size, from files to features, against torch in f32."""
    end = time.monotonic() + seconds
    if not has_torch(run):
        raise Skipped("python3 has no torch")
    model = run.model()
    result["seed"] = time.time_ns()
    status, said, sequence = encode_pictures(run, model, "golden", end - time.monotonic(), result["seed"])
    if status == 0:
        status, said, found = judge(run, model, [sequence], end - time.monotonic())
        if found:
            result["found"] = found["golden"]
    if status != 0:
        result.update(status="cut" if status is None else "failed", end=tail(said))
        if "found" in result:
            why = "rel-L2 {rel_l2:.2e}, {of_torch_fp16:.2f} of torch's fp16, cosine {cosine:.6f}"
            result["why"] = why.format(**result["found"])


# ------------------------------------------------------------------------------------------------------ sanitizer

TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]  # in the order of what they find


def sanitizer(run, seconds, result):
    """NVIDIA's checker over a whole encode of a small model: every kernel, few blocks."""
    end = time.monotonic() + seconds
    found = shutil.which("compute-sanitizer")
    for pattern in ("/usr/local/cuda*/bin/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer"):
        found = found or next((path for path in sorted(glob.glob(pattern)) if os.access(path, os.X_OK)), None)
    if not found:
        raise Skipped("there is no compute-sanitizer")
    imagehere, place = HERE / "bin/imagehere", pathlib.Path(run.place.name)
    model = place / "small"
    if not model.exists():
        run.command([imagehere, "synth", "tiny", "--out", model], 20)
    images = sorted((HERE / "goldens/model/images").iterdir())[:3]
    work = [imagehere, "encode", "--model", model, "--device", "cuda", "--prompt", "<ImageHere>" * len(images)]
    for image in images:
        work += ["--image", image]
    result["tools"] = {}
    for tool in TOOLS:
        if end - time.monotonic() < 4:
            result["tools"][tool] = {"status": "skipped", "why": "no time was left"}
            continue
        command = [found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        status, said, took = run.command([*command, *work, "--out", place / "checked.safetensors"], end - time.monotonic())
        entry = result["tools"][tool] = {"status": "ok", "seconds": took}
        if "not supported" in said.lower():
            entry.update(status="skipped", why=next(line for line in said.splitlines() if "not supported" in line.lower()))
        elif status is None:
            entry.update(status="cut")
        elif status != 0:
            entry.update(status="failed", end=tail(said, 40))
            result.update(status="failed", failed=[*result.get("failed", []), tool])
    if all(entry["status"] == "skipped" for entry in result["tools"].values()):
        raise Skipped(result["tools"][TOOLS[0]]["why"])

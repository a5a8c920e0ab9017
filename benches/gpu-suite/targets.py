"""What this project wants to reach on an H200, and what a run found: reached, or missed by how much.

The useful rate of a product inside its waves is `operations / (time x useful)`, where `useful` is the share of the tiles
of all waves that lies in the output: outputs of M x N in tiles of BM x BN take ceil(tiles / SMs) waves, and
`useful = M N / (waves SMs BM BN)`. It says what the kernel does while it is fed, without what the shape wastes; of
several layers it is the sum of their operations over the sum of their `time x useful`.
"""

TOWER = {"qkv": 24, "out": 24, "fc1": 24, "fc2": 24}  # launches of each in an encode
ENDS = ["patch_embedding", "projector_hidden", "projector_out"]
MANY = [8, 12, 16, 32]


def in_wave(benchmarks, images):
    """TFLOP/s of the tower's products inside their waves; None if one was not measured."""
    work = time = 0.0
    for name, count in TOWER.items():
        entry = benchmarks.get(f"linear/{name}/{images}", {})
        if "tflops" not in entry or "useful" not in entry:
            return None
        work += count * entry["tflops"] * entry["seconds"]
        time += count * entry["seconds"] * entry["useful"]
    return work / time


def kernels_of(benchmarks, images):
    """Seconds of all products and attention of an encode by themselves; None if one was not measured."""
    counts = [(f"linear/{name}/{images}", count) for name, count in TOWER.items()]
    counts += [(f"attention/{images}", 24), *((f"linear/{name}/{images}", 1) for name in ENDS)]
    if any(name not in benchmarks for name, _ in counts):
        return None
    return sum(count * benchmarks[name]["seconds"] for name, count in counts)


def row(what, target, found, unit, most=False):
    """`most`: the target is an upper bound."""
    entry = {"what": what, "target": target, "unit": unit, "most": most}
    if found is not None:
        entry.update(found=found, reached=found <= target if most else found >= target)
    return entry


def ratios(benchmarks, variants, images):
    """Theirs over ours, in the same rounds, for the fastest of the variants; and which that was."""
    ours = benchmarks.get(f"beside_torch/ours/{images}")
    theirs = {name: benchmarks[f"torch/{name}/{images}"]["seconds"]
              for name in variants if f"torch/{name}/{images}" in benchmarks}  # fmt: skip
    if not ours or not theirs:
        return None, ""
    best = min(theirs, key=theirs.get)
    return theirs[best] / ours["seconds"], f" ({best})"


def targets(results):
    """Rows of the table: what, target, found, reached."""
    benchmarks = {name: entry for part in results.values() for name, entry in part.get("benchmarks", {}).items()}
    roof = results.get("roof", {}).get("tflops")
    table = []
    shares = {}
    for images in MANY:
        entry = benchmarks.get(f"encode/from_pixels/{images}", {})
        if roof and "tflops" in entry:
            shares[images] = entry["tflops"] / roof
        table.append(row(f"share of the roof, {images} images", 0.80, shares.get(images), "%"))
    least = min(shares.values()) if len(shares) == len(MANY) else None
    table.append(row("  the least of them: first milestone", 0.65, least, "%"))
    table.append(row("torch.compile, default SDPA / ours, 8 images", 1.3, ratios(benchmarks, ["compile"], 8)[0], "x"))
    ratio, which = ratios(benchmarks, ["best", "graph", "compile", "eager"], 8)
    table.append(row(f"best of torch{which} / ours, 8 images", 1.2, ratio, "x"))
    one = benchmarks.get("encode/from_pixels/1", {}).get("seconds")
    table.append(row("one image, pixels to slots", 2.0, one and one * 1e3, "ms", most=True))
    ratio = ratios(benchmarks, ["compile"], 1)[0]
    table.append(row("torch.compile with graphs / ours, 1 image", 1.6, ratio, "x"))
    for images in MANY:
        rate = in_wave(benchmarks, images)
        attention = benchmarks.get(f"attention/{images}", {}).get("tflops")
        # Either pair will do: the one whose worse half is the nearer to its target is shown.
        pairs = [(735, 430), (720, 460)]
        near = lambda pair: min((rate or 0) / pair[0], (attention or 0) / pair[1])  # noqa: E731
        of_products, of_attention = max(pairs, key=near)
        table.append(row(f"products inside their waves, {images} images", of_products, rate, "TFLOP/s"))
        table.append(row(f"  with attention, {images} images", of_attention, attention, "TFLOP/s"))
    for images in (8, 32):
        whole = benchmarks.get(f"encode/from_pixels/{images}", {}).get("seconds")
        call = benchmarks.get(f"encode/encode_into/{images}", {}).get("seconds")
        idle = max(0.0, 1 - whole / call) if whole and call else None
        table.append(row(f"GPU idle in a call from memory, {images} images", 0.05, idle, "%", most=True))
    return table


def gaps(results):
    """What of an encode is neither a product nor attention, by number of images: other kernels, launches, waits."""
    benchmarks = {name: entry for part in results.values() for name, entry in part.get("benchmarks", {}).items()}
    found = {}
    for images in [1, 2, 4, *MANY]:
        whole, kernels = benchmarks.get(f"encode/from_pixels/{images}"), kernels_of(benchmarks, images)
        if whole and kernels is not None:
            found[images] = 1 - kernels / whole["seconds"]
    return found


def show_targets(summary):
    print(f"\n{'target':54} {'':>10} {'found':>14}")
    for entry in summary["targets"]:
        percent = entry["unit"] == "%"
        words = lambda x: f"{x:.1%}" if percent else f"{x:.4g} {entry['unit']}"  # noqa: E731,B023
        sign = "<=" if entry["most"] else ">="
        if "found" not in entry:
            verdict = f"{'-':>14}  not measured"
        else:
            apart = entry["found"] - entry["target"]
            by = f"{abs(apart) * 100:.1f} points" if percent else f"{abs(apart) / entry['target']:.1%}"
            verdict = f"{words(entry['found']):>14}  {'reached' if entry['reached'] else f'MISSED by {by}'}"
        print(f"{entry['what']:54} {sign} {words(entry['target']):>11} {verdict}")
    for images, share in summary["gaps"].items():
        print(f"of {images} images' time {share:.1%} is neither a product nor attention by itself (below 0: they overlap)")

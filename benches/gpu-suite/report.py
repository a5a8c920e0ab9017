"""What a run found: a table, a plot, and a comparison with an earlier run."""

import json
import math

from targets import gaps, show_targets, targets

NOTES = ("kernel", "useful", "behind", "of_all")  # which kernel, how full its waves are, how far it is from others
SLOWER = 1.10  # than before, from which on a line is a regression


def rows(results):
    """The table: what, time, rates, share of the roof measured in this run."""
    roof = results.get("roof", {})
    best, copy, products = roof.get("tflops"), roof.get("copy_gbps"), roof.get("products", {})
    benchmarks = {name: entry for part in results.values() for name, entry in part.get("benchmarks", {}).items()}
    table = []
    for name, entry in benchmarks.items():
        row = {"what": name, "seconds": entry["seconds"]}
        row.update((key, entry[key]) for key in ("tflops", "gbps", "p90", "p99", "samples", *NOTES) if key in entry)
        if "tflops" in entry and best:
            row["share"] = entry["tflops"] / best
        elif "gbps" in entry and copy:
            row["share"] = entry["gbps"] / copy
        linear = name.split("/", 1)[0] in ("linear", "linear_sm80")
        library = products.get(name.split("/", 1)[1]) if linear else None
        if library:
            row["cublas"] = entry["tflops"] / library["tflops"]
        twin = benchmarks.get(name.replace("/", "_sm80/", 1))
        if twin:
            row["of_sm80"] = entry["seconds"] / twin["seconds"]
        if "decode" in entry:
            row["decoding"] = entry["decode"] / entry["seconds"]
            row.update(idle(benchmarks, name, entry))
        table.append(row)
    # By name, then by number of images.
    order = lambda row: [int(word) if word.isdigit() else 0 for word in row["what"].rsplit("/", 1)[1:]]  # noqa: E731
    return sorted(table, key=lambda row: (row["what"].rsplit("/", 1)[0], order(row), row["what"]))


def idle(benchmarks, name, entry):
    """The share of a call from files in which the GPU has nothing to do, by what its work takes alone."""
    _, size, images = name.split("/")
    tower, resize = benchmarks.get(f"encode/from_pixels/{images}"), benchmarks.get(f"resize/{size}")
    if not tower or not resize:
        return {}
    busy = tower["seconds"] + int(images) * resize["seconds"]
    return {"gpu_idle": max(0.0, 1 - busy / entry["seconds"])}


def show(summary):
    roof = summary["roof"]
    print()
    print(f"{'':34} {'time':>12} {'TFLOP/s':>8} {'GB/s':>7} {'of roof':>8} {'of cuBLAS':>9}")
    for row in summary["table"]:
        length = lambda s: f"{s * 1e3:.3f} ms" if s >= 1e-3 else f"{s * 1e6:.1f} us"  # noqa: E731
        cell = lambda key, form: format(row[key], form) if key in row else "-"  # noqa: E731
        extra = [f"{key} {length(row[key])}" for key in ("p90", "p99") if key in row]
        if "kernel" in row:
            extra.append(row["kernel"])
        if "useful" in row:
            rate = f", {row['tflops'] / row['useful']:.0f} in its waves" if "tflops" in row else ""
            extra.append(f"{row['useful']:.1%} useful{rate}")
        if "of_sm80" in row:
            extra.append(f"{row['of_sm80']:.2f} of the portable kernel's time")
        if "of_all" in row:
            extra.append(f"{row['of_all']:.3f} of the default's time")
        shares = (("decoding", "decoding"), ("gpu_idle", "GPU idle"), ("behind", "won over the choice"))
        extra += [f"{row[key]:.0%} {words}" for key, words in shares if key in row]
        print(
            f"{row['what']:34} {length(row['seconds']):>12} {cell('tflops', '.1f'):>8} {cell('gbps', '.0f'):>7}"
            f" {cell('share', '.1%'):>8} {cell('cublas', '.1%'):>9}{'  ' if extra else ''}{', '.join(extra)}"
        )
    best = f"{roof['tflops']:.0f} TFLOP/s" if "tflops" in roof else "not measured"
    copy = f"{roof['copy_gbps']:.0f} GB/s" if "copy_gbps" in roof else "not measured"
    print(f"\nroof: {best}, copy {copy}{' (' + roof['library'] + ')' if 'library' in roof else ''}")
    for name, part in summary["parts"].items():
        why = part.get("why") or ", ".join(part.get("failed", []))
        why = f": {why}" if why else ""
        print(f"{name:12} {part['status']} in {part['seconds']:.0f} s{why}")
        for what, reason in part.get("missing", {}).items():
            print(f"  not {what}: {reason}")
    for name, entry in summary["tests"].items():
        alone = [failed for failed in entry["failed"] if failed["alone"] != 0]
        print(f"tests, {name}: {entry['passed']} passed, {len(entry['failed'])} failed, {len(alone)} of them also alone")
        for failed in alone[:20]:
            print(f"  {failed['test']} (alone: {failed['alone']})")
    if summary["golden"]:
        found = "rel-L2 {rel_l2:.2e}, torch's own fp16 {torch_fp16_rel_l2:.2e}, least cosine {cosine:.6f}"
        print("against torch in f32:", found.format(**summary["golden"]))
    for name, entry in summary["errors"].items():
        print(f"error by {name}: rel-L2 {entry['rel_l2']:.3e}, {entry['of_torch_fp16']:.3f} of torch's fp16")
    if summary["equal_bits"]:
        print("equal bits: " + "; ".join(", ".join(names) for names in summary["equal_bits"]))
    show_targets(summary)
    print(f"device: {summary['device']}")


def summarise(run, build, results):
    keys = ("status", "seconds", "why", "failed", "missing", "tools", "goldens")
    parts = {name: {key: result[key] for key in keys if key in result} for name, result in results.items()}
    summary = {
        "build": build,
        "device": run.device,
        "parts": parts,
        "tests": results.get("correctness", {}).get("tests", {}),
        "golden": results.get("golden", {}).get("found"),
        "roof": {k: v for k, v in results.get("roof", {}).items() if k in ("tflops", "copy_gbps", "library")},
        "errors": results.get("fusions", {}).get("errors", {}),
        "equal_bits": results.get("fusions", {}).get("equal_bits", []),
        "targets": targets(results),
        "gaps": gaps(results),
        "table": rows(results),
    }
    run.save("summary", summary)
    picture = plot(summary)
    if picture:
        (run.out / "share.svg").write_text(picture)
    return summary


# ------------------------------------------------------------------------------------------------------- the plot

SERIES = [  # name of the rows, words, colour
    ("encode/from_pixels", "imagehere", "#0a7d3c"), ("torch/best", "torch, fused and compiled, cuDNN, graph", "#b3541e"),
    ("torch/compile", "torch.compile max-autotune", "#8a4fbf"), ("torch/graph", "torch, fused, cuDNN, graph", "#c98a00"),
    ("torch/eager", "torch eager", "#777777"),
]  # fmt: skip
LEFT, TOP, WIDTH, HEIGHT = 60, 30, 560, 300


def plot(summary):
    """Share of the roof by number of images, as SVG; None if there is nothing to draw."""
    lines = []
    for prefix, words, colour in SERIES:
        points = [
            (int(row["what"].rsplit("/", 1)[1]), row["share"])
            for row in summary["table"]
            if row["what"].rsplit("/", 1)[0] == prefix and "share" in row
        ]
        if points:
            lines.append((words, colour, sorted(points)))
    if not lines:
        return None
    most = max(images for _, _, points in lines for images, _ in points)
    x = lambda images: LEFT + WIDTH * math.log2(images) / max(1.0, math.log2(most))  # noqa: E731
    y = lambda share: TOP + HEIGHT * (1 - min(share, 1.0))  # noqa: E731
    text = lambda at, up, words, more="": f'<text x="{at:.1f}" y="{up:.1f}" {more}>{words}</text>'  # noqa: E731
    device, roof = summary["device"]["name"], summary["roof"]["tflops"]
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {TOP + HEIGHT + 60 + 18 * len(lines)}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT, 18, f"Share of the roof, {roof:.0f} TFLOP/s, on {device}, by number of images"),
    ]
    for share in range(0, 101, 20):
        at = y(share / 100)
        svg.append(f'<path d="M{LEFT} {at:.1f}h{WIDTH}" stroke="#ddd"/>')
        svg.append(text(LEFT - 8, at + 4, f"{share} %", 'text-anchor="end"'))
    for images in sorted({images for _, _, points in lines for images, _ in points}):
        svg.append(text(x(images), TOP + HEIGHT + 18, images, 'text-anchor="middle"'))
    for i, (words, colour, points) in enumerate(lines):
        path = "L".join(f"{x(images):.1f} {y(share):.1f}" for images, share in points)
        svg.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        svg += [f'<circle cx="{x(images):.1f}" cy="{y(share):.1f}" r="3" fill="{colour}"/>' for images, share in points]
        svg.append(text(LEFT, TOP + HEIGHT + 44 + 18 * i, words, f'fill="{colour}"'))
    return "\n".join([*svg, "</svg>", ""])


# ------------------------------------------------------------------------------------------------------- comparing


def against(summary, path):
    """Prints each line's time over an earlier run's; whether none of ours got slower by more than a tenth.

    What was measured once, an open or a first call, is printed and not judged."""
    earlier = json.loads(path.read_text())
    before = {row["what"]: row["seconds"] for row in earlier["table"]}
    names = [(run["device"] or {}).get("name") for run in (summary, earlier)]
    if names[0] != names[1]:
        print(f"\nanother device: {names[0]}, not {names[1]}: nothing can be said")
        return True
    slower = []
    print(f"\n{'':34} {'now / ' + path.name:>24}")
    for row in summary["table"]:
        what = row["what"]
        if what not in before:
            continue
        ratio = row["seconds"] / before[what]
        judged = "samples" in row and not what.startswith("torch/")
        bad = judged and ratio > SLOWER
        print(f"{what:34} {ratio:>24.3f}{'  SLOWER' if bad else ''}")
        if bad:
            slower.append(what)
    gone = sorted(what for what in before if what not in {row["what"] for row in summary["table"]})
    if gone:
        print(f"not measured this time: {', '.join(gone)}")
    print(f"{len(slower)} slower by more than {SLOWER - 1:.0%}")
    return not slower

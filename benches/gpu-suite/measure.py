"""What is measured: the roof, kernels, tiles, encodes, calls, and torch at the same work."""

import json
import pathlib
import re
import shutil
import statistics
import sys
import tempfile
import time

from device import HERE, TINY, Peer, Skipped, tail

# Each in a process of its own: one that is wrong or breaks the device takes no other along.
KERNELS = ["linear", "attention", "layer_norm", "patches", "resize", "embed_tokens", "verify"]
# Hopper has these of its own: the portable ones are measured there as well, under this suffix.
TWINS, PORTABLE = ["linear", "attention"], "_sm80"

# The products of a call with so many images, as groups of [M, N, K]: src/cuda/peers.rs splits 32 into 16, 16.
LAYERS = {
    "patch_embedding": (1225, 1024, 588),
    "qkv": (1226, 3072, 1024),
    "out": (1226, 1024, 1024),
    "fc1": (1226, 4096, 1024),
    "fc2": (1226, 1024, 4096),
    "projector_hidden": (1225, 4096, 1024),
    "projector_out": (1225, 4096, 4096),
}
GROUPS = {1: [1], 2: [2], 4: [4], 8: [8], 12: [12], 16: [16], 32: [16, 16]}
SHAPES = {
    f"{name}/{images}": [[group * rows, n, k] for group in groups]
    for images, groups in GROUPS.items()
    for name, (rows, n, k) in LAYERS.items()
}


def operations(images):
    """Of every product of an encode, at the real sizes: 0.941e12 an image."""
    products = {name: 2 * m * n * k for name, (m, n, k) in LAYERS.items()}
    layer = sum(products[name] for name in ("qkv", "out", "fc1", "fc2")) + 4 * 1226**2 * 1024
    ends = sum(products[name] for name in ("patch_embedding", "projector_hidden", "projector_out"))
    return images * (24 * layer + ends)


def roof(run, seconds, result):
    shapes = json.dumps(SHAPES)
    status, said, _ = run.command([sys.executable, HERE / "roof.py", shapes], seconds)
    for line in said.splitlines():
        if line.startswith("{"):
            try:
                result.update(json.loads(line))
            except ValueError:
                pass
    if status is None:
        result["status"] = "cut"
    elif status == 3:
        result.update(status="skipped", why=tail(said, 1)[0])
    elif status:
        result.update(status="failed", end=tail(said))


def read_criterion(place):
    """What criterion measured: name to seconds, operations, bytes."""
    found = {}
    for path in sorted(place.glob("**/new/benchmark.json")):
        try:
            about = json.loads(path.read_text())
            times = json.loads(path.with_name("estimates.json").read_text())
            sample = json.loads(path.with_name("sample.json").read_text())
        except (OSError, ValueError):
            continue  # cut off while it was written
        median = times["median"]
        seconds = median["point_estimate"] * 1e-9
        interval = median["confidence_interval"]
        entry = {
            "seconds": seconds,
            "from": interval["lower_bound"] * 1e-9,
            "to": interval["upper_bound"] * 1e-9,
            "samples": len(sample["times"]),
        }
        throughput = about.get("throughput") or {}
        both = throughput.get("ElementsAndBytes") or {}
        operations = both.get("elements") or throughput.get("Elements")
        moved = both.get("bytes") or throughput.get("Bytes")
        if operations:
            entry["tflops"] = operations / seconds * 1e-12
        if moved:
            entry["gbps"] = moved / seconds * 1e-9
        found[about["full_id"]] = entry
    return found


def bench(run, seconds, result, patterns, twins=()):
    """Runs benchmarks, a process for each pattern; what was measured is saved as it comes.

    `twins`: those of them to be run with the portable kernels as well, each right after its own."""
    end = time.monotonic() + seconds
    place = pathlib.Path(tempfile.mkdtemp(prefix="imagehere-bench-"))
    runs = []
    for pattern in patterns:
        runs += [(pattern, "", {}), (pattern, PORTABLE, {"IMAGEHERE_CUDA_KERNELS": "sm80"})][: 1 + (pattern in twins)]

    def keep(status):
        result["benchmarks"] = {}
        for suffix in ("", PORTABLE):
            for name, entry in read_criterion(place / f"of{suffix}").items():
                group, rest = name.split("/", 1)
                kernel = result.get("chosen", {}).get(f"{group}{suffix}/{rest}", {})
                result["benchmarks"][f"{group}{suffix}/{rest}"] = dict(entry, **kernel)
        run.save(result["part"], dict(result, status=status))

    try:
        for pattern, suffix, more in runs:
            status, said, took = run.command(
                [HERE / "bin/cuda", "--bench", "--noplot", f"^{pattern}/"], end - time.monotonic(),
                meanwhile=lambda: keep("running"), CRITERION_HOME=str(place / f"of{suffix}"), **more,
            )  # fmt: skip
            for name, what in re.findall(r"^(device|features against the CPU's): (.*)", said, re.M):
                result[name + (" of sm80" if suffix else "")] = what
            for name, useful, kernel in re.findall(r"^kernel of (\S+): (\S+) (.*)", said, re.M):
                group, rest = name.split("/", 1)
                chosen = {"kernel": kernel, **({} if useful == "-" else {"useful": float(useful)})}
                result.setdefault("chosen", {})[f"{group}{suffix}/{rest}"] = chosen
            entry = {"status": status, "seconds": took}
            result.setdefault("processes", {})[pattern + suffix] = entry
            seed = re.search(r"^seed: (.*)", said, re.M)
            if seed:
                entry["seed"] = seed[1]
            skipped = re.search(r"^skipped: (.*)", said, re.M)
            if skipped:
                result.update(status="skipped", why=skipped[1])
                break
            if status != 0:
                entry["end"] = tail(said)
                result["failed"] = [*result.get("failed", []), pattern + suffix]
                result["status"] = "failed" if status is not None or result["status"] == "failed" else "cut"
            if status is None:
                break
    finally:
        # Also of a run that is being stopped.
        keep(result["status"])
        shutil.rmtree(place, ignore_errors=True)


def hopper(run):
    return run.device["capability"] == "9.0"


def kernels(run, seconds, result):
    bench(run, seconds, result, KERNELS, TWINS if hopper(run) else ())


TUNED = [1, 2] if TINY else [1, 2, 4, 8, 12, 16]  # images of a group


def tune(run, seconds, result):
    """Every kernel of every linear layer, and of attention, in turns; leaves the best tiles in DIR/tiles.txt."""
    if not hopper(run):
        raise Skipped("there is but one family of kernels here")
    tiles = run.out / "tiles.txt"
    tiles.unlink(missing_ok=True)
    status, said, _ = run.command([HERE / "bin/cuda", "tune", tiles, *TUNED], seconds)
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    result["shapes"] = found
    result["benchmarks"] = {}
    for entry in found:
        best, rate = entry["best"], entry["operations"] * 1e-12
        result["benchmarks"][f"tuned/{entry['name']}"] = dict(
            best, tflops=rate / best["seconds"], chosen=entry["chosen"]["kernel"], behind=entry["behind"]
        )
    skipped = re.search(r"^skipped: (.*)", said, re.M)
    if skipped:
        raise Skipped(skipped[1])
    if status != 0:
        result.update(status="cut" if status is None else "failed", end=tail(said))
    elif found:
        worst = max(found, key=lambda entry: entry["behind"])
        mean = statistics.mean(entry["behind"] for entry in found)
        result["why"] = f"the choice is {mean:.1%} behind the best on average, {worst['behind']:.0%} at {worst['name']}"


def encode(run, seconds, result):
    bench(run, seconds, result, ["encode"])


def calls(run, seconds, result, mode):
    """Runs `cuda MODE` on a model: a benchmark for each JSON line."""
    end = time.monotonic() + seconds
    model = run.model()
    status, said, _ = run.command([HERE / "bin/cuda", mode, model], end - time.monotonic())
    result["benchmarks"] = {}
    for line in said.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            result["benchmarks"][f"{mode}/{entry.pop('name')}"] = entry
    if status != 0:
        result.update(status="cut" if status is None else "failed", end=tail(said))


def latency(run, seconds, result):
    calls(run, seconds, result, "latency")


def files(run, seconds, result):
    calls(run, seconds, result, "files")


# ---------------------------------------------------------------------------------------------------------- torch

ROUNDS, SAMPLES = (2, 2) if TINY else (5, 10)
COUNTS = [1, 2, 17] if TINY else [1, 2, 4, 8, 16, 32]
COMPILED = [1] if TINY else [8, 1]
# Seconds left, under which nothing is begun; a compilation takes most.
LEAST = {"eager": 8, "graph": 8, "compile": 25, "best": 25}


class Theirs:
    """torch_peers.py, begun anew when something ended it."""

    def __init__(self, run):
        self.run, self.peer = run, None

    def ask(self, line, seconds):
        if self.peer is None:
            words = [sys.executable, HERE / "torch_peers.py", "--device", self.run.torch_device]
            self.peer = Peer(self.run, words + (["--tiny"] if TINY else []))
            self.about = self.peer.hear(60)
            if self.about is None:
                raise Skipped(self.peer.last or "torch_peers.py ended")
        answer = self.peer.ask(line, seconds)
        if answer is None:
            answer, self.peer = {"error": self.peer.last or "it ended"}, None
        return answer


def torch(run, seconds, result):
    """Ours and torch in turns, so that heat and clocks are the same for both."""
    end = time.monotonic() + seconds
    left = lambda: end - time.monotonic()  # noqa: E731
    theirs = Theirs(run)

    def prepare(variant, images):
        # A compilation that takes too long is no reason to go without the next one.
        return theirs.ask(f"prepare {variant} {images}", left() * (0.6 if variant in ("compile", "best") else 1))

    answer = prepare("eager", COUNTS[0])
    if "error" in answer:
        raise Skipped(answer["error"])
    result["torch"] = theirs.about["torch"]
    ours = Peer(run, [HERE / "bin/cuda", "rounds"])
    if ours.hear(left()) is None:
        result.update(status="failed", why=f"ours: {ours.last}")
        return
    times, result["missing"] = {}, {}

    def keep():
        result["benchmarks"] = {}
        for (who, images), found in times.items():
            name = f"torch/{who}/{images}" if who != "ours" else f"beside_torch/ours/{images}"
            entry = {"seconds": statistics.median(found), "samples": len(found), "least": min(found), "most": max(found)}
            if not TINY:
                entry["tflops"] = operations(images) / entry["seconds"] * 1e-12
            result["benchmarks"][name] = entry
        run.save(result["part"], dict(result, status="running"))

    def compare(variants, images):
        ready = []
        for variant in variants:
            if left() < LEAST[variant]:
                result["missing"][f"{variant}/{images}"] = "no time was left"
                continue
            answer = prepare(variant, images)
            if "error" in answer:
                result["missing"][f"{variant}/{images}"] = answer["error"]
            else:
                result.setdefault("prepared", {})[f"{variant}/{images}"] = answer
                ready.append(variant)
        for _ in range(ROUNDS if ready else 0):
            for who in ["ours", *ready]:
                if left() < 2:
                    break
                if who == "ours":
                    answer = ours.ask(f"{images} {SAMPLES}", left()) or {"error": ours.last}
                else:
                    answer = theirs.ask(f"time {who} {images} {SAMPLES}", left())
                if "seconds" in answer:
                    times.setdefault((who, images), []).extend(answer["seconds"])
                else:
                    result["missing"][f"{who}/{images}"] = answer["error"]
        keep()

    for images in COUNTS:
        compare(["eager", "graph"], images)
    for images in COMPILED:
        compare(["compile", "best"], images)
    if not times:
        result.update(status="failed", why="nothing could be timed")
    for peer in (ours, theirs.peer):
        if peer:
            peer.end()

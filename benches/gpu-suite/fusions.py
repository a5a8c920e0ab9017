"""What each fusion, the kernels of Hopper and launches that overlap do: to the time of a whole tower, and to its error."""

import statistics
import time

from checks import encode_pictures, has_torch, judge
from device import HERE, TINY, Peer, Skipped, tail
from measure import hopper, operations

# By the environment. `tuned` is the default, with the tiles that the part `tune` found best.
ALL = {}
CONFIGURATIONS = {
    "all": ALL,
    "none": {"IMAGEHERE_CUDA_FUSIONS": "none"},
    "layer_norm": {"IMAGEHERE_CUDA_FUSIONS": "layer_norm"},
    "query_scale": {"IMAGEHERE_CUDA_FUSIONS": "query_scale"},
    "class_row": {"IMAGEHERE_CUDA_FUSIONS": "class_row"},
    "no_overlap": {"IMAGEHERE_CUDA_PDL": "0"},
    "none_no_overlap": {"IMAGEHERE_CUDA_FUSIONS": "none", "IMAGEHERE_CUDA_PDL": "0"},
    "sm80": {"IMAGEHERE_CUDA_KERNELS": "sm80"},
}
# These change when launches run and how they cut their outputs, and no result.
SAME_BITS = ["no_overlap", "tuned"]
COUNTS, ROUNDS, SAMPLES = ([1, 2], 1, 2) if TINY else ([1, 8], 4, 12)


def fusions(run, seconds, result):
    """All configurations in turns; then two pictures by each, against torch in f32."""
    end = time.monotonic() + seconds
    left = lambda: end - time.monotonic()  # noqa: E731
    if not hopper(run):
        raise Skipped("there is nothing to fuse for here")
    configurations = dict(CONFIGURATIONS)
    tiles = run.out / "tiles.txt"
    if tiles.exists():
        configurations["tuned"] = {"IMAGEHERE_CUDA_TILES": str(tiles)}
    result["missing"], result["benchmarks"], result["errors"] = {}, {}, {}
    times(run, configurations, left, seconds * 0.5, result)
    run.save(result["part"], dict(result, status="running"))
    errors(run, configurations, left, result)


def times(run, configurations, left, most, result):
    begin = time.monotonic()
    # The same pixels and weights for all; they are made at the same time, and then take turns.
    seed = str(time.time_ns() % 2**40)
    peers = {
        name: Peer(run, [HERE / "bin/cuda", "rounds"], IMAGEHERE_BENCH_SEED=seed, **environment)
        for name, environment in configurations.items()
    }
    ready = {}
    for name, peer in peers.items():
        if peer.hear(min(left(), most - (time.monotonic() - begin))) is None:
            result["missing"][f"time of {name}"] = peer.last or "it ended"
        else:
            ready[name] = peer
    found = {}
    for images in COUNTS:
        for _ in range(ROUNDS):
            for name, peer in ready.items():
                answer = peer.ask(f"{images} {SAMPLES}", left()) if left() > 2 else None
                if answer is None:
                    result["missing"][f"time of {name} at {images}"] = peer.last or "no time was left"
                else:
                    found.setdefault((name, images), []).extend(answer["seconds"])
    for (name, images), seconds in found.items():
        entry = {"seconds": statistics.median(seconds), "samples": len(seconds), "least": min(seconds)}
        base = found.get(("all", images))
        if base:
            entry["of_all"] = entry["seconds"] / statistics.median(base)
        if not TINY:
            entry["tflops"] = operations(images) / entry["seconds"] * 1e-12
        result["benchmarks"][f"fusions/{name}/{images}"] = entry
    for peer in peers.values():
        peer.end()
    if not found:
        result.update(status="failed", why="nothing could be timed")


def errors(run, configurations, left, result):
    model = run.model()
    made, bits = {}, {}
    for name, environment in configurations.items():
        if left() < 8:
            result["missing"][f"error of {name}"] = "no time was left"
            continue
        status, said, path = encode_pictures(run, model, f"by_{name}", left(), time.time_ns(), **environment)
        if status == 0:
            made[name], bits[name] = path, path.read_bytes()
        else:
            result.update(status="cut" if status is None else "failed", end=tail(said))
    alike = {}
    for name, data in bits.items():
        alike.setdefault(data, []).append(name)
    result["equal_bits"] = list(alike.values())
    for name in SAME_BITS:
        if bits.get(name, bits.get("all")) != bits.get("all"):
            result.update(status="failed", why=f"{name} has other bits than the default")
    if not made or not has_torch(run):
        result["missing"]["errors"] = "python3 has no torch" if made else "nothing was encoded"
        return
    status, said, found = judge(run, model, made.values(), left())
    result["errors"] = {name.removeprefix("by_"): entry for name, entry in found.items()}
    if status != 0:
        result.update(status="cut" if status is None else "failed", end=tail(said))

"""How fast others run the same job: full-size tower and projector, one 490-pixel image, two threads.

    python benches/peers.py [--threads 2] [--rounds 5] [--json FILE]
                            [--ours target/release/imagehere --model DIR]

Random weights (the arithmetic does not care); environment of tests/oracle/requirements.txt. Rounds are
interleaved: each runs every engine once, so that a busy machine hurts all alike. Reported: best and median wall
time, GFLOP/s of the best at 0.941 TFLOP per image, its share of the machine's measured peak of f32 multiply-adds (more
than all of it where products go through AMX), and how far the result is from torch's in f32. With --ours, `imagehere
bench` takes part on DIR (made by `imagehere synth vl-7b-vision`), by the encode that it reports, warm as the others are,
and once more without AMX where there is AMX; the last lines give its ratio to the best f32 engine, what `imagehere encode`
needs, and its resize beside Pillow's.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

TFLOP = 0.941  # per image: 2 x multiply-adds of every matrix product of tower and projector at 490 px

# Sixteen independent accumulators per thread hide the latency of two FMA pipes. Best of five short runs.
FMA_PEAK = r"""
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#if defined(__AVX512F__)
typedef __m512 V;
#define LANES 16
#define SET _mm512_set1_ps
#define FMA _mm512_fmadd_ps
#else
typedef __m256 V;
#define LANES 8
#define SET _mm256_set1_ps
#define FMA _mm256_fmadd_ps
#endif
#define N 400000000L
static volatile float sink;
static void *work(void *unused) {
    V a[16], x = SET(0.999999f), y = SET(1e-6f);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = SET(i);
    for (long n = 0; n < N; n += 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            a[i] = FMA(a[i], x, y);
            __asm__ volatile("" : "+v"(a[i])); // or the compiler would skip the work
        }
    }
    V s = a[0];
#pragma GCC unroll 16
    for (int i = 1; i < 16; i++) s = FMA(s, x, a[i]);
    sink = ((float *)&s)[0];
    return unused;
}
int main(int argc, char **argv) {
    int threads = atoi(argv[argc - 1]);
    double best = 0;
    for (int run = 0; run < 5; run++) {
        pthread_t t[256];
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        for (int i = 0; i < threads; i++) pthread_create(&t[i], 0, work, 0);
        for (int i = 0; i < threads; i++) pthread_join(t[i], 0);
        clock_gettime(CLOCK_MONOTONIC, &b);
        double s = b.tv_sec - a.tv_sec + 1e-9 * (b.tv_nsec - a.tv_nsec);
        double g = 2.0 * LANES * N * threads / s * 1e-9;
        if (g > best) best = g;
    }
    printf("%f\n", best);
}
"""


def fma_peak(threads):
    """GFLOP/s of f32 FMAs on `threads` threads, or None without an x86 C compiler."""
    with tempfile.TemporaryDirectory() as d:
        source, program = pathlib.Path(d) / "fma.c", pathlib.Path(d) / "fma"
        source.write_text(FMA_PEAK)
        try:
            subprocess.run(["cc", "-O3", "-march=native", "-pthread", source, "-o", program], check=True, capture_output=True)
            return float(subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return None


def build(attention):
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    class TowerAndProjector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, projection_dim=768, num_hidden_layers=24,
                num_attention_heads=16, image_size=490, patch_size=14, hidden_act="quick_gelu",
                attn_implementation=attention,
            )  # fmt: skip
            self.tower = CLIPVisionModel(config)
            linear = torch.nn.Linear
            self.projector = torch.nn.Sequential(linear(1024, 4096), torch.nn.GELU(), linear(4096, 4096))

        def forward(self, pixels):
            return self.projector(self.tower(pixel_values=pixels).last_hidden_state[:, 1:])

    torch.manual_seed(0)
    return TowerAndProjector().eval()


def engines(threads, work, wanted):
    """name -> function that runs one image. Weights are the same in all."""
    import torch

    torch.set_num_threads(threads)
    pixels = torch.randn(1, 3, 490, 490)
    model = build("sdpa")
    out = {}

    def torch_run(model, x):
        def run():
            with torch.inference_mode():
                return model(x).float().numpy()

        return run

    out["torch f32 sdpa"] = torch_run(model, pixels)
    eager = build("eager")
    out["torch f32 eager"] = torch_run(eager, pixels)
    if "torch f16" in wanted:
        out["torch f16 sdpa"] = torch_run(build("sdpa").half(), pixels.half())
    if "torch bf16" in wanted:
        out["torch bf16 sdpa"] = torch_run(build("sdpa").bfloat16(), pixels.bfloat16())
    if {"onnxruntime", "openvino", "openvino bf16"} & set(wanted):
        path = str(work / "tower.onnx")
        torch.onnx.export(eager, (pixels,), path, dynamo=True, input_names=["pixels"], verbose=False)
    if "onnxruntime" in wanted:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        out["onnxruntime f32"] = lambda: session.run(None, {"pixels": pixels.numpy()})[0]
    for name, precision in [("openvino", "f32"), ("openvino bf16", "bf16")]:
        if name in wanted:
            import openvino

            hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
            compiled = openvino.Core().compile_model(path, "CPU", hints)
            out[f"openvino {precision}"] = lambda compiled=compiled: compiled([pixels.numpy()])[0]
    return out


def has_amx():
    """Whether Linux lists AMX-BF16 among the CPU's flags."""
    try:
        return "amx_bf16" in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def resize(binary, model, work):
    """Best seconds of Pillow's BICUBIC from 1920x1080 to 490x490, and of ours; one thread each, in turn."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    file = work / "hd.png"
    picture.save(file, compress_level=1)
    command = [binary, "bench", "--model", model, "--image", file, "--threads", "1", "--repeat", "2", "--device", "cpu",
               "--json"]  # fmt: skip
    pillow, mine = [], []
    for _ in range(3):
        for _ in range(20):
            start = time.perf_counter()
            picture.resize((490, 490), Image.Resampling.BICUBIC)
            pillow.append(time.perf_counter() - start)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"imagehere bench failed ({done.returncode}):\n{done.stderr}")
        mine.append(next(row for row in json.loads(done.stdout)["rows"] if row["name"] == "resize")["best_s"])
    return min(pillow), min(mine)


def ours(binary, model, work, threads, **more):
    """Two functions: one runs `imagehere encode` and returns its report, one returns the seconds of a warm encode.

    Warm as the engines are that live in this process: `imagehere bench` opens, encodes once, and times the next."""
    from PIL import Image

    picture = work / "picture.png"
    Image.linear_gradient("L").resize((490, 490)).convert("RGB").save(picture)
    common = ["--model", model, "--image", picture, "--device", "cpu", "--json"]
    encode = [binary, "encode", *common, "--raw", "--prompt", "<ImageHere>", "--out", work / "out.safetensors"]
    bench = [binary, "bench", *common, "--repeat", "1"]
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)} | more

    def run(command):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            sys.exit(f"imagehere {command[1]} failed ({done.returncode}):\n{done.stderr}")
        return json.loads(done.stdout)

    return lambda: run(encode), lambda: next(row["best_s"] for row in run(bench)["rows"] if row["name"] == "encode")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--ours", type=pathlib.Path, metavar="BINARY")
    parser.add_argument("--model", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--engines", default="torch f16,torch bf16,onnxruntime,openvino,openvino bf16", help="beside torch f32")
    args = parser.parse_args()
    if bool(args.ours) != bool(args.model):
        parser.error("--ours and --model go together")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    peak = fma_peak(args.threads)
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        runs = engines(args.threads, work, args.engines.split(","))
        import numpy as np

        times, errors, first, skip = {name: [] for name in runs}, {}, None, set()
        for name, run in runs.items():  # warm up, and check that all compute the same
            start = time.perf_counter()
            result = run()
            skip |= {name} if time.perf_counter() - start > 60 else set()  # measured once below, not every round
            first = result if first is None else first
            error = float(np.linalg.norm(result - first) / np.linalg.norm(first))
            errors[name] = error
            bound = next(bound for dtype, bound in [("bf16", 5e-2), ("f16", 5e-3), ("f32", 1e-4)] if dtype in name)
            assert error < bound, (name, error)
        report, mine, without = None, None, None
        if args.ours:
            encode, mine = ours(args.ours, args.model, work, args.threads)
            report = encode()
            if has_amx():
                without = ours(args.ours, args.model, work, args.threads, IMAGEHERE_CPU_ISA="avx512")[1]
        for i in range(args.rounds):
            for name, run in runs.items():
                if name in skip and i > 0:
                    continue
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
                time.sleep(0.3)  # let its threads go to sleep
            if mine:
                times.setdefault("imagehere fp16", []).append(mine())
            if without:
                times.setdefault("imagehere no AMX", []).append(without())
        if peak:
            peak = max(peak, fma_peak(args.threads))  # the machine may have been busy
        pillow, resized = resize(args.ours, args.model, work) if mine else (None, None)
    rows = []
    for name, seconds in sorted(times.items(), key=lambda item: min(item[1])):
        best = min(seconds)
        gflops = TFLOP * 1000 / best
        rows.append(dict(engine=name, best_s=best, median_s=statistics.median(seconds), runs=len(seconds), gflops=gflops,
                         share_of_peak=gflops / peak if peak else None, error=errors.get(name)))  # fmt: skip
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, FMA peak "
          + (f"{peak:.0f} GFLOP/s" if peak else "unknown"))  # fmt: skip
    print(f"{'engine':18} {'best s':>8} {'median s':>9} {'GFLOP/s':>8} {'of peak':>8} {'to torch f32':>13}")
    for r in rows:
        share = f"{r['share_of_peak']:8.0%}" if peak else f"{'':8}"
        error = f"{r['error']:13.1e}" if r["error"] is not None else ""
        print(f"{r['engine']:18} {r['best_s']:8.2f} {r['median_s']:9.2f} {r['gflops']:8.0f} {share} {error}")
    document = dict(threads=args.threads, tflop_per_image=TFLOP, fma_peak_gflops=peak, engines=rows)
    if mine:
        f32 = [r for r in rows if r["engine"].endswith("f32") or "f32 " in r["engine"]]
        us = next(r for r in rows if r["engine"] == "imagehere fp16")
        document["ratio_best"] = us["best_s"] / min(r["best_s"] for r in f32)
        document["ratio_median"] = us["median_s"] / min(r["median_s"] for r in f32)
        document["peak_bytes"] = report["peak_bytes"]
        print(f"imagehere / best f32 engine: {document['ratio_best']:.2f} (best), {document['ratio_median']:.2f} (median); "
              f"peak memory {document['peak_bytes'] / 1e9:.2f} GB; open {report['timings']['open_s']:.2f} s")  # fmt: skip
        document |= dict(resize_hd_s=resized, resize_hd_pillow_s=pillow)
        print(f"1920x1080 to 490x490: {resized * 1e3:.2f} ms, Pillow {pillow * 1e3:.2f} ms: {pillow / resized:.2f} times as fast")
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a device does at best, for `run`: JSON lines on stdout, each with more of it. Status 3: nothing to ask.

    python3 roof.py SHAPES      SHAPES: {"name": [[M, N, K], ...], ...} in JSON

The roof is 8192 x 8192 x 8192 in fp16 with f32 sums, by cuBLAS, on random data, after a second of warm-up. Products of
the given shapes rotate among inputs that no cache holds; several of a name run one after the other. All numbers are
medians. By torch if it is there, else by libcublas, called directly.
"""

import ctypes
import ctypes.util
import glob
import json
import os
import statistics
import sys
import time

SIDE = 8192
SAMPLES = 50
COPY = 2 << 30  # bytes
ROTATE = 200 << 20  # bytes that no cache holds


def say(**what):
    print(json.dumps(what), flush=True)


def sets(shapes):
    """How many sets of inputs and outputs rotate."""
    held = sum(2 * (m * k + n * k + m * n) for m, n, k in shapes)
    return max(2, min(24, ROTATE // held + 1))


def per_sample(shapes):
    """Rounds of a sample: about half a millisecond of them."""
    return max(1, min(32, int(5e-4 / (operations(shapes) / 5e14))))


def operations(shapes):
    return sum(2.0 * m * n * k for m, n, k in shapes)


def report(engine, shapes):
    """Measures with an engine: `product(shapes)` makes a function of a number of rounds that returns seconds."""
    big = [[SIDE, SIDE, SIDE]]
    run = engine.product(big)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        run(5)
    times = [run(1) for _ in range(SAMPLES)]
    say(library=engine.name, tflops=operations(big) / statistics.median(times) * 1e-12, samples=len(times))
    say(copy_gbps=2 * COPY / statistics.median(engine.copy(20)) * 1e-9)
    products = {}
    for name, parts in shapes.items():
        run, rounds = engine.product(parts), per_sample(parts)
        run(rounds)
        seconds = statistics.median(run(rounds) / rounds for _ in range(SAMPLES))
        products[name] = {"seconds": seconds, "tflops": operations(parts) / seconds * 1e-12}
        say(products=products)
    # Again: did it hold?
    run = engine.product(big)
    run(5)
    say(tflops_after=operations(big) / statistics.median([run(1) for _ in range(20)]) * 1e-12)


class Torch:
    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise ImportError("torch sees no device")
        self.torch = torch
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.name = f"torch {torch.__version__}"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def product(self, shapes):
        torch = self.torch
        half = {"dtype": torch.float16, "device": "cuda"}
        inputs = [
            [
                (torch.randn(m, k, **half), torch.randn(n, k, **half).mul_(0.03), torch.empty(m, n, **half))
                for m, n, k in shapes
            ]
            for _ in range(sets(shapes))
        ]
        at = 0

        def launch(rounds):
            nonlocal at
            for _ in range(rounds):
                for a, w, out in inputs[at % len(inputs)]:
                    torch.mm(a, w.t(), out=out)
                at += 1

        # Small ones as a graph: Python takes longer to launch them than the device to do them.
        side = torch.cuda.Stream()
        rounds_of_graph = per_sample(shapes)
        with torch.cuda.stream(side):
            launch(len(inputs))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(rounds_of_graph)

        def run(rounds):
            start, end = self.events
            replays = -(-rounds // rounds_of_graph)
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 * rounds / (replays * rounds_of_graph)

        run.inputs = inputs  # the graph needs them
        return run

    def copy(self, times):
        torch = self.torch
        a = torch.randint(0, 255, (COPY,), dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        start, end = self.events
        found = []
        for _ in range(times + 3):
            start.record()
            b.copy_(a)
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e-3)
        return found[3:]


def load(names):
    for name in names:
        try:
            return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            pass
    return None


def cublas():
    """libcublas from the linker's path, a toolkit, or a Python package."""
    folders = ["", "/usr/local/cuda/lib64/", *(f"{p}/" for p in glob.glob("/usr/local/cuda-*/lib64"))]
    for place in sys.path:
        folders += [f"{p}/" for p in glob.glob(os.path.join(place, "nvidia/*/lib"))]
    for folder in folders:
        for version in ("13", "12"):
            load([f"{folder}libcublasLt.so.{version}"])
            library = load([f"{folder}libcublas.so.{version}"])
            if library:
                return library, f"libcublas.so.{version}"
    return None, None


class Cublas:
    """The driver and cuBLAS by hand, with the primary context."""

    def __init__(self):
        self.cuda = load(["libcuda.so.1", "libcuda.so"])
        if not self.cuda:
            raise ImportError("no libcuda")
        self.blas, self.name = cublas()
        if not self.blas:
            raise ImportError("no torch and no libcublas")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self.stream, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(self.stream), 1)
        self.call_blas("cublasCreate_v2", ctypes.byref(self.handle))
        self.call_blas("cublasSetStream_v2", self.handle, self.stream)
        self.events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self.events:
            self.call("cuEventCreate", ctypes.byref(event), 0)
        self.noise = self.make_noise(64 << 20)

    def call(self, name, *arguments):
        result = getattr(self.cuda, name)(*arguments)
        if result:
            raise RuntimeError(f"{name} failed with {result}")

    def call_blas(self, name, *arguments):
        result = getattr(self.blas, name)(*arguments)
        if result:
            raise RuntimeError(f"{name} failed with {result}")

    @staticmethod
    def make_noise(size):
        """fp16 of random sign and fraction, between 0.5 and 2: of random bits, all but four of the exponent's."""
        bits = int.from_bytes(os.urandom(size), "little")
        whole = lambda half: int.from_bytes(half.to_bytes(2, "little") * (size // 2), "little")  # noqa: E731
        return (bits & whole(0x87FF) | whole(0x3800)).to_bytes(size, "little")

    def allocate(self, size):
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def random(self, size):
        address = self.allocate(size)
        for at in range(0, size, len(self.noise)):
            count = min(len(self.noise), size - at)
            self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address + at), self.noise, ctypes.c_size_t(count))
        return address

    def timed(self, work):
        start, end = self.events
        milliseconds = ctypes.c_float()
        self.call("cuEventRecord", start, self.stream)
        work()
        self.call("cuEventRecord", end, self.stream)
        self.call("cuEventSynchronize", end)
        self.call("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return max(milliseconds.value * 1e-3, 1e-9)

    def product(self, shapes):
        held = [
            [(self.random(2 * m * k), self.random(2 * n * k), self.allocate(2 * m * n), m, n, k) for m, n, k in shapes]
            for _ in range(sets(shapes))
        ]
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        half, single = 2, 68  # CUDA_R_16F, CUBLAS_COMPUTE_32F
        pointer = ctypes.c_void_p
        at = 0

        def work(rounds):
            nonlocal at
            for _ in range(rounds):
                # Row-major a w^T is column-major w^T-transposed times a.
                for a, w, out, m, n, k in held[at % len(held)]:
                    self.call_blas(
                        "cublasGemmEx", self.handle, 1, 0, n, m, k, ctypes.byref(one), pointer(w), half, k, pointer(a),
                        half, k, ctypes.byref(zero), pointer(out), half, n, single, -1,
                    )  # fmt: skip
                at += 1

        work(len(held))
        return lambda rounds: self.timed(lambda: work(rounds))

    def copy(self, times):
        a, b = self.random(COPY), self.allocate(COPY)

        def work():
            self.call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(b), ctypes.c_uint64(a), ctypes.c_size_t(COPY), self.stream)

        return [self.timed(work) for _ in range(times + 3)][3:]


def main():
    why = []
    for engine in (Torch, Cublas):
        try:
            found = engine()
        except Exception as error:  # a broken torch is no reason to leave cuBLAS out
            why.append(f"{engine.__name__}: {error}")
            continue
        report(found, json.loads(sys.argv[1]))
        return
    print("; ".join(why))
    sys.exit(3)


main()

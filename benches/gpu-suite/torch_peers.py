"""The tower in torch, timed on request beside ours: one request a line on stdin, one JSON answer on stdout.

    python3 torch_peers.py [--device cuda] [--tiny]

    prepare VARIANT IMAGES        builds it, compiles it, checks it against eager: {"seconds": ..}, or {"error": ..}
    time VARIANT IMAGES SAMPLES   {"seconds": [..]}: pixels on the device to features, fresh random pixels for each

Variants, all fp16 with random weights:

    eager     a module as one writes it: q, k, v apart, SDPA as torch chooses
    compile   that under torch.compile(mode="max-autotune"), which records CUDA graphs itself
    graph     q, k, v in one product, cuDNN's SDPA where it is, one CUDA graph
    best      that under torch.compile(mode="max-autotune-no-cudagraphs"), in one CUDA graph

Status 3: there is no torch, or it sees no device. On a CPU nothing is recorded and wall time is taken.
"""

import argparse
import contextlib
import json
import sys
import time

try:
    import torch

    from tower import FULL, TINY, Tower
except ImportError as error:
    print(error)
    sys.exit(3)


class Peers:
    def __init__(self, device, tiny):
        self.device, self.cuda = device, device == "cuda"
        self.sizes = TINY if tiny else FULL
        self.ready = {}
        torch.manual_seed(time.time_ns() % 2**31)
        plain = Tower(**self.sizes).to(device=device, dtype=torch.float16).eval()
        fused = Tower(**self.sizes, fused=True).to(device=device, dtype=torch.float16).eval()
        with torch.no_grad():
            state = plain.state_dict()
            for name in fused.state_dict():
                if ".projections.0." in name:
                    apart = [state.pop(name.replace("projections.0", f"projections.{i}")) for i in range(3)]
                    state[name] = torch.cat(apart)
            fused.load_state_dict(state)
        self.towers = {"eager": plain, "compile": plain, "graph": fused, "best": fused}
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else None

    def pixels(self, images):
        side = self.towers["eager"].side
        return torch.randn(images, 3, side, side, device=self.device, dtype=torch.float16)

    def attention(self, variant):
        """cuDNN's where the variant asks for it and this torch has it."""
        if variant in ("graph", "best") and self.cuda:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            return sdpa_kernel(order, set_priority=True)
        return contextlib.nullcontext()

    def prepare(self, variant, images):
        start = time.monotonic()
        run = self.towers[variant]
        if variant in ("compile", "best"):
            mode = "max-autotune" if variant == "compile" else "max-autotune-no-cudagraphs"
            run = torch.compile(run, mode=mode, dynamic=False)
        held = self.pixels(images)
        with self.attention(variant):
            if self.cuda and variant in ("graph", "best"):
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        run(held)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = run(held)

                def call(graph=graph, out=out):
                    graph.replay()
                    return out
            else:

                def call(run=run, held=held):
                    return run(held)

            for _ in range(3):
                got = call()
        got, truth = got.double(), self.towers["eager"](held).double()
        error = ((got - truth).norm() / truth.norm()).item()
        if not error < 1e-2:
            return {"error": f"differs from eager by {error:.1e}"}
        self.ready[variant, images] = (call, held)
        return {"seconds": time.monotonic() - start, "rel_l2": error}

    def time(self, variant, images, samples):
        call, held = self.ready[variant, images]
        seconds = []
        for _ in range(samples):
            held.normal_()
            if self.cuda:
                begin, end = self.events
                begin.record()
                call()
                end.record()
                end.synchronize()
                seconds.append(begin.elapsed_time(end) * 1e-3)
            else:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no device")
        return 3
    answers, sys.stdout = sys.stdout, sys.stderr  # compilers talk
    with torch.inference_mode():
        peers = Peers(options.device, options.tiny)
        print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
        for line in sys.stdin:
            what, variant, *numbers = line.split()
            try:
                answer = getattr(peers, what)(variant, *map(int, numbers))
            except Exception as error:  # a variant that does not work here leaves the others
                answer = {"error": f"{type(error).__name__}: {error}"[:500]}
            print(json.dumps(answer), file=answers, flush=True)
    return 0


sys.exit(main())

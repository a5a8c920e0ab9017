"""What Python adds to an encode: the wall time of a call less what the library says decoding, resizing and encoding took.

    python benches/python_overhead.py MODEL IMAGE [--calls N] [--out F.json]

MODEL: a checkpoint directory; with a small one (`imagehere synth tiny`) the fixed cost is seen, with the full-size one
(`imagehere synth vl-7b-vision`) its share. In what is added are arguments, the plan, memory for the rows, a thread that
listens for Ctrl-C, and the completeness check, which can be left out. Prints the medians.
"""

import argparse
import json
import platform
import statistics
import time

import imagehere


def measure(encoder, image, calls, **options):
    """Medians in seconds: of whole calls, and of what they add."""
    prompt, whole, added = "<ImageHere>What is it?", [], []
    for _ in range(calls + 1):
        begin = time.perf_counter()
        sequence = encoder.encode(prompt, [image], **options)
        whole.append(time.perf_counter() - begin)
        report = sequence.report
        added.append(whole[-1] - report["decode_s"] - report["resize_s"] - report["encode_s"])
    return statistics.median(whole[1:]), statistics.median(added[1:])  # the first call makes memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("image")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out")
    args = parser.parse_args()
    encoder = imagehere.Encoder(args.model, args.device)
    results = {"device": encoder.device, "machine": platform.processor() or platform.machine(), "calls": args.calls}
    for name, options in [("as it is", {}), ("verify=False", {"verify": False})]:
        whole, added = measure(encoder, args.image, args.calls, **options)
        results[name] = {"whole_s": whole, "added_s": added}
        print(f"{name:>13}: {whole * 1e3:9.3f} ms a call, {added * 1e3:7.3f} ms of it added, {added / whole:.2%}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()

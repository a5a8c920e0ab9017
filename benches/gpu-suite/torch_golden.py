"""Sequences that imagehere encoded, against the same tower in torch: f32 as the truth, fp16 as the yardstick.

    python3 torch_golden.py MODEL RGB SEQUENCE.. [--device cuda]

MODEL: the checkpoint directory (safetensors). RGB: the pictures' pixels at the tower's size, one after the other.
SEQUENCE: what `imagehere encode --out` wrote of them. A JSON line for each, `name` is the file's; status 1 if the bounds
do not hold for one of them, 3 if there is no torch.

Bounds: relative L2 error 2e-3, each row's cosine 0.9999, and 1.5 times the error of torch's own fp16.
"""

import argparse
import json
import pathlib
import sys

try:
    import torch

    from tower import Tower, normalise, read_checkpoint, read_safetensors
except ImportError as error:
    print(error)
    sys.exit(3)


def apart(got, truth):
    got, truth = got.double(), truth.double()
    return ((got - truth).norm() / truth.norm()).item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rgb")
    parser.add_argument("sequences", nargs="+", type=pathlib.Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no device")
        return 3
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    weights = read_checkpoint(options.model)
    with open(options.rgb, "rb") as file:
        rgb = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).to(device)
    features = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float16):
            tower = Tower.of(weights, dtype, device)
            pixels = normalise(rgb.reshape(-1, tower.side, tower.side, 3)).to(dtype)
            features[dtype] = torch.cat([tower(image[None]) for image in pixels])
            del tower
    truth = features[torch.float32]
    theirs = apart(features[torch.float16], truth)
    return max(judge(path, truth, theirs) for path in options.sequences)


def judge(path, truth, theirs):
    """Compares a sequence with `truth` [B, P, H] and says so; 0 if it is well. `theirs`: the error of torch's fp16."""
    sequence = read_safetensors(path)
    rows, slots = sequence["inputs_embeds"][0], sequence["slots"]
    ours = torch.stack([rows[begin:end] for begin, end in slots.tolist()]).to(truth.device)
    if ours.shape != truth.shape:
        print(f"{path} has {list(ours.shape)}, torch {list(truth.shape)}")
        return 1
    cosine = torch.nn.functional.cosine_similarity(ours.double(), truth.double(), dim=-1).min().item()
    found = {"rel_l2": apart(ours, truth), "torch_fp16_rel_l2": theirs, "cosine": cosine}
    found["of_torch_fp16"] = found["rel_l2"] / theirs
    print(json.dumps(dict(found, name=path.stem, torch=torch.__version__, images=len(ours))))
    well = found["rel_l2"] <= 2e-3 and cosine >= 0.9999 and found["of_torch_fp16"] <= 1.5
    return 0 if well else 1  # not well with any NaN


sys.exit(main())

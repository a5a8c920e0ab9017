"""Runs `imagehere convert` and `encode --format npy` on checkpoints that no test has seen, and lets transformers, torch,
safetensors and NumPy load what they wrote.

    python tests/oracle/convert.py target/release/imagehere [--cases N] [--seed S]

Each case draws a checkpoint as heldout.py does (sizes, dtype, format, shards, strides, extra tensors), and demands:

    convert                         the names of upstream, each tensor torch's own rounding to fp16, bit for bit;
                                    encoded, the same sequence as the original, bit for bit
    convert --layout clip-vision    CLIPVisionModel.from_pretrained takes every tensor, misses none, warns of none;
                                    Sequential and Embedding load strictly; all three together give the features
                                    that the oracle has from the original's tensors, bit for bit
    convert, upstream's modules     with a transformers whose modules have upstream's names (4.x): load_state_dict
    encode --format npy             numpy.load gives the arrays of the safetensors file; numpy.save the same bytes

Works with transformers 4 and 5; run it with both. Prints a line for each case; exits 1 if one fails.
"""

import argparse
import io
import json
import pathlib
import random
import sys
import tempfile
import time
import warnings

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers import CLIPVisionModel

import checkpoint
import heldout
import reference


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def half(tensor):
    return tensor.float().to(torch.float16)


def equal_tensors(got, want):
    assert sorted(got) == sorted(want), f"names differ: {sorted(set(got) ^ set(want))}"
    for name, tensor in want.items():
        assert got[name].dtype == torch.float16 and got[name].shape == tensor.shape, (name, got[name].dtype, got[name].shape)
        assert torch.equal(bits(got[name]), bits(half(tensor))), f"{name} differs"


def projector(sizes):
    return torch.nn.Sequential(
        torch.nn.Linear(sizes.width, sizes.projector), torch.nn.GELU(), torch.nn.Linear(sizes.projector, sizes.hidden)
    ).half()


def check_upstream(folder, weights, sizes):
    """The default layout: the tensors, and the modules that upstream's code would load them into."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    optional = ("post_layernorm", "position_ids")
    equal_tensors(state, {name: t for name, t in weights.items() if not any(part in name for part in optional)})
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "float16" and config["img_size"] == sizes.image

    tower = CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=sizes.width, intermediate_size=sizes.mlp, num_hidden_layers=sizes.layers, image_size=sizes.image,
        num_attention_heads=sizes.width // 64, patch_size=sizes.patch))  # fmt: skip
    if not hasattr(tower, "vision_model"):
        return False  # transformers 5: upstream's code does not run with it either
    module = torch.nn.Module()
    module.vit, module.model = torch.nn.Module(), torch.nn.Module()
    module.vit.vision_tower, module.vision_proj = tower, projector(sizes)
    module.model.tok_embeddings = torch.nn.Embedding(sizes.vocab, sizes.hidden)
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all("post_layernorm" in name for name in missing), (missing, unexpected)
    return True


def check_clip_vision(folder, weights, sizes, pixels):
    """The layout of transformers: loaded by its own classes, and by torch's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    own = {p.dtype for p in CLIPVisionModel.from_pretrained(folder, torch_dtype="auto").parameters()}
    assert own == {torch.float16}, own
    c = tower.config
    assert (c.image_size, c.patch_size, c.hidden_act, c.layer_norm_eps) == (sizes.image, sizes.patch, "quick_gelu", 1e-5)
    post = {end: getattr(getattr(tower, "vision_model", tower).post_layernorm, end) for end in ("weight", "bias")}
    for end, start in (("weight", 1.0), ("bias", 0.0)):
        want = weights.get(reference.TOWER + "post_layernorm." + end, torch.full_like(post[end], start))
        assert torch.equal(post[end].float(), half(want).float()), f"post_layernorm.{end}"

    project, table = projector(sizes), torch.nn.Embedding(sizes.vocab, sizes.hidden).half()
    project.load_state_dict(safetensors.torch.load_file(folder / "projector.safetensors"))
    table.load_state_dict(safetensors.torch.load_file(folder / "token_embedding.safetensors"))
    assert torch.equal(bits(table.weight.detach()), bits(half(weights["model.tok_embeddings.weight"])))

    with torch.no_grad():
        rows = tower.float().eval()(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        got = project.float()(rows)[0]
    assert torch.equal(got, reference.Oracle(weights).features(pixels)), "features differ"


def check_npy(folder, file):
    """The arrays of a folder against the tensors of a file."""
    want = safetensors.torch.load_file(file)
    slots = want["slots"].tolist()
    for i, (begin, end) in enumerate(slots):
        want[f"image_{i:03}"] = want["inputs_embeds"][0, begin:end]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*(f"{name}.npy" for name in want), "metadata.json"])
    for name, tensor in want.items():
        array = np.load(folder / f"{name}.npy", allow_pickle=False)
        assert array.dtype == tensor.numpy().dtype and array.flags.c_contiguous, (name, array.dtype)
        assert np.load(folder / f"{name}.npy", mmap_mode="r").shape == tuple(tensor.shape), name
        assert array.tobytes() == tensor.contiguous().numpy().tobytes(), f"{name} differs"
        saved = io.BytesIO()
        np.save(saved, array)
        assert saved.getvalue() == (folder / f"{name}.npy").read_bytes(), f"{name}: numpy.save writes other bytes"
    with safetensors.safe_open(file, "pt") as opened:
        assert json.loads((folder / "metadata.json").read_text()) == opened.metadata()


def check(binary, seed, directory):
    rng = random.Random(seed)
    model = directory / "model"
    what = heldout.draw_checkpoint(rng, seed, binary, model, heldout.SMALL_TOKENIZER, [])
    weights = checkpoint.read(model)
    sizes = reference.Sizes.of(weights)
    images = [heldout.draw_picture(rng, directory, i) for i in range(2)]
    pixels = reference.normalise(reference.resize(reference.load_image(images[0]), sizes.image))

    heldout.run([binary, "convert", model, "--out", directory / "upstream"])
    heldout.run([binary, "convert", model, "--out", directory / "clip", "--layout", "clip-vision"])
    modules = check_upstream(directory / "upstream", weights, sizes)
    check_clip_vision(directory / "clip", weights, sizes, pixels)

    def encode(model, out, *more):
        prompt = "a <ImageHere>, b <ImageHere>"
        words = [binary, "encode", "--model", model, "--prompt", prompt, "--image", *images, "--device", "cpu"]
        heldout.run([*words, "--out", directory / out, *more])
        return directory / out

    original, converted = encode(model, "original"), encode(directory / "upstream", "converted")
    original_tensors, converted_tensors = (safetensors.torch.load_file(file) for file in (original, converted))
    for name, tensor in original_tensors.items():
        assert torch.equal(tensor, converted_tensors[name]), f"{name} of the converted checkpoint differs"
    check_npy(encode(model, "arrays", "--format", "npy"), original)
    return what + ("; upstream's modules" if modules else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--seed", type=int, default=int(time.time()) // 60 * 1000, help="of the first case (default: the clock)")
    args = parser.parse_args()
    failures = []
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, numpy {np.__version__}")
    for seed in range(args.seed, args.seed + args.cases):
        with tempfile.TemporaryDirectory() as temp:
            try:
                print(f"{seed:12}  {check(args.binary, seed, pathlib.Path(temp))}", flush=True)
            except Exception as e:  # whatever another library says of a file
                failures.append(seed)
                print(f"{seed:12}  FAIL {type(e).__name__}: {e}", flush=True)
    print(f"{args.cases - len(failures)} of {args.cases} cases pass" + (f"; failed seeds: {failures}" if failures else ""))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

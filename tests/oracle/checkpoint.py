"""Random checkpoints in the upstream layout, written by torch and safetensors themselves, and read back.

Weights come from a formula (`formula`), not from a generator of some library: whoever has the list of
(tensor, dtype, mean, std) and a seed has the checkpoint. So most goldens need no committed weights: the Rust
test writes them again, and a hash says that it wrote the same.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import safetensors.torch
import torch

from reference import TOWER

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def splitmix64(x):
    """The finaliser of SplitMix64, on a u64 array."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def formula(seed, name, shape, mean, std):
    """f32 values, nearly normal: element i is mean + std * (sum of the four u16 of h(h(seed + i) ^ fnv1a(name))
    - 131070) / 37837, in f64, rounded once. 37837 is the standard deviation of that sum."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    i = np.arange(int(np.prod(shape)), dtype=np.uint64)
    h = splitmix64(splitmix64(i + np.uint64(seed)) ^ np.uint64(key))
    total = sum((h >> np.uint64(16 * part)) & np.uint64(0xFFFF) for part in range(4))
    unit = (total.astype(np.float64) - 131070.0) / 37837.0
    return torch.from_numpy((mean + std * unit).astype(np.float32)).reshape(tuple(shape))


@dataclasses.dataclass
class Tensor:
    name: str
    shape: list
    mean: float
    std: float
    dtype: str = "BF16"


def tensors(width, mlp, layers, patch, grid, projector, hidden, vocab, dtype, flavour=()):
    """The tensor list of a checkpoint, with scales under which every mistake of reference.py shows.

    A linear layer's weights have std gain / sqrt(inputs). Flavours, any of:
      "erf"      projector pre-activations around -3.2, where exact GELU and its tanh form part
      "faint"    embeddings so small that the layer norms' eps matters, and text rows subnormal in fp16
      "outliers" a few strong channels, as real CLIP has
      "extras"   post_layernorm, position_ids and some of the LLM's tensors lie in the files too
    """
    out = []

    def add(name, shape, mean, std):
        out.append(Tensor(name, list(shape), mean, std, dtype))

    def linear(name, n, k, gain, bias_mean=0.0, bias_std=0.3):
        add(name + ".weight", (n, k), 0.0, gain / k**0.5)
        add(name + ".bias", (n,), bias_mean, bias_std)

    def norm(name):
        add(name + ".weight", (width,), 1.0, 0.6 if "outliers" in flavour else 0.25)
        add(name + ".bias", (width,), 0.0, 0.2)

    faint = 0.004 if "faint" in flavour else 1.0
    e = TOWER + "embeddings."
    add("model.tok_embeddings.weight", (vocab, hidden), 0.0, 2e-6 if "faint" in flavour else 0.4)
    add(e + "class_embedding", (width,), 0.0, faint)
    add(e + "patch_embedding.weight", (width, 3, patch, patch), 0.0, faint * 1.2 / (3 * patch * patch) ** 0.5)
    add(e + "position_embedding.weight", (grid * grid + 1, width), 0.0, 0.7 * faint)
    norm(TOWER + "pre_layrnorm")
    for i in range(layers):
        layer = f"{TOWER}encoder.layers.{i}."
        linear(layer + "self_attn.q_proj", width, width, 1.1)
        linear(layer + "self_attn.k_proj", width, width, 1.1)
        linear(layer + "self_attn.v_proj", width, width, 1.1)
        linear(layer + "self_attn.out_proj", width, width, 0.8, bias_std=0.1)
        norm(layer + "layer_norm1")
        norm(layer + "layer_norm2")
        linear(layer + "mlp.fc1", mlp, width, 0.9, bias_mean=-1.6, bias_std=0.5)
        linear(layer + "mlp.fc2", width, mlp, 6.0, bias_std=0.1)
    if "extras" in flavour:
        norm(TOWER + "post_layernorm")
    if "erf" in flavour:
        linear("vision_proj.0", projector, width, 0.12, bias_mean=-3.4)
        linear("vision_proj.2", hidden, projector, 400.0, bias_std=0.1)
    else:
        linear("vision_proj.0", projector, width, 0.3, bias_mean=-1.0)
        linear("vision_proj.2", hidden, projector, 6.0, bias_std=0.1)
    if "extras" in flavour:
        add("model.norm.weight", (hidden,), 1.0, 0.1)
        add("model.layers.0.attention.wqkv.weight", (8, hidden), 0.0, 0.1)
        add("model.layers.0.attention.wqkv.Plora_A.weight", (4, hidden), 0.0, 0.1)
        add("output.weight", (16, hidden), 0.0, 0.1)
    return out


def materialise(seed, specs):
    """name -> tensor in its stored dtype."""
    return {t.name: formula(seed, t.name, t.shape, t.mean, t.std).to(DTYPES[t.dtype]) for t in specs}


def strain(weights, flavour):
    """What layer norms find hard, by the bias that begins the residual stream: a few channels of +-300 ("massive", as
    seen in trained towers), or a mean of 30 deviations ("far")."""
    bias = weights[TOWER + "pre_layrnorm.bias"]
    if "far" in flavour:
        bias += 30
    if "massive" in flavour:
        bias[5::37] = 300
        bias[23::37] = -300


def digest(weights):
    """sha256 over the tensors' bytes, in the order of their names."""
    h = hashlib.sha256()
    for name in sorted(weights):
        h.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def config_json(sizes, dtype, max_length=4096):
    """config.json with upstream's keys. Those of the LLM disagree with the tower on purpose."""
    return {
        "architectures": ["InternLMXComposer2ForCausalLM"],
        "attn_implementation": "eager",
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": sizes["hidden"],
        "img_size": sizes["grid"] * sizes["patch"],
        "initializer_range": 0.02,
        "intermediate_size": 3 * sizes["hidden"],
        "max_length": max_length,
        "max_position_embeddings": 32768,
        "model_type": "internlmxcomposer2",
        "num_attention_heads": 7,
        "num_hidden_layers": 5,
        "num_key_value_heads": 7,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 1.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
        "transformers_version": "4.33.1",
        "use_cache": False,
        "vocab_size": sizes["vocab"],
    }


# ---------------------------------------------------------------------------------------------- writing


def awkward(weights):
    """The same tensors as torch may really hold them: views into shared storages, transposed, strided, wrapped
    in Parameters, in an OrderedDict with the `_metadata` that `Module.state_dict()` leaves. Values are equal."""
    out = collections.OrderedDict(weights)
    for name in [n for n in out if n.endswith("q_proj.weight")]:
        stem = name.removesuffix("q_proj.weight")
        names = [name for p in "qkv" if (name := f"{stem}{p}_proj.weight") in out]  # a shard may end between them
        fused = torch.cat([out[n] for n in names])  # one storage, three views with offsets
        out.update(zip(names, fused.chunk(len(names))))
    for name in [n for n in out if n.endswith("out_proj.weight")]:
        out[name] = out[name].T.contiguous().T  # column-major
    for name in [n for n in out if n.endswith("position_embedding.weight")]:
        wide = torch.full((out[name].shape[0] + 1, 2 * out[name].shape[1]), 7.0, dtype=out[name].dtype)
        wide[1:, ::2] = out[name]
        out[name] = wide[1:, ::2]  # every second element, from the second row on
    for name in [n for n in out if "mlp.fc1" in n or n == "vision_proj.0.weight"]:
        out[name] = torch.nn.Parameter(out[name], requires_grad=name.endswith("bias"))
    out._metadata = collections.OrderedDict({"": {"version": 1}, "vit": {"version": 1}, "vision_proj.0": {"version": 1}})
    return out


def shards(weights, count):
    """Splits in order into `count` parts of about equal bytes, or fewer where one tensor is larger than a part."""
    total = sum(t.numel() * t.element_size() for t in weights.values())
    parts, done = [{} for _ in range(count)], 0
    for name, tensor in weights.items():
        parts[min(done * count // total, count - 1)][name] = tensor
        done += tensor.numel() * tensor.element_size()
    return [part for part in parts if part]


def write(directory, weights, config, tokenizer, form="bin", shard_count=1, odd=False, absent_llm=False):
    """Writes a checkpoint directory. `form`: "bin" or "safetensors".

    `absent_llm`: a sharded checkpoint gets one shard more, for the LLM's tensors, in the index alone: the file is
    not there, as in a download of only what encoding needs."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "tokenizer.model").write_bytes(tokenizer)
    stem, end = ("pytorch_model", ".bin") if form == "bin" else ("model", ".safetensors")

    def save(part, path):
        if form == "bin":
            torch.save(awkward(part) if odd else dict(part), path)
        else:
            safetensors.torch.save_file(part, path, metadata={"format": "pt"})

    if shard_count == 1:
        save(weights, directory / (stem + end))
        return
    llm = {} if not absent_llm else {n: t for n, t in weights.items() if not needed(n) and not n.startswith("vit.")}
    parts = shards({n: t for n, t in weights.items() if n not in llm}, shard_count) + [llm] * bool(llm)
    weight_map = {}
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05}-of-{len(parts):05}{end}"
        if part is not llm:
            save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{stem}{end}.index.json").write_text(json.dumps(index, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- reading


def needed(name):
    return name.startswith((TOWER, "vision_proj.")) or name == "model.tok_embeddings.weight"


def read(directory):
    """name -> tensor of the needed tensors of any checkpoint directory, by torch and safetensors."""
    directory = pathlib.Path(directory)
    for stem, load in (
        ("pytorch_model.bin", lambda p: torch.load(p, map_location="cpu", weights_only=True, mmap=True)),
        ("model.safetensors", safetensors.torch.load_file),
    ):
        index = directory / (stem + ".index.json")
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            files = sorted({file for name, file in weight_map.items() if needed(name)})
        elif (directory / stem).exists():
            files = [stem]
        else:
            continue
        out = {}
        for file in files:
            out |= {k: v.detach() for k, v in load(directory / file).items() if needed(k)}
        return out
    raise FileNotFoundError(f"no weights in {directory}")

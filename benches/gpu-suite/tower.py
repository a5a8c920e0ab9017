"""The vision tower and projector in torch, in the plain way, and a reader of safetensors. Needs torch alone.

Shapes: B images, P patches, T = P + 1 tokens, C width, H hidden size.
"""

import json
import mmap
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

TOWER = "vit.vision_tower.vision_model."
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


def read_safetensors(path):
    """name -> tensor, over a map of the file: 8 bytes of length, a JSON header, the data."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, about in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            dtype = DTYPES[about["dtype"]]
            count = (end - begin) // dtype.itemsize
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).reshape(about["shape"])
    return tensors


def read_checkpoint(folder):
    """Tower and projector of a checkpoint directory, every weight rounded to fp16 once."""
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        found.update(read_safetensors(path))
    return {name: t.to(torch.float16) for name, t in found.items() if name.startswith((TOWER, "vision_proj."))}


def sizes(weights):
    e = TOWER + "embeddings."
    width, _, patch, _ = weights[e + "patch_embedding.weight"].shape
    layers = {name[len(TOWER) :].split(".")[2] for name in weights if name.startswith(TOWER + "encoder.layers.")}
    return {
        "width": width, "patch": patch, "tokens": weights[e + "position_embedding.weight"].shape[0],
        "layers": len(layers), "mlp": weights[TOWER + "encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projector": weights["vision_proj.0.weight"].shape[0], "hidden": weights["vision_proj.2.weight"].shape[0],
    }  # fmt: skip


FULL = {"width": 1024, "patch": 14, "tokens": 1226, "layers": 24, "mlp": 4096, "projector": 4096, "hidden": 4096}
TINY = {"width": 128, "patch": 14, "tokens": 26, "layers": 2, "mlp": 192, "projector": 192, "hidden": 136}


class Layer(nn.Module):
    def __init__(self, width, mlp, fused):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        outputs = [3 * width] if fused else [width] * 3
        self.projections = nn.ModuleList(nn.Linear(width, n) for n in outputs)
        self.out_proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x):  # [B, T, C]
        b, t, c = x.shape
        h = self.layer_norm1(x)
        parts = [linear(h) for linear in self.projections]
        q, k, v = parts if len(parts) == 3 else parts[0].chunk(3, dim=-1)
        heads = lambda part: part.view(b, t, c // 64, 64).transpose(1, 2)  # noqa: E731
        attended = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
        x = x + self.out_proj(attended.transpose(1, 2).reshape(b, t, c))
        h = self.fc1(self.layer_norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))


class Tower(nn.Module):
    """Pixels [B, 3, S, S] to features [B, P, H]: the last layer's hidden states but the class row, projected."""

    def __init__(self, width, patch, tokens, layers, mlp, projector, hidden, fused=False):
        super().__init__()
        self.side = round((tokens - 1) ** 0.5) * patch
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.5)
        self.position_embedding = nn.Parameter(torch.randn(tokens, width) * 0.3)
        self.pre_norm = nn.LayerNorm(width, eps=1e-5)
        self.layers = nn.ModuleList(Layer(width, mlp, fused) for _ in range(layers))
        self.projector = nn.Sequential(nn.Linear(width, projector), nn.GELU(), nn.Linear(projector, hidden))

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.position_embedding
        x = self.pre_norm(x)
        for layer in self.layers:
            x = layer(x)
        return self.projector(x[:, 1:])

    @classmethod
    def of(cls, weights, dtype, device):
        """The checkpoint's own."""
        tower = cls(**sizes(weights))
        names = {
            "patch_embedding.weight": "embeddings.patch_embedding.weight",
            "class_embedding": "embeddings.class_embedding",
            "position_embedding": "embeddings.position_embedding.weight",
            "pre_norm.weight": "pre_layrnorm.weight",
            "pre_norm.bias": "pre_layrnorm.bias",
        }
        for i in range(len(tower.layers)):
            for ours, theirs in [
                ("layer_norm1", "layer_norm1"), ("layer_norm2", "layer_norm2"), ("out_proj", "self_attn.out_proj"),
                ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"),
                *((f"projections.{j}", f"self_attn.{q}_proj") for j, q in enumerate("qkv")),
            ]:  # fmt: skip
                for kind in ("weight", "bias"):
                    names[f"layers.{i}.{ours}.{kind}"] = f"encoder.layers.{i}.{theirs}.{kind}"
        state = {ours: weights[TOWER + theirs] for ours, theirs in names.items()}
        for end in ("0.weight", "0.bias", "2.weight", "2.bias"):
            state[f"projector.{end}"] = weights[f"vision_proj.{end}"]
        tower.load_state_dict(state)
        return tower.to(device=device, dtype=dtype).eval()


def normalise(rgb):
    """[B, S, S, 3] u8 -> [B, 3, S, S] f32."""
    mean, std = (torch.tensor(values, device=rgb.device)[:, None, None] for values in (MEAN, STD))
    return (rgb.permute(0, 3, 1, 2).float() / 255 - mean) / std

"""The oracle: what transformers, Pillow and SentencePiece make of a checkpoint, an image and a prompt.

Nothing here looks at the Rust code. Three parts:

* pixels   Pillow BICUBIC to the tower's size, u8 -> f32, CLIP normalisation.
* tower    transformers.CLIPVisionModel on the fp16-rounded weights, in f32 (the truth) or in fp16 (the
           yardstick: how far a straightforward fp16 run strays), and a plain torch forward of the same formula
           with one deliberate mistake at a time, to show that a golden can tell it from the truth.
* prompt   the reference's chat template and interleaving, straight from its description, on SentencePiece.

Shapes: P patches, T = P + 1 tokens, C tower width, H hidden size, p patch side.
"""

import dataclasses
import io
import re

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sentencepiece import sentencepiece_model_pb2
from transformers import CLIPVisionConfig, CLIPVisionModel

sentencepiece.set_min_log_level(2)  # upstream's vocabulary has a NUL piece, about which it would warn each time

TOWER = "vit.vision_tower.vision_model."
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


# ---------------------------------------------------------------------------------------------- pixels


def load_image(path, exif=True):
    """RGB8 as the reference opens it (`convert("RGB")`), upright if `exif`."""
    image = Image.open(path)
    return (ImageOps.exif_transpose(image) if exif else image).convert("RGB")


def resize(image, size):
    """Both sides forced to `size`, no crop; [S, S, 3] u8."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def normalise(rgb):
    """[S, S, 3] u8 -> [1, 3, S, S] f32."""
    x = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255
    return ((x - MEAN[:, None, None]) / STD[:, None, None])[None]


def im2col(pixels, patch):
    """[1, 3, S, S] -> [P, 3·p²]: row-major patches, element order channel, y, x."""
    return F.unfold(pixels, patch, stride=patch)[0].T.contiguous()


# ---------------------------------------------------------------------------------------------- numbers


def round_fp16(tensor):
    """The one rounding that every weight goes through, back in f32."""
    half = tensor.to(torch.float32).to(torch.float16)
    assert torch.isfinite(half).all(), "the oracle's weights must fit fp16"
    return half.float()


def rel_l2(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def worst_cosine(got, want):
    """The smallest cosine among the rows of two [rows, columns] matrices."""
    return F.cosine_similarity(got.double(), want.double(), dim=1).min().item()


# ------------------------------------------------------------------------------------------------ tower


@dataclasses.dataclass
class Sizes:
    """What a checkpoint's tensors say about themselves."""

    width: int
    mlp: int
    layers: int
    patch: int
    grid: int
    projector: int
    hidden: int
    vocab: int

    @classmethod
    def of(cls, weights):
        e = TOWER + "embeddings."
        width, _, patch, _ = weights[e + "patch_embedding.weight"].shape
        tokens = weights[e + "position_embedding.weight"].shape[0]
        layers = {int(m[1]) for name in weights if (m := re.match(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.", name))}
        return cls(
            width=width,
            mlp=weights[TOWER + "encoder.layers.0.mlp.fc1.weight"].shape[0],
            layers=len(layers),
            patch=patch,
            grid=round((tokens - 1) ** 0.5),
            projector=weights["vision_proj.0.weight"].shape[0],
            hidden=weights["vision_proj.2.weight"].shape[0],
            vocab=weights["model.tok_embeddings.weight"].shape[0],
        )

    @property
    def image(self):
        return self.grid * self.patch


class Oracle:
    """transformers' tower and torch's projector, on the fp16-rounded weights."""

    def __init__(self, weights, attention="eager", dtype=torch.float32):
        """`weights`: name -> tensor of the upstream layout, any float dtype."""
        self.sizes = s = Sizes.of(weights)
        self.dtype = dtype
        config = CLIPVisionConfig(
            hidden_size=s.width, intermediate_size=s.mlp, projection_dim=s.width, num_hidden_layers=s.layers,
            num_attention_heads=s.width // 64, num_channels=3, image_size=s.image, patch_size=s.patch,
            hidden_act="quick_gelu", layer_norm_eps=1e-5, attention_dropout=0.0, attn_implementation=attention,
        )  # fmt: skip
        model = CLIPVisionModel(config).eval()
        # transformers 5 dropped the `vision_model.` level from the names of this model.
        level = "vision_model." if any(k.startswith("vision_model.") for k in model.state_dict()) else ""
        state = {level + k[len(TOWER) :]: round_fp16(v) for k, v in weights.items()
                 if k.startswith(TOWER) and not k.endswith("position_ids")}  # fmt: skip
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and all("post_layernorm" in k for k in missing), (missing, unexpected)
        self.tower = model.to(dtype)
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(s.width, s.projector), torch.nn.GELU(), torch.nn.Linear(s.projector, s.hidden)
        )
        self.projector.load_state_dict(
            {k.removeprefix("vision_proj."): round_fp16(v) for k, v in weights.items() if k.startswith("vision_proj.")}
        )
        self.projector.to(dtype)

    @torch.inference_mode()
    def stages(self, pixels):
        """{stage: f32}: "embedded" and "layer.i" [T, C], "projector_hidden" [P, projector], "features" [P, H]."""
        states = self.tower(pixel_values=pixels.to(self.dtype), output_hidden_states=True).hidden_states
        out = {"embedded": states[0]} | {f"layer.{i}": h for i, h in enumerate(states[1:])}
        out["projector_hidden"] = self.projector[1](self.projector[0](states[-1][:, 1:]))
        out["features"] = self.projector[2](out["projector_hidden"])
        return {name: value[0].float() for name, value in out.items()}

    def features(self, pixels):
        """[P, H] f32."""
        return self.stages(pixels)["features"]


# Each of these is a mistake that someone has made, or could, in re-implementing the tower.
MISTAKES = [
    "projector gelu tanh", "projector quick_gelu", "tower gelu erf", "layer before last", "post_layernorm applied",
    "class token kept, last patch dropped", "no pre_layrnorm", "no positions", "positions after pre_layrnorm",
    "class position on the first patch", "eps 1e-6", "attention scale width**-0.5", "heads interleaved",
    "query and key swapped", "patch as y x channel", "patch as channel x y", "grid column-major", "BGR",
    "bilinear pixels", "mean and std 0.5", "projector biases dropped", "qkv biases dropped",
]  # fmt: skip


@torch.inference_mode()
def plain_features(weights, image, mistake=None):
    """The formula in plain torch, f32; [P, H]. With `mistake`, one of MISTAKES is made."""
    assert mistake is None or mistake in MISTAKES, mistake
    s, oops = Sizes.of(weights), lambda name: mistake == name
    w = {k.removeprefix(TOWER): round_fp16(v) for k, v in weights.items() if v.is_floating_point()}
    eps = 1e-6 if oops("eps 1e-6") else 1e-5

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    if oops("bilinear pixels"):
        rgb = np.asarray(image.resize((s.image, s.image), Image.Resampling.BILINEAR))
    else:
        rgb = resize(image, s.image)
    pixels = normalise(rgb[:, :, ::-1] if oops("BGR") else rgb)
    if oops("mean and std 0.5"):
        pixels = (torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    patches = im2col(pixels, s.patch).view(-1, 3, s.patch, s.patch)
    if oops("patch as y x channel"):
        patches = patches.permute(0, 2, 3, 1)
    if oops("patch as channel x y"):
        patches = patches.transpose(2, 3)
    if oops("grid column-major"):
        patches = patches.unflatten(0, (s.grid, s.grid)).transpose(0, 1).flatten(0, 1)
    x = patches.flatten(1) @ w["embeddings.patch_embedding.weight"].flatten(1).T
    x = torch.cat([w["embeddings.class_embedding"][None], x])
    position = w["embeddings.position_embedding.weight"]
    if oops("class position on the first patch"):
        position = position.roll(1, 0)
    if oops("positions after pre_layrnorm"):
        x = norm(x, "pre_layrnorm") + position
    else:
        x = x if oops("no positions") else x + position
        x = x if oops("no pre_layrnorm") else norm(x, "pre_layrnorm")
    heads = s.width // 64
    split = (-1, 64, heads) if oops("heads interleaved") else (-1, heads, 64)
    for i in range(s.layers - oops("layer before last")):
        layer = f"encoder.layers.{i}."
        y = norm(x, layer + "layer_norm1")
        q, k, v = (linear(y, f"{layer}self_attn.{n}_proj") for n in "qkv")
        if oops("qkv biases dropped"):
            q, k, v = (y @ w[f"{layer}self_attn.{n}_proj.weight"].T for n in "qkv")
        if oops("query and key swapped"):
            q, k = k, q
        q, k, v = (t.view(split) if split[1] == heads else t.view(split).transpose(1, 2) for t in (q, k, v))
        scores = torch.einsum("thd,shd->hts", q, k)
        scores = scores * (s.width if oops("attention scale width**-0.5") else 64) ** -0.5
        y = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
        y = y.transpose(1, 2) if split[1] != heads else y
        x = x + linear(y.flatten(1), layer + "self_attn.out_proj")
        y = linear(norm(x, layer + "layer_norm2"), layer + "mlp.fc1")
        y = F.gelu(y) if oops("tower gelu erf") else y * torch.sigmoid(1.702 * y)
        x = x + linear(y, layer + "mlp.fc2")
    if oops("post_layernorm applied"):
        w.setdefault("post_layernorm.weight", torch.ones(s.width))
        w.setdefault("post_layernorm.bias", torch.zeros(s.width))
        x = norm(x, "post_layernorm")
    x = x[:-1] if oops("class token kept, last patch dropped") else x[1:]
    if oops("projector biases dropped"):
        return F.gelu(x @ w["vision_proj.0.weight"].T) @ w["vision_proj.2.weight"].T
    x = linear(x, "vision_proj.0")
    if oops("projector quick_gelu"):
        x = x * torch.sigmoid(1.702 * x)
    else:
        x = F.gelu(x, approximate="tanh" if oops("projector gelu tanh") else "none")
    return linear(x, "vision_proj.2")


# ----------------------------------------------------------------------------------------------- prompt

DEFAULT_META = (
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"
    "- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by "
    "Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user "
    "such as English and 中文.\n"
    "- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on "
    "the provided image."
)
MARKER = "<ImageHere>"
START, END = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}


class Tokenizer:
    """SentencePiece as the reference's slow tokenizer drives it.

    `live=False` asks for control tokens typed by a user to stay plain text. To get that from SentencePiece itself,
    the template's own tokens are spelled with private-use characters, which take the ids of the
    `[UNUSED_TOKEN_n]` pieces; those pieces then no longer match anything, so that what a user types goes through
    BPE in one run with its neighbours.
    """

    SENTINEL = 0xF0000  # + n stands for [UNUSED_TOKEN_n]: a plane-15 private-use character
    SPECIAL = 0xF1000  # + id stands for <unk>, <s>, </s> in text that is not a user's

    def __init__(self, model):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        self.live = sentencepiece.SentencePieceProcessor(model_proto=model)
        for piece in proto.pieces:
            if m := re.fullmatch(r"\[UNUSED_TOKEN_(\d+)\]", piece.piece):
                piece.piece = chr(self.SENTINEL + int(m[1]))
        self.plain = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def encode(self, text, live):
        """Ids without BOS; `text` has its own control tokens as `template` spells them."""
        if live:
            text = re.sub("[\U000f0000-\U000f0fff]", lambda m: f"[UNUSED_TOKEN_{ord(m[0]) - self.SENTINEL}]", text)
            for special, id in SPECIALS.items():
                text = text.replace(special, chr(self.SPECIAL + id))
        ids = []
        for part in re.split("([\U000f1000-\U000f1002])", text):  # the slow tokenizer splits its specials out first
            special = len(part) == 1 and self.SPECIAL <= ord(part) < self.SPECIAL + 3
            ids += [ord(part) - self.SPECIAL] if special else (self.live if live else self.plain).encode(part)
        return ids

    @classmethod
    def template(cls, text):
        """Spells the control tokens of template text so that they are live either way."""
        for special, id in SPECIALS.items():
            text = text.replace(special, chr(cls.SPECIAL + id))
        return re.sub(r"\[UNUSED_TOKEN_(\d+)\]", lambda m: chr(cls.SENTINEL + int(m[1])), text)


def chat_prompt(query, history=(), meta=DEFAULT_META):
    """The chat template; template and meta text with live control tokens."""
    t = Tokenizer.template
    text = t(f"{START}system\n{meta}{END}\n") if meta else ""
    for q, a in history:
        text += t(f"{START}user\n") + q + t(f"{END}\n{START}assistant\n") + a + t(f"{END}\n")
    return text + t(f"{START}user\n") + query + t(f"{END}\n{START}assistant\n")


def interleave(tokenizer, text, images, rows, bos="per-segment", live=False, cut=None):
    """`interleav_wrap_chat` without the tensors: (input_ids with -1 in image rows, slots [begin, end]).

    images: their number; rows: P. A text without images gets one BOS. `cut`: upstream's silent max_length.
    """
    parts = text.split(MARKER)
    if len(parts) != images + 1:
        raise ValueError("Invalid <ImageHere> prompt format.")
    ids, slots, need_bos = [], [], True
    for i, part in enumerate(parts):
        if part:
            ids += [1] * need_bos + tokenizer.encode(part, live)
            need_bos = bos == "per-segment"
        if i < images:
            slots.append([len(ids), len(ids) + rows])
            ids += [-1] * rows
    if cut is not None and len(ids) > cut:
        ids = ids[:cut]
        slots = [[min(begin, cut), min(end, cut)] for begin, end in slots]
    return ids, slots


def plan(tokenizer, case, rows):
    """A case of goldens.json, or of heldout.py -> (input_ids, slots)."""
    live = case.get("allow_control_tokens", False) or case.get("raw", False)
    if case.get("raw"):
        text = Tokenizer.template(case["query"])
    else:
        text = chat_prompt(case["query"], case.get("history", ()), case.get("meta", DEFAULT_META))
    return interleave(tokenizer, text, case["images"], rows, case.get("bos", "per-segment"), live, case.get("cut"))


def png_bytes(image):
    out = io.BytesIO()
    image.save(out, "PNG", optimize=False, compress_level=9)
    return out.getvalue()

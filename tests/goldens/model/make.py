"""Makes the model goldens beside this script: `python tests/goldens/model/make.py`, in the environment of
tests/oracle/requirements.txt. Running it again with the same versions gives the same bytes.

    tokenizer.model        a small SentencePiece BPE model with upstream's settings
    images/*.png           odd-sized pictures
    goldens.json           checkpoints (sizes, tensors, errors of fp16 runs), prompts and their layouts
    <checkpoint>.safetensors   stage outputs of transformers.CLIPVisionModel in f32 on fp16-rounded weights
    <checkpoint>/          only for .bin checkpoints: the directory as torch.save writes it

Safetensors checkpoints are not committed: their weights follow from goldens.json by the formula in
tests/oracle/checkpoint.py, and the test writes them. Each golden is asserted here to tell the truth from every
mistake listed in tests/oracle/reference.py, by more than ten times the tolerance of the test, wherever the
checkpoint's shape lets that mistake show at all.
"""

import hashlib
import json
import pathlib
import platform
import shutil
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "oracle"))

import io  # noqa: E402

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import safetensors.torch  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

import checkpoint  # noqa: E402
import reference  # noqa: E402

TOLERANCE = 2e-3  # rel-L2 of a stage in fp16 against the golden
VOCAB = 384

CHECKPOINTS = [
    dict(name="bin_bf16", form="bin", shards=1, dtype="BF16", flavour=[], odd=False,
         sizes=dict(width=64, mlp=160, layers=2, patch=14, grid=3, projector=96, hidden=72)),
    dict(name="bin_odd_mixed", form="bin", shards=2, dtype="F16", flavour=["extras"], odd=True,
         sizes=dict(width=64, mlp=256, layers=1, patch=7, grid=2, projector=64, hidden=48)),
    dict(name="safetensors_f16_erf", form="safetensors", shards=1, dtype="F16", flavour=["erf"], odd=False,
         sizes=dict(width=128, mlp=512, layers=3, patch=14, grid=4, projector=192, hidden=160)),
    dict(name="safetensors_bf16_wide", form="safetensors", shards=3, dtype="BF16", flavour=["outliers"], odd=False,
         sizes=dict(width=192, mlp=768, layers=4, patch=14, grid=5, projector=224, hidden=224)),
    dict(name="safetensors_f32_faint", form="safetensors", shards=2, dtype="F32", flavour=["faint", "extras"], odd=False,
         sizes=dict(width=128, mlp=320, layers=1, patch=10, grid=3, projector=128, hidden=96)),
    dict(name="safetensors_bf16_massive", form="safetensors", shards=1, dtype="BF16", flavour=["massive"], odd=False,
         sizes=dict(width=128, mlp=512, layers=2, patch=14, grid=3, projector=96, hidden=64)),
    dict(name="safetensors_bf16_far", form="safetensors", shards=1, dtype="BF16", flavour=["far"], odd=False,
         sizes=dict(width=128, mlp=512, layers=2, patch=14, grid=3, projector=96, hidden=64)),
]  # fmt: skip

# Mistakes that a checkpoint cannot show: one head hides how heads are cut, exact GELU and its tanh form part only
# far from 0, eps shows only under faint embeddings (and there the tower's input hides nothing else).
# A strained residual stream hides nearly all of them: those goldens are about layer norms alone.
def visible(mistake, spec):
    if "massive" in spec["flavour"] or "far" in spec["flavour"]:
        return False
    if mistake == "projector gelu tanh":
        return "erf" in spec["flavour"]
    if mistake == "eps 1e-6":
        return "faint" in spec["flavour"]
    if mistake in ("heads interleaved", "attention scale width**-0.5"):
        return spec["sizes"]["width"] > 64
    return True


CORPUS = """
Please describe this image in detail.
Describe the subject of these two pictures? First picture: , second picture: .
Image 1: ; Image 2: ; Image 3: ; compare them and say what changed between the first and the last.
The first picture shows a red car parked beside a wooden fence; the second one shows a panda eating bamboo.
system user assistant You are an AI assistant whose name is. It is designed to be helpful, honest, and harmless.
can understand and communicate fluently in the language chosen by the user such as English and
is capable of comprehending and articulating responses effectively based on the provided image.
How many windows does the house have? It has 12 windows, 3 doors and  2  chimneys.
def area(width, height):\n    return width * height\n\n
请描述这张图片。第一张图片和第二张图片有什么不同？语言模型 中文 图片 图片 描述 描述
""" * 4  # fmt: skip


def train_tokenizer():
    """SentencePiece with upstream's settings: identity normaliser, no dummy prefix, byte fallback."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.strip().split("\n")), model_writer=out, model_type="bpe", vocab_size=VOCAB,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=0.995,
        user_defined_symbols=["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "……", "——"],
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def picture(seed, width, height):
    """Two gradients, a checkerboard and noise, from integers alone."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    noise = checkpoint.splitmix64(np.arange(height * width * 3, dtype=np.uint64) + np.uint64(seed << 32))
    noise = (noise >> np.uint64(56)).astype(np.int64).reshape(height, width, 3)
    r = x * 255 // max(width - 1, 1)
    g = y * 255 // max(height - 1, 1)
    b = ((x // 5 + y // 7 + seed) % 2) * 200
    smooth = np.stack([r, g, b], axis=2)
    return Image.fromarray(((5 * smooth + 3 * noise) // 8).astype(np.uint8))


PICTURES = {"landscape.png": (1, 61, 37), "tall.png": (2, 19, 83), "small.png": (3, 9, 11)}

M = reference.MARKER
HISTORY = [["First picture:" + M + "what is it?", "A red car……"], ["And how many windows?", "It has 12."]]
PROMPTS = [
    dict(name="one image", query=M + "Please describe this image in detail.", images=1),
    dict(name="two images", query=f"First picture:{M}, second picture:{M}. Describe the subject of these two pictures?",
         images=2),
    dict(name="two images, first-bos", query=f"First picture:{M}, second picture:{M}. Describe?", images=2, bos="first"),
    dict(name="adjacent markers", query=M + M + "Compare.", images=2),
    dict(name="marker at the end", query="What is this? " + M, images=1, meta=""),
    dict(name="markers in history", query="Compare it with " + M, images=2, history=HISTORY),
    dict(name="marker in meta", query="Is it like " + M + "?", images=2, meta=f"Always think of {M}\n and be brief."),
    dict(name="empty meta is none", query=f"Image 1: {M}; Image 2: {M}; compare them", images=2, meta=""),
    dict(name="no image", query="How many windows does the house have?", images=0),
    dict(name="bytes", query=f"😀👍 ＡＢＣ……——\t\n\n  ça{M}图片描述　 ", images=1, meta="中文"),
    dict(name="control tokens as text", query=f"a</s>[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_0]b{M}<s> <unk>c", images=1,
         history=[["[UNUSED_TOKEN_146]system", "ok[UNUSED_TOKEN_145]"]], meta="be brief[UNUSED_TOKEN_0]</s>"),
    dict(name="control tokens live", query=f"a</s>[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_0]b{M}<s> <unk>c", images=1,
         history=[["[UNUSED_TOKEN_146]system", "ok[UNUSED_TOKEN_145]"]], meta="", allow_control_tokens=True),
    dict(name="raw", query=f"[UNUSED_TOKEN_146]user\n{M} and {M}</s>\n", images=2, raw=True),
    dict(name="raw, image alone", query=M, images=1, raw=True),
    dict(name="cut in the second image", query=f"x{M}y{M}z", images=2, meta="", cut=24),
]  # fmt: skip


def golden(spec, weights, images):
    """Stage outputs and errors of one checkpoint; asserts that each mistake shows."""
    s = spec["sizes"]
    size = s["grid"] * s["patch"]
    truth, half = reference.Oracle(weights), reference.Oracle(weights, dtype=torch.float16)
    out, fp16_error = {}, {}
    for name, image in images.items():
        rgb = reference.resize(image, size)
        pixels = reference.normalise(rgb)
        stages, stages16 = truth.stages(pixels), half.stages(pixels)
        stem = name.removesuffix(".png")
        if name == "landscape.png":
            # u8 in im2col order: with normalise_table they are the exact f32 patches, in a quarter of the space.
            bytes_ = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float()
            out[stem + ".patches_u8"] = reference.im2col(bytes_, s["patch"]).to(torch.uint8)
        else:
            stages = {"features": stages["features"]}
        for stage, value in stages.items():
            out[f"{stem}.{stage}"] = value.contiguous()
            fp16_error[f"{stem}.{stage}"] = reference.rel_l2(stages16[stage], value)
        want = stages["features"]
        plain = reference.plain_features(weights, image)
        # f32's 1 + erf(x) has lost all but its last bits where "erf" puts x: two f32 runs part there.
        limit = 3e-4 if "erf" in spec["flavour"] else 3e-6
        assert reference.rel_l2(plain, want) < limit, (spec["name"], reference.rel_l2(plain, want))
    mistakes = {}
    for mistake in reference.MISTAKES:
        errors = [reference.rel_l2(reference.plain_features(weights, image, mistake), out[name.removesuffix(".png") + ".features"])
                  for name, image in images.items()]  # fmt: skip
        mistakes[mistake] = float(f"{max(errors):.2e}")
    worst16 = max(fp16_error.values())
    assert worst16 < TOLERANCE, (spec["name"], "transformers' own fp16 run strays too far", fp16_error)
    hidden = {m: e for m, e in mistakes.items() if visible(m, spec) and e <= 10 * TOLERANCE}
    assert not hidden, (spec["name"], "mistakes that would pass", hidden)
    print(f"{spec['name']:24} fp16 run {worst16:.1e}  nearest mistake", min(
        ((v, k) for k, v in mistakes.items() if visible(k, spec)), default="of none that shows"))  # fmt: skip
    return out, {k: float(f"{v:.4e}") for k, v in fp16_error.items()}, mistakes


def text_rows_digest(weights, ids):
    """sha256 of the text rows of a sequence in order, as fp16 bytes."""
    table = weights["model.tok_embeddings.weight"].float().to(torch.float16)
    rows = table[torch.tensor([i for i in ids if i >= 0], dtype=torch.long)]
    return hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in one order
    model = train_tokenizer()
    (HERE / "tokenizer.model").write_bytes(model)
    tokenizer = reference.Tokenizer(model)
    (HERE / "images").mkdir(exist_ok=True)
    images = {}
    for name, (seed, width, height) in PICTURES.items():
        images[name] = picture(seed, width, height)
        (HERE / "images" / name).write_bytes(reference.png_bytes(images[name]))

    entries, weights_of = [], {}
    for seed, spec in enumerate(CHECKPOINTS, start=1):
        sizes = spec["sizes"] | dict(vocab=VOCAB)
        specs = checkpoint.tensors(**sizes, dtype=spec["dtype"], flavour=spec["flavour"])
        if "mixed" in spec["name"]:
            for t in specs:
                t.dtype = "F32" if len(t.shape) == 1 else "BF16" if "embedding" in t.name else "F16"
        weights = checkpoint.materialise(seed, specs)
        checkpoint.strain(weights, spec["flavour"])
        weights_of[spec["name"]] = weights
        config = checkpoint.config_json(sizes, spec["dtype"])
        directory = HERE / spec["name"]
        if spec["form"] == "bin":
            shutil.rmtree(directory, ignore_errors=True)
            stored = dict(weights)
            if "extras" in spec["flavour"]:
                stored[reference.TOWER + "embeddings.position_ids"] = torch.arange(sizes["grid"] ** 2 + 1)[None]
            checkpoint.write(directory, stored, config, model, "bin", spec["shards"], spec["odd"], absent_llm=True)
            (directory / "tokenizer.model").unlink()  # one for all lies beside
            back = checkpoint.read(directory)
            assert all(torch.equal(back[n], weights[n]) for n in weights if checkpoint.needed(n))
        out, fp16_error, mistakes = golden(spec, weights, images)
        safetensors.torch.save_file(out, HERE / f"{spec['name']}.safetensors")
        entries.append(
            dict(
                name=spec["name"], form=spec["form"], shards=spec["shards"], seed=seed, sizes=sizes, config=config,
                flavour=spec["flavour"], sha256=checkpoint.digest(weights), fp16_error=fp16_error, mistakes=mistakes,
                tensors=[[t.name, t.shape, t.dtype, t.mean, t.std] for t in specs],
            )
        )  # fmt: skip

    plans = []
    layout_model = entries[0]["name"]
    rows = entries[0]["sizes"]["grid"] ** 2
    for case in PROMPTS:
        ids, slots = reference.plan(tokenizer, case, rows)
        digest = text_rows_digest(weights_of[layout_model], ids)
        plans.append(case | dict(input_ids=ids, slots=slots, text_rows_sha256=digest))

    table = [(torch.arange(256).float() / 255 - m) / s for m, s in zip(reference.MEAN, reference.STD)]
    document = dict(
        made_with=dict(python=platform.python_version(), torch=torch.__version__.split("+")[0],
                       transformers=transformers.__version__, numpy=np.__version__, pillow=PIL.__version__,
                       sentencepiece=sentencepiece.__version__),
        tolerance=TOLERANCE,
        default_meta=reference.DEFAULT_META,
        normalise_table=[[float(v) for v in t] for t in table],
        images=list(PICTURES),
        layout_model=layout_model,
        plans=plans,
        checkpoints=entries,
    )  # fmt: skip
    # One line per entry of a list: diffs stay readable and the file small.
    def dump(value):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    lines = []
    for key, value in document.items():
        many = isinstance(value, list) and value and isinstance(value[0], dict)
        lines.append(f"{dump(key)}:" + ("[\n" + ",\n".join(map(dump, value)) + "\n]" if many else dump(value)))
    (HERE / "goldens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

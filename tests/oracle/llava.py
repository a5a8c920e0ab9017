"""Runs the built command on LLaVA-1.5 checkpoints and compares it with transformers' own classes.

    python tests/oracle/llava.py target/release/imagehere [--cases N] [--seed S] [--shared DIR]

Each case draws sizes, dtype and pictures (or photos of DIR/photos) from its seed, and saves a random
`LlavaForConditionalGeneration` with `save_pretrained`; every other one is then renamed as transformers 4 saves it, or as
the modules of 5 are called. It has a Llama tokenizer, trained here, and the processor's files beside it. The case runs
`imagehere preprocess`, `features`, `encode --raw` and `encode`, and demands:

    pixels                           equal, byte for byte, to CLIPImageProcessorPil (resize, centre crop)
    input_ids, slots                 equal to LlavaProcessor's, with -1 for its image tokens
    text rows                        equal, bit for bit
    image rows                       rel-L2 <= 2e-3, every row's cosine >= 0.9999, against get_image_features in f32
    the same, against fp16           rel-L2 <= 1.1 x that of transformers' own fp16 run

transformers' other image processor, which resizes tensors with torchvision, makes other bytes and is not compared.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import heldout
import reference

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{{ message['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CORPUS = ["the red car and the second panda in the picture ; compare them .", "USER: What is this? ASSISTANT: A car.",
          "describe the images : first, second 图片 中文 描述 déjà vu"] * 3  # fmt: skip
NAMES = [None, ("model.", ""), ("", "vision_model."), ("model.", "vision_model.")]


def make_tokenizer(kind):
    """A small Llama: `legacy` puts a space in front of every text between special tokens, `first` of the first alone."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   extra_special_tokens={"image_token": "<image>"}, pad_token="<pad>")  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def draw_sizes(rng):
    width, patch = rng.choice([64, 128, 192]), rng.choice([14, 14, 7, 16])
    return dict(width=width, mlp=rng.choice([2, 4]) * width, blocks=rng.randint(2, 5), patch=patch,
                side=patch * rng.randint(2, 8), hidden=32 * rng.randint(2, 8))  # fmt: skip


def make_model(rng, seed, vocab, directory, sizes=None, dtype=None):
    """Saves a random model; returns it with its weights as fp16 has them, and a word on it."""
    torch.manual_seed(seed)
    sizes = sizes or draw_sizes(rng)
    width, patch = sizes["width"], sizes["patch"]
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=sizes["mlp"], num_hidden_layers=sizes["blocks"], num_attention_heads=width // 64,
        patch_size=patch, image_size=sizes["side"], attn_implementation="eager",
    )  # fmt: skip
    text = LlamaConfig(hidden_size=sizes["hidden"], intermediate_size=64, num_hidden_layers=1,
                       num_attention_heads=4, num_key_value_heads=4, vocab_size=vocab)  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocab - 2))
    model = model.float().eval()
    with torch.no_grad():  # as trained towers are, not as they begin: biases, norms, and logits that differ
        for name, weight in model.named_parameters():
            if "vision_tower" not in name and "projector" not in name:
                continue
            centre, spread = 0.0, 0.05
            if "norm" in name and name.endswith("weight"):
                centre = 1.0
            elif "patch_embedding" in name or (weight.dim() == 2 and "embedding" not in name):
                spread = weight[0].numel() ** -0.5
            elif "embedding" in name:
                spread = 0.3
            weight.copy_(centre + spread * torch.randn_like(weight))
    dtype = dtype or rng.choice([torch.float32, torch.bfloat16, torch.float16])
    model = model.to(dtype)
    model.save_pretrained(directory)
    names = NAMES[seed % 4]
    if names:
        prefix, level = names
        path = directory / "model.safetensors"
        renamed = {}
        for name, tensor in safetensors.torch.load_file(path).items():
            name = name.replace("vision_tower.", f"vision_tower.{level}")
            if prefix and name.startswith("language_model.model."):
                name = name.replace("language_model.model.", "language_model.")
            is_head = name == "language_model.lm_head.weight"
            renamed["lm_head.weight" if prefix and is_head else prefix + name] = tensor
        safetensors.torch.save_file(renamed, path, metadata={"format": "pt"})
    # What fp16 makes of the weights is what both sides compute with.
    rounded = model.half()
    what = f"{width}x{vision.num_hidden_layers} {vision.image_size}/{vision.patch_size} H {text.hidden_size} {str(dtype)[6:]} {names}"
    return rounded, what


def features(model, pixels, dtype):
    with torch.no_grad():
        out = model.to(dtype).get_image_features(pixel_values=torch.from_numpy(pixels).to(dtype))
    rows = out.pooler_output if hasattr(out, "pooler_output") else out
    return torch.stack(list(rows)).float().numpy()


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load_features(path):
    return safetensors.torch.load_file(path)["features"].float().numpy()


def check(rng, seed, binary, directory, photos):
    model_dir = directory / "model"
    kind = rng.choice(["legacy", "first"])
    tokenizer = make_tokenizer(kind)
    model, what = make_model(rng, seed, len(tokenizer), model_dir)
    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    settings = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pil = CLIPImageProcessorPil(**settings)
    processor = LlavaProcessor(pil, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=TEMPLATE)  # fmt: skip
    model.config.image_token_index = processor.image_token_id
    processor.save_pretrained(model_dir)
    if rng.random() < 0.5:  # as the Hub has it
        pil.save_pretrained(model_dir)
    count = rng.randint(1, 3)
    files = [rng.choice(photos) if photos and rng.random() < 0.4 else heldout.draw_picture(rng, directory, i)
             for i in range(count)]  # fmt: skip
    images = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]

    # Pixels
    run([binary, "preprocess", "--model", model_dir, "--out", directory / "seen", "--image", *files])
    seen = [np.asarray(Image.open(directory / "seen" / f"{i:03}.png")) for i in range(count)]
    raw = dict(do_rescale=False, do_normalize=False)
    want = [np.moveaxis(np.asarray(one), 0, -1) for one in pil(images, **raw)["pixel_values"]]
    for got, expected, file in zip(seen, want, files):
        assert np.array_equal(got, expected), f"{file}: {np.sum(got != expected)} of {got.size} bytes differ"

    # Features
    pixels = np.stack(pil(images)["pixel_values"]).astype(np.float32)
    fp16 = features(model, pixels, torch.float16)
    full = features(model, pixels, torch.float32)
    run([binary, "features", "--model", model_dir, "--out", directory / "f.safetensors", "--image", *files, "--device", "cpu"])
    got = load_features(directory / "f.safetensors")
    assert got.shape == full.shape, (got.shape, full.shape)

    # Sequences
    table = model.float().get_input_embeddings().weight.detach().half().numpy()
    mark = processor.image_token
    words = lambda: " ".join(rng.choices(["the", "panda", "图片", "what?", "\n", "déjà", "x", " "], k=rng.randint(1, 5)))  # noqa: E731
    query = rng.choice(["", " ", words()]) + "".join(f"{mark}{rng.choice(['', chr(10), ' ', words()])}" for _ in range(count)) + words()
    history = [(words(), words())] * rng.randint(0, 2)
    messages = [dict(role=role, content=text) for pair in history for role, text in zip(("user", "assistant"), pair)]
    messages.append(dict(role="user", content=query))
    (directory / "h.json").write_text(json.dumps(history))
    cases = [(query, ["--raw"]), (processor.apply_chat_template(messages, add_generation_prompt=True), ["--history", directory / "h.json"])]
    for text, options in cases:
        out = directory / "s.safetensors"
        (directory / "q.txt").write_text(query)
        run([binary, "encode", "--model", model_dir, "--out", out, "--image", *files, "--prompt-file", directory / "q.txt",
             "--device", "cpu", *options])  # fmt: skip
        made = safetensors.torch.load_file(out)
        ids = np.asarray(processor(text=text, images=images)["input_ids"]).ravel()
        inside = ids == processor.image_token_id
        mine = made["input_ids"].numpy().ravel()
        expected = np.where(inside, -1, ids)
        assert np.array_equal(mine, expected), f"{kind} {text!r}\n{mine[mine >= 0]}\n{expected[expected >= 0]}"
        rows = made["inputs_embeds"].numpy().reshape(len(ids), -1)
        assert np.array_equal(rows[~inside].view(np.uint16), table[ids[~inside]].view(np.uint16)), "text rows differ"
        assert np.array_equal(rows[inside].astype(np.float32), got.reshape(-1, got.shape[-1])), "rows are not the features"
    flat = lambda rows: torch.from_numpy(rows.reshape(-1, rows.shape[-1]))  # noqa: E731
    return f"{what} {kind}", count, reference.rel_l2(flat(got), flat(full)), reference.worst_cosine(flat(got), flat(full)), \
        reference.rel_l2(flat(fp16), flat(full))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--seed", type=int, default=int(time.time()) // 60 * 1000, help="of the first case (default: the clock)")
    parser.add_argument("--shared", type=pathlib.Path, default=heldout.ROOT.parent / "shared/data")
    args = parser.parse_args()
    photos, failures = sorted((args.shared / "photos").glob("*")), []
    print(f"{'seed':>12}  {'checkpoint':66} {'images':>6} {'rel-L2':>8} {'fp16 run':>8} {'ratio':>5} {'cosine':>9}")
    for seed in range(args.seed, args.seed + args.cases):
        with tempfile.TemporaryDirectory() as temp:
            try:
                what, count, error, cosine, fp16 = check(random.Random(seed), seed, args.binary, pathlib.Path(temp), photos)
            except AssertionError as e:
                failures.append(seed)
                print(f"{seed:12}  FAIL\n{e}", flush=True)
                continue
            ok = error <= heldout.AGAINST_FP16 * fp16 and error <= heldout.REL_L2 and cosine >= heldout.COSINE
            print(f"{seed:12}  {what[:66]:66} {count:6} {error:8.2e} {fp16:8.2e} {error / fp16:5.2f} {cosine:9.7f}"
                  f"{'' if ok else '  FAIL'}", flush=True)  # fmt: skip
            if not ok:
                failures.append(seed)
    print(f"{args.cases - len(failures)} of {args.cases} cases pass" + (f"; failed seeds: {failures}" if failures else ""))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

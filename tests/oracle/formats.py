"""Runs `imagehere encode --format` and `features --format` for every engine's format, and lets the readers that these
engines use load what was written: NumPy, torch, json, base64, safetensors, pyarrow.

    python tests/oracle/formats.py target/release/imagehere [--cases N] [--seed S] [--shared DIR]

Each case draws a checkpoint as heldout.py does, pictures (or photos of DIR/photos) and a prompt, and demands of every
format the values of `--format safetensors`, bit for bit:

    vllm-image-embeds    the body's texts and images are the prompt's, in order; each image goes through what vLLM does with
                         it: strict base64, np.load(allow_pickle=False), a tensor [P, H]
    vllm-prompt-embeds   torch.load(weights_only=True), with and without mmap, from a file and from memory
    vllm-completion      strict base64 of the same file
    lmdeploy             torch.load(weights_only=True) gives input_ids, and of each image its rows and where they stand; these
                         go through what TurboMind does with them
    sglang               torch.load(weights_only=True) gives input_ids and one precomputed_embedding; its rows, shared out
                         by its offsets, and among the runs of the image token as SGLang finds these, are the images'
    vllm-encoder-cache   safetensors.torch.load_file of the file that the connector looks for
    parquet              pyarrow.parquet.read_table: names, digests, sizes, a list<halffloat> for each image; once also of
                         more images than a row group takes

Prints a line for each case; exits 1 if one fails.
"""

import argparse
import base64
import io
import itertools
import json
import pathlib
import random
import sys
import tempfile
import time

import numpy as np
import pyarrow.parquet
import safetensors.torch
import torch

import heldout

MARKER = "<ImageHere>"


def same(got, want, what):
    """Equal bits, of equal dtype and shape."""
    assert got.dtype == want.dtype and got.shape == want.shape, (what, got.dtype, got.shape, want.dtype, want.shape)
    assert got.contiguous().numpy().tobytes() == want.contiguous().numpy().tobytes(), f"{what} differs"


def strict(text):
    return base64.b64decode(text, validate=True)


def load(source, **more):
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.load(source, weights_only=True, **more)


class Case:
    """A model, pictures, a prompt, and what `--format safetensors` makes of them."""

    def __init__(self, binary, seed, directory, photos):
        rng = random.Random(seed)
        self.binary, self.directory, self.model = binary, directory, directory / "model"
        self.what = heldout.draw_checkpoint(rng, seed, binary, self.model, heldout.SMALL_TOKENIZER, [])
        draw = lambda i: rng.choice(photos) if photos and rng.random() < 0.3 else heldout.draw_picture(rng, directory, i)
        self.pictures = [draw(i) for i in range(rng.randint(1, 4))]
        self.images = [self.pictures[0], *rng.choices(self.pictures, k=rng.randint(0, 3))]
        between = lambda: " ".join(rng.choices(heldout.WORDS, k=rng.randint(0, 3)))
        markers = len(self.images)
        in_history = rng.randint(0, markers) if rng.random() < 0.3 else 0
        text = lambda count: MARKER.join(between() for _ in range(count + 1))
        self.query = text(markers - in_history)
        self.history = [[text(in_history), "Yes."]] if in_history else []
        self.meta = rng.choice([None, "", "Be brief."])
        (directory / "prompt.txt").write_bytes(self.query.encode())
        (directory / "history.json").write_text(json.dumps(self.history))
        path = directory / "sequence.safetensors"
        self.encode("safetensors", path)
        self.tensors = safetensors.torch.load_file(path)
        self.rows = self.tensors["inputs_embeds"][0]
        self.slots = self.tensors["slots"].tolist()
        self.features = [self.rows[begin:end] for begin, end in self.slots]

    def encode(self, form, out, *more):
        meta = [] if self.meta is None else ["--meta-instruction", self.meta] if self.meta else ["--no-meta"]
        words = ["--prompt-file", self.directory / "prompt.txt", "--history", self.directory / "history.json", *meta]
        words += ["--max-length", 100000, "--image", *self.images, "--device", "cpu", "--format", form, "--out", out]
        report = json.loads(heldout.run([self.binary, "encode", "--model", self.model, "--json", *words, *more]))
        assert report["format"] == form, report["format"]
        return out


def check_image_embeds(case):
    body = json.loads(case.encode("vllm-image-embeds", case.directory / "chat.json").read_text())
    messages = body["messages"]
    roles = [message["role"] for message in messages if message["role"] != "system"]
    assert roles == ["user", "assistant"] * len(case.history) + ["user"], roles
    texts = [text for turn in case.history for text in turn] + [case.query]
    images = iter(case.features)
    for message, text in zip([m for m in messages if m["role"] != "system"], texts, strict=True):
        parts = message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": message["content"]}]
        spelt = "".join(MARKER if part["type"] == "image_embeds" else part["text"] for part in parts)
        assert spelt == text, (spelt, text)
        for part in parts:
            if part["type"] == "image_embeds":
                file = strict(part["image_embeds"])
                assert file[:6] == b"\x93NUMPY"
                same(torch.from_numpy(np.load(io.BytesIO(file), allow_pickle=False)), next(images), "image_embeds")
    assert next(images, None) is None
    system = [m["content"] for m in messages if m["role"] == "system"]
    assert (system == [] if case.meta == "" else system == [case.meta] if case.meta else len(system) == 1), system


def check_prompt_embeds(case):
    path = case.encode("vllm-prompt-embeds", case.directory / "prompt.pt")
    same(load(path), case.rows, "prompt_embeds")
    same(load(path, mmap=True), case.rows, "prompt_embeds, mapped")
    same(load(io.BytesIO(path.read_bytes()), map_location=torch.device("cpu")), case.rows, "prompt_embeds, in memory")
    # What torch makes of the same tensor is read back to the same by the same reader.
    torch.save(case.rows.clone(), case.directory / "torch.pt")
    same(load(path), load(case.directory / "torch.pt"), "prompt_embeds")
    body = json.loads(case.encode("vllm-completion", case.directory / "completion.json").read_text())
    assert strict(body["prompt_embeds"]) == path.read_bytes()


def check_lmdeploy(case):
    arguments = load(case.encode("lmdeploy", case.directory / "lmdeploy.pt"))
    ids = case.tensors["input_ids"][0]
    assert arguments["input_ids"] == torch.where(ids < 0, 0, ids).tolist()
    assert torch.IntTensor(arguments["input_ids"]).shape == ids.shape
    assert arguments["input_embedding_ranges"] == case.slots
    assert torch.IntTensor(arguments["input_embedding_ranges"]).reshape(-1, 2).tolist() == case.slots
    for got, want in zip(arguments["input_embeddings"], case.features, strict=True):
        same(got, want, "input_embeddings")
    same(torch.cat([e.to(torch.float16) for e in arguments["input_embeddings"]]), torch.cat(case.features), "embeddings")
    mapped = load(case.directory / "lmdeploy.pt", mmap=True)
    same(torch.cat(mapped["input_embeddings"]), torch.cat(case.features), "input_embeddings, mapped")


def check_sglang(case):
    token = 1_000_000
    arguments = load(case.encode("sglang", case.directory / "sglang.pt", "--image-token", token))
    ids = case.tensors["input_ids"][0]
    assert arguments["input_ids"] == torch.where(ids < 0, token, ids).tolist()
    (item,) = arguments["image_data"]
    assert sorted(item) == ["feature", "format", "offsets"] and item["format"] == "precomputed_embedding"
    same(item["feature"], torch.cat(case.features), "feature")
    assert item["offsets"] == [(begin, end - 1) for begin, end in case.slots]
    same(item["feature"], torch.cat([case.rows[first : last + 1] for first, last in item["offsets"]]), "feature by offsets")
    # Without offsets, SGLang shares the rows out among the runs of the token: of images side by side there is one.
    runs, at = [], 0
    for is_image, run in itertools.groupby(arguments["input_ids"], lambda id: id == token):
        length = len(list(run))
        runs += [case.rows[at : at + length]] * is_image
        at += length
    assert len(runs) <= len(case.images)
    same(item["feature"], torch.cat(runs), "feature by runs")


def features(case, form, out):
    words = ["--image", *case.images, "--device", "cpu", "--format", form, "--out", out]
    return json.loads(heldout.run([case.binary, "features", "--model", case.model, "--json", *words]))


def check_encoder_cache(case):
    place = case.directory / "cache"
    report = features(case, "vllm-encoder-cache", place)
    for image, want in zip(report["images"], case.features, strict=True):
        file = place / image["uuid"] / "encoder_cache.safetensors"
        same(safetensors.torch.load_file(file)["ec_cache"], want, "ec_cache")
    assert {path.name for path in place.iterdir()} == {image["uuid"] for image in report["images"]}


def check_parquet(case):
    path = case.directory / "features.parquet"
    report = features(case, "parquet", path)
    table = pyarrow.parquet.read_table(path)
    table.validate(full=True)
    types = dict(name=pyarrow.string(), pixels=pyarrow.string(), checkpoint=pyarrow.string(), rows=pyarrow.int64(),
                 hidden=pyarrow.int64())  # fmt: skip
    assert table.schema.names == [*types, "features"] and not any(field.nullable for field in table.schema)
    assert all(table.schema.field(name).type == kind for name, kind in types.items()), table.schema
    assert pyarrow.types.is_list(table.schema.field("features").type), table.schema
    assert table.schema.field("features").type.value_type == pyarrow.float16(), table.schema
    rows, hidden = case.features[0].shape
    assert table["name"].to_pylist() == [image["name"] for image in report["images"]] == [str(i) for i in case.images]
    assert table["pixels"].to_pylist() == [image["pixels"] for image in report["images"]]
    assert set(table["checkpoint"].to_pylist()) == {report["fingerprint"]}
    assert set(table["rows"].to_pylist()) == {rows} and set(table["hidden"].to_pylist()) == {hidden}
    for got, want in zip(table["features"], case.features, strict=True):
        array = got.values.to_numpy(zero_copy_only=True).reshape(rows, hidden)
        same(torch.from_numpy(array.copy()), want, "features")
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert json.loads(metadata["preprocessing"]) == report["preprocessing"], metadata
    # A column by itself, a row group by itself, batches: other ways through the reader.
    file = pyarrow.parquet.ParquetFile(path)
    assert file.read(["rows"]).num_rows == file.metadata.num_rows == len(case.images)
    batches = pyarrow.concat_arrays([b.column(0).flatten() for b in file.iter_batches(batch_size=1, columns=["features"])])
    assert batches.to_numpy().tobytes() == torch.cat(case.features).numpy().tobytes(), "features by batches differ"


def check_many_groups(binary):
    """A table beyond one row group: 11 000 images, 141 MB."""
    with tempfile.TemporaryDirectory() as temp:
        directory = pathlib.Path(temp)
        heldout.run([binary, "synth", "tiny", "--out", directory / "model"])
        images = [heldout.draw_picture(random.Random(seed), directory, seed) for seed in range(2)]
        words = [binary, "features", "--model", directory / "model", "--device", "cpu", "--format"]
        heldout.run([*words, "parquet", "--out", directory / "t", "--image", *images * 5500])
        heldout.run([*words, "safetensors", "--out", directory / "s", "--image", *images])
        want = safetensors.torch.load_file(directory / "s")["features"].reshape(2, -1).numpy().view(np.uint16)
        table = pyarrow.parquet.read_table(directory / "t")
        groups = pyarrow.parquet.ParquetFile(directory / "t").metadata.num_row_groups
        assert groups == 2 and table.num_rows == 11000, (groups, table.num_rows)
        assert table["name"].to_pylist() == [str(image) for image in images] * 5500
        for i, row in enumerate(table["features"]):
            assert np.array_equal(row.values.to_numpy().view(np.uint16), want[i % 2]), f"row {i} differs"


CHECKS = [check_image_embeds, check_prompt_embeds, check_lmdeploy, check_sglang, check_encoder_cache, check_parquet]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--seed", type=int, default=int(time.time()) // 60 * 1000, help="of the first case (default: the clock)")
    parser.add_argument("--shared", type=pathlib.Path, default=heldout.ROOT.parent / "shared/data")
    args = parser.parse_args()
    photos = sorted((args.shared / "photos").glob("*"))
    failures = []
    print(f"torch {torch.__version__}, numpy {np.__version__}, safetensors {safetensors.__version__}, pyarrow {pyarrow.__version__}")
    check_many_groups(args.binary)
    for seed in range(args.seed, args.seed + args.cases):
        with tempfile.TemporaryDirectory() as temp:
            try:
                case = Case(args.binary, seed, pathlib.Path(temp), photos)
                for check in CHECKS:
                    check(case)
                print(f"{seed:12}  {len(case.images)} images, L {len(case.rows)}, {case.what}", flush=True)
            except Exception as e:  # whatever another library says of a file
                failures.append(seed)
                print(f"{seed:12}  FAIL {type(e).__name__}: {e}", flush=True)
    print(f"{args.cases - len(failures)} of {args.cases} cases pass" + (f"; failed seeds: {failures}" if failures else ""))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

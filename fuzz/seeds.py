"""Writes the first files of tests/hostile/: small inputs that each target takes or nearly takes, for a fuzzer to start from.

    python3 fuzz/seeds.py        # from the root of the checkout; files that are there are written anew

What a fuzzer found lies beside them, under names of its own.
"""

import hashlib
import io
import json
import pathlib
import struct
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOST = 4096  # bytes of a file


def put(target, name, data):
    data = data.encode() if isinstance(data, str) else data
    assert len(data) < MOST, (target, name, len(data))
    (ROOT / "tests/hostile" / target / f"seed-{name}").write_bytes(data)


# ---- pickles -------------------------------------------------------------------------------------------------------

def text(s):
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def ints(*sizes):
    return b"(" + b"".join(b"K" + bytes([n]) for n in sizes) + b"t"


def tensor(storage, kind, elements, shape, strides, v3=None):
    rebuild = b"_rebuild_tensor_v3" if v3 else b"_rebuild_tensor_v2"
    holder = b"ctorch.storage\nUntypedStorage\n" if v3 else b"ctorch\n" + kind + b"\n"
    out = b"ctorch._utils\n" + rebuild + b"\n((" + text("storage") + holder + text(storage) + text("cpu")
    out += b"K" + bytes([elements]) + b"tQK\0" + ints(*shape) + ints(*strides) + b"\x89ccollections\nOrderedDict\n)R"
    return out + (b"ctorch\n" + v3 + b"\n" if v3 else b"") + b"tR"


def state_dict(*tensors):
    out = b"\x80\x02ccollections\nOrderedDict\n)Rq\0("
    out += b"".join(text(name) + body for name, body in tensors) + b"u}" + text("_metadata")
    return out + b"ccollections\nOrderedDict\n)R" + text("") + b"}" + text("version") + b"K\x01sssb."


half = tensor("0", b"HalfStorage", 6, (2, 3), (3, 1))
turned = tensor("1", b"BFloat16Storage", 6, (2, 3), (1, 2))
fp8 = tensor("2", b"", 6, (2, 3), (3, 1), v3=b"float8_e4m3fn")
whole = state_dict(("a", half), ("b.weight", turned))
put("pickle", "two-tensors", whole)
put("pickle", "v3", state_dict(("w", fp8)))
put("pickle", "nested", b"\x80\x02}(" + text("epoch") + b"J\x70\x11\1\0" + text("model") + b"}" + text("w") + half + b"u.")
put("pickle", "protocol-4", b"\x80\x04\x95\x20\0\0\0\0\0\0\0}\x94\x8c\x01a\x94\x8c\x0ccollections\x94\x8c\x0bOrderedDict\x94\x93)Rs.")
put("pickle", "system", b"\x80\x02cos\nsystem\n(" + text("true") + b"tR.")
put("pickle", "holds-itself", b"}q\0X\1\0\0\0ah\0s.")
put("pickle", "laughs", b")q\0" + b"h\0h\0\x86q\0" * 400 + b".")
put("pickle", "marks", b"(" * 4000)
put("pickle", "parameter", b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_parameter\n" + half + b"\x88ccollections\nOrderedDict\n)R\x87Rs.")
put("pickle", "long-string", b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff")


# ---- archives ------------------------------------------------------------------------------------------------------

def archive(pickle, storages, order=b"little", method=zipfile.ZIP_STORED, wide=False):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        entries = [("data.pkl", pickle), ("byteorder", order)] + [(f"data/{k}", v) for k, v in storages.items()]
        for name, data in entries:
            with file.open(zipfile.ZipInfo("m/" + name), "w", force_zip64=wide) as entry:
                entry.write(data)
    return out.getvalue()


storages = {"0": struct.pack("<6e", 1, -2, 3, 0.1, 6e-8, 65504), "1": bytes(range(12))}
put("torch_zip", "two-tensors", archive(whole, storages))
put("torch_zip", "wide", archive(whole, storages, wide=True))
put("torch_zip", "big-endian", archive(whole, storages, order=b"big"))
put("torch_zip", "short-storage", archive(whole, {"0": bytes(11), "1": bytes(12)}))
put("torch_zip", "expanded", archive(state_dict(("a", tensor("0", b"FloatStorage", 1, (255, 255, 255, 255), (0, 0, 0, 0)))), {"0": bytes(4)}))
put("torch_zip", "quantised", archive(state_dict(("w", fp8)), {"2": bytes(6)}))
put("torch_zip", "empty-archive", b"PK\5\6" + bytes(18))
end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 0, 0, 0, 2**64 - 1) + struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1)
put("torch_zip", "wide-end", end64 + b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2))


# ---- safetensors ---------------------------------------------------------------------------------------------------

def safetensors(header, data=b""):
    header = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def line(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


put("safetensors", "three", safetensors({"__metadata__": {"format": "pt"}, "a": line("F16", [2, 3], 0, 12), "b": line("F32", [], 12, 16), "c": line("BF16", [0, 7], 16, 16)}, bytes(range(16))))
put("safetensors", "overlap", safetensors({"a": line("U8", [4], 0, 4), "b": line("U8", [4], 3, 7)}, bytes(7)))
put("safetensors", "twice", safetensors('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}', bytes(4)))
put("safetensors", "overflow", safetensors({"a": line("F64", [2**32, 2**32], 0, 2**64 - 1)}, bytes(4)))
put("safetensors", "infinite", safetensors({"a": line("F32", [3], 0, 12)}, struct.pack("<3f", float("inf"), float("nan"), 1e38)))
put("safetensors", "deep", safetensors("[" * 4000))
put("safetensors", "long-header", struct.pack("<Q", 99_999_999) + b"{")
put("safetensors", "half-byte", safetensors({"a": line("F4", [3], 0, 2), "b": line("F8_E8M0", [1], 2, 3)}, bytes(3)))

# ---- small JSON ----------------------------------------------------------------------------------------------------

put("index", "two-shards", json.dumps({"metadata": {"total_size": 9}, "weight_map": {"a": "m-1.bin", "b": "m-2.bin"}}))
put("index", "outside", json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
put("index", "windows", json.dumps({"weight_map": {"a": "C:x.bin", "b": "a\\b", "c": "nul\0"}}))
put("index", "deep", '{"weight_map":' + "[" * 3000)
put("index", "wrong-types", json.dumps({"weight_map": {"a": 1, "b": None}}))

sizes = {"img_size": 28, "hidden_size": 96, "vocab_size": 512, "max_length": 4096, "max_position_embeddings": 32768}
put("config", "small", json.dumps(sizes))
put("config", "others", json.dumps({**sizes, "torch_dtype": "bfloat16", "num_attention_heads": 2, "architectures": ["X"]}))
put("config", "wrong-size", json.dumps({**sizes, "img_size": 29}))
put("config", "absurd", json.dumps({**sizes, "max_length": 2**64 - 1, "vocab_size": 1}))
put("config", "no-number", '{"img_size": -1, "hidden_size": 1e400, "vocab_size": 512.0, "max_length": "4096"}')
put("config", "quantised", json.dumps({**sizes, "quantization_config": {"quant_method": "\u001b[31mgptq"}}))
put("config", "deep", '{"a":' * 800)

# ---- tokenizers ----------------------------------------------------------------------------------------------------


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(field, body):
    return varint(field << 3 | 2) + varint(len(body)) + body


def piece(s, score=None, kind=None):
    body = message(1, s if isinstance(s, bytes) else s.encode())
    body += b"" if score is None else b"\x15" + struct.pack("<f", score)
    return message(1, body + (b"" if kind is None else b"\x18" + varint(kind)))


settings = message(2, b"\x18\2" + varint(35 << 3) + b"\1") + message(3, message(1, b"identity") + b"\x18\0\x20\0\x28\1")
needed = piece("<unk>", kind=2) + piece("<s>", kind=3) + piece("</s>", kind=3)
needed += b"".join(piece(f"<0x{b:02X}>", kind=6) for b in range(256)) + settings
put("tokenizer_model", "smallest", needed)
# What the target puts behind the pieces of the one above.
merged = b"".join(piece(s, -i) for i, s in enumerate(["e", "r", "s", "u", "\u2581", "se", "er", "us", "user", "\u2581us"]))
put("tokenizer_model", "merges", merged + piece("[UNUSED_TOKEN_145]", 0, 4) + piece("\u56fe\u7247", 0, 4))
put("tokenizer_model", "ties", b"".join(piece(s, 0.0) for s in ["a", "b", "ab", "ba", "aa", "aba"]))
put("tokenizer_model", "nul", piece("\0", -1.0) + piece("a", -2.0) + piece("\0a", -3.0))
put("tokenizer_model", "unknown-character", piece("a", 0.0) + piece("ab", 1.0))
put("tokenizer_model", "not-a-number", piece("a", float("nan")))
put("tokenizer_model", "infinite", piece("a", float("inf")) + piece("b", float("-inf")) + piece("ab", float("inf")))
put("tokenizer_model", "long-piece", piece("a", 0.0) + piece("a" * 512, 1.0) + piece("a" * 256, 2.0) + piece("a" * 128, 3.0))
put("tokenizer_model", "unused", piece("a", 0.0, 5))
put("tokenizer_model", "cut", b"\x0a\xff\xff\xff\xff\x0f")

tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u2581"]
base = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i, t in enumerate(tokens[:3])],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": {t: i for i, t in enumerate(tokens)}, "merges": ["a b"]},
}
put("tokenizer_json", "small", json.dumps(base))
put("tokenizer_json", "far-id", json.dumps({**base, "added_tokens": base["added_tokens"] + [{**base["added_tokens"][0], "id": 2**32 - 1, "content": "far"}]}))
put("tokenizer_json", "word-level", json.dumps({**base, "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "<s>"}}))
put("tokenizer_json", "unigram", json.dumps({**base, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.0]], "byte_fallback": True}}))
put("tokenizer_json", "wordpiece", json.dumps({**base, "model": {"type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"<s>": 0, "a": 1}}}))
put("tokenizer_json", "no-bos", json.dumps({**base, "added_tokens": []}))
put("tokenizer_json", "split", json.dumps({**base, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}}))

# ---- prompts -------------------------------------------------------------------------------------------------------

MARK = "<ImageHere>"


def plan(flags, size, surplus, limit, cut, turns, *texts):
    return struct.pack("<BBbHHB", flags, size, surplus, limit, cut, turns) + "\x1f".join(texts).encode()


put("plan", "two-images", plan(0, 3, 0, 0, 0, 0, f"First:{MARK}, second:{MARK}. What?"))
put("plan", "history", plan(0xE0, 3, 0, 40, 4095, 2, f"{MARK}Compare", f"meta {MARK}", f"{MARK} earlier", "answer [UNUSED_TOKEN_145]"))
put("plan", "raw", plan(0x01, 1, 0, 0, 0, 1, f"<s>{MARK}{MARK}[UNUSED_TOKEN_146]user\n<ImageHere"))
put("plan", "too-few", plan(0, 0, -1, 0, 0, 1, f"Image 1: {MARK}; {MARK}"))
put("plan", "too-many", plan(0x20, 0, 100, 0, 0, 1, f"<Image{MARK}Here>"))
put("plan", "cut", plan(0x49, 3, 0, 0, 30, 1, f"some text {MARK} and {MARK}"))
put("plan", "limit", plan(0x11, 4, 0, 60, 0, 1, f"{MARK}" * 30))
put("plan", "ids", plan(0, 2, 0, 0, 0, 1, "\0\1\2\0\0\xaa"))
put("plan", "enormous", plan(0x01, 7, 0, 0, 0, 1, MARK * 8))
put("plan", "enormous-cut", plan(0x49, 7, 0, 0, 65535, 1, MARK * 8))
put("plan", "large", plan(0x01, 6, 0, 0, 0, 1, MARK))

# ---- images: the smallest of tests/goldens/image -------------------------------------------------------------------

IMAGES = """420.jpg arithmetic.jpg cmyk.jpg cut_progressive.jpg cut_restarts.jpg column.jpg exif_6.jpg grey_1.png
grey_16_interlaced.png exif_8_late.png animated.gif few_codes.gif cut.gif core_8.bmp bilevel.bmp cut.bmp bits_reversed.tiff
cut_deflate.tiff deflate_predicted.tiff grey_12.tiff cut_lossless.webp cut_lossy.webp animated.webp exif_6.webp
animated.png""".split()
for name in IMAGES:
    data = (ROOT / "tests/goldens/image" / name).read_bytes()
    if len(data) < MOST:
        put("image", name, data)
put("image", "huge.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xea\x60\0\0\xea\x60\x08\2\0\0\0\x3f\xcf\xa9\xb5")
put("image", "huge.gif", b"GIF89a\x60\xea\x60\xea\xf0\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x60\xea\x60\xea\0\2\2\x44\1\0;")
put("image", "page.html", "<!DOCTYPE html><title>404</title>")

# ---- features ------------------------------------------------------------------------------------------------------


def sha256_of(parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part.encode())) + part.encode())
    return digest.hexdigest()


def features(shape, data, change=None, **more):
    images, patches, hidden = shape
    each = 2 * patches * hidden
    rows = [hashlib.sha256(data[i * each:(i + 1) * each]).hexdigest() for i in range(images)]
    note = {"name": "a.png", "pixels": "0" * 64, "warnings": [{"kind": "alpha_dropped", "message": "image 0 (a.png) is clear"}]}
    metadata = {
        "format": "pt", "format_version": "1", "kind": "imagehere features", "version": "imagehere 0.1.0",
        "rows": json.dumps(rows), "checkpoint": "c" * 64, "preprocessing": json.dumps({"exif": "apply"}),
        "numerics": "cpu (portable)", "images": json.dumps([note] * images), "warnings": "[]", **more,
    }
    flat = [str(shape)] + [part for key in sorted(metadata) for part in (key, metadata[key])]
    metadata["digest"] = sha256_of(flat)
    header = {"__metadata__": metadata, "features": line("F16", shape, 0, len(data))}
    if change:
        change(header)
    return safetensors(header, data)


six = struct.pack("<12e", *range(12))
put("features", "two-images", features([2, 2, 3], six))
put("features", "infinite", features([1, 1, 2], struct.pack("<2e", float("inf"), 0)))
put("features", "other-version", features([1, 2, 3], six[:12], format_version="2"))
put("features", "cached", features([1, 2, 3], six[:12], kind="imagehere cached features"))
put("features", "many", features([4, 1, 1], six[:8], images="[]"))
put("features", "absurd-shape", features([1, 2, 3], six[:12], lambda h: h["features"].update(shape=[2**62, 2**62, 4])))
put("features", "a-model", safetensors({"a": line("F16", [1], 0, 2)}, bytes(2)))
put("features", "long-header", struct.pack("<Q", 8 << 20) + b"{")

# ---- requests ------------------------------------------------------------------------------------------------------

images = {"before": "a.jpg", "after": "sub/b.png"}
both = [{"name": "change", "prompt": f"{MARK} {MARK}What?", "images": ["before", "after"]},
        {"prompt": f"{MARK}It", "images": ["before"], "meta_instruction": None, "history": [["q", "a"]], "raw": False, "bos": "first"}]
put("request", "both", json.dumps({"images": images, "sequences": both}))
put("request", "no-images", json.dumps({"sequences": [{"prompt": "a", "raw": True, "bos": "per-segment"}]}))
put("request", "same-file", json.dumps({"sequences": [{"name": "A", "prompt": ""}, {"name": "a", "prompt": ""}]}))
put("request", "number-taken", json.dumps({"sequences": [{"name": "001", "prompt": ""}, {"prompt": ""}]}))
put("request", "outside", json.dumps({"sequences": [{"name": "../x", "prompt": ""}]}))
put("request", "twice", '{"images": {"a": "b", "a": "c"}, "sequences": []}')
put("request", "array", json.dumps([{}, [["n", "p"]]]))
put("request", "deep", '{"sequences": [' + '{"history": [' * 200)
put("request", "many", json.dumps({"sequences": [{"prompt": ""}] * 201}))

"""What goes in: images in every form, prompts, plans, features. What comes out is the same whichever way."""

import pathlib

import pytest

import imagehere
from conftest import SIDES, bmp, pixels

PROMPT = "First:<ImageHere>, second:<ImageHere>, third:<ImageHere>. What changed?"


def rows(sequence):
    """All rows, as bytes."""
    return memoryview(sequence.inputs_embeds).tobytes()


@pytest.fixture(scope="module")
def expected(encoder, files):
    sequence = encoder.encode(PROMPT, files)
    assert sequence.report["images_encoded"] == 3
    return rows(sequence)


def test_a_sequence_is_laid_out_as_planned(encoder, files):
    plan = encoder.plan(PROMPT, 3)
    sequence = encoder.encode(plan, files)
    assert len(sequence) == len(plan) == sequence.inputs_embeds.shape[1]
    assert sequence.slots == plan.slots and len(plan.slots) == 3
    ids, mask = memoryview(sequence.input_ids).tolist()[0], memoryview(sequence.im_mask).tolist()[0]
    inside = [any(offset <= i < offset + n for offset, n in plan.slots) for i in range(len(plan))]
    assert mask == inside and [id == -1 for id in ids] == inside
    assert [image for _, _, image, _ in plan.segments if image is not None] == [0, 1, 2]
    assert sum(n for _, n, _, _ in plan.segments) == len(plan)
    assert len(sequence.norms) == 3 and all(norm > 0 for norm in sequence.norms)
    assert encoder.encode(plan, files, verify=False).norms is None


def test_paths(encoder, files, expected, tmp_path):
    paths = [tmp_path / f"{i}.bmp" for i in range(3)]
    for path, file in zip(paths, files):
        path.write_bytes(file)
    assert rows(encoder.encode(PROMPT, paths)) == expected
    assert rows(encoder.encode(PROMPT, [str(path) for path in paths])) == expected
    assert rows(encoder.encode(PROMPT, iter(paths))) == expected


def test_bytes_like(encoder, files, expected):
    mixed = [files[0], bytearray(files[1]), memoryview(files[2])]
    assert rows(encoder.encode(PROMPT, mixed)) == expected


def test_arrays_in_any_layout(encoder, expected):
    numpy = pytest.importorskip("numpy")
    arrays = [
        numpy.frombuffer(pixels(seed, *side), "uint8").reshape(side[1], side[0], 3) for seed, side in enumerate(SIDES)
    ]
    assert rows(encoder.encode(PROMPT, arrays)) == expected
    padded = [numpy.zeros((a.shape[0], a.shape[1] + 5, 3), "uint8") for a in arrays]
    for p, a in zip(padded, arrays):
        p[:, : a.shape[1]] = a
    views = [p[:, : a.shape[1]] for p, a in zip(padded, arrays)]
    assert rows(encoder.encode(PROMPT, views)) == expected
    # Colours in reverse, columns in reverse, channels first: read by their strides.
    turned = [
        arrays[0][..., ::-1].copy()[..., ::-1],
        arrays[1][:, ::-1].copy()[:, ::-1],
        arrays[2].transpose(2, 0, 1).copy().transpose(1, 2, 0),
    ]
    assert rows(encoder.encode(PROMPT, turned)) == expected
    upside_down = [arrays[0][::-1].copy()[::-1], *arrays[1:]]
    assert rows(encoder.encode(PROMPT, upside_down)) == expected


def test_pil_images(encoder, expected):
    image = pytest.importorskip("PIL.Image")
    pictures = [image.frombytes("RGB", side, pixels(seed, *side)) for seed, side in enumerate(SIDES)]
    assert rows(encoder.encode(PROMPT, pictures)) == expected
    grey = image.new("L", (9, 9), 77)
    same = image.new("RGB", (9, 9), (77, 77, 77))
    assert rows(encoder.encode("<ImageHere>", grey)) == rows(encoder.encode("<ImageHere>", [same]))


def test_one_image_needs_no_list(encoder, files, tmp_path):
    alone = rows(encoder.encode("<ImageHere>", [files[0]]))
    assert rows(encoder.encode("<ImageHere>", files[0])) == alone
    path = tmp_path / "a.bmp"
    path.write_bytes(files[0])
    assert rows(encoder.encode("<ImageHere>", str(path))) == rows(encoder.encode("<ImageHere>", path)) == alone


def test_text_alone(encoder):
    assert encoder.encode("Hello").slots == []


def test_staged_use_encodes_nothing_twice(encoder, files, expected):
    features = encoder.features(files)
    assert [len(f) for f in features] == [encoder.config["patches"]] * 3
    assert features[0].rows.shape == (encoder.config["patches"], encoder.config["hidden_size"])
    each = [encoder.encode("<ImageHere>What is it?", f) for f in features]
    together = encoder.encode(PROMPT, features)
    assert rows(together) == expected
    assert [s.report["images_encoded"] for s in [*each, together]] == [0, 0, 0, 0]
    offset, count = each[1].slots[0]
    width = 2 * encoder.config["hidden_size"]
    assert rows(each[1])[offset * width : (offset + count) * width] == memoryview(features[1].rows).tobytes()
    # Some encoded before, some not.
    mixed = encoder.encode(PROMPT, [features[0], files[1], features[2]])
    assert rows(mixed) == expected and mixed.report["images_encoded"] == 1


def test_features_files(encoder, files, expected, tmp_path):
    path = tmp_path / "features.safetensors"
    assert encoder.save_features(path, files) == path.stat().st_size
    assert rows(encoder.encode(PROMPT, encoder.read_features(path))) == expected


def test_a_feature_cache(checkpoint, files, expected, tmp_path):
    for encoded, cached in [(3, 0), (0, 3)]:
        encoder = imagehere.Encoder(checkpoint, "cpu", feature_cache=tmp_path / "cache", feature_cache_size=1 << 30)
        sequence = encoder.encode(PROMPT, files)
        assert rows(sequence) == expected
        assert (sequence.report["images_encoded"], sequence.report["images_cached"]) == (encoded, cached)


def test_prompt_options(encoder, files):
    length = lambda **options: len(encoder.plan("<ImageHere>Hi", 1, **options))
    default = length()
    assert length(meta_instruction=imagehere.DEFAULT_META_INSTRUCTION) == default
    assert length(meta_instruction=None) < length(meta_instruction="Be brief.") < default
    assert length(raw=True) < length(meta_instruction=None)
    assert length(bos="first") == default - 1
    assert length(history=[("Hello", "Hi")]) > default
    long = "<ImageHere>" + "word " * 3000
    cut, whole = encoder.plan(long, 1, truncate=True), encoder.plan(long, 1)
    assert len(cut) == 4096 < len(whole) and cut.warnings and whole.warnings
    sequence = encoder.encode("<ImageHere>Hi", files[:1], meta_instruction=None)
    assert len(sequence) == length(meta_instruction=None)
    # None is none, in both calls, and not the default.
    assert encoder.plan("<ImageHere>Hi", 1, meta_instruction=None).segments[0][3].startswith("[UNUSED_TOKEN_146]user")


def test_a_llava(tmp_path, files):
    imagehere.make_random_checkpoint(tmp_path / "llava", preset="llava-tiny")
    encoder = imagehere.Encoder(tmp_path / "llava", "cpu")
    assert encoder.marker == "<image>"
    sequence = encoder.encode("<image>\n<image>\nWhat changed?", files[:2])
    assert [count for _, count in sequence.slots] == [encoder.config["patches"]] * 2
    features = encoder.features(files[:2])
    offset, count = sequence.slots[1]
    width = 2 * encoder.config["hidden_size"]
    assert rows(sequence)[offset * width : (offset + count) * width] == memoryview(features[1].rows).tobytes()
    with pytest.raises(imagehere.errors.MarkerCountError):
        encoder.encode("<ImageHere>", files[:1])


def test_threads_and_repeats_change_no_bit(checkpoint, files, expected):
    for threads in [1, 3]:
        encoder = imagehere.Encoder(checkpoint, "cpu", threads=threads)
        assert rows(encoder.encode(PROMPT, files)) == rows(encoder.encode(PROMPT, files)) == expected


def test_an_encoder_tells_what_it_is(encoder, checkpoint):
    assert pathlib.Path(encoder.path) == checkpoint
    assert encoder.device.startswith("cpu (") and len(encoder.fingerprint) == 64
    assert encoder.config["patches"] == (encoder.config["image_size"] // encoder.config["patch_size"]) ** 2
    assert "cpu" in repr(encoder) and encoder.warnings == []
    assert bmp(0, *SIDES[0])[:2] == b"BM"

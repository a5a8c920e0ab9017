"""The published recipe for several images, as people try to write it, against a small InternLM2 with PLoRA."""

import pytest

torch = pytest.importorskip("torch")

import imagehere  # noqa: E402
import internlm2  # noqa: E402
from conftest import SIDES, pixels  # noqa: E402
from imagehere import compat, errors  # noqa: E402

QUERY = "First picture:<ImageHere>, second picture:<ImageHere>. What changed?"


@pytest.fixture(scope="module")
def embeddings(checkpoint):
    """The checkpoint's own token embeddings, fp16."""
    for shard in sorted(checkpoint.glob("*.bin")):
        weights = torch.load(shard, weights_only=True)
        if "model.tok_embeddings.weight" in weights:
            return weights["model.tok_embeddings.weight"].to(torch.float16)
    raise AssertionError("no token embeddings")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def model(request, embeddings, encoder):
    model = internlm2.Model(embeddings).to(request.param)
    compat.attach(model, encoder)
    return model


@pytest.fixture(scope="module")
def paths(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.bmp" for i in range(len(files))]
    for path, file in zip(paths, files):
        path.write_bytes(file)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def features(encoder, files):
    return [torch.from_dlpack(f.rows) for f in encoder.features(files)]


def tokenize(encoder):
    """A segment of text to ids, with BOS, as upstream's tokenizer gives them."""

    def ids(text):
        plan = encoder.plan(text, raw=True, allow_control_tokens=True, meta_instruction=None)
        return torch.from_dlpack(plan.input_ids)[0].tolist()

    return ids


def test_the_published_recipe(model, encoder, embeddings, features, paths):
    image1 = model.encode_img(paths[0])
    image2 = model.encode_img(paths[1])
    image = torch.cat((image1, image2), dim=0)
    dtype = model.output.weight.dtype
    assert image.shape == (2, encoder.config["patches"], encoder.config["hidden_size"]) and image.dtype == dtype
    inputs, im_mask = model.interleav_wrap_chat(None, QUERY, image, history=[])

    meta = imagehere.DEFAULT_META_INSTRUCTION
    expected, mask = internlm2.wrap(embeddings, tokenize(encoder), QUERY, features[:2], meta)
    assert im_mask.dtype == torch.bool and torch.equal(im_mask, mask)
    assert inputs["inputs_embeds"].dtype == dtype
    assert torch.equal(inputs["inputs_embeds"], expected.to(dtype))

    ids = model.generate(**inputs, im_mask=im_mask, max_new_tokens=6, eos_token_id=compat.STOP_TOKENS)
    assert torch.equal(ids, model.generate(expected.to(dtype), mask, 6, compat.STOP_TOKENS))
    assert compat.stop_reason(ids, 6) in ("stop", "length")


@pytest.mark.parametrize("meta", ["Be brief.", "", None])
def test_images_in_any_form_are_the_same(encoder, embeddings, features, files, paths, meta):
    upstream = compat.Upstream(encoder)
    expected, _ = internlm2.wrap(embeddings, tokenize(encoder), QUERY, features[:2], meta)
    both = upstream.encode_img(paths[:2])
    assert both.dtype == torch.float16 and torch.equal(both, torch.stack(features[:2]))
    array = torch.frombuffer(bytearray(pixels(0, *SIDES[0])), dtype=torch.uint8).view(SIDES[0][1], SIDES[0][0], 3)
    forms = [
        both,
        paths[:2],
        files[:2],
        [upstream.encode_img(paths[0]), upstream.encode_img(files[1])],
        [upstream.encode_img(paths[0])[0][None], *encoder.features(files[1])],
        encoder.features(paths[:2]),
        [memoryview(bytes(array.flatten().tolist())).cast("B", tuple(array.shape)), paths[1]],
        both.float(),
    ]
    for form in forms:
        inputs, _ = upstream.interleav_wrap_chat("any tokenizer", QUERY, form, [], meta)
        assert torch.equal(inputs["inputs_embeds"], expected)
    assert upstream.encode_img(None) is None
    assert upstream.interleav_wrap_chat(None, "Hello", None, [], meta)[1].any() == False  # noqa: E712


def test_a_normalised_tensor_is_taken_as_upstream_takes_it(encoder):
    upstream = compat.Upstream(encoder)
    side = encoder.config["image_size"]
    image = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8)
    mean, std = torch.tensor(compat._MEAN), torch.tensor(compat._STD)
    normalised = ((image / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = upstream.encode_img([memoryview(bytes(i.flatten().tolist())).cast("B", (side, side, 3)) for i in image])
    for dtype in [torch.float32, torch.float16]:
        assert torch.equal(upstream.encode_img(normalised.to(dtype)), expected)
    for wrong in [normalised[0], normalised[..., 1:], image / 255.0 - 5, torch.rand(1, 3, side, side) * 9]:
        with pytest.raises(errors.ArgumentError):
            upstream.encode_img(wrong)


def test_more_images_than_go_together(encoder, files):
    upstream = compat.Upstream(encoder)
    many = upstream.encode_img([files[i % 3] for i in range(35)])
    three = upstream.encode_img(files)
    assert all(torch.equal(many[i], three[i % 3]) for i in range(35))


def test_the_mask_matters(model, paths):
    inputs, im_mask = model.interleav_wrap_chat(None, QUERY, paths[:2], [])
    with torch.no_grad():
        masked, unmasked = model(inputs["inputs_embeds"], im_mask), model(inputs["inputs_embeds"], None)
    assert not torch.equal(masked, unmasked)


def test_history_brings_its_images(encoder, embeddings, features, paths):
    upstream = compat.Upstream(encoder)
    history = [("<ImageHere>What is it?", "A house.")]
    inputs, mask = upstream.interleav_wrap_chat(None, "<ImageHere>And this?", paths[:2], history, None)
    query = "<ImageHere>What is it?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\nA house.[UNUSED_TOKEN_145]\n"
    query += "[UNUSED_TOKEN_146]user\n<ImageHere>And this?"
    expected, expected_mask = internlm2.wrap(embeddings, tokenize(encoder), query, features[:2], None)
    assert torch.equal(inputs["inputs_embeds"], expected) and torch.equal(mask, expected_mask)


def test_the_staged_recipe(model, encoder, paths):
    """Each image by itself, then all with what was said of each: every image goes through the tower once."""
    features = encoder.features(paths[:2])
    said = []
    for one in features:
        inputs, im_mask = model.interleav_wrap_chat(None, "<ImageHere>Describe it.", [one], [])
        ids = model.generate(**inputs, im_mask=im_mask, max_new_tokens=4, eos_token_id=compat.STOP_TOKENS)
        said.append(" ".join(map(str, ids[0].tolist())))
    query = "".join(f"Image {i + 1}: <ImageHere> {text}\n" for i, text in enumerate(said)) + "What changed?"
    inputs, im_mask = model.interleav_wrap_chat(None, query, features, [])
    again, _ = model.interleav_wrap_chat(None, query, paths[:2], [])
    assert torch.equal(inputs["inputs_embeds"], again["inputs_embeds"])
    model.generate(**inputs, im_mask=im_mask, max_new_tokens=2)


def test_mistakes_are_told(encoder, paths):
    upstream = compat.Upstream(encoder)
    with pytest.raises(ValueError, match="<ImageHere>"):
        upstream.interleav_wrap_chat(None, QUERY, paths[:1], [])
    for wrong in [True, False, 1]:
        with pytest.raises(TypeError):
            upstream.interleav_wrap_chat(None, QUERY, paths[:2], [], wrong)
    with pytest.raises(errors.ImageError, match="image 1"):
        upstream.encode_img([paths[0], "missing.jpg"])
    with pytest.warns(UserWarning, match="4096"):
        upstream.interleav_wrap_chat(None, "<ImageHere>" + "word " * 4000, paths[:1], [])


def test_why_generation_ended():
    assert compat.stop_reason(torch.tensor([[5, 6, 92542]]), 10) == "stop"
    assert compat.stop_reason([5, 6, 2], 3) == "stop"
    assert compat.stop_reason(torch.tensor([[5, 6, 7]]), 3) == "length"
    with pytest.raises(errors.ArgumentError, match="none of them ends"):
        compat.stop_reason([5, 6], 3)

"""What engines are given, read by the readers that they use."""

import base64
import io
import json

import pytest

from imagehere import engines, errors

numpy = pytest.importorskip("numpy")

PROMPT = "First:<ImageHere>, second:<ImageHere>."


@pytest.fixture(scope="module")
def features(encoder, files):
    return encoder.features(files[:2])


@pytest.fixture(scope="module")
def sequence(encoder, files):
    return encoder.encode(PROMPT, files[:2])


def test_a_chat_for_vllm(encoder, features):
    body = json.loads(engines.vllm_chat_body(encoder, PROMPT, features, model="m", meta_instruction="Be brief."))
    assert body["model"] == "m"
    system, user = body["messages"]
    assert system["role"] == "system" and user["role"] == "user"
    parts = user["content"]
    assert [part["type"] for part in parts] == ["text", "image_embeds", "text", "image_embeds", "text"]
    for part, expected in zip((part for part in parts if part["type"] == "image_embeds"), features):
        array = numpy.load(io.BytesIO(base64.b64decode(part["image_embeds"], validate=True)), allow_pickle=False)
        assert array.dtype == numpy.float16 and (array == numpy.asarray(expected.rows)).all()
    with pytest.raises(errors.ArgumentError):
        engines.vllm_chat_body(encoder, PROMPT, features[:1])
    with pytest.raises(TypeError):
        engines.vllm_chat_body(encoder, PROMPT, features, meta_instruction=True)


def test_a_sequence_for_vllm(sequence, encoder, files):
    torch = pytest.importorskip("torch")
    expected = torch.from_dlpack(sequence.inputs_embeds)[0]
    saved = engines.vllm_prompt_embeds(sequence)
    assert torch.equal(torch.load(io.BytesIO(saved), weights_only=True), expected)
    body = json.loads(engines.vllm_completion_body(sequence, model="m"))
    sent = base64.b64decode(body["prompt_embeds"], validate=True)
    assert body["model"] == "m" and torch.equal(torch.load(io.BytesIO(sent), weights_only=True), expected)
    # Rows that lie apart are brought together.
    out = torch.zeros(len(expected) + 3, expected.shape[1] + 8, dtype=torch.float16)[:, : expected.shape[1]]
    apart = encoder.encode(PROMPT, files[:2], out=out)
    assert torch.equal(torch.load(io.BytesIO(engines.vllm_prompt_embeds(apart)), weights_only=True), expected)


def test_an_encoder_cache_for_vllm(features, tmp_path):
    uuids = engines.vllm_encoder_cache(tmp_path / "cache", features)
    assert len(set(uuids)) == 2
    for uuid, expected in zip(uuids, features):
        data = (tmp_path / "cache" / uuid / "encoder_cache.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])["ec_cache"]
        assert header["dtype"] == "F16" and tuple(header["shape"]) == expected.rows.shape
        assert data[8 + size :] == memoryview(expected.rows).tobytes()


def test_arguments_for_lmdeploy(sequence, features):
    arguments = engines.lmdeploy_arguments(sequence, image_token=7)
    ids = numpy.asarray(sequence.input_ids)[0]
    assert arguments["input_ids"] == numpy.where(ids < 0, 7, ids).tolist()
    assert arguments["input_embedding_ranges"] == [[offset, offset + rows] for offset, rows in sequence.slots]
    width = 2 * features[0].rows.shape[1]
    for tensor, (offset, _), expected in zip(arguments["input_embeddings"], sequence.slots, features):
        assert tensor.data_ptr() == sequence.inputs_embeds.data_ptr() + offset * width, "not copied"
        assert (numpy.asarray(tensor) == numpy.asarray(expected.rows)).all()


def test_arguments_for_sglang(sequence, features, encoder):
    arguments = engines.sglang_arguments(sequence, image_token=1000)
    ids = numpy.asarray(sequence.input_ids)[0]
    assert arguments["input_ids"] == numpy.where(ids < 0, 1000, ids).tolist()
    (image,) = arguments["image_data"]
    assert image["format"] == "precomputed_embedding"
    assert image["offsets"] == [(offset, offset + rows - 1) for offset, rows in sequence.slots]
    assert (numpy.asarray(image["feature"]) == numpy.concatenate([numpy.asarray(f.rows) for f in features])).all()
    with pytest.raises(errors.ArgumentError, match="is text"):
        engines.sglang_arguments(sequence, image_token=int(ids[0]))
    assert engines.sglang_arguments(encoder.encode("Hello"), image_token=1000)["image_data"] is None
    alone = encoder.encode("<ImageHere>", [features[0]])
    feature = engines.sglang_arguments(alone, image_token=1000)["image_data"][0]["feature"]
    assert (numpy.asarray(feature) == numpy.asarray(features[0].rows)).all()


def test_a_table_of_many(encoder, files, features, tmp_path):
    path = tmp_path / "table.parquet"
    many = [files[i % 2] for i in range(40)]
    assert encoder.write_parquet(path, many) == path.stat().st_size
    assert path.read_bytes()[:4] == path.read_bytes()[-4:] == b"PAR1"
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    assert table.num_rows == 40
    said = {key.decode() for key in table.schema.metadata}
    assert said >= {"format_version", "version", "checkpoint", "preprocessing", "numerics"}
    for i in [0, 1, 39]:
        row = table["features"][i].values.to_numpy()
        assert (row == numpy.asarray(features[i % 2].rows).ravel()).all()
    with pytest.raises(errors.ImageError, match="image 39"):
        encoder.write_parquet(tmp_path / "bad.parquet", [*many[:39], b"no image"])
    assert not (tmp_path / "bad.parquet").exists()

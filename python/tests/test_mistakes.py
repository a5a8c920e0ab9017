"""What callers get wrong: an exception that says what to do, never a crash, and nothing written."""

import array
import pickle

import pytest

import imagehere
from imagehere import errors


def test_a_bool_is_no_system_text(encoder):
    for call in [encoder.plan, encoder.encode]:
        with pytest.raises(TypeError, match='the text "True"'):
            call("Hi", meta_instruction=True)
        with pytest.raises(TypeError, match="string or None, not int"):
            call("Hi", meta_instruction=3)


def test_markers_and_images_must_match(encoder, files):
    with pytest.raises(errors.MarkerCountError, match="<ImageHere>") as caught:
        encoder.encode("<ImageHere>", files)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, imagehere.Error)
    with pytest.raises(errors.MarkerCountError):
        encoder.encode("Nothing here", files[:1])
    with pytest.raises(errors.ArgumentError, match="2 images"):
        encoder.encode(encoder.plan("<ImageHere><ImageHere>", 2), files[:1])


def test_a_plan_has_its_options(encoder, files):
    plan = encoder.plan("<ImageHere>", 1)
    with pytest.raises(errors.ArgumentError, match="has its options"):
        encoder.encode(plan, files[:1], meta_instruction=None)


def test_too_long(encoder, files):
    with pytest.raises(errors.SequenceTooLongError, match="limit is 50"):
        encoder.encode("<ImageHere>", files[:1], max_length=50)


@pytest.mark.parametrize(
    "image",
    [3, None, 2.5, object(), [], {}, array.array("f", [1.0]), array.array("B"), b"", b"no image", "missing.jpg", "", "a\0b", "."],
    ids=repr,
)
def test_what_is_no_image(encoder, image):
    with pytest.raises((TypeError, ValueError, OSError)):
        encoder.encode("<ImageHere>", [image])
    with pytest.raises((TypeError, ValueError, OSError)):
        encoder.features([image])


def test_arrays_that_are_no_pictures(encoder):
    numpy = pytest.importorskip("numpy")
    strange = [
        numpy.zeros((4, 4, 3), "float32"),
        numpy.zeros((4, 4, 3), "int8"),
        numpy.zeros((4, 4, 4), "uint8"),
        numpy.zeros((4, 4), "uint8"),
        numpy.zeros((0, 4, 3), "uint8"),
        numpy.zeros((4, 0, 3), "uint8"),
        numpy.zeros((2, 4, 4, 3), "uint8"),
        numpy.zeros((4, 4, 3), ">u2"),
        numpy.zeros((), "uint8"),
        numpy.zeros((4, 4, 3), "O"),
        numpy.broadcast_to(numpy.zeros((1, 1, 3), "uint8"), (10**6, 10**6, 3)),
        numpy.broadcast_to(numpy.zeros((1, 1, 1), "uint8"), (2**33, 2, 3)),
    ]
    for image in strange:
        with pytest.raises((TypeError, ValueError)):
            encoder.encode("<ImageHere>", [image])


def test_objects_that_lie(encoder):
    class Lies:
        mode, size = "RGB", (10**6, 10**6)

        def tobytes(self):
            return b"123"

        def convert(self, mode):
            return self

    class Raises:
        def __fspath__(self):
            raise RuntimeError("no path today")

    class Negative(Lies):
        size = (-1, 5)

    class NoBytes(Lies):
        def tobytes(self):
            return "text"

    for image in [Lies(), Raises(), Negative(), NoBytes()]:
        with pytest.raises((TypeError, ValueError, RuntimeError, OverflowError)):
            encoder.encode("<ImageHere>", [image])


def test_a_bad_image_leaves_out_alone(encoder, files):
    numpy = pytest.importorskip("numpy")
    out = numpy.full((600, encoder.config["hidden_size"]), 5, "float16")
    with pytest.raises(errors.ImageError, match="image 1"):
        encoder.encode("<ImageHere><ImageHere>", [files[0], b"\xff\xd8\xff no jpeg"], out=out)
    assert (out == 5).all()


def test_out_that_cannot_be_written(encoder, files):
    numpy = pytest.importorskip("numpy")
    hidden = encoder.config["hidden_size"]
    encode = lambda out: encoder.encode("<ImageHere>", files[:1], out=out)
    with pytest.raises(TypeError, match="float32.*Give float16"):
        encode(numpy.zeros((600, hidden), "float32"))
    with pytest.raises(TypeError, match="float16"):
        encode(numpy.zeros((600, hidden), "int16"))
    with pytest.raises(errors.ArgumentError, match="has 10 rows, but the sequence needs"):
        encode(numpy.zeros((10, hidden), "float16"))
    with pytest.raises(errors.ArgumentError, match=f"H is {hidden}"):
        encode(numpy.zeros((600, hidden + 1), "float16"))
    for shape in [(hidden,), (2, 600, hidden), (1, 1, 600, hidden), ()]:
        with pytest.raises(errors.ArgumentError, match="shape"):
            encode(numpy.zeros(shape, "float16"))
    with pytest.raises(errors.ArgumentError, match="strides"):
        encode(numpy.zeros((hidden, 600), "float16").T)
    with pytest.raises(errors.ArgumentError, match="strides"):
        encode(numpy.lib.stride_tricks.as_strided(numpy.zeros(hidden, "float16"), (600, hidden), (0, 2)))
    with pytest.raises(errors.ArgumentError, match="strides"):
        encode(numpy.zeros((600, hidden), "float16")[::-1])
    locked = numpy.zeros((600, hidden), "float16")
    locked.flags.writeable = False
    with pytest.raises((BufferError, TypeError)):
        encode(locked)
    for out in [3, "text", b"bytes", object(), [1.0]]:
        with pytest.raises(TypeError):
            encode(out)


def test_out_of_torch_that_cannot_be_written(encoder, files):
    torch = pytest.importorskip("torch")
    hidden = encoder.config["hidden_size"]
    encode = lambda out: encoder.encode("<ImageHere>", files[:1], out=out)
    with pytest.raises(TypeError, match="bfloat16.*Give float16"):
        encode(torch.zeros(600, hidden, dtype=torch.bfloat16))
    with pytest.raises(BufferError):
        encode(torch.zeros(600, hidden, dtype=torch.float16, requires_grad=True))
    with pytest.raises((BufferError, RuntimeError, ValueError)):
        encode(torch.zeros(600, hidden, dtype=torch.float16, device="meta"))


def test_words_that_are_none(checkpoint, encoder):
    for options in [{"exif": "maybe"}, {"alpha": "red"}, {"alpha": 3}, {"resample": "bicubic"}, {"threads": 0}]:
        with pytest.raises((ValueError, TypeError)):
            imagehere.Encoder(checkpoint, "cpu", **options)
    with pytest.raises(errors.ArgumentError, match="is no device"):
        imagehere.Encoder(checkpoint, "tpu")
    with pytest.raises(errors.ArgumentError, match="without feature_cache"):
        imagehere.Encoder(checkpoint, "cpu", feature_cache_size=5)
    with pytest.raises(errors.ArgumentError, match="per-segment"):
        encoder.plan("Hi", bos="all")
    with pytest.raises(OverflowError):
        encoder.plan("Hi", max_length=-1)
    with pytest.raises(TypeError):
        encoder.encode(3)


def test_checkpoints_that_are_none(tmp_path, checkpoint):
    with pytest.raises((errors.CheckpointError, errors.ReadError)):
        imagehere.Encoder(tmp_path / "nothing", "cpu")
    with pytest.raises(errors.DeviceError):
        imagehere.Encoder(checkpoint, "cuda:63")


def test_features_of_another_model(encoder, files, checkpoint, tmp_path):
    path = tmp_path / "features.safetensors"
    encoder.save_features(path, files[:1])
    other = imagehere.Encoder(checkpoint, "cpu", resample="pillow13")
    with pytest.raises(errors.FeaturesError, match="pillow13"):
        other.read_features(path)
    with pytest.raises(errors.FeaturesError):
        path.write_bytes(path.read_bytes()[:200])
        encoder.read_features(path)
    with pytest.raises(errors.ArgumentError, match="Give images"):
        encoder.save_features(path, encoder.features(files[:1]))
    with pytest.raises(errors.WriteError):
        encoder.save_features(tmp_path / "no" / "such" / "folder", files[:1])


def test_exceptions_travel(encoder):
    with pytest.raises(imagehere.Error) as caught:
        encoder.encode("<ImageHere>")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is errors.MarkerCountError and str(again) == str(caught.value)

"""Nothing is copied: the same addresses, in whoever's memory."""

import gc

import pytest

import imagehere

numpy = pytest.importorskip("numpy")

PROMPT = "First:<ImageHere>, second:<ImageHere>."


@pytest.fixture
def sequence(encoder, files):
    return encoder.encode(PROMPT, files[:2])


def test_numpy_shares_the_rows(sequence):
    embeds = numpy.asarray(sequence.inputs_embeds)
    assert embeds.dtype == numpy.float16 and embeds.shape == sequence.inputs_embeds.shape
    assert embeds.ctypes.data == sequence.inputs_embeds.data_ptr()
    assert embeds.flags.writeable and embeds.flags.c_contiguous
    mask, ids = numpy.asarray(sequence.im_mask), numpy.asarray(sequence.input_ids)
    assert mask.dtype == bool and ids.dtype == numpy.int64
    assert (ids == -1).tolist() == mask.tolist() and not mask.flags.writeable
    by_dlpack = numpy.from_dlpack(sequence.inputs_embeds)
    assert by_dlpack.ctypes.data == embeds.ctypes.data and (by_dlpack == embeds).all()
    by_dlpack[0, 0, 0] = 7
    assert embeds[0, 0, 0] == 7


def test_memory_outlives_what_it_came_from(encoder, files):
    sequence = encoder.encode(PROMPT, files[:2])
    before = memoryview(sequence.inputs_embeds).tobytes()
    array = numpy.asarray(sequence.inputs_embeds)
    of_features = numpy.asarray(encoder.features(files[:1])[0].rows)
    of_dlpack = numpy.from_dlpack(encoder.encode(PROMPT, files[:2]).inputs_embeds)
    del sequence
    gc.collect()
    junk = [numpy.full(array.size, 1, "float16") for _ in range(8)]
    assert array.tobytes() == of_dlpack.tobytes() == before and junk
    offset, rows = encoder.plan(PROMPT, 2).slots[0]
    assert (of_features == array[0, offset : offset + rows]).all()


def test_a_tensor_nobody_takes_is_freed(sequence):
    for _ in range(3):
        sequence.inputs_embeds.__dlpack__()
        sequence.inputs_embeds.__dlpack__(max_version=(1, 0))


def test_dlpack_says_what_it_cannot(sequence):
    tensor = sequence.inputs_embeds
    assert tensor.__dlpack_device__() == (1, 0) and tensor.device == "cpu" and tensor.dtype == "float16"
    with pytest.raises(BufferError):
        tensor.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match="read-only"):
        sequence.im_mask.__dlpack__()
    copy = numpy.from_dlpack(sequence.im_mask, copy=True)
    assert copy.flags.writeable and copy.tolist() == numpy.asarray(sequence.im_mask).tolist()
    with pytest.raises((TypeError, BufferError)):
        memoryview(sequence.im_mask).__setitem__((0, 0), True)
    with pytest.raises(TypeError):
        imagehere.Tensor()
    with pytest.raises(TypeError):
        type(tensor)(object())


def test_torch_shares_the_rows(sequence):
    torch = pytest.importorskip("torch")
    embeds = torch.from_dlpack(sequence.inputs_embeds)
    assert embeds.dtype == torch.float16 and embeds.data_ptr() == sequence.inputs_embeds.data_ptr()
    assert embeds.shape == sequence.inputs_embeds.shape
    mask = torch.from_dlpack(sequence.im_mask)
    assert mask.dtype == torch.bool and mask.sum() == sum(rows for _, rows in sequence.slots)
    embeds[0, 1, 2] = 3
    assert numpy.asarray(sequence.inputs_embeds)[0, 1, 2] == 3


@pytest.mark.parametrize("shape", ["[rows, H]", "[1, rows, H]", "rows apart", "a part of a batch"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_out_is_filled_in_place(encoder, files, library, shape):
    expected = numpy.asarray(encoder.encode(PROMPT, files[:2]).inputs_embeds)[0]
    (length, hidden), spare = expected.shape, 5
    mark = -9.0
    if library == "numpy":
        full = lambda *shape: numpy.full(shape, mark, "float16")
        address = lambda array: array.ctypes.data
    else:
        torch = pytest.importorskip("torch")
        full = lambda *shape: torch.full(shape, mark, dtype=torch.float16)
        address = lambda tensor: tensor.data_ptr()
    if shape == "[rows, H]":
        whole = full(length + spare, hidden)
        out = whole
    elif shape == "[1, rows, H]":
        whole = full(1, length + spare, hidden)
        out = whole
    elif shape == "rows apart":
        whole = full(length + spare, hidden + 3)
        out = whole[:, :hidden]
    else:
        whole = full(3, length + spare, hidden)
        out = whole[1]
    sequence = encoder.encode(PROMPT, files[:2], out=out)
    assert sequence.inputs_embeds.data_ptr() == address(out)
    assert sequence.inputs_embeds.shape == (1, length, hidden)
    assert (numpy.asarray(sequence.inputs_embeds)[0] == expected).all()
    written = numpy.asarray(whole)
    assert (written != mark).sum() == expected.size - (expected == mark).sum(), "nothing else is touched"
    out_rows = numpy.asarray(out).reshape(-1, hidden)
    assert (out_rows[:length] == expected).all() and (out_rows[length:] == mark).all()


def test_out_makes_no_second_copy(encoder, files):
    """Memory grows by the rows once without `out`, and not at all with it."""
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
    try:
        resident()
    except FileNotFoundError:
        pytest.skip("no /proc")
    plan = encoder.plan("<ImageHere>" * 1000 + "x", 1000, raw=True, max_length=30000)
    features = encoder.features(files[:1]) * 1000
    size = 2 * len(plan) * encoder.config["hidden_size"]
    out = numpy.ones((len(plan), encoder.config["hidden_size"]), "float16")
    encoder.encode(plan, features, out=out)
    before = resident()
    encoder.encode(plan, features, out=out)
    assert resident() - before < size / 4
    before = resident()
    sequence = encoder.encode(plan, features)
    assert size / 2 < resident() - before < 1.5 * size
    array = numpy.asarray(sequence.inputs_embeds)
    assert resident() - before < 1.5 * size and (array[0] == out).all()

"""Results that stay in a GPU's memory: on a GPU, or on the emulated device, whose `libcuda.so` must come first:
`LD_LIBRARY_PATH=target/emu python -m pytest python/tests`.
"""

import ctypes

import pytest

import imagehere
from imagehere import errors

PROMPT = "First:<ImageHere>, second:<ImageHere>."


@pytest.fixture(scope="module")
def gpu(checkpoint):
    try:
        return imagehere.Encoder(checkpoint, "cuda")
    except errors.DeviceError as error:
        pytest.skip(f"no GPU: {error}")


class OnGpu:
    """What a framework's tensor on the device looks like: memory by DLPack, on a stream."""

    def __init__(self, tensor):
        self.tensor, self.streams = tensor, []

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return self.tensor.__dlpack__(stream=stream, **options)


def rows(tensor):
    """The rows at a tensor's address, as the driver copies them."""
    try:
        driver = ctypes.CDLL("libcuda.so")
    except OSError:
        driver = ctypes.CDLL("libcuda.so.1")
    context, copy = ctypes.c_void_p(), ctypes.create_string_buffer(tensor.nbytes)
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert driver.cuCtxSetCurrent(context) == 0
    assert driver.cuMemcpyDtoH_v2(copy, ctypes.c_uint64(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)) == 0
    return copy.raw


def test_rows_stay_on_the_device(gpu, encoder, files):
    sequence = gpu.encode(PROMPT, files[:2])
    tensor = sequence.inputs_embeds
    assert gpu.place == tensor.device == "cuda:0" and tensor.__dlpack_device__() == (2, 0)
    with pytest.raises(BufferError, match="DLPack"):
        memoryview(tensor)
    assert tensor.__dlpack__(stream=1) is not None
    expected = encoder.encode(PROMPT, files[:2])
    assert tensor.shape == expected.inputs_embeds.shape
    # Text is the same bit by bit, images to the rounding of fp16.
    width, (first, _) = 2 * gpu.config["hidden_size"], expected.slots[0]
    assert rows(tensor)[: first * width] == memoryview(expected.inputs_embeds).tobytes()[: first * width]
    assert all(abs(a / b - 1) < 1e-2 for a, b in zip(sequence.norms, expected.norms))


def test_out_on_the_device_is_filled_in_place(gpu, files):
    expected = rows(gpu.encode(PROMPT, files[:2]).inputs_embeds)
    theirs = OnGpu(gpu.encode(PROMPT, [files[2], files[2]]).inputs_embeds)
    assert rows(theirs.tensor) != expected
    sequence = gpu.encode(PROMPT, files[:2], out=theirs)
    assert sequence.inputs_embeds.data_ptr() == theirs.tensor.data_ptr() and rows(theirs.tensor) == expected
    assert theirs.streams == [1], "the default stream waits for what was done to it"


def test_out_on_the_host_is_filled_from_the_device(gpu, encoder, files):
    out = encoder.encode(PROMPT, [files[2], files[2]]).inputs_embeds
    gpu.encode(PROMPT, files[:2], out=out)
    assert memoryview(out).tobytes() == rows(gpu.encode(PROMPT, files[:2]).inputs_embeds)


def test_memory_of_the_wrong_side_is_refused(gpu, encoder, files):
    on_gpu = OnGpu(gpu.encode(PROMPT, files[:2]).inputs_embeds)
    with pytest.raises(errors.ArgumentError):
        encoder.encode(PROMPT, files[:2], out=on_gpu)
    with pytest.raises(errors.ArgumentError, match="CPU"):
        gpu.adopt_features(on_gpu)

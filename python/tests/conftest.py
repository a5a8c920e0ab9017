import io
import random

import pytest

import imagehere

SIDES = [(60, 40), (70, 70), (33, 91)]  # width, height


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small random model."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    imagehere.make_random_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def encoder(checkpoint):
    return imagehere.Encoder(checkpoint, "cpu")


def pixels(seed, width, height):
    """Noise, as rows of bytes without gaps."""
    return random.Random(seed).randbytes(3 * width * height)


def bmp(seed, width, height):
    """The same noise as the bytes of a BMP file, which needs no library to write."""
    rows, data = [], pixels(seed, width, height)
    for y in reversed(range(height)):
        row = data[3 * width * y : 3 * width * (y + 1)]
        row = b"".join(row[i : i + 3][::-1] for i in range(0, len(row), 3))
        rows.append(row + bytes(-len(row) % 4))
    body = b"".join(rows)
    out = io.BytesIO()
    out.write(b"BM" + (54 + len(body)).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little"))
    for number, size in [(40, 4), (width, 4), (height, 4), (1, 2), (24, 2), (0, 4), (len(body), 4)]:
        out.write(number.to_bytes(size, "little"))
    out.write(bytes(16) + body)
    return out.getvalue()


@pytest.fixture(scope="session")
def files():
    return [bmp(seed, *side) for seed, side in enumerate(SIDES)]

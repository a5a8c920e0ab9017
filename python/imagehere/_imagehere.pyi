"""The compiled part. Letters of shapes: N images, P patches of each, L positions, H elements of a row."""

import os
import sys
from collections.abc import Iterable, Sequence as Seq
from typing import Any, Literal, Protocol, TypeAlias, final

__all__ = [
    "DEFAULT_META_INSTRUCTION",
    "Encoder",
    "Features",
    "MARKER",
    "Plan",
    "Sequence",
    "Tensor",
    "__version__",
    "lmdeploy_arguments",
    "make_random_checkpoint",
    "sglang_arguments",
    "vllm_chat_body",
    "vllm_completion_body",
    "vllm_encoder_cache",
    "vllm_prompt_embeds",
]

class _PilImage(Protocol):
    mode: str
    def tobytes(self) -> bytes: ...
    def convert(self, mode: str) -> Any: ...

class _HasDlpack(Protocol):
    def __dlpack__(self, **options: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

_Image: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | _PilImage | Any
"""A path; the bytes of a file; a PIL image (as ``convert("RGB")`` has it); a uint8 array [height, width, 3] of RGB, read in
place where the bytes of a row lie together."""

__version__: str
MARKER: str
DEFAULT_META_INSTRUCTION: str
"""Upstream's system text: what ``meta_instruction`` is where nothing is given."""

@final
class Tensor:
    """Memory of the library's, or of the caller's ``out``, shared and not copied.

    By DLPack (``torch.from_dlpack``, ``jax.dlpack.from_dlpack``), on the host by the buffer protocol too
    (``numpy.asarray``, ``memoryview``). It lives as long as anybody looks at it. All is written when a call returns: a
    consumer's stream has nothing to wait for.
    """

    def __new__(cls, memory: Any) -> Tensor:
        """Raises TypeError: tensors are made by the library."""
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Literal["float16", "int64", "bool"]: ...
    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:N``."""
    @property
    def nbytes(self) -> int:
        """Bytes of all elements, without gaps between rows."""
    def data_ptr(self) -> int:
        """Address of the first element, in the memory of its device."""
    def __len__(self) -> int: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...

@final
class Plan:
    """The layout of a sequence: integers alone, nothing decoded."""

    @property
    def input_ids(self) -> Tensor:
        """[1, L] int64, -1 in the rows of images. Read-only."""
    @property
    def im_mask(self) -> Tensor:
        """[1, L] bool, true in the rows of images. Read-only."""
    @property
    def slots(self) -> list[tuple[int, int]]:
        """First position and rows of each image, in the order of the markers."""
    @property
    def segments(self) -> list[tuple[int, int, int | None, str]]:
        """First position, rows, image or None, and text of everything, in order."""
    @property
    def warnings(self) -> list[str]: ...
    def __len__(self) -> int:
        """L, in positions."""

@final
class Features:
    """One image's features, to be placed in any number of sequences. Bound to the checkpoint that made them."""

    @property
    def rows(self) -> Tensor:
        """[P, H] float16 in host memory. Read-only."""
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int:
        """P."""

@final
class Sequence:
    """A filled sequence."""

    @property
    def inputs_embeds(self) -> Tensor:
        """[1, L, H] float16, where the encoder's device is, or the rows of ``out``."""
    @property
    def input_ids(self) -> Tensor:
        """[1, L] int64, -1 in the rows of images, in host memory."""
    @property
    def im_mask(self) -> Tensor:
        """[1, L] bool, in host memory."""
    @property
    def slots(self) -> list[tuple[int, int]]:
        """First position and rows of each image, in the order of the markers."""
    @property
    def norms(self) -> list[float] | None:
        """Mean Euclidean norm of each slot's rows; None without ``verify``."""
    @property
    def plan(self) -> Plan: ...
    @property
    def report(self) -> dict[str, float]:
        """Seconds of decoding, resizing and encoding; images that were encoded and that a cache had."""
    @property
    def warnings(self) -> list[str]: ...
    def __len__(self) -> int:
        """L, in positions."""

@final
class Encoder:
    """A loaded model. Calls from several threads run side by side and share the weights; the GIL is free meanwhile.

    Opens a checkpoint directory as the Hub holds it.

    ``device``: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``cuda:0,1`` or ``cuda:all``. ``threads``: of the CPU, in a
    pool of its own; None shares one of a thread per core. ``saturate``: weights beyond fp16 become ±65504 instead of
    an error. ``exif``: files are turned as their orientation says, or (upstream) not. ``alpha``: dropped (upstream),
    or over a colour. ``resample``: the Pillow whose resize is matched, byte by byte. ``feature_cache``: a folder where
    features are looked for first and kept after, of ``feature_cache_size`` bytes at most.

    Raises CheckpointError, DTypeError, ValueOutOfRangeError or DeviceError.
    """

    def __new__(
        cls,
        path: str | os.PathLike[str],
        device: str = "auto",
        *,
        threads: int | None = None,
        saturate: bool = False,
        exif: Literal["apply", "ignore"] = "apply",
        alpha: Literal["drop", "white", "black"] | tuple[int, int, int] | None = None,
        resample: Literal["pillow", "pillow13"] = "pillow",
        feature_cache: str | os.PathLike[str] | None = None,
        feature_cache_size: int | None = None,
    ) -> Encoder: ...

    def plan(
        self,
        prompt: str,
        images: int | _Image | Iterable[_Image] | None = None,
        *,
        meta_instruction: str | None = ...,
        history: Seq[tuple[str, str]] | None = None,
        raw: bool = False,
        bos: Literal["per-segment", "first"] = "per-segment",
        allow_control_tokens: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
    ) -> Plan:
        """Lays out a sequence for so many images, or for these: each takes the place of an ``<ImageHere>``.

        ``meta_instruction``: the system text; None for none; upstream's where not given. A bool is a TypeError: upstream's
        code would put the text "True" into the prompt. ``history``: earlier (query, answer) pairs, with their markers.
        ``raw``: the prompt is the whole text, without a template. ``bos``: before each segment of text, as upstream's chat
        has it, or before the first alone, as in training. ``max_length``: a limit in positions; longer is an error.
        ``truncate``: cut where upstream does, with a warning, at the ``max_length`` of the checkpoint's config.

        Raises MarkerCountError or SequenceTooLongError.
        """

    def encode(
        self,
        prompt: str | Plan,
        images: _Image | Features | Iterable[_Image | Features] | None = None,
        *,
        meta_instruction: str | None = ...,
        history: Seq[tuple[str, str]] | None = None,
        raw: bool = False,
        bos: Literal["per-segment", "first"] = "per-segment",
        allow_control_tokens: bool = False,
        max_length: int | None = None,
        truncate: bool = False,
        out: _HasDlpack | Any | None = None,
        verify: bool = True,
    ) -> Sequence:
        """Fills a sequence: text rows, and each image's features in its slot.

        Features are placed and not encoded again. ``out``: a float16 tensor or array [rows, H] or [1, rows, H], of
        the host or the encoder's device, with at least L rows; they are written in place, and rows after them are not
        touched. Nobody else may touch it during the call. ``verify``: every row was written, and no value is NaN or infinite.

        Ctrl-C stops the call; rows of ``out`` may have been written then.

        Raises as ``plan``, ImageError naming the first image that cannot be used (nothing was written then),
        IncompleteError.
        """

    def features(self, images: _Image | Iterable[_Image]) -> list[Features]:
        """Encodes images, equal ones once. Raises ImageError."""

    def adopt_features(self, rows: _HasDlpack | Any) -> list[Features]:
        """Takes float16 rows [N, P, H] or [P, H] in host memory, made by this checkpoint elsewhere, as features: copied.

        Raises ArgumentError, TypeError.
        """

    def save_features(self, path: str | os.PathLike[str], images: _Image | Iterable[_Image]) -> int:
        """Encodes images into a features file, whole or not at all, and returns its bytes. Raises ImageError, WriteError."""

    def write_parquet(self, path: str | os.PathLike[str], images: _Image | Iterable[_Image]) -> int:
        """Encodes images into a Parquet file, a row for each: name, pixels, checkpoint, rows, hidden, features. Whole or not
        at all; images are encoded and written some at a time. Returns its bytes. Raises ImageError, WriteError.
        """

    def read_features(self, path: str | os.PathLike[str]) -> list[Features]:
        """Reads a features file that this checkpoint made by this encoder's rules. Raises FeaturesError."""

    def warm_up(self, *batch_sizes: int) -> None:
        """Makes the first call with so many images cost what the tenth does, on a GPU."""

    @property
    def path(self) -> str: ...
    @property
    def device(self) -> str:
        """The device and the kernels chosen on it, in words."""
    @property
    def marker(self) -> str:
        """The text in a prompt that stands for an image: ``<ImageHere>``, or ``<image>`` in LLaVA."""
    @property
    def place(self) -> str:
        """Where sequences lie: ``cpu`` or ``cuda:N``."""
    @property
    def fingerprint(self) -> str: ...
    @property
    def warnings(self) -> list[str]:
        """What was noticed when the checkpoint was opened."""
    @property
    def config(self) -> dict[str, int]: ...

def make_random_checkpoint(
    path: str | os.PathLike[str], *, preset: Literal["tiny", "llava-tiny", "vl-7b-vision"] = "tiny"
) -> None:
    """Writes random weights in the upstream layout, for tests and trials."""

def vllm_chat_body(
    encoder: Encoder,
    prompt: str,
    features: Iterable[Features],
    *,
    model: str | None = None,
    meta_instruction: str | None = ...,
    history: Seq[tuple[str, str]] | None = None,
) -> bytes:
    """The JSON body of a chat for ``vllm serve --enable-mm-embeds``: each image a part ``image_embeds`` in its place.

    The server puts its own template around it. ``features``: one for each marker, in order. Raises ArgumentError.
    """

def vllm_prompt_embeds(sequence: Sequence) -> bytes:
    """What ``torch.save`` writes of all rows, [L, H] float16: vLLM's ``prompt_embeds``, before base64."""

def vllm_completion_body(sequence: Sequence, *, model: str | None = None) -> bytes:
    """The JSON body of a completion for ``vllm serve --enable-prompt-embeds``, all rows as ``prompt_embeds``."""

def vllm_encoder_cache(path: str | os.PathLike[str], features: Iterable[Features]) -> list[str]:
    """Writes entries for vLLM's ``ECExampleConnector`` under a folder, and returns the ``uuid`` of each."""

def lmdeploy_arguments(sequence: Sequence, *, image_token: int = ...) -> dict[str, Any]:
    """What LMDeploy's TurboMind takes: ``input_ids``, ``input_embeddings`` (a Tensor [P, H] for each image, not copied; pass
    them through ``torch.from_dlpack``) and ``input_embedding_ranges``.

    ``image_token``: the id in the rows of images, 0 if not given.
    """

def sglang_arguments(sequence: Sequence, *, image_token: int) -> dict[str, Any]:
    """What SGLang's ``Engine.generate`` takes: ``input_ids`` and ``image_data``, one ``precomputed_embedding`` for all images,
    its ``feature`` a Tensor (pass it through ``torch.from_dlpack``), with the first and last position of each image.

    ``image_token``: the served model's. Raises ArgumentError if it occurs in text.
    """

"""Many images into one multimodal LLM sequence: CLIP tower, projector and slots, fp16 end to end.

    >>> import imagehere, torch
    >>> encoder = imagehere.Encoder("internlm-xcomposer2-vl-7b")
    >>> sequence = encoder.encode("<ImageHere> <ImageHere>What changed?", ["before.jpg", "after.jpg"])
    >>> embeds = torch.from_dlpack(sequence.inputs_embeds)  # [1, L, H] float16, not copied
    >>> mask = torch.from_dlpack(sequence.im_mask)          # [1, L] bool

Needs neither numpy nor torch; works with both.
"""

from . import engines, errors
from ._imagehere import (
    DEFAULT_META_INSTRUCTION,
    MARKER,
    Encoder,
    Features,
    Plan,
    Sequence,
    Tensor,
    __version__,
    make_random_checkpoint,
)
from .errors import Error

__all__ = [
    "DEFAULT_META_INSTRUCTION",
    "MARKER",
    "Encoder",
    "Error",
    "Features",
    "Plan",
    "Sequence",
    "Tensor",
    "__version__",
    "engines",
    "errors",
    "make_random_checkpoint",
]

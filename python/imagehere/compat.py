"""Upstream's two functions, with upstream's arguments and return values, for several images.

    >>> upstream = imagehere.compat.attach(model, encoder)       # or Upstream(encoder), without a model
    >>> image = model.encode_img(["before.jpg", "after.jpg"])    # [2, P, H]
    >>> inputs, im_mask = model.interleav_wrap_chat(tokenizer, query, image, history=[])
    >>> ids = model.generate(**inputs, im_mask=im_mask, eos_token_id=STOP_TOKENS, max_new_tokens=500)

What differs from upstream's code:

- images by path, several in a list, PIL images, bytes and arrays; upstream takes one path, or a normalised tensor;
- rows of text and images have one dtype, the model's: no "mat1 and mat2 must have the same dtype", no autocast;
- a sequence longer than upstream's limit is not cut; a warning says so;
- ``meta_instruction`` may be left out (upstream's text), and is a string or None: a bool is a TypeError.

Source: ``modeling_internlm_xcomposer2.py`` of InternLM-XComposer2-VL-7B, ``encode_img`` and ``interleav_wrap_chat``.
"""

import warnings

import torch

from . import DEFAULT_META_INSTRUCTION, Encoder, Features, errors

STOP_TOKENS = (2, 92542)
"""``</s>`` and ``[UNUSED_TOKEN_145]``, which ends a turn: where upstream's ``chat`` stops."""

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_TOGETHER = 16  # images of one call


class Upstream:
    """``encode_img`` and ``interleav_wrap_chat`` on an encoder."""

    def __init__(self, encoder: Encoder, *, dtype: torch.dtype = torch.float16, device: "torch.device | str | None" = None):
        """Results are of ``dtype``, that of the language model's weights, on ``device``, by default the encoder's."""
        self.encoder = encoder
        self.dtype = dtype
        self.device = torch.device(encoder.place if device is None else device)

    def encode_img(self, image) -> "torch.Tensor | None":
        """Encodes images, [N, P, H]; None gives None.

        ``image``: a path, the bytes of a file, a PIL image or an array, or a list of these; or, as upstream has it, a
        tensor [N, 3, S, S] that its ``vis_processor`` made.
        """
        if image is None:
            return None
        if isinstance(image, torch.Tensor):
            image = _pixels(image, self.encoder.config["image_size"])
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        patches, hidden = self.encoder.config["patches"], self.encoder.config["hidden_size"]
        rows = torch.empty(len(images), patches, hidden, dtype=torch.float16, device=self.encoder.place)
        for first in range(0, len(images), _TOGETHER):
            group = images[first : first + _TOGETHER]
            plan = self.encoder.plan(self.encoder.marker * len(group), len(group), raw=True)
            self.encoder.encode(plan, group, out=rows[first : first + len(group)].view(-1, hidden))
        return rows.to(self.device, self.dtype)

    def interleav_wrap_chat(
        self, tokenizer, query: str, image, history=(), meta_instruction: "str | None" = DEFAULT_META_INSTRUCTION
    ) -> "tuple[dict[str, torch.Tensor], torch.Tensor]":
        """Wraps a query, its history and images: ``({"inputs_embeds": [1, L, H]}, im_mask bool [1, L])``.

        ``tokenizer`` is not used: the encoder has that of its checkpoint. ``image``: what ``encode_img`` returned, or
        several of those concatenated on dimension 0, or a list of them, or anything that ``encode_img`` takes; one for
        each marker of history and query, in order.

        Raises MarkerCountError, a ValueError, where upstream raises ``Invalid <ImageHere> prompt format.``
        """
        del tokenizer
        features = self._features(image)
        meta_instruction = None if meta_instruction == "" else meta_instruction  # as upstream has it
        turns = [(question, answer) for question, answer in history]
        plan = self.encoder.plan(query, len(features), history=turns, meta_instruction=meta_instruction)
        sequence = self.encoder.encode(plan, features)
        for warning in sequence.warnings:
            warnings.warn(warning, stacklevel=2)
        embeds = torch.from_dlpack(sequence.inputs_embeds).to(self.device, self.dtype)
        im_mask = torch.from_dlpack(sequence.im_mask).to(self.device, copy=True)
        return {"inputs_embeds": embeds}, im_mask

    def _features(self, image) -> "list[Features]":
        """The features of a call, in order."""
        if image is None:
            return []
        if isinstance(image, Features):
            return [image]
        if isinstance(image, (list, tuple)):
            if any(isinstance(one, (Features, torch.Tensor)) for one in image):
                return [features for one in image for features in self._features(one)]
            return self.encoder.features(image)
        if isinstance(image, torch.Tensor):
            # fp16 rows come back from any other dtype as what they were, or, from bf16, to the same bf16.
            rows = image if image.ndim == 3 else self.encode_img(image)
            return self.encoder.adopt_features(rows.detach().to("cpu", torch.float16).contiguous())
        return self.encoder.features([image])


def attach(model: torch.nn.Module, encoder: Encoder) -> Upstream:
    """Gives a model loaded by upstream's code these two functions, so that its ``chat`` takes several images.

    Device and dtype are those of the model's weights. Its vision tower is not used any more.
    """
    weight = next(model.parameters())
    upstream = Upstream(encoder, dtype=weight.dtype, device=weight.device)
    model.encode_img = upstream.encode_img
    model.interleav_wrap_chat = upstream.interleav_wrap_chat
    return upstream


def stop_reason(ids, max_new_tokens: int, stop_tokens=STOP_TOKENS) -> str:
    """Says why generation ended: ``"stop"``, the model ended its turn; ``"length"``, it was cut at ``max_new_tokens``.

    ``ids``: the new tokens of one answer, as ``generate(inputs_embeds=...)`` returns them. Upstream's ``chat`` does not
    tell: a cut answer looks like a short one.
    """
    ids = [int(i) for i in (ids.flatten().tolist() if isinstance(ids, torch.Tensor) else ids)]
    if any(i in stop_tokens for i in ids):
        return "stop"
    if len(ids) < max_new_tokens:
        raise errors.ArgumentError(
            f"{len(ids)} tokens of at most {max_new_tokens}, and none of them ends the turn ({list(stop_tokens)}). "
            "Give the tokens with the one that ended them, or the tokens that end a turn"
        )
    return "length"


def _pixels(tensor: torch.Tensor, side: int) -> "list":
    """The images that a normalised tensor [N, 3, S, S] was made of, as uint8 arrays [S, S, 3]."""
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != (3, side, side):
        raise errors.ArgumentError(
            f"the tensor has shape {list(tensor.shape)}. Give [N, 3, {side}, {side}], as `vis_processor` makes it, or paths"
        )
    exact = tensor.detach().to("cpu", torch.float64)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (_MEAN, _STD))
    levels = (exact * std + mean) * 255
    whole = levels.round()
    if not bool(((levels - whole).abs() < 0.25).all()) or whole.min() < 0 or whole.max() > 255:
        raise errors.ArgumentError(
            "the tensor is no image normalised by CLIP's mean and deviation. Give what `vis_processor` makes, or paths"
        )
    images = whole.to(torch.uint8).permute(0, 2, 3, 1)
    return [memoryview(bytes(image.flatten().tolist())).cast("B", (side, side, 3)) for image in images]

"""InternLM2 with PLoRA in torch, small and random, and upstream's way of wrapping a chat, both written from the
specification of InternLM-XComposer2-VL-7B for these tests: what our sequences are meant for."""

import torch
import torch.nn.functional as F
from torch import nn

HEADS, KV_HEADS, RANK = 4, 2, 8


class PLoRA(nn.Linear):
    """y = W x, and, in the rows of images alone, + B A x."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.Plora_A = nn.Linear(inputs, RANK, bias=False)
        self.Plora_B = nn.Linear(RANK, outputs, bias=False)

    def forward(self, x, im_mask):
        y = super().forward(x)
        if im_mask is not None and im_mask.any():
            y[im_mask] += self.Plora_B(self.Plora_A(x[im_mask]))
        return y


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        exact = x.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * exact.to(x.dtype)


def rotate(x):
    """Rotary positions of x [B, heads, L, D], halves paired."""
    length, size = x.shape[-2:]
    frequencies = 1e6 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Layer(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.size = hidden // HEADS
        self.attention_norm, self.ffn_norm = RMSNorm(hidden), RMSNorm(hidden)
        self.wqkv = PLoRA(hidden, (HEADS + 2 * KV_HEADS) * self.size)
        self.wo = PLoRA(hidden, hidden)
        self.w1, self.w3 = PLoRA(hidden, 2 * hidden), PLoRA(hidden, 2 * hidden)
        self.w2 = PLoRA(2 * hidden, hidden)

    def forward(self, h, im_mask):
        batch, length, hidden = h.shape
        group = HEADS // KV_HEADS
        qkv = self.wqkv(self.attention_norm(h), im_mask).view(batch, length, KV_HEADS, group + 2, self.size)
        query = qkv[..., :group, :].reshape(batch, length, HEADS, self.size).transpose(1, 2)
        key, value = (qkv[..., group + i, :].transpose(1, 2).repeat_interleave(group, 1) for i in range(2))
        scores = rotate(query) @ rotate(key).transpose(-1, -2) / self.size**0.5
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
        mixed = scores.float().softmax(-1).to(h.dtype) @ value
        h = h + self.wo(mixed.transpose(1, 2).reshape(batch, length, hidden), im_mask)
        x = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(x, im_mask)) * self.w3(x, im_mask), im_mask)


class Model(nn.Module):
    """The language model, with the token embeddings of a checkpoint."""

    def __init__(self, embeddings, layers=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        vocab, hidden = embeddings.shape
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings.clone())
        self.layers = nn.ModuleList(Layer(hidden) for _ in range(layers))
        self.norm, self.output = RMSNorm(hidden), nn.Linear(hidden, vocab, bias=False)

    def forward(self, inputs_embeds, im_mask=None):
        h = inputs_embeds
        for layer in self.layers:
            h = layer(h, im_mask)
        return self.output(self.norm(h)).float()

    @torch.no_grad()
    def generate(self, inputs_embeds, im_mask=None, max_new_tokens=20, eos_token_id=(2,)):
        """Greedy. The new tokens, [1, n], with the one that ended them. The mask is not of new tokens."""
        ids = []
        while len(ids) < max_new_tokens:
            ids.append(int(self(inputs_embeds, im_mask)[0, -1].argmax()))
            if ids[-1] in eos_token_id:
                break
            token = self.tok_embeddings(torch.tensor([[ids[-1]]]))
            inputs_embeds = torch.cat([inputs_embeds, token], 1)
            if im_mask is not None:
                im_mask = F.pad(im_mask, (0, 1))
        return torch.tensor([ids])


def wrap(embeddings, tokenize, query, images, meta):
    """Upstream's `interleav_wrap_chat` for one turn: embeds [1, L, H] and mask [1, L]."""
    begin, end = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]\n"
    prompt = f"{begin}system\n{meta}{end}" if meta else ""
    prompt += f"{begin}user\n{query}{end}{begin}assistant\n"
    parts = prompt.split("<ImageHere>")
    if len(parts) != len(images) + 1:
        raise ValueError("Invalid <ImageHere> prompt format.")
    embeds, mask = [], []
    for i, part in enumerate(parts):
        if part:
            rows = embeddings[torch.tensor(tokenize(part))]
            embeds.append(rows)
            mask += [False] * len(rows)
        if i < len(images):
            embeds.append(images[i])
            mask += [True] * len(images[i])
    return torch.cat(embeds)[None], torch.tensor([mask])

"""A small text encoder that reads bytes: no vocabulary, no download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.errors import InputError
from apt.kernels import attention
from apt.models.conditions import TextCondition
from apt.models.registry import TEXT_ENCODERS


@dataclass(frozen=True, kw_only=True)
class ByteEncoderConfig:
    """Options of `ByteTextEncoder`.

    Attributes:
        width: embedding dimension E.
        depth: transformer blocks over the words.
        num_heads: attention heads.
        byte_width: embedding dimension of a byte.
        max_length: words in a prompt, at most.
        max_word_bytes: bytes in a word, at most.
        alphabet: "utf8" takes any text; "ascii" refuses other characters, which a model trained on
            ASCII captions has never seen.
    """

    width: int = 128
    depth: int = 2
    num_heads: int = 4
    byte_width: int = 64
    max_length: int = 64
    max_word_bytes: int = 32
    alphabet: Literal["ascii", "utf8"] = "utf8"

    def build(self) -> ByteTextEncoder:
        return ByteTextEncoder(self)


class ByteTextEncoder(nn.Module):
    """Bytes to one token per word, then a transformer over the words.

    A word's bytes, with their places in the word, go through a small convolution and are averaged,
    so the same word gives the same token wherever it stands. A learned token leads every prompt and
    is all that an empty prompt has.
    """

    def __init__(self, config: ByteEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_dim = config.width
        self.max_length = config.max_length
        b, d = config.byte_width, config.width
        self.byte_embedding = nn.Embedding(256, b)
        self.place_embedding = nn.Parameter(torch.randn(config.max_word_bytes, b) * 0.1)
        self.conv = nn.Conv1d(b, b, kernel_size=3, padding=1)
        self.word_projection = nn.Linear(b, d)
        self.lead_token = nn.Parameter(torch.randn(d) * 0.1)
        self.position_embedding = nn.Parameter(torch.randn(config.max_length + 1, d) * 0.1)
        self.blocks = nn.ModuleList(_Block(d, config.num_heads) for _ in range(config.depth))
        self.norm = nn.RMSNorm(d, eps=1e-6)

    def forward(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts to tokens (R, S, E), S = 1 + the longest prompt's words, and their mean.

        Raises:
            InputError: for a prompt with control characters, characters outside the alphabet, too
                many words or too long a word.
        """
        words = [self._split(prompt) for prompt in prompts]
        longest = max((len(row) for row in words), default=0)
        place = self.place_embedding
        mask = torch.zeros(len(words), longest + 1, dtype=torch.bool, device=place.device)
        mask[:, 0] = True
        tokens = self.lead_token.expand(len(words), 1, -1)
        flat = [word for row in words for word in row]
        # Ranks must agree on which weights have gradients, also one whose prompts are all empty.
        vectors = self._encode_words(flat or [b" "])
        if flat:
            for i, row in enumerate(words):
                mask[i, 1 : len(row) + 1] = True
            table = vectors.new_zeros(len(words), longest, vectors.shape[-1])
            tokens = torch.cat([tokens, table.masked_scatter(mask[:, 1:, None], vectors)], dim=1)
        else:
            tokens = tokens + 0 * vectors.sum()
        tokens = tokens + self.position_embedding[: longest + 1]
        padding = None if all(len(row) == longest for row in words) else mask
        for block in self.blocks:
            tokens = block(tokens, padding)
        tokens = self.norm(tokens)
        weight = mask[..., None].to(tokens.dtype)
        pooled = (tokens * weight).sum(dim=1) / weight.sum(dim=1)
        return TextCondition(tokens, padding, pooled)

    def _encode_words(self, words: list[bytes]) -> Tensor:
        """(N, E) for N words."""
        device = self.place_embedding.device
        lengths = torch.tensor([len(word) for word in words], device=device)
        longest = int(lengths.max())
        ids = torch.tensor([list(word.ljust(longest, b"\0")) for word in words], device=device)
        valid = (torch.arange(longest, device=device) < lengths[:, None])[..., None]
        hidden = (self.byte_embedding(ids) + self.place_embedding[:longest]) * valid
        hidden = hidden + F.gelu(self.conv(hidden.transpose(1, 2)).transpose(1, 2))
        mean = (hidden * valid).sum(dim=1) / lengths[:, None]
        return self.word_projection(mean)

    def _split(self, prompt: str) -> list[bytes]:
        bad = [ch for ch in prompt if not (ch.isprintable() or ch.isspace())]
        if self.config.alphabet == "ascii":
            bad += [ch for ch in prompt if not ch.isascii()]
        if bad:
            names = ", ".join(sorted({f"{ch!r} (U+{ord(ch):04X})" for ch in bad}))
            raise InputError(
                f"the prompt {prompt!r} has characters that this encoder does not know: {names}; "
                f"use printable {self.config.alphabet.upper()} text"
            )
        words = [word.encode() for word in prompt.split()]
        if len(words) > self.max_length:
            raise InputError(
                f"the prompt has {len(words)} words, at most {self.max_length} fit; shorten it"
            )
        for word in words:
            if len(word) > self.config.max_word_bytes:
                raise InputError(
                    f"the word {word.decode()!r} has {len(word)} bytes, at most "
                    f"{self.config.max_word_bytes} fit; shorten it"
                )
        return words


class _Block(nn.Module):
    """A plain pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.unbind(dim=2)
        x = x + self.out(attention(q, k, v, mask=mask).flatten(2))
        return x + self.mlp(self.norm2(x))


@TEXT_ENCODERS.register("bytes")
def byte_encoder() -> ByteEncoderConfig:
    """Small byte-level encoder, trained with the diffusion model; no download."""
    return ByteEncoderConfig()

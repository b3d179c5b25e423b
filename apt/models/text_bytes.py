"""A small byte-level text encoder, which needs no vocabulary and no download."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from apt.condition import EncodedText, PromptCheck, TextEncoder
from apt.errors import InputError, PromptLengthError
from apt.kernels import attention
from apt.models.architectures import TEXT_ENCODERS

_NGRAM = 3


@dataclass(frozen=True, kw_only=True)
class ByteEncoderConfig:
    """Options of `ByteTextEncoder`.

    Attributes:
        width: embedding dimension E.
        depth: transformer blocks over the words.
        num_heads: attention heads.
        num_buckets: rows of the embedding table that words and their trigrams are hashed into.
        max_length: maximum number of words in a prompt.
        max_word_bytes: maximum number of bytes in a word.
        alphabet: "utf8" accepts any text; "ascii" rejects other characters, which a model trained
            on ASCII captions has never seen.
    """

    width: int = 128
    depth: int = 2
    num_heads: int = 4
    num_buckets: int = 4096
    max_length: int = 64
    max_word_bytes: int = 32
    alphabet: Literal["ascii", "utf8"] = "utf8"

    def build(self) -> ByteTextEncoder:
        return ByteTextEncoder(self)

    def prompt_check(self) -> PromptCheck:
        """Return the encoder's check of prompts."""
        return partial(_check, config=self)


class ByteTextEncoder(TextEncoder):
    """Makes one token per word from its bytes, then runs a transformer over the words.

    A word's token is the embedding of the whole word plus the mean embedding of its byte trigrams,
    all hashed into one table (Bojanowski et al. 2017): each word is learned directly, and a new
    word still resembles similar ones. Every prompt starts with a learned token, the only one of an
    empty prompt.
    """

    def __init__(self, config: ByteEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_dim = d = config.width
        self.max_length = config.max_length
        self.embedding = nn.Embedding(config.num_buckets, d)
        self.lead_token = nn.Parameter(torch.randn(d))
        self.position_embedding = nn.Parameter(torch.randn(config.max_length + 1, d) * 0.1)
        self.blocks = nn.ModuleList(_Block(d, config.num_heads) for _ in range(config.depth))
        self.norm = nn.RMSNorm(d, eps=1e-6)

    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts to tokens (R, S, E), S = 1 + words of the longest, and a pooled vector.

        The pooled vector is the sum of the tokens, divided by the square root of their number: a
        mean would leave too little of the one word in which two prompts differ.

        Raises:
            InputError: for a prompt with control characters, characters outside the alphabet, too
                many words, or a word that is too long.
        """
        words = [_split(prompt, self.config) for prompt in prompts]
        longest = max((len(row) for row in words), default=0)
        device = self.lead_token.device
        lengths = torch.tensor([len(row) for row in words])
        mask = (torch.arange(longest + 1) <= lengths[:, None]).to(device)
        tokens = self.lead_token.expand(len(words), 1, -1)
        flat = [word for row in words for word in row]
        # All ranks must have gradients for the same weights, even if all prompts of one are empty.
        vectors = self._encode_words(flat or [b" "])
        if flat:
            # Indices come from the CPU: indexing with a mask on the GPU would need a sync.
            firsts = lengths.cumsum(0) - lengths
            places = firsts[:, None] + torch.arange(longest)
            places = places.where(torch.arange(longest) < lengths[:, None], len(flat)).to(device)
            padded = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[-1])])
            table = padded.index_select(0, places.flatten()).unflatten(0, places.shape)
            tokens = torch.cat([tokens, table], dim=1)
        else:
            tokens = tokens + 0 * vectors.sum()
        tokens = tokens + self.position_embedding[: longest + 1]
        padding = None if all(len(row) == longest for row in words) else mask
        for block in self.blocks:
            tokens = block(tokens, padding)
        tokens = self.norm(tokens)
        weight = mask[..., None].to(tokens.dtype)
        pooled = (tokens * weight).sum(dim=1) / weight.sum(dim=1).sqrt()
        return EncodedText(tokens, padding, pooled)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise InputError if `forward` would."""
        _check(prompts, config=self.config)

    def _encode_words(self, words: list[bytes]) -> Tensor:
        """Return vectors (N, E) of N words."""
        rows = [[_bucket(part, self.config.num_buckets) for part in _parts(w)] for w in words]
        longest = max(len(row) for row in rows)
        device = self.embedding.weight.device
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        vectors = self.embedding(ids)
        # The first part is the word itself, the others are its trigrams.
        valid = torch.arange(1, longest, device=device) < lengths[:, None]
        weight = valid.to(vectors.dtype) / (lengths[:, None] - 1)
        return vectors[:, 0] + torch.einsum("nk,nke->ne", weight, vectors[:, 1:])


def _check(prompts: Sequence[str], *, config: ByteEncoderConfig) -> None:
    for prompt in prompts:
        _split(prompt, config)


def _split(prompt: str, config: ByteEncoderConfig) -> list[bytes]:
    bad = [ch for ch in prompt if not (ch.isprintable() or ch.isspace())]
    if config.alphabet == "ascii":
        bad += [ch for ch in prompt if not ch.isascii()]
    if bad:
        names = ", ".join(sorted({f"{ch!r} (U+{ord(ch):04X})" for ch in bad}))
        raise InputError(
            f"the prompt {prompt!r} has characters that this text encoder does not support: "
            f"{names}; use printable {config.alphabet.upper()} text"
        )
    words = [word.encode() for word in prompt.split()]
    if len(words) > config.max_length:
        raise PromptLengthError(
            f"the prompt has {len(words)} words, but at most {config.max_length} fit; shorten it"
        )
    for word in words:
        if len(word) > config.max_word_bytes:
            raise InputError(
                f"the word {word.decode()!r} has {len(word)} bytes, but at most "
                f"{config.max_word_bytes} fit; shorten it"
            )
    return words


def _parts(word: bytes) -> list[bytes]:
    """Return the word between start and end markers, and the byte trigrams of that."""
    marked = b"<" + word + b">"
    return [marked, *(marked[i : i + _NGRAM] for i in range(len(marked) - _NGRAM + 1))]


def _bucket(part: bytes, num_buckets: int) -> int:
    # Python's hash differs between processes.
    return zlib.crc32(part) % num_buckets


class _Block(nn.Module):
    """A plain pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        contract = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), contract)
        # Start near the identity: otherwise a random mixture of all words hides each of them.
        for layer in (self.out, contract):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.unbind(dim=2)
        x = x + self.out(attention(q, k, v, mask=mask).flatten(2))
        return x + self.mlp(self.norm2(x))


@TEXT_ENCODERS.register("bytes")
def byte_encoder() -> ByteEncoderConfig:
    """Small byte-level encoder, trained with the diffusion model; no download."""
    return ByteEncoderConfig()

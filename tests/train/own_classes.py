"""The smallest possible parts of a user's own, which the package does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from apt.condition import Condition, EncodedText, PromptCheck, TextEncoder
from apt.data.source import ClipRequest, DataSource
from apt.errors import InputError, PromptLengthError
from apt.losses import UnpairedObjective
from apt.models.transformer import Context, DiffusionTransformer, Tokens, TransformerBlock
from apt.pixels import LatentCodec

CLIP = (5, 8, 8)
CAPTIONS = ("a bar moving down", "a bar moving up")
_LONGEST = 6


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """A mixer of tokens."""

    in_channels: int = 12
    hidden_size: int = 16
    depth: int = 2
    text_dim: int = 8

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        t, h, w = latent_shape
        return t, h, w

    def build(self) -> Mixer:
        return Mixer(self)


class MixerBlock(TransformerBlock):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        h = tokens.visual
        h = h + self.mlp(self.norm(h) + h.mean(dim=1, keepdim=True) + context.modulation)
        return Tokens(h, tokens.text)


class Mixer(DiffusionTransformer):
    output_names: ClassVar[tuple[str, ...]] = ("out",)

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.inner = nn.Linear(config.in_channels, width)
        self.time = nn.Linear(1, width)
        self.text = nn.Linear(config.text_dim, width)
        self.blocks = nn.ModuleList(MixerBlock(width) for _ in range(config.depth))
        self.out = nn.Linear(width, config.in_channels)

    def embed(
        self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None
    ) -> tuple[Tokens, Context]:
        words = c.text.tokens
        condition = self.time(t[:, None].to(words.dtype)) + self.text(words.mean(dim=1))
        if rows is not None:
            condition = condition[rows]
        h = self.inner(rearrange(x, "b c t h w -> b (t h w) c"))
        return Tokens(h, words), Context(condition, condition[:, None], None)

    def unembed(self, h_BLD: Tensor, context: Context, x: Tensor, t: Tensor) -> Tensor:
        _, _, frames, height, width = x.shape
        return rearrange(self.out(h_BLD), "b (t h w) c -> b c t h w", t=frames, h=height, w=width)


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Words by their length."""

    width: int = 8

    def build(self) -> Words:
        return Words(self)

    def prompt_check(self) -> PromptCheck:
        return check_words


class Words(TextEncoder):
    max_length = _LONGEST

    def __init__(self, config: WordsConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_dim = config.width
        self.table = nn.Embedding(16, config.width)

    def forward(self, prompts: Sequence[str]) -> EncodedText:
        self.check(prompts)
        lengths = [[min(len(word), 15) for word in prompt.split()] for prompt in prompts]
        ids = [row + [0] * (_LONGEST - len(row)) for row in lengths]
        return EncodedText(self.table(torch.tensor(ids, device=self.table.weight.device)))

    def check(self, prompts: Sequence[str]) -> None:
        check_words(prompts)


def check_words(prompts: Sequence[str]) -> None:
    for prompt in prompts:
        if len(prompt.split()) > _LONGEST:
            raise PromptLengthError(f"{prompt!r} has more than {_LONGEST} words")


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """2x2 pixels in 12 channels."""

    scale: float = 1.0

    def build(self) -> Fold:
        return Fold(self)


class Fold(LatentCodec):
    channels = 12
    temporal_compression = 1
    spatial_compression = 2

    def __init__(self, config: FoldConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.tensor(config.scale), requires_grad=False)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.scale * rearrange(pixels, "b c t (h p) (w q) -> b (c p q) t h w", p=2, q=2)

    def decode(self, latents: Tensor) -> Tensor:
        whole = rearrange(latents, "b (c p q) t h w -> b c t (h p) (w q)", p=2, q=2)
        return whole / self.scale

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        if height % 2 or width % 2:
            raise InputError(f"heights and widths must be even, got {height}x{width}")
        return frames, height // 2, width // 2


class MeanHead(nn.Module):
    """The mean token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        return self.out(tokens.to(self.out.weight.dtype).mean(dim=1))


@dataclass(frozen=True)
class Margin(UnpairedObjective):
    """Hinge with a margin of a half."""

    def real_term(self, logits: Tensor) -> Tensor:
        return F.relu(0.5 - logits).mean()

    def fake_term(self, logits: Tensor) -> Tensor:
        return F.relu(0.5 + logits).mean()

    def generator(self, logits_fake: Tensor, logits_real: Tensor | None = None) -> Tensor:
        return -logits_fake.mean()


class Bars(torch.utils.data.Dataset[tuple[Tensor, str]]):
    """White bars that move down or up."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        frames, height, width = CLIP
        pixels = torch.full((3, frames, height, width), -1.0)
        for frame in range(frames):
            row = (index + (frame if index % 2 == 0 else -frame)) % height
            pixels[:, frame, row] = 1.0
        return pixels, CAPTIONS[index % 2]


@dataclass(frozen=True, kw_only=True)
class BarsSource(DataSource):
    """Moving bars."""

    names_folders: ClassVar[tuple[str, ...]] = ("notes",)

    count: int = 4
    notes: str = ""

    def open(self, request: ClipRequest) -> Bars:
        return Bars(self.count)

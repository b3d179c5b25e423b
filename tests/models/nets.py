"""Backbones that are small enough for tests, random in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.models import create_model
from apt.models.mmdit import MMDiT

CHANNELS, TEXT_DIM, POOLED_DIM = 4, 8, 6


def tiny_mmdit(seed: int = 0, **overrides: Any) -> MMDiT:
    """Width 24, 3 heads, 3 blocks; no layer is left at its initial zeros."""
    shape: dict[str, Any] = {
        "in_channels": CHANNELS,
        "hidden_size": 24,
        "depth": 3,
        # 8 channels a head: 4 turn with time, 2 with height and 2 with width.
        "num_heads": 3,
        "text_dim": TEXT_DIM,
    }
    model = create_model("mmdit_small", **{**shape, **overrides})
    assert isinstance(model, MMDiT)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def inputs(
    samples: int = 2,
    size: tuple[int, int, int] = (2, 4, 6),
    *,
    words: int = 5,
    lengths: list[int] | None = None,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Condition]:
    """Latents, timesteps and text; `lengths` are numbers of real tokens, the rest is padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, CHANNELS, *size, generator=generator)
    t = torch.rand(samples, generator=generator)
    tokens = torch.randn(samples, words, TEXT_DIM, generator=generator)
    mask = None
    if lengths is not None:
        mask = torch.arange(words) < torch.tensor(lengths)[:, None]
    pooled = torch.randn(samples, POOLED_DIM, generator=generator)
    return x, t, Condition(EncodedText(tokens, mask, pooled))

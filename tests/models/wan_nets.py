"""Tiny Wans, ours and diffusers' with the same random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.models import FAMILIES
from apt.models.wan import Wan

CHANNELS, TEXT_DIM, TEXT_LENGTH = 4, 10, 9


def tiny_peer(seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    """2 heads of 12, 2 blocks; random in every parameter, norms around 1."""
    options: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 20,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    peer = WanTransformer3DModel(**{**options, **overrides})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peer.named_parameters():
        is_norm = ".norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, float(is_norm), 0.2, generator=generator)
    return peer


def ours_of(peer: WanTransformer3DModel, *, text_length: int = TEXT_LENGTH) -> Wan:
    """Our module with the peer's weights."""
    family = FAMILIES.create("wan")
    config = family.from_diffusers(dict(peer.config))
    model = type(config)(**{**vars(config), "text_length": text_length}).build()
    assert isinstance(model, Wan)
    model.load_state_dict(peer.state_dict())
    return model


def tiny_wan(seed: int = 0, **overrides: Any) -> Wan:
    return ours_of(tiny_peer(seed, **overrides))


def wan_inputs(
    samples: int = 2,
    size: tuple[int, int, int] = (2, 4, 6),
    *,
    lengths: list[int] | None = None,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Condition]:
    """Latents, timesteps, and text; `lengths` are numbers of words, behind them is padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, CHANNELS, *size, generator=generator)
    t = torch.rand(samples, generator=generator)
    words = TEXT_LENGTH if lengths is None else max(lengths)
    tokens = torch.randn(samples, words, TEXT_DIM, generator=generator)
    mask = None
    if lengths is not None:
        mask = torch.arange(words) < torch.tensor(lengths)[:, None]
    return x, t, Condition(EncodedText(tokens, mask))


def peer_text(c: Condition, length: int = TEXT_LENGTH) -> Tensor:
    """Text as diffusers' pipeline gives it: zeros behind the words, up to the length."""
    tokens = torch.zeros(len(c), length, c.text.tokens.shape[2], dtype=c.text.tokens.dtype)
    for row in range(len(c)):
        words = c.text.tokens[row] if c.text.mask is None else c.text.tokens[row, c.text.mask[row]]
        tokens[row, : len(words)] = words
    return tokens


def run_peer(peer: WanTransformer3DModel, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    """The peer's prediction for our t in [0, 1]."""
    return peer(x, 1000 * t, peer_text(c), return_dict=False)[0]


def relative_error(value: Tensor | None, expected: Tensor | None) -> float:
    """The largest difference over the largest expected value."""
    assert value is not None and expected is not None
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max())

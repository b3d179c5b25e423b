"""What families share: token grids, positions, timesteps, rows of conditions, MLPs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.condition import Condition
from apt.errors import ConfigError, InputError
from apt.kernels.modulated_norm import take_rows

_LARGEST_PATCH = 16


def token_grid(latent_shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    """Tokens along (T, H, W); raises InputError if the patch size does not divide."""
    for name, size, patch in zip(
        ("frames", "height", "width"), latent_shape, patch_size, strict=True
    ):
        if size < patch or size % patch:
            raise InputError(f"latent {name} {size} is not a multiple of the patch, {patch}")
    t, h, w = (size // patch for size, patch in zip(latent_shape, patch_size, strict=True))
    return t, h, w


def tokens_multiple(backbone_config: Any) -> int:
    """Latents along a side of a frame that become one token: the patch of a backbone.

    Raises ConfigError for a patch that is no square of at most 16.
    """
    for side in range(1, _LARGEST_PATCH + 1):
        try:
            backbone_config.token_grid((1, side, side))
        except InputError:
            continue
        return side
    raise ConfigError(
        f"{type(backbone_config).__name__} tells no patch of height and width; set "
        "--data.size-multiple to the pixels that become one token"
    )


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raise InputError unless there are layers and all are blocks, counted from 1."""
    if not layers or min(layers) < 1 or max(layers) > depth:
        raise InputError(f"layers must lie in 1..{depth}, got {list(layers)}")


def check_rows(
    x: Tensor, t: Tensor, c: Condition, rows: Tensor | None, *, num_tokens: int | None = None
) -> None:
    """Raise InputError unless t (R,) and c (R rows) fit x (B, ...) and rows (B,).

    `num_tokens` L also allows a timestep per token, (R, L).
    """
    if rows is not None and (rows.shape != x.shape[:1] or rows.dtype != torch.int64):
        raise InputError(
            f"rows must be ({x.shape[0]},) int64, the row of each sample, got "
            f"{tuple(rows.shape)} {rows.dtype}"
        )
    num_rows = x.shape[0] if rows is None else t.shape[0]
    per_token = num_tokens is not None and t.shape == (num_rows, num_tokens)
    if (t.shape != (num_rows,) and not per_token) or len(c) != num_rows:
        shape = f"({num_rows},)" + (f" or ({num_rows}, {num_tokens})" if num_tokens else "")
        raise InputError(
            f"{x.shape[0]} samples need {num_rows} timesteps and conditions, timesteps of shape "
            f"{shape}; got {tuple(t.shape)} and {len(c)} conditions; pass `rows` to share them"
        )


def check_extra(c: Condition, names: Collection[str]) -> None:
    """Raise InputError for something given beside the text that a model does not read."""
    unread = sorted(c.extra.keys() - set(names))
    if unread:
        known = ", ".join(sorted(names)) or "text alone"
        raise InputError(
            f"this model does not read {', '.join(unread)} of a condition; it reads {known}"
        )


def extra_condition(c: Condition, name: str) -> Tensor:
    """What is given under a name, (R, ...); raises InputError if it is not."""
    if name not in c.extra:
        raise InputError(
            f"this model needs {name!r} beside the text, got {', '.join(c.extra) or 'text alone'}"
        )
    return c.extra[name]


def text_tokens(c: Condition, size: int) -> Tensor:
    """The embeddings (R, S, E) of text; raises InputError unless E is `size`."""
    if c.text.tokens.shape[2] != size:
        raise InputError(
            f"this model needs text tokens of {size} dimensions, got {c.text.tokens.shape[2]}; use "
            "the text encoder that it was trained with"
        )
    return c.text.tokens


def pooled_text(c: Condition, size: int) -> Tensor:
    """The pooled vectors (R, P) of text; raises InputError unless it has them and P is `size`."""
    pooled = c.text.pooled
    if pooled is None or pooled.shape[1] != size:
        given = "none" if pooled is None else tuple(pooled.shape)
        raise InputError(
            f"this model needs text with a pooled vector of {size} dimensions, got {given}; use "
            "the text encoder that it was trained with"
        )
    return pooled


def joint_mask(c: Condition, rows: Tensor | None, num_visual: int) -> Tensor | None:
    """Keys (B, L + S) that count when visual and text tokens attend jointly; None if all do."""
    if c.text.mask is None:
        return None
    mask = take_rows(c.text.mask, rows)
    return torch.cat([mask.new_ones(len(mask), num_visual), mask], dim=1)


def timestep_sinusoids(time: Tensor, size: int) -> Tensor:
    """Cosines, then sines (..., size) fp32 of times (...) in diffusers' scale, 1000 t.

    In fp32 and in diffusers' order of operations: the angles reach 1000, where one ulp is visible.
    """
    half = size // 2
    index = torch.arange(half, dtype=torch.float32, device=time.device)
    frequencies = torch.exp(-math.log(10_000) * index / half)
    angles = time.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=64)
def rope_table(
    grid: tuple[int, int, int], head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, Dh / 2) fp32 of 3D rotary positions.

    Height and width get a third of the dimensions each (rounded down to even), time the rest.
    """
    spatial = head_dim // 6 * 2
    sizes = (head_dim - 2 * spatial, spatial, spatial)
    axes = []
    # Kept for later callers, who may train: then it is saved for their backward passes.
    with torch.inference_mode(False):
        for length, size in zip(grid, sizes, strict=True):
            frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            axes.append(torch.arange(length, dtype=torch.float64)[:, None] * frequencies)
        t, h, w = grid
        angles = torch.cat(
            [
                axes[0][:, None, None].expand(t, h, w, -1),
                axes[1][None, :, None].expand(t, h, w, -1),
                axes[2][None, None, :].expand(t, h, w, -1),
            ],
            dim=-1,
        ).reshape(t * h * w, head_dim // 2)
        return angles.cos().float().to(device), angles.sin().float().to(device)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear; numbered as in diffusers, where a dropout of 0 is number 1."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(hidden_size, mlp_size), nn.Identity(), nn.Linear(mlp_size, hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GELUProjection(nn.Module):
    """The first layer and activation of a `FeedForward`."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, mlp_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")

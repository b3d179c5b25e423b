"""Layers and tables that families share, and descriptions of a module's weights."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_sinusoids(time: Tensor, size: int) -> Tensor:
    """Return cosines, then sines (..., size) fp32 of times (...) in diffusers' scale, 1000 t.

    Computed in fp32 and in diffusers' order of operations: angles reach 1000, where an error of one
    ulp is visible.
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
    """Return cosines and sines (L, Dh / 2) fp32 of 3D rotary positions.

    Height and width each get a third of the dimensions, rounded down to even; time gets the rest.
    """
    spatial = head_dim // 6 * 2
    sizes = (head_dim - 2 * spatial, spatial, spatial)
    axes = []
    # Later callers get the cached table and may train, but autograd cannot save inference tensors.
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
    """Linear, tanh-GELU, linear; numbered as in diffusers, where number 1 is a dropout of 0."""

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


@torch.no_grad()
def keep_rows(layer: nn.Linear, *rows: slice) -> nn.Linear:
    """Return a linear layer with some of another's outputs, in the given order, on its device.

    Its `stored_rows` says which, for weights that will be loaded from a file.
    """
    weight = torch.cat([layer.weight[part] for part in rows])
    kept: Any = nn.Linear(
        layer.in_features, len(weight), bias=layer.bias is not None, device="meta"
    )
    kept.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = torch.cat([layer.bias[part] for part in rows])
        kept.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    kept.stored_rows = rows
    return cast(nn.Linear, kept)

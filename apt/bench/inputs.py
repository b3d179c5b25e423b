"""Random inputs of ops at a shape.

Shapes: B samples, L tokens (S of text), D channels, H heads, Dh channels per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apt.bench.shapes import Shape

Inputs = dict[str, Any]  # tensors, and a few plain values, by the names of arguments


@dataclass(frozen=True)
class Random:
    """Draws values anew for every case: zeros would be faster, and hide mistakes."""

    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """N(0, 1) in the case's dtype, or another."""
        device = self.generator.device
        values = torch.randn(size, generator=self.generator, device=device)
        return values.to(dtype or self.dtype)

    def norm_weight(self, size: int) -> Tensor:
        """Around 1, as the weights of norms are."""
        return 1 + 0.1 * self.normal(size)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Of a linear layer that keeps the variance."""
        return self.normal(rows, columns) * columns**-0.5

    def rotation(self, shape: Shape) -> Inputs:
        """Tables cos, sin (L, Dh / 2) in fp32."""
        angles = 10 * self.normal(shape.tokens, shape.head_dim // 2, dtype=torch.float32)
        return {"cos": angles.cos(), "sin": angles.sin()}


def tokens(shape: Shape, random: Random, *names: str) -> Inputs:
    """(B, L, D) for each name."""
    return {name: random.normal(shape.batch, shape.tokens, shape.width) for name in names}


def modulation(shape: Shape, random: Random, *names: str) -> Inputs:
    """(B, D) for each name: one row a sample."""
    return {name: random.normal(shape.batch, shape.width) for name in names}


def heads(shape: Shape, random: Random, *names: str) -> Inputs:
    """(B, L, H, Dh) for each name."""
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return {name: random.normal(*size) for name in names}


def latents(shape: Shape, random: Random, *names: str) -> Inputs:
    """(B, values) for each name."""
    return {name: random.normal(shape.batch, shape.latent_values) for name in names}


def queries(shape: Shape, random: Random) -> Inputs:
    """x, its weight and tables."""
    weight = {"weight": random.norm_weight(shape.head_dim)}
    return heads(shape, random, "x") | weight | random.rotation(shape)


def qk(shape: Shape, random: Random) -> Inputs:
    """q, k, their weights and tables."""
    weights = {name: random.norm_weight(shape.head_dim) for name in ("q_weight", "k_weight")}
    return heads(shape, random, "q", "k") | weights | random.rotation(shape)


def text_tokens(shape: Shape) -> int:
    """S beside the visual tokens: 256 at the sizes of videos, fewer at small ones."""
    return max(min(256, shape.tokens // 8), 1)


def joint_qkv(shape: Shape, random: Random) -> Inputs:
    """Fused projections (B, L, 3, H, Dh) of visual and text tokens, weights and tables."""
    drawn: Inputs = {}
    for stream, length in (("visual", shape.tokens), ("text", text_tokens(shape))):
        drawn[f"{stream}_qkv"] = random.normal(shape.batch, length, 3, shape.heads, shape.head_dim)
        drawn[f"{stream}_q_weight"] = random.norm_weight(shape.head_dim)
        drawn[f"{stream}_k_weight"] = random.norm_weight(shape.head_dim)
    return drawn | random.rotation(shape)


def pooling(shape: Shape, random: Random) -> Inputs:
    """Tokens, one query, and the weights of keys and values."""
    d = shape.width
    return {
        "x": random.normal(shape.batch, shape.tokens, d),
        "query": random.normal(d),
        "key_weight": random.matrix(d, d),
        "value_weight": random.matrix(d, d),
        "value_bias": random.normal(d),
        "norm_weight": random.norm_weight(d),
        "num_heads": shape.heads,
    }


def optimizer(shape: Shape, random: Random) -> Inputs:
    """As many parameters as there are token values, with gradients; fp32 averages."""
    count = shape.batch * shape.tokens * shape.width
    return {
        "parameters": random.normal(count),
        "gradients": random.normal(count),
        "square_averages": random.normal(count, dtype=torch.float32).square(),
        "averages": random.normal(count, dtype=torch.float32),
    }


def exact(inputs: Mapping[str, Any]) -> Inputs:
    """The same values in fp64, as leaves of their own."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def copies(inputs: Mapping[str, Any]) -> Inputs:
    """Tensors of their own, for an op that writes to its inputs."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}

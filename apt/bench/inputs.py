"""Random inputs for ops at a shape.

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
    """Draws random values for a case: zeros would be faster and would hide mistakes."""

    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw from N(0, 1) in the case's dtype, or in another."""
        device = self.generator.device
        values = torch.randn(size, generator=self.generator, device=device)
        return values.to(dtype or self.dtype)

    def norm_weight(self, size: int) -> Tensor:
        """Draw values around 1, as the weights of norms are."""
        return 1 + 0.1 * self.normal(size)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Draw the weight of a linear layer that keeps the variance."""
        return self.normal(rows, columns) * columns**-0.5

    def rotation(self, shape: Shape) -> Inputs:
        """Draw rotation tables cos and sin (L, Dh / 2) in fp32."""
        angles = 10 * self.normal(shape.tokens, shape.head_dim // 2, dtype=torch.float32)
        return {"cos": angles.cos(), "sin": angles.sin()}


def tokens(shape: Shape, random: Random, *names: str) -> Inputs:
    """Draw (B, L, D) for each name."""
    return {name: random.normal(shape.batch, shape.tokens, shape.width) for name in names}


def modulation(shape: Shape, random: Random, *names: str) -> Inputs:
    """Draw (B, D) for each name: one row per sample."""
    return {name: random.normal(shape.batch, shape.width) for name in names}


def heads(shape: Shape, random: Random, *names: str) -> Inputs:
    """Draw (B, L, H, Dh) for each name."""
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    return {name: random.normal(*size) for name in names}


def latents(shape: Shape, random: Random, *names: str) -> Inputs:
    """Draw (B, values) for each name."""
    return {name: random.normal(shape.batch, shape.latent_values) for name in names}


def queries(shape: Shape, random: Random) -> Inputs:
    """Draw x, its norm weight and rotation tables."""
    weight = {"weight": random.norm_weight(shape.head_dim)}
    return heads(shape, random, "x") | weight | random.rotation(shape)


def qk(shape: Shape, random: Random) -> Inputs:
    """Draw q, k, their norm weights and rotation tables."""
    weights = {name: random.norm_weight(shape.head_dim) for name in ("q_weight", "k_weight")}
    return heads(shape, random, "q", "k") | weights | random.rotation(shape)


def text_tokens(shape: Shape) -> int:
    """Return the number S of text tokens: 256 at video sizes, fewer at small ones."""
    return max(min(256, shape.tokens // 8), 1)


def joint_qkv(shape: Shape, random: Random) -> Inputs:
    """Draw fused projections (B, L, 3, H, Dh) of visual and text tokens, weights and tables."""
    drawn: Inputs = {}
    for stream, length in (("visual", shape.tokens), ("text", text_tokens(shape))):
        drawn[f"{stream}_qkv"] = random.normal(shape.batch, length, 3, shape.heads, shape.head_dim)
        drawn[f"{stream}_q_weight"] = random.norm_weight(shape.head_dim)
        drawn[f"{stream}_k_weight"] = random.norm_weight(shape.head_dim)
    return drawn | random.rotation(shape)


def pooling(shape: Shape, random: Random) -> Inputs:
    """Draw tokens, one query, and the weights of keys and values."""
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
    """Draw as many parameters as there are token values, gradients, and fp32 averages."""
    count = shape.batch * shape.tokens * shape.width
    return {
        "parameters": random.normal(count),
        "gradients": random.normal(count),
        "square_averages": random.normal(count, dtype=torch.float32).square(),
        "averages": random.normal(count, dtype=torch.float32),
    }


def exact(inputs: Mapping[str, Any]) -> Inputs:
    """Return the same values in fp64, as new leaves."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def copies(inputs: Mapping[str, Any]) -> Inputs:
    """Return copies, for an op that writes to its inputs."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}

"""What the ops take: each NamedTuple is the schema of one, and is passed on whole.

Shapes are those that the op's own file states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apt.rng import PhiloxKey


class ModulatedNorm(NamedTuple):
    """Of `modulated_norm`: a layer norm, or an RMS norm."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rows: Tensor | None
    eps: float
    layer: bool


class ResidualModulatedNorm(NamedTuple):
    """Of `residual_modulated_norm`: x of the norm is the stream to which the update is added."""

    norm: ModulatedNorm
    update: Tensor
    gate: Tensor


class RopeOptions(NamedTuple):
    """What all rows of `norm_rope` have in common; pairs lie half a head apart, or side by side."""

    eps: float
    across_heads: bool
    half: bool


class NormRope(NamedTuple):
    """Of `norm_rope` and `qk_norm_rope`: q and k, or one of the two as q."""

    q: Tensor
    k: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    options: RopeOptions


class StreamQKV(NamedTuple):
    """A stream's projection, and what to do with it.

    Attributes:
        qkv: (B, L, 3, H, Dh) queries, keys and values, or (B, L, 2, H, Dh) keys and values of a
            stream that is only attended to; floating point, Dh even. Views of a projection's
            output, or of a part of it, are taken as they are if channels are adjacent.
        q_weight, k_weight: (Dh,) of the norms, or (H Dh,) across heads; None for 1.
        cos, sin: (L, Dh/2) of the angle of each pair at each position; None for both: no rotation.
    """

    qkv: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


class Pooling(NamedTuple):
    """Of the core of `query_pooling`: x (B, L, D), folded queries a (H, D) in at least fp32."""

    x: Tensor
    folded: Tensor
    eps: float


class ShiftedTimesteps(NamedTuple):
    """Of `sample_shifted_timesteps`."""

    num: int
    shift: float
    key: PhiloxKey
    backend: str
    device: torch.device


class PerturbedBatch(NamedTuple):
    """Of `perturbed_batch`."""

    x_real: Tensor
    x_fake: Tensor
    sigma: float
    num_perturbed: int
    key: PhiloxKey
    backend: str


class RMSpropOptions(NamedTuple):
    """What the parameters of a group have in common, in `fused_rmsprop`."""

    lr: float
    alpha: float
    eps: float
    weight_decay: float


class RMSpropStep(NamedTuple):
    """Of `fused_rmsprop`: contiguous tensors, fp32 square_avgs, fp32 averages or none at all."""

    params: list[Tensor]
    grads: list[Tensor]
    square_avgs: list[Tensor]
    averages: list[Tensor]
    options: RMSpropOptions
    ema_decay: float

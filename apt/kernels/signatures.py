"""The inputs of the ops: each NamedTuple is the schema of an op, and is passed on as one object.

The file of each op states the shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apt.rng import PhiloxKey


class ModulatedNorm(NamedTuple):
    """Inputs of `modulated_norm`: a layer norm, or an RMS norm."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rows: Tensor | None
    eps: float
    layer: bool


class ResidualModulatedNorm(NamedTuple):
    """Inputs of `residual_modulated_norm`: the update is added to x of the norm."""

    norm: ModulatedNorm
    update: Tensor
    gate: Tensor


class RopeOptions(NamedTuple):
    """Options of `norm_rope`; with `half`, the channels of a pair lie half a head apart."""

    eps: float
    across_heads: bool
    half: bool


class NormRope(NamedTuple):
    """Inputs of `norm_rope` and `qk_norm_rope`: q and k, or one of the two as q."""

    q: Tensor
    k: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    options: RopeOptions


class StreamQKV(NamedTuple):
    """The projection of a stream, with norm weights and rotation.

    Attributes:
        qkv: (B, L, 3, H, Dh) queries, keys and values, or (B, L, 2, H, Dh) keys and values of a
            stream that is only attended to; floating point, Dh even. Views of a projection's
            output, or of a part of it, are not copied if channels are adjacent.
        q_weight, k_weight: (Dh,) norm weights, or (H Dh,) across heads; None for 1.
        cos, sin: (L, Dh/2) of the angle of each pair at each position; None for both: no rotation.
    """

    qkv: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


class Pooling(NamedTuple):
    """Inputs of the core of `query_pooling`: x (B, L, D), folded queries a (H, D), fp32 or fp64."""

    x: Tensor
    folded: Tensor
    eps: float


class ShiftedTimesteps(NamedTuple):
    """Inputs of `sample_shifted_timesteps`."""

    num: int
    shift: float
    key: PhiloxKey
    backend: str
    device: torch.device


class PerturbedBatch(NamedTuple):
    """Inputs of `perturbed_batch`."""

    x_real: Tensor
    x_fake: Tensor
    sigma: float
    num_perturbed: int
    key: PhiloxKey
    backend: str


class RMSpropOptions(NamedTuple):
    """Options of `fused_rmsprop`, shared by the parameters of a group."""

    lr: float
    alpha: float
    eps: float
    weight_decay: float


class RMSpropStep(NamedTuple):
    """Inputs of `fused_rmsprop`: contiguous tensors, fp32 square_avgs, fp32 averages or none."""

    params: list[Tensor]
    grads: list[Tensor]
    square_avgs: list[Tensor]
    averages: list[Tensor]
    options: RMSpropOptions
    ema_decay: float

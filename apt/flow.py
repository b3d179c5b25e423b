"""Flow matching in this project's convention: t = 0 is data, t = 1 is noise.

x_t = (1 - t) x + t z, and the velocity is v = z - x, so x = x_t - t v and at t = 1 x = z - v
(APT Eqs. 3-4). All functions are pure; `t` is (B,) and broadcasts over what follows the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.errors import InputError

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, ...), t (B,)) -> velocity (B, ...), with the condition already bound."""


def expand_timesteps(t: Tensor, like: Tensor) -> Tensor:
    """Reshape t (B,) to (B, 1, ..., 1) in the dtype of `like` (B, ...)."""
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise InputError(
            f"timesteps must have shape ({like.shape[0]},), one per sample, got {tuple(t.shape)}"
        )
    return t.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t z for data x and noise z (B, ...), t (B,) in [0, 1]."""
    t_ = expand_timesteps(t, x)
    return (1 - t_) * x + t_ * z


def velocity(x: Tensor, z: Tensor) -> Tensor:
    """v = z - x, the derivative of `interpolate` by t."""
    return z - x


def to_sample(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data that velocity v points at: x = x_t - t v (APT Eq. 4 at t = 1)."""
    return x_t - expand_timesteps(t, x_t) * v


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Move timesteps towards the noise end: s t / (1 + (s - 1) t) (APT Eq. 7).

    Args:
        t: any shape, floating point, in [0, 1].
        shift: s > 0; 1 is the identity.

    Raises:
        InputError: for s <= 0, or integer t (a sign of the [0, 1000] convention, for which the
            formula is wrong: it sends every t to about s / (s - 1)).
    """
    if not shift > 0:
        raise InputError(f"timestep shift must be positive, got {shift}")
    if not t.is_floating_point():
        raise InputError(f"timesteps must be floating point in [0, 1], got {t.dtype}")
    if not t.is_cuda and t.numel() and (t.min() < 0 or t.max() > 1):
        raise InputError("timesteps must lie in [0, 1]; divide a [0, 1000] scale by 1000 first")
    return shift * t / (1 + (shift - 1) * t)


def sampling_timesteps(num_steps: int, shift: float = 1.0) -> Tensor:
    """The grid 1 = t_0 > t_1 > ... > t_n = 0 of an Euler sampler: (num_steps + 1,) fp32."""
    if num_steps < 1:
        raise InputError(f"the number of steps must be at least 1, got {num_steps}")
    # fp64 in between, so that the first timestep is exactly 1 for any shift.
    return shift_timesteps(torch.linspace(1, 0, num_steps + 1).double(), shift).float()


def euler_sample(predict: Predict, z: Tensor, timesteps: Tensor | Sequence[float]) -> Tensor:
    """Integrate the flow from noise with explicit Euler steps.

    Args:
        predict: the velocity field.
        z: noise (B, ...), the state at timesteps[0].
        timesteps: descending; the last one is where integration stops (0 for data).
    """
    x = z
    grid = [float(t) for t in timesteps]
    for t, t_next in itertools.pairwise(grid):
        x = x - (t - t_next) * predict(x, torch.full((x.shape[0],), t, device=x.device))
    return x


def classifier_free_guidance(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """v_uncond + scale (v_cond - v_uncond); scale 1 is the conditional prediction."""
    return torch.lerp(v_uncond, v_cond, scale)


@dataclass(frozen=True, kw_only=True)
class FlowAdapter:
    """How a family's time and velocity differ from t in [0, 1], 0 is data, v = z - x.

    Attributes:
        time_scale: the family's number for t = 1.
        reversed_time: its time runs from noise to data.
        negated_velocity: it predicts x - z.
    """

    time_scale: float = 1000.0
    reversed_time: bool = False
    negated_velocity: bool = False

    def time(self, t: Tensor) -> Tensor:
        """Our t (...) in [0, 1] in the family's scale, fp32."""
        t = t.float()
        return (1 - t if self.reversed_time else t) * self.time_scale

    def velocity(self, v: Tensor) -> Tensor:
        """The family's prediction as our velocity."""
        return -v if self.negated_velocity else v

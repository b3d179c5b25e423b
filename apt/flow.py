"""Flow matching and its samplers. In this project, t = 0 is data and t = 1 is noise.

x_t = (1 - t) x + t z, and the velocity is v = z - x, so x = x_t - t v, and at t = 1, x = z - v
(APT Eqs. 3-4). All functions are pure. `t` is (B,) and broadcasts over the other dimensions.

Every sampler takes a `Predict`, which is a backbone with its conditions bound (`bind`,
`bind_guided`), and latents in fp32. A grid of timesteps runs from 1 (noise) down to 0 (data). With
one step, `euler` and `consistency` are the same. With more steps they differ in the noise: the
consistency sampler predicts the data and returns to t with fresh noise; Euler returns with the same
noise, since (1 - t)(z - v) + t z = z - (1 - t) v.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from apt.condition import Condition
from apt.errors import InputError

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, ...), t (B,)) -> velocity (B, ...), with the condition bound."""

Velocity = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (B, ...), t (B,), c (B rows)) -> velocity (B, ...): a backbone."""

SamplerName = Literal["consistency", "euler"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)

NoiseSource = Callable[[int], Tensor]
"""Step number (from 1) -> fresh standard normal noise of the latents' shape."""


def expand_timesteps(t: Tensor, like: Tensor) -> Tensor:
    """Reshape t (B,) to (B, 1, ..., 1) in the dtype of `like` (B, ...)."""
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise InputError(
            f"timesteps must have shape ({like.shape[0]},), one per sample, got {tuple(t.shape)}"
        )
    return t.to(like.dtype).view(-1, *([1] * (like.ndim - 1)))


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) x + t z for data x and noise z (B, ...), t (B,) in [0, 1]."""
    t_ = expand_timesteps(t, x)
    return (1 - t_) * x + t_ * z


def velocity(x: Tensor, z: Tensor) -> Tensor:
    """Return v = z - x, the derivative of `interpolate` with respect to t."""
    return z - x


def to_sample(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Return the data that velocity v predicts: x = x_t - t v (APT Eq. 4 at t = 1)."""
    return x_t - expand_timesteps(t, x_t) * v


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Shift timesteps towards noise: s t / (1 + (s - 1) t) (APT Eq. 7).

    Args:
        t: any shape, floating point, in [0, 1].
        shift: s > 0; 1 is the identity.

    Raises:
        InputError: for s <= 0, or integer t. Integers suggest the [0, 1000] convention, for which
            the formula is wrong: it maps every t to about s / (s - 1).
    """
    if not shift > 0:
        raise InputError(f"timestep shift must be positive, got {shift}")
    if not t.is_floating_point():
        raise InputError(f"timesteps must be floating point in [0, 1], got {t.dtype}")
    if not t.is_cuda and t.numel() and (t.min() < 0 or t.max() > 1):
        raise InputError("timesteps must lie in [0, 1]; divide a [0, 1000] scale by 1000 first")
    return shift * t / (1 + (shift - 1) * t)


def sampling_timesteps(num_steps: int, shift: float = 1.0) -> Tensor:
    """Return the grid 1 = t_0 > t_1 > ... > t_n = 0 of an Euler sampler: (num_steps + 1,) fp32."""
    if num_steps < 1:
        raise InputError(f"the number of steps must be at least 1, got {num_steps}")
    # In fp64 the first timestep is exactly 1 for any shift.
    uniform = torch.linspace(1, 0, num_steps + 1, dtype=torch.float32, device="cpu")
    return shift_timesteps(uniform.double(), shift).float()


def euler_sample(predict: Predict, z: Tensor, timesteps: Tensor | Sequence[float]) -> Tensor:
    """Integrate the flow from noise with explicit Euler steps.

    Args:
        predict: the velocity field.
        z: noise (B, ...), the state at timesteps[0].
        timesteps: descending; integration stops at the last one (0 for data).
    """
    x = z
    grid = [float(t) for t in timesteps]
    for t, t_next in itertools.pairwise(grid):
        x = x - (t - t_next) * predict(x, _each(t, x))
    return x


def classifier_free_guidance(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Return v_uncond + scale (v_cond - v_uncond); scale 1 is the conditional prediction."""
    return torch.lerp(v_uncond, v_cond, scale)


def bind(backbone: Velocity, condition: Condition) -> Predict:
    """Bind `condition` (one row per sample) to the backbone, which computes in its dtype."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return backbone(x.to(condition.dtype), t, condition).to(x.dtype)

    return predict


def bind_guided(
    backbone: Velocity, condition: Condition, negative: Condition, scale: float
) -> Predict:
    """Bind conditions with classifier-free guidance: v_neg + scale (v_cond - v_neg).

    Both halves go through the backbone as one batch of 2 B. At scale 1 the negative half has no
    weight and is not computed.

    Args:
        condition: B rows.
        negative: B rows, or one row for all samples.
        scale: 0 uses only the negative prompt, 1 only the prompt.
    """
    if scale == 1:
        return bind(backbone, condition)
    num = len(condition)
    if len(negative) not in (1, num):
        raise InputError(f"the negative condition must have 1 or {num} rows, got {len(negative)}")
    negative = negative if len(negative) == num else negative.expand(num)
    both = bind(backbone, Condition.concatenate([condition, negative]))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        v_cond, v_negative = both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return classifier_free_guidance(v_cond, v_negative, scale)

    return predict


def one_step_sample(predict: Predict, z: Tensor) -> Tensor:
    """Return G(z, c) = z - v(z, 1) (APT Eq. 5) for noise z (B, ...)."""
    t = _each(1.0, z)
    return to_sample(z, predict(z, t), t)


def consistency_sample(
    predict: Predict, z: Tensor, timesteps: Tensor | Sequence[float], noise: NoiseSource
) -> Tensor:
    """Predict the data at every timestep, and go to the next timestep with fresh noise.

    This is the multistep sampler of consistency models (Song et al. 2023, Algorithm 1) for this
    flow.

    Args:
        predict: the velocity field.
        z: noise (B, ...), the state at timesteps[0].
        timesteps: 1 = t_0 > ... > t_n = 0; n evaluations, at t_0 to t_(n-1).
        noise: called with 1 to n - 1.

    Raises:
        InputError: if the timesteps do not fall strictly from 1 to 0.
    """
    grid = check_timesteps(timesteps)
    x_t = z
    x = z
    for step, value in enumerate(grid[:-1]):
        t = _each(value, z)
        if step:
            x_t = interpolate(x, noise(step), t)
        x = to_sample(x_t, predict(x_t, t), t)
    return x


def sample(
    predict: Predict,
    z: Tensor,
    timesteps: Tensor | Sequence[float],
    *,
    sampler: SamplerName,
    noise: NoiseSource,
) -> Tensor:
    """Run the named sampler on a grid of timesteps; arguments as for `consistency_sample`."""
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}; choose from {', '.join(SAMPLERS)}")
    grid = check_timesteps(timesteps)
    if sampler == "euler":
        return euler_sample(predict, z, grid)
    return consistency_sample(predict, z, grid, noise)


def _each(t: float, x: Tensor) -> Tensor:
    """Return t for each sample of x (B, ...): (B,) fp32, whatever torch's default dtype is."""
    return torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)


def check_timesteps(timesteps: Tensor | Sequence[float]) -> list[float]:
    """Return the grid as floats. Raises InputError unless it falls strictly from 1 to 0."""
    grid = [float(t) for t in timesteps]
    falling = all(a > b for a, b in itertools.pairwise(grid))
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not falling:
        raise InputError(
            "timesteps must fall strictly from 1 (noise) to 0 (data), such as 1, 0.5, 0; got "
            f"{', '.join(f'{t:g}' for t in grid) or 'none'}"
        )
    return grid


@dataclass(frozen=True, kw_only=True)
class FlowAdapter:
    """Conversion between our time and velocity (t in [0, 1], 0 is data, v = z - x) and a family's.

    Attributes:
        time_scale: the family's value for t = 1.
        reversed_time: whether its time runs from noise to data.
        negated_velocity: whether it predicts x - z.
    """

    time_scale: float = 1000.0
    reversed_time: bool = False
    negated_velocity: bool = False

    def time(self, t: Tensor) -> Tensor:
        """Convert our t (...) in [0, 1] to the family's scale, fp32."""
        t = t.float()
        return (1 - t if self.reversed_time else t) * self.time_scale

    def velocity(self, v: Tensor) -> Tensor:
        """Convert the family's prediction to our velocity."""
        return -v if self.negated_velocity else v

"""From noise to latents: one step, a few consistency steps, or many Euler steps.

Every sampler takes a `Predict`, which is a backbone with its conditions bound (`bind`,
`bind_guided`), and latents in fp32. A grid of timesteps runs from 1 (noise) down to 0 (data).

One step is the first step of either grid, so `euler` and `consistency` agree there. With more
steps they differ in the noise: the consistency sampler jumps to the data, and goes back to t with
fresh noise; Euler goes back with the noise it came from, since
(1 - t)(z - v) + t z = z - (1 - t) v.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from apt.condition import Condition
from apt.errors import InputError
from apt.flow import Predict, classifier_free_guidance, euler_sample, interpolate, to_sample
from apt.models.protocols import VelocityNetwork

SamplerName = Literal["consistency", "euler"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)

NoiseSource = Callable[[int], Tensor]
"""Fresh standard normal noise, of the latents' shape, for the step of this number (from 1)."""


def bind(backbone: VelocityNetwork, condition: Condition) -> Predict:
    """The backbone's velocity under `condition` (one row per sample), computed in its dtype."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return backbone(x.to(condition.dtype), t, condition).to(x.dtype)

    return predict


def bind_guided(
    backbone: VelocityNetwork, condition: Condition, negative: Condition, scale: float
) -> Predict:
    """The velocity with classifier-free guidance: v_neg + scale (v_cond - v_neg).

    Both halves go through the backbone as one batch of 2 B. At scale 1 the negative prompt has no
    weight, and is not computed.

    Args:
        condition: B rows.
        negative: B rows, or one row for all samples.
        scale: 0 follows the negative prompt alone, 1 the prompt alone.
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
    """G(z, c) = z - v(z, 1) (APT Eq. 5) for noise z (B, ...)."""
    t = torch.ones(z.shape[0], device=z.device)
    return to_sample(z, predict(z, t), t)


def consistency_sample(
    predict: Predict, z: Tensor, timesteps: Tensor | Sequence[float], noise: NoiseSource
) -> Tensor:
    """Jump to the data from every timestep, going back to the next one with fresh noise.

    The multistep sampler of consistency models (Song et al. 2023, Algorithm 1), for this flow.

    Args:
        predict: the velocity field.
        z: noise (B, ...), the state at timesteps[0].
        timesteps: 1 = t_0 > ... > t_n = 0; n evaluations, at t_0 to t_(n-1).
        noise: called with 1 to n - 1.

    Raises:
        InputError: for a grid that is not of that form.
    """
    grid = check_timesteps(timesteps)
    x_t = z
    x = z
    for step, value in enumerate(grid[:-1]):
        t = torch.full((z.shape[0],), value, device=z.device)
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
    """Run the sampler of that name on a grid of timesteps, as `consistency_sample` describes."""
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}; choose from {', '.join(SAMPLERS)}")
    grid = check_timesteps(timesteps)
    if sampler == "euler":
        return euler_sample(predict, z, grid)
    return consistency_sample(predict, z, grid, noise)


def check_timesteps(timesteps: Tensor | Sequence[float]) -> list[float]:
    """The grid as floats. Raises InputError unless it falls strictly from 1 to 0."""
    grid = [float(t) for t in timesteps]
    falling = all(a > b for a, b in itertools.pairwise(grid))
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not falling:
        raise InputError(
            "timesteps must fall strictly from 1 (noise) to 0 (data), such as 1, 0.5, 0; got "
            f"{', '.join(f'{t:g}' for t in grid) or 'none'}"
        )
    return grid

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("diffusers")

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.condition import Condition
from apt.errors import InputError
from apt.flow import (
    SAMPLERS,
    bind,
    bind_guided,
    check_timesteps,
    consistency_sample,
    euler_sample,
    one_step_sample,
    sample,
    sampling_timesteps,
)
from tests.tiny import tiny_bundle

MEAN, STD = 3.0, 2.0


def gaussian_velocity(x_t: Tensor, t: Tensor) -> Tensor:
    """E[z - x | x_t] for data x ~ N(3, 2^2): the exact velocity field of this flow."""
    t = t[:, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x_t - (1 - t) * MEAN) - MEAN


def noise_pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, fresh = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    return z, fresh


def test_one_step_is_the_posterior_mean() -> None:
    """By hand: v(z, 1) = z - mean, so z - v = mean, whatever the noise."""
    z, _ = noise_pair()
    assert torch.allclose(one_step_sample(gaussian_velocity, z), torch.full_like(z, MEAN))


def test_two_steps_by_hand() -> None:
    """At t = 1/2 the variance is 5/4 and the slope (1/2 - 2) / (5/4) = -6/5.

    From the mean, noise n leads to x_t = mean/2 + n/2 and to x = mean + 0.8 n: fresh noise for the
    consistency sampler, the first noise for Euler.
    """
    z, fresh = noise_pair()
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return fresh

    renoised = sample(gaussian_velocity, z, [1, 0.5, 0], sampler="consistency", noise=noise)
    assert torch.allclose(renoised, MEAN + 0.8 * fresh)
    assert asked == [1]
    euler = sample(gaussian_velocity, z, [1, 0.5, 0], sampler="euler", noise=noise)
    assert torch.allclose(euler, MEAN + 0.8 * z)
    assert asked == [1], "Euler draws no noise"


def test_consistency_with_the_first_noise_is_two_step_euler() -> None:
    z, _ = noise_pair()
    grid = [1, 0.3, 0]
    same = consistency_sample(gaussian_velocity, z, grid, lambda step: z)
    assert torch.allclose(same, euler_sample(gaussian_velocity, z, grid))


def test_consistency_of_a_perfect_one_step_model_keeps_its_distribution() -> None:
    """A perfect G maps every x_t to data: the last jump alone decides."""

    def consistent(x_t: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        scale = ((1 - t) ** 2 * STD**2 + t**2).sqrt()
        data = MEAN + STD * (x_t - (1 - t) * MEAN) / scale
        return (x_t - data) / t

    z, fresh = noise_pair()
    noises = {1: torch.zeros_like(z), 2: fresh}
    result = consistency_sample(consistent, z, [1, 0.6, 0.2, 0], noises.__getitem__)
    first = MEAN + STD * z
    second = MEAN + STD * (0.4 * first - 0.4 * MEAN) / np.sqrt(0.16 * 4 + 0.36)
    third = MEAN + STD * (0.8 * second + 0.2 * fresh - 0.8 * MEAN) / np.sqrt(0.64 * 4 + 0.04)
    assert torch.allclose(result, third)


def test_many_euler_steps_reach_the_exact_flow() -> None:
    """The flow of a Gaussian maps z to mean + std z; Euler's error falls with the step."""
    z, fresh = noise_pair()

    def error(num_steps: int, shift: float) -> float:
        grid = sampling_timesteps(num_steps, shift)
        x = sample(gaussian_velocity, z, grid, sampler="euler", noise=lambda step: fresh)
        return float((x - (MEAN + STD * z)).abs().max())

    assert error(1000, 1.0) < 0.01
    assert error(1000, 3.0) < 0.02
    assert error(200, 1.0) / error(400, 1.0) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("num_steps", [1, 2, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_euler_is_diffusers_euler(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    grid = sampling_timesteps(num_steps, shift)
    assert torch.allclose(scheduler.sigmas, grid, atol=1e-6)
    z = noise_pair()[0].float()
    theirs = z
    for timestep in scheduler.timesteps:
        velocity = gaussian_velocity(theirs, (timestep / 1000).expand(len(z)))
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
    ours = sample(gaussian_velocity, z, grid, sampler="euler", noise=lambda step: z)
    assert torch.allclose(ours, theirs, atol=1e-5)


@settings(deadline=None)
@given(st.floats(-5, 5), st.sampled_from(SAMPLERS))
def test_in_one_step_all_samplers_are_eq_5(value: float, sampler: str) -> None:
    z = torch.full((2, 3), value)
    result = sample(gaussian_velocity, z, [1, 0], sampler=sampler, noise=lambda step: z)  # type: ignore[arg-type]
    assert torch.equal(result, one_step_sample(gaussian_velocity, z))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=5))
def test_only_grids_that_fall_from_1_to_0_pass(inner: list[float]) -> None:
    grid = [1.0, *inner, 0.0]
    if all(a > b for a, b in itertools.pairwise(grid)):
        assert check_timesteps(grid) == grid
    else:
        with pytest.raises(InputError, match="from 1"):
            check_timesteps(grid)


@pytest.mark.parametrize("grid", [[], [1], [0, 1], [0.9, 0], [1, 0.1], [1000, 500, 0]])
def test_wrong_grids_are_refused(grid: list[float]) -> None:
    z, _ = noise_pair()
    for sampler in SAMPLERS:
        with pytest.raises(InputError, match="timesteps must fall"):
            sample(gaussian_velocity, z, grid, sampler=sampler, noise=lambda step: z)


def test_an_unknown_sampler_is_refused() -> None:
    z, _ = noise_pair()
    with pytest.raises(InputError, match="choose from consistency, euler"):
        sample(gaussian_velocity, z, [1, 0], sampler="ddim", noise=lambda step: z)  # type: ignore[arg-type]


def conditions(*prompts: str) -> Condition:
    with torch.no_grad():
        return Condition(tiny_bundle().text_encoder(prompts))


@pytest.mark.parametrize("negatives", [("blurred",), ("blurred", "dull and still")])
@torch.no_grad()
def test_guidance_by_hand(negatives: tuple[str, ...]) -> None:
    """v_neg + s (v_cond - v_neg), from two separate calls of a real backbone."""
    backbone = tiny_bundle().backbone
    condition, negative = conditions("a red seven", "a blue one moving up"), conditions(*negatives)
    x, t = torch.randn(2, 768, 3, 4, 4), torch.tensor([0.9, 0.4])
    both = negative if len(negative) == 2 else conditions(*negatives, *negatives)
    v_cond, v_negative = backbone(x, t, condition), backbone(x, t, both)
    guided = bind_guided(backbone, condition, negative, 2.5)(x, t)
    assert torch.allclose(guided, v_negative + 2.5 * (v_cond - v_negative), atol=1e-4)
    assert not torch.allclose(guided, v_cond, atol=1e-2)


@torch.no_grad()
def test_guidance_at_scale_1_is_the_model_itself_at_half_the_cost() -> None:
    backbone = tiny_bundle().backbone
    assert isinstance(backbone, torch.nn.Module)
    sizes: list[int] = []
    backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    condition, negative = conditions("a red seven"), conditions("blurred")
    x, t = torch.randn(1, 768, 3, 4, 4), torch.ones(1)
    unguided = bind(backbone, condition)(x, t)
    assert torch.equal(bind_guided(backbone, condition, negative, 1.0)(x, t), unguided)
    bind_guided(backbone, condition, negative, 2.0)(x, t)
    assert sizes == [1, 1, 2]


def test_guidance_needs_a_negative_for_every_row() -> None:
    with pytest.raises(InputError, match="1 or 3 rows, got 2"):
        bind_guided(tiny_bundle().backbone, conditions("a", "b", "c"), conditions("d", "e"), 2.0)


@torch.no_grad()
def test_the_backbone_runs_in_the_conditions_dtype_and_latents_stay_fp32() -> None:
    backbone = tiny_bundle().backbone
    assert isinstance(backbone, torch.nn.Module)
    condition = conditions("a red seven")
    x, t = torch.randn(1, 768, 3, 4, 4), torch.full((1,), 0.7)
    exact = bind(backbone, condition)(x, t)
    rounded = bind(backbone.to(torch.bfloat16), condition.to(dtype=torch.bfloat16))(x, t)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() / exact.norm() < 0.05

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.errors import InputError
from apt.flow import (
    classifier_free_guidance,
    euler_sample,
    expand_timesteps,
    interpolate,
    sampling_timesteps,
    shift_timesteps,
    to_sample,
    velocity,
)

X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
Z = torch.tensor([[-1.0, 0.5], [0.0, 2.0], [1.0, -3.0]], dtype=torch.float64)
T = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)


def test_zero_is_data_and_one_is_noise() -> None:
    x_t = interpolate(X, Z, T)
    assert torch.equal(x_t[0], X[0]) and torch.equal(x_t[2], Z[2])
    torch.testing.assert_close(x_t[1], torch.tensor([2.25, 3.5], dtype=torch.float64))


def test_velocity_is_the_derivative_by_time() -> None:
    before, after = interpolate(X, Z, T / 2), interpolate(X, Z, T / 2 + 0.5)
    torch.testing.assert_close(velocity(X, Z), (after - before) / 0.5)


def test_velocity_leads_back_to_data_from_everywhere() -> None:
    torch.testing.assert_close(to_sample(interpolate(X, Z, T), velocity(X, Z), T), X)
    # Eq. 4: at t = 1 the sample is z - v.
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(to_sample(Z, velocity(X, Z), one), Z - velocity(X, Z))


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.rand(2), torch.rand(3, 1)])
def test_one_timestep_per_sample(t: Tensor) -> None:
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        interpolate(X, Z, t)
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        to_sample(X, Z, t)


def test_expand_timesteps_takes_the_dtype_of_the_latents() -> None:
    expanded = expand_timesteps(torch.rand(3), X.view(3, 1, 2, 1))
    assert expanded.shape == (3, 1, 1, 1) and expanded.dtype == torch.float64


unit = st.floats(0, 1, width=32)
factor = st.floats(0.01, 100)


@given(t=unit, shift=factor)
def test_shift_is_equation_7(t: float, shift: float) -> None:
    shifted = shift_timesteps(torch.tensor([t], dtype=torch.float64), shift).item()
    assert shifted == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-9)
    assert 0 <= shifted <= 1 + 1e-12
    # The odds of noise are multiplied by s, so that 1 / s leads back.
    back = shift_timesteps(torch.tensor([min(shifted, 1.0)], dtype=torch.float64), 1 / shift)
    assert back.item() == pytest.approx(t, abs=1e-6)


def test_shift_by_hand() -> None:
    t = torch.tensor([0.0, 0.1, 0.5, 1.0])
    expected = torch.tensor([0.0, 1.2 / 2.1, 6 / 6.5, 1.0])
    torch.testing.assert_close(shift_timesteps(t, 12.0), expected)
    assert torch.equal(shift_timesteps(t, 1.0), t)
    assert shift_timesteps(t[:0], 3.0).shape == (0,)


@pytest.mark.parametrize(
    ("t", "shift", "message"),
    [
        (torch.tensor([500.0]), 12.0, "divide a"),
        (torch.tensor([-0.1]), 12.0, "lie in"),
        (torch.tensor([500]), 12.0, "floating point"),
        (torch.tensor([0.5]), 0.0, "positive"),
        (torch.tensor([0.5]), -1.0, "positive"),
        (torch.tensor([0.5]), float("nan"), "positive"),
    ],
)
def test_shift_refuses_other_scales(t: Tensor, shift: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shift_timesteps(t, shift)


@settings(deadline=None)
@given(num_steps=st.integers(1, 100), shift=st.floats(0.05, 50))
def test_sampling_timesteps_fall_from_exactly_1_to_0(num_steps: int, shift: float) -> None:
    grid = sampling_timesteps(num_steps, shift)
    assert grid.shape == (num_steps + 1,) and grid.dtype == torch.float32
    assert grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_sampling_timesteps_by_hand() -> None:
    expected = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert torch.equal(sampling_timesteps(4), expected)
    torch.testing.assert_close(sampling_timesteps(4, 3.0), 3 * expected / (1 + 2 * expected))
    with pytest.raises(InputError, match="at least 1"):
        sampling_timesteps(0)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_euler_follows_straight_flow_exactly(num_steps: int) -> None:
    times: list[Tensor] = []

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return velocity(X, Z)

    grid = sampling_timesteps(num_steps, 3.0)
    torch.testing.assert_close(euler_sample(predict, Z, grid), X, rtol=1e-6, atol=1e-6)
    # Each step is evaluated where it starts, for every sample.
    assert torch.equal(torch.stack(times), grid[:-1, None].expand(-1, 3))


def test_one_euler_step_is_the_generator() -> None:
    assert torch.equal(euler_sample(lambda x, t: 3 * x, Z, [1.0, 0.0]), Z - 3 * Z)


def test_euler_can_stop_early() -> None:
    halfway = euler_sample(lambda x, t: velocity(X, Z), Z, [1.0, 0.5])
    torch.testing.assert_close(halfway, (X + Z) / 2)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_guidance_extrapolates_from_the_negative(scale: float) -> None:
    torch.testing.assert_close(classifier_free_guidance(X, Z, scale), Z + scale * (X - Z))
    assert torch.equal(classifier_free_guidance(X, Z, 1.0), X)
    assert torch.equal(classifier_free_guidance(X, Z, 0.0), Z)

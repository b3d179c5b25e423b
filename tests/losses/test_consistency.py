from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apt.errors import InputError
from apt.flow import shift_timesteps
from apt.losses import Consistency, create_loss

MEAN, STD = 0.7, 0.4
F64 = torch.float64


def column(t: Tensor) -> Tensor:
    return t[:, None].double()


def spread(t: Tensor) -> Tensor:
    """Standard deviation of x_t for data N(MEAN, STD^2)."""
    return (((1 - t) * STD) ** 2 + t**2).sqrt()


def exact_velocity(x_t: Tensor, t: Tensor) -> Tensor:
    """E[z - x | x_t]: the probability flow of the Gaussian data."""
    t = column(t)
    slope = (t - (1 - t) * STD**2) / spread(t) ** 2
    return -MEAN + slope * (x_t - (1 - t) * MEAN)


def exact_consistency_velocity(x_t: Tensor, t: Tensor) -> Tensor:
    """The v for which x_t - t v is where the flow through x_t ends at t = 0."""
    t = column(t)
    end = MEAN + STD / spread(t) * (x_t - (1 - t) * MEAN)
    # At t = 0 any v will do; the limit of the quotient is 0 / 0.
    return torch.where(t > 0, (x_t - end) / t.clamp(min=1e-30), torch.zeros_like(x_t))


def far_off(x_t: Tensor) -> Tensor:
    return torch.full_like(x_t, 1e3)


def exact_teacher(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return exact_velocity(x_t, t), far_off(x_t)


def gaussian_loss(num_timesteps: int, shift: float, student: object = None) -> float:
    loss = Consistency(num_timesteps=num_timesteps, cfg_scale=1.0, timestep_shift=shift)
    generator = torch.Generator().manual_seed(0)
    x = MEAN + STD * torch.randn(num_timesteps, 512, generator=generator, dtype=F64)
    z = torch.randn(num_timesteps, 512, generator=generator, dtype=F64)
    index = torch.arange(num_timesteps)
    network = student or exact_consistency_velocity
    return loss(network, exact_teacher, exact_consistency_velocity, x, z, index).item()  # type: ignore[arg-type]


def test_the_oracle_is_an_oracle() -> None:
    # Integrating the exact velocity finely ends where the exact consistency function says.
    z = torch.linspace(-2, 2, 9, dtype=F64)[None]
    x, n = z.clone(), 4000
    for i in range(n, 0, -1):
        x = x - exact_velocity(x, torch.tensor([(i - 0.5) / n])) / n
    t = torch.ones(1)
    torch.testing.assert_close(x, z - exact_consistency_velocity(z, t), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_exact_consistency_function_has_only_the_discretisation_error(shift: float) -> None:
    coarse, fine, finest = (gaussian_loss(n, shift) for n in (32, 64, 128))
    # One Euler step errs by O(1/n^2), its square by O(1/n^4): halving n's step divides by 16.
    assert 13 < coarse / fine < 19
    assert 14 < fine / finest < 18
    assert finest < 1e-7


def test_a_network_that_is_not_consistent_is_seen() -> None:
    # The diffusion model itself: its one-step sample is the mean, not the end of the flow.
    assert gaussian_loss(128, 1.0, exact_velocity) > 1e3 * gaussian_loss(128, 1.0)


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 300), shift=st.floats(0.05, 20.0))
def test_the_grid_runs_from_data_to_noise_without_gaps(num: int, shift: float) -> None:
    loss = Consistency(num_timesteps=num, timestep_shift=shift)
    t, t_next = loss.timesteps(torch.arange(num))
    assert t.dtype == t_next.dtype == torch.float32
    assert t_next[0] == 0 and t[-1] == 1
    assert torch.equal(t[:-1], t_next[1:])
    assert (t > t_next).all()
    expected = shift_timesteps(torch.arange(1, num + 1, dtype=F64) / num, shift).float()
    torch.testing.assert_close(t, expected)


def test_index_selects_the_interval_of_each_sample() -> None:
    t, t_next = Consistency(num_timesteps=4).timesteps(torch.tensor([3, 0, 1, 3]))
    assert t.tolist() == [1.0, 0.25, 0.5, 1.0]
    assert t_next.tolist() == [0.75, 0.0, 0.25, 0.75]


def constant(value: float):  # type: ignore[no-untyped-def]
    return lambda x_t, t: torch.full_like(x_t, value)


@pytest.mark.parametrize(("scale", "guided"), [(7.5, 1.0 + 7.5 * 0.5), (1.0, 1.5), (0.0, 1.0)])
def test_value_by_hand(scale: float, guided: float) -> None:
    # Interval from t = 0.5 to 0.25 with x = 1, z = 3: x_t = 2.
    loss = Consistency(num_timesteps=4, cfg_scale=scale)
    seen = {}

    def target(x_next: Tensor, t_next: Tensor) -> Tensor:
        seen["target"] = x_next.item(), t_next.item()
        return torch.full_like(x_next, -2.0)

    value = loss(
        constant(0.25),
        lambda x_t, t: (torch.full_like(x_t, 1.5), torch.full_like(x_t, 1.0)),
        target,
        torch.tensor([[1.0]]),
        torch.tensor([[3.0]]),
        torch.tensor([1]),
    )
    x_next = 2.0 - 0.25 * guided
    assert seen["target"] == pytest.approx((x_next, 0.25))
    assert value.item() == pytest.approx(((2.0 - 0.5 * 0.25) - (x_next - 0.25 * -2.0)) ** 2)


def test_scale_one_is_the_conditional_branch() -> None:
    # far_off would show up at any weight.
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(6, 5, generator=generator) for _ in range(2))
    index = torch.tensor([0, 1, 2, 3, 4, 5])
    loss = Consistency(num_timesteps=6, cfg_scale=1.0)
    teacher = lambda x_t, t: (x_t.sin(), far_off(x_t))  # noqa: E731
    alone = lambda x_t, t: (x_t.sin(), x_t.sin())  # noqa: E731
    networks = constant(0.1), constant(0.2)
    value = loss(networks[0], teacher, networks[1], x, z, index)
    torch.testing.assert_close(value, loss(networks[0], alone, networks[1], x, z, index))


def test_at_the_boundary_the_target_is_the_sample_itself() -> None:
    loss = Consistency(num_timesteps=5, cfg_scale=1.0)
    x, z, index = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([0])
    teacher = lambda x_t, t: (torch.ones_like(x_t), far_off(x_t))  # noqa: E731
    # x_t = 1.2 and v = z - x = 1 lead back to x = 1, whatever the target network says at t = 0.
    for value in (0.0, -7.0, 1e6):
        assert loss(constant(1.0), teacher, constant(value), x, z, index) < 1e-12
    off = loss(constant(0.0), teacher, constant(0.0), x, z, index)
    assert off.item() == pytest.approx(0.2**2)


def test_one_interval_is_one_step_regression_on_the_teacher() -> None:
    loss = Consistency(num_timesteps=1, cfg_scale=1.0)
    x, z = torch.tensor([[5.0]]), torch.tensor([[2.0]])
    teacher = lambda x_t, t: (torch.full_like(x_t, 3.0), far_off(x_t))  # noqa: E731
    value = loss(constant(0.5), teacher, constant(9.0), x, z, torch.tensor([0]))
    assert value.item() == pytest.approx((3.0 - 0.5) ** 2)  # z - 0.5 against z - 3; x is not seen


class Scale(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.grad_enabled: list[bool] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.grad_enabled.append(torch.is_grad_enabled())
        return self.value * x_t


def test_only_the_student_gets_a_gradient() -> None:
    student, target, cond, uncond = Scale(0.3), Scale(0.4), Scale(0.5), Scale(0.6)
    x, z = torch.tensor([[1.0], [0.5]]), torch.tensor([[3.0], [-1.0]])
    loss = create_loss("consistency", num_timesteps=4)
    teacher = lambda x_t, t: (cond(x_t, t), uncond(x_t, t))  # noqa: E731
    value = loss(student, teacher, target, x, z, torch.tensor([1, 3]))
    value.backward()
    assert student.grad_enabled == [True]
    assert target.grad_enabled == cond.grad_enabled == uncond.grad_enabled == [False]
    assert target.value.grad is None and cond.value.grad is None and uncond.value.grad is None
    # By hand: d/dw mean((x_t - t w x_t - y)^2) = mean(2 (x_t - t w x_t - y) (-t x_t)).
    t, t_next = loss.timesteps(torch.tensor([1, 3]))
    x_t = (1 - t) * x[:, 0] + t * z[:, 0]
    x_next = x_t - (t - t_next) * (0.6 + 7.5 * (0.5 - 0.6)) * x_t
    y = x_next - t_next * 0.4 * x_next
    assert student.value.grad is not None
    expected = (2 * (x_t - t * 0.3 * x_t - y) * -t * x_t).mean()
    torch.testing.assert_close(student.value.grad, expected)


def test_half_precision_networks_are_compared_in_fp32() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    half = lambda x_t, t: (0.3 * x_t).bfloat16()  # noqa: E731
    loss = create_loss("consistency", num_timesteps=10)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, lambda a, t: (half(a, t), half(a, t)), half, x, -x, torch.arange(3))
    assert value.dtype == torch.float32
    assert math.isfinite(value.item())


def test_bad_input_is_refused() -> None:
    loss = create_loss("consistency", num_timesteps=4)
    for index, match in (
        (torch.tensor([0.5]), "int64"),
        (torch.tensor([1], dtype=torch.int32), "int64"),
        (torch.tensor(1), "shape"),
        (torch.zeros(0, dtype=torch.int64), "shape"),
        (torch.tensor([-1]), r"\[0, 4\)"),
        (torch.tensor([4]), r"\[0, 4\)"),
    ):
        with pytest.raises(InputError, match=match):
            loss.timesteps(index)
    x, one = torch.zeros(2, 3), constant(0.0)
    teacher = lambda x_t, t: (x_t, x_t)  # noqa: E731
    index = torch.tensor([0, 1])
    with pytest.raises(InputError, match="same shape"):
        loss(one, teacher, one, x, x[:1], index)
    with pytest.raises(InputError, match="one per sample"):
        loss(one, teacher, one, x, x, index[:1])
    with pytest.raises(InputError, match="student"):
        loss(lambda x_t, t: x_t[:, :1], teacher, one, x, x, index)
    with pytest.raises(InputError, match="target"):
        loss(one, teacher, lambda x_t, t: x_t[:1], x, x, index)
    with pytest.raises(InputError, match="teacher"):
        loss(one, lambda x_t, t: (x_t, x_t[:1]), one, x, x, index)

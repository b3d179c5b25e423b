"""Discrete consistency distillation, which initialises the one-step generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.errors import ConfigError, InputError
from apt.flow import Predict, classifier_free_guidance, interpolate, shift_timesteps, to_sample
from apt.losses.checks import at_least_fp32, check_number, check_same_shape
from apt.losses.names import LOSSES

PredictGuided = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_t (B, ...), t (B,)) -> velocities under the condition and under the negative prompt."""


@LOSSES.register("consistency")
@dataclass(frozen=True)
class Consistency:
    """MSE between the student's sample at t and the target's sample after one teacher step.

    Song et al. 2023, as in APT Section 3.2 (MSE, constant guidance scale, fixed negative prompt).
    The consistency function is f(x_t, t) = x_t - t v(x_t, t). It is the identity at t = 0, so any
    network meets the boundary condition, and f(z, 1) = z - v is the generator (Eq. 5).

    Attributes:
        num_timesteps: N, the number of intervals in [0, 1]. Training pairs are neighbours on the
            grid.
        cfg_scale: guidance scale of the teacher; 1 is its conditional prediction.
        timestep_shift: s of Eq. 7, applied to the uniform grid.

    None leaves a value open. The training stage then takes it from the teacher's sampling settings;
    until then nothing can be computed.
    """

    num_timesteps: int | None = 50
    cfg_scale: float | None = 7.5
    timestep_shift: float | None = 1.0

    def __post_init__(self) -> None:
        n = self.num_timesteps
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise ConfigError(f"Consistency: num_timesteps must be an integer >= 1, got {n!r}")
        if self.cfg_scale is not None:
            check_number("Consistency", "cfg_scale", self.cfg_scale)
        if self.timestep_shift is not None:
            check_number("Consistency", "timestep_shift", self.timestep_shift, positive=True)

    @property
    def num_intervals(self) -> int:
        """N. Raises ConfigError if it is open."""
        return int(_given("num_timesteps", self.num_timesteps))

    def timesteps(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pair (t, t_next), t > t_next, of each interval; both (B,) fp32 in [0, 1].

        Args:
            index: (B,) int64 in [0, num_timesteps); 0 is the interval next to data, and
                num_timesteps - 1 the one next to noise.

        Raises:
            InputError: for other shapes, dtypes or values.
        """
        if index.dtype != torch.int64 or index.ndim != 1 or index.shape[0] == 0:
            raise InputError(
                f"index must be int64 of shape (B,), got {index.dtype} {tuple(index.shape)}"
            )
        n, shift = self.num_intervals, _given("timestep_shift", self.timestep_shift)
        if int(index.min()) < 0 or int(index.max()) >= n:
            raise InputError(f"index must be in [0, {n})")
        # The shift is computed in fp64, so that the grid's ends are exactly 0 and 1 in fp32.
        uniform = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        grid = shift_timesteps(uniform, shift).to(index.device, torch.float32)
        return grid[index + 1], grid[index]

    def __call__(
        self,
        student: Predict,
        teacher: PredictGuided,
        target: Predict,
        x: Tensor,
        z: Tensor,
        index: Tensor,
    ) -> Tensor:
        """Return the loss, an fp32 scalar: the mean over samples and elements.

        Args:
            student: the trained velocity network, with its condition bound.
            teacher: the frozen diffusion model, for the Euler step from t to t_next.
            target: the student's EMA; neither it nor the teacher gets gradients.
            x: data (B, ...), floating point.
            z: standard normal noise of the same shape.
            index: (B,) int64, see `timesteps`; on the CPU, checking it needs no device sync.

        Raises:
            InputError: for shapes that differ, or wrong dtypes.
        """
        cfg_scale = _given("cfg_scale", self.cfg_scale)
        check_same_shape("x", x, "z", z)
        x, z = at_least_fp32("x", x), at_least_fp32("z", z)
        t, t_next = (side.to(x.device) for side in self.timesteps(index))
        x_t = interpolate(x, z, t)
        with torch.no_grad():
            v_cond, v_uncond = (_velocity("teacher", v, x) for v in teacher(x_t, t))
            guided = classifier_free_guidance(v_cond, v_uncond, cfg_scale)
            x_next = to_sample(x_t, guided, t - t_next)  # an Euler step is a partial to_sample
            expected = to_sample(x_next, _velocity("target", target(x_next, t_next), x), t_next)
        return F.mse_loss(to_sample(x_t, _velocity("student", student(x_t, t), x), t), expected)


def _given(name: str, value: float | None) -> float:
    if value is None:
        raise ConfigError(f"Consistency: {name} is open; set it to a number")
    return value


def _velocity(name: str, v: Tensor, x: Tensor) -> Tensor:
    v = at_least_fp32(f"the {name}'s velocity", v)
    check_same_shape(f"the {name}'s velocity", v, "x", x)
    return v

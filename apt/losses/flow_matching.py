"""The flow-matching loss for pre-training."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from apt.flow import Predict, interpolate, velocity
from apt.losses.checks import at_least_fp32, check_same_shape
from apt.losses.names import LOSSES


@LOSSES.register("flow_matching")
@dataclass(frozen=True)
class FlowMatching:
    """Mean squared error of the velocity: mean((predict(x_t, t) - (z - x))^2).

    Lipman et al. 2023; APT Section 3.1. x_t = (1 - t) x + t z.
    """

    def __call__(self, predict: Predict, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return the loss, an fp32 scalar: the mean over samples and elements.

        Args:
            predict: (x_t (B, ...), t (B,)) -> velocity (B, ...), with its condition bound.
            x: data (B, ...), floating point.
            z: standard normal noise of the same shape.
            t: (B,) in [0, 1], one per sample.

        Raises:
            InputError: for shapes that differ, or dtypes that are not floating point.
        """
        check_same_shape("x", x, "z", z)
        x, z = at_least_fp32("x", x), at_least_fp32("z", z)
        t = at_least_fp32("t", t)
        predicted = at_least_fp32("the predicted velocity", predict(interpolate(x, z, t), t))
        check_same_shape("the predicted velocity", predicted, "x", x)
        return F.mse_loss(predicted, velocity(x, z))

"""Regularisers of the discriminator: penalties added to its adversarial loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from apt.errors import ConfigError, InputError
from apt.losses.checks import at_least_fp32, check_logits, check_number, check_same_shape
from apt.losses.names import LOSSES


@dataclass(frozen=True)
class FiniteDifferencePenalty:
    """weight * mean((D(x) - D(x + sigma * eps))^2), eps ~ N(0, I): a penalty on D's slope at x.

    To first order, its expectation is weight * sigma^2 * ||grad_x D||^2, so weight * sigma^2 is the
    equivalent weight of the exact penalty. It needs no double backward, so it works with FSDP,
    checkpointing and fused attention.

    Attributes:
        weight: lambda.
        sigma: standard deviation of the perturbation (not a variance), in units of the latents.
        normalize: "sigma2" divides the penalty by sigma^2, so that `weight` is the weight of the
            squared gradient norm for any sigma. None, as in the paper, does not.
        fraction: share of the batch that is perturbed, in (0, 1]; the penalty is the mean over the
            first samples. Below 1, accumulated micro-batches perturb other samples than one large
            batch does.
    """

    weight: float = 100.0
    sigma: float = 0.1
    normalize: Literal["sigma2"] | None = None
    fraction: float = 1.0

    point: ClassVar[str]

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_number(owner, "weight", self.weight)
        check_number(owner, "sigma", self.sigma, positive=True)
        check_number(owner, "fraction", self.fraction, positive=True)
        if self.fraction > 1:
            raise ConfigError(f"{owner}: fraction must be at most 1, got {self.fraction}")
        if self.normalize not in (None, "sigma2"):
            raise ConfigError(
                f"{owner}: normalize must be None or 'sigma2', got {self.normalize!r}"
            )

    def num_perturbed(self, batch: int) -> int:
        """Return how many of `batch` samples to perturb: the rounded fraction, at least 1."""
        if batch < 1:
            raise InputError(f"the batch must hold at least 1 sample, got {batch}")
        return max(1, int(self.fraction * batch + 0.5))

    def _penalty(self, logits: Tensor, logits_perturbed: Tensor) -> Tensor:
        for name, given in ((self.point, logits), ("logits_perturbed", logits_perturbed)):
            # The difference of two rounded logits is mostly rounding error; upcasting now is too
            # late.
            if isinstance(given, Tensor) and given.dtype in (torch.bfloat16, torch.float16):
                raise InputError(
                    f"{name} are {given.dtype}, which is too coarse for a finite difference; "
                    "compute D's heads and logits in fp32 (outside autocast)"
                )
        base = check_logits(self.point, logits)
        perturbed = check_logits("logits_perturbed", logits_perturbed)
        expected = self.num_perturbed(base.shape[0])
        if perturbed.shape[0] != expected:
            raise InputError(
                f"fraction {self.fraction} of {base.shape[0]} samples needs {expected} perturbed "
                f"logits, got {perturbed.shape[0]}; perturb the first num_perturbed(batch) samples"
            )
        # Both logits keep their graph: detaching one would halve the gradient and bias it.
        penalty = (base[:expected] - perturbed).square().mean()
        scale = self.weight / self.sigma**2 if self.normalize == "sigma2" else self.weight
        return scale * penalty


@LOSSES.register("approximate_r1")
@dataclass(frozen=True)
class ApproximateR1(FiniteDifferencePenalty):
    """The paper's penalty: weight * mean((D(x, c) - D(x + sigma * eps, c))^2) on real samples.

    APT Eqs. 9-10; the paper uses weight 100 and sigma 0.01 (images) or 0.1 (videos), in every D
    step. The perturbed copy must share the sample's timestep and condition; otherwise the penalty
    measures how D varies with those.
    """

    point: ClassVar[str] = "logits_real"

    def __call__(self, logits_real: Tensor, logits_perturbed: Tensor) -> Tensor:
        """Return the weighted penalty, a scalar.

        Args:
            logits_real: D(x, c), (B,), fp32 (or fp64).
            logits_perturbed: D(x + sigma * eps, c) of the first `num_perturbed(B)` samples.

        Raises:
            InputError: for other shapes, and for half-precision or integer logits.
        """
        return self._penalty(logits_real, logits_perturbed)


@LOSSES.register("approximate_r2")
@dataclass(frozen=True)
class ApproximateR2(FiniteDifferencePenalty):
    """The same penalty on generated samples: weight * mean((D(G(z)) - D(G(z) + sigma * eps))^2).

    The authors' later work uses it with `relativistic` (AAPT, SeedVR2). The generated samples must
    be detached from G.
    """

    point: ClassVar[str] = "logits_fake"

    def __call__(self, logits_fake: Tensor, logits_perturbed: Tensor) -> Tensor:
        """Return the weighted penalty, a scalar; see `ApproximateR1`, but on generated samples."""
        return self._penalty(logits_fake, logits_perturbed)


@LOSSES.register("r1")
@dataclass(frozen=True)
class R1:
    """Exact R1 by double backward: weight * mean(||grad_x D(x, c)||^2); reference ops only.

    APT Eq. 8 (Roth et al. 2017; Mescheder et al. 2018, who write gamma / 2 for the weight). With
    weight w * sigma^2 it matches `approximate_r1` of weight w. Fused attention, fused kernels and
    reentrant checkpointing have no double backward: they raise here or in `backward`.

    Attributes:
        weight: weight of the squared gradient norm; the default matches those of approximate_r1.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("R1", "weight", self.weight)

    def __call__(self, logits_real: Tensor, x_real: Tensor) -> Tensor:
        """Return the weighted penalty, a scalar whose graph reaches D's parameters.

        Args:
            logits_real: D(x, c), (B,), fp32 or fp64; logit i may depend on x_real[i] only.
            x_real: (B, ...), the same tensor that D saw, with `requires_grad`.

        Raises:
            InputError: for other shapes or dtypes, an input that does not require gradients, logits
                that do not depend on it, or a gradient that has no graph of its own.
        """
        logits = check_logits("logits_real", logits_real)
        at_least_fp32("x_real", x_real)
        if x_real.shape[:1] != logits.shape:
            raise InputError(
                f"logits_real has {logits.shape[0]} samples, but x_real has shape "
                f"{tuple(x_real.shape)}; both need the same batch size"
            )
        if not x_real.requires_grad:
            raise InputError(
                "x_real must require gradients; call x_real.requires_grad_() before D's forward "
                "pass"
            )
        if not logits.requires_grad:
            raise InputError("logits_real have no graph; run D outside torch.no_grad()")
        # A seed that requires gradients makes every op differentiate its backward. With a constant
        # seed, `once_differentiable` ops next to the logits would not raise, but silently count as
        # constants.
        seed = torch.ones_like(logits, requires_grad=True)
        (gradient,) = torch.autograd.grad(
            logits, x_real, grad_outputs=seed, create_graph=True, allow_unused=True
        )
        if gradient is None:
            raise InputError("logits_real do not depend on x_real; pass the tensor that D saw")
        if not gradient.requires_grad:
            raise InputError(
                "R1 cannot train D: an op in D has no double backward, so the gradient has no "
                "graph; use the reference ops, or approximate_r1"
            )
        return self.weight * at_least_fp32("gradient", gradient).square().flatten(1).sum(1).mean()


@LOSSES.register("logit_centring")
@dataclass(frozen=True)
class LogitCentring:
    """weight * mean((D(x) + D(G(z)))^2): keeps logits around 0 if the objective does not.

    From the authors' later work (Adversarial Flow Models), with the relativistic objective.
    """

    weight: float = 0.01

    def __post_init__(self) -> None:
        check_number("LogitCentring", "weight", self.weight)

    def __call__(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """Return the weighted penalty, a scalar, for logits (B,) each.

        Raises InputError for other shapes or dtypes.
        """
        check_same_shape("logits_real", logits_real, "logits_fake", logits_fake)
        total = check_logits("logits_real", logits_real) + check_logits("logits_fake", logits_fake)
        return self.weight * total.square().mean()

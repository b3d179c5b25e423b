"""The finite-difference penalty against exact R1, on discriminators with a known gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from apt.losses import R1, ApproximateR1, create_loss

F64 = torch.float64
CHUNKS, PER_CHUNK = 64, 256
# |mean - truth| / standard error is about normal with 64 chunks; 5 is a false alarm in 10^6.
NUM_ERRORS = 5.0


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=F64))
        self.b = nn.Parameter(torch.randn(6, generator=generator, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a.T) @ self.b


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + 3.0


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def flat_gradient(value: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])


Penalty = Callable[[Tensor, Tensor], Tensor]


def estimate(module: nn.Module, x: Tensor, perturb: ApproximateR1, penalty: Penalty) -> Tensor:
    """Rows of (penalty, its parameter gradient), one per independent chunk of noise."""
    rows = []
    for chunk in range(CHUNKS):
        base = x.repeat_interleave(PER_CHUNK // len(x), 0)
        value = penalty(module(base), module(base + perturb.sigma * draw(chunk, *base.shape)))
        rows.append(torch.cat([value.detach()[None], flat_gradient(value, module)]))
    return torch.stack(rows)


def exact(module: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    value = R1(weight=1.0)(module(x), x)
    return torch.cat([value.detach()[None], flat_gradient(value, module)])


def deviations(rows: Tensor, truth: Tensor) -> Tensor:
    return (rows.mean(0) - truth).abs() / (rows.std(0) / math.sqrt(len(rows)))


@pytest.mark.parametrize("kind", [Linear, Mlp])
def test_expectation_and_parameter_gradient_meet_exact_r1(kind: type[nn.Module]) -> None:
    module = kind()
    x = 0.5 * draw(1000, 4, 4)
    # The bias is of order sigma^2 = 1e-8, far below the standard error.
    r1 = create_loss("approximate_r1", weight=1.0, sigma=1e-4, normalize="sigma2")
    rows, truth = estimate(module, x, r1, r1), exact(module, x)
    assert (deviations(rows, truth) < NUM_ERRORS).all()
    # Power: the standard error is small against what is measured.
    error = rows.std(0) / math.sqrt(CHUNKS)
    assert error[0] < 0.03 * truth[0]
    assert error[1:].norm() < 0.06 * truth[1:].norm()
    # The same bounds see a detached branch: one branch's gradient is noise of order 1 / sigma.
    detached = estimate(module, x, r1, lambda base, perturbed: r1(base, perturbed.detach()))
    assert (detached[:, 1:].std(0) / math.sqrt(CHUNKS)).norm() > 10 * truth[1:].norm()


def test_the_linear_discriminator_has_the_exact_chi_square_spread() -> None:
    # (D(x) - D(x + sigma eps))^2 / sigma^2 = (w . eps)^2 ~ |w|^2 chi^2_1: mean |w|^2, var 2 |w|^4.
    module, n = Linear(), 40_000
    r1 = create_loss("approximate_r1", weight=7.0, sigma=0.3, normalize="sigma2")
    x = draw(0, 1, 4).expand(n, 4)
    value = r1(module(x), module(x + r1.sigma * draw(1, n, 4))).item() / 7.0
    squared_norm = module.w.square().sum().item()
    assert abs(value - squared_norm) < NUM_ERRORS * squared_norm * math.sqrt(2 / n)


@pytest.mark.parametrize("normalize", [None, "sigma2"])
def test_a_quadratic_discriminator_shows_weight_sigma_and_the_bias(normalize: str | None) -> None:
    # D(x) = x A x / 2: E = weight sigma^2 (|A x|^2 + sigma^2 / 4 (2 tr A^2 + (tr A)^2)).
    a = draw(0, 4, 4)
    a = (a + a.T) / 2
    x, n, sigma, weight = draw(1, 4), 200_000, 0.5, 5.0
    r1 = create_loss("approximate_r1", weight=weight, sigma=sigma, normalize=normalize)

    def logits(points: Tensor) -> Tensor:
        return (points @ a * points).sum(1) / 2

    batch = x.expand(n, 4)
    perturbed = logits(batch + r1.sigma * draw(2, n, 4))
    scale = weight if normalize == "sigma2" else weight * sigma**2
    slope = (a @ x).square().sum()
    bias = sigma**2 / 4 * (2 * (a @ a).trace() + a.trace() ** 2)
    spread = (logits(batch) - perturbed).square().std() / sigma**2 / math.sqrt(n)
    assert bias > 20 * spread  # so that leaving the bias out would be seen
    value = r1(logits(batch), perturbed)
    assert abs(value - scale * (slope + bias)) < NUM_ERRORS * scale * spread


def test_r1_weight_is_weight_times_sigma_squared() -> None:
    x = draw(0, 8, 4)
    module = Linear()
    r1 = create_loss("approximate_r1", weight=100.0, sigma=0.1)
    n = 20_000
    base = x.repeat_interleave(n // 8, 0)
    approximate = r1(module(base), module(base + r1.sigma * draw(1, n, 4)))
    x.requires_grad_()
    value = create_loss("r1", weight=100.0 * 0.1**2)(module(x), x)
    assert abs(approximate / value - 1) < NUM_ERRORS * math.sqrt(2 / n)

"""Fréchet distance between two sets of features, as FID computes it (Heusel et al., 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.errors import InputError


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean (D,) and unbiased covariance (D, D) of a feature set, both in fp64 on the CPU."""

    mean: Tensor
    covariance: Tensor
    count: int


def gaussian_statistics(features: Tensor | Iterable[Tensor]) -> GaussianStatistics:
    """Fit a Gaussian to features (N, D) of any float dtype, given whole or in chunks (n, D).

    Chunks are accumulated in fp64, so a set of any size needs only D x D memory.
    Raises ``InputError`` for fewer than two rows, a wrong rank, or values that are not finite.
    """
    count = 0
    shift, first, second = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for chunk in [features] if isinstance(features, Tensor) else features:
        x = chunk.detach().to(device="cpu", dtype=torch.float64)
        if x.ndim != 2 or (count and x.shape[1] != shift.shape[0]):
            raise InputError(
                f"features have shape {tuple(x.shape)}; a Fréchet distance needs (N, D) with the "
                "same D everywhere."
            )
        if not torch.isfinite(x).all():
            raise InputError(
                "features contain NaN or infinity, so no Fréchet distance exists. "
                "Check the samples: the model that made them may have diverged."
            )
        if count == 0 and len(x):
            # A mean far from zero would cancel digits in the second moment.
            shift = x.mean(dim=0)
            first, second = torch.zeros_like(shift), shift.new_zeros(len(shift), len(shift))
        x = x - shift
        count += len(x)
        first = first + x.sum(dim=0)
        second = second + x.T @ x
    if count < 2:
        raise InputError(
            f"a Fréchet distance needs at least 2 samples, got {count}. Generate more samples."
        )
    offset = first / count
    covariance = (second - count * torch.outer(offset, offset)) / (count - 1)
    return GaussianStatistics(shift + offset, covariance, count)


def frechet_distance(a: GaussianStatistics | Tensor, b: GaussianStatistics | Tensor) -> float:
    """Return the squared Fréchet distance |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) in fp64.

    Takes features (N, D) or their statistics. The trace of (C_a C_b)^½ is computed as the nuclear
    norm of C_a^½ C_b^½. That needs only symmetric square roots, stays real, and loses no digits to
    squaring when a covariance is singular (fewer samples than features, or a collapsed generator).

    Raises ``InputError`` if the feature sizes differ or a set is too small.
    """
    stats_a = a if isinstance(a, GaussianStatistics) else gaussian_statistics(a)
    stats_b = b if isinstance(b, GaussianStatistics) else gaussian_statistics(b)
    if stats_a.mean.shape != stats_b.mean.shape:
        raise InputError(
            f"feature sizes differ: {stats_a.mean.numel()} and {stats_b.mean.numel()}. "
            "Both sets must come from the same feature extractor."
        )
    product = _symmetric_sqrt(stats_a.covariance) @ _symmetric_sqrt(stats_b.covariance)
    cross = torch.linalg.svdvals(product).sum()
    spread = stats_a.covariance.trace() + stats_b.covariance.trace() - 2 * cross
    distance = (stats_a.mean - stats_b.mean).square().sum() + spread
    # Rounding gives about -1e-15 for equal sets; the exact distance is never negative.
    return max(distance.item(), 0.0)


def _symmetric_sqrt(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding turns zero eigenvalues into about ±1e-17.
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

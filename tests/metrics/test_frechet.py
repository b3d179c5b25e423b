from __future__ import annotations

import math

import pytest

pytest.importorskip("torchmetrics")

import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import _compute_fid

from apt.errors import InputError
from apt.metrics import frechet_distance, gaussian_statistics


def correlated(num: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator)
    return torch.randn(num, size, generator=generator) @ mixing + seed


def test_hand_computed_one_dimension() -> None:
    # Means 1 and 4, unbiased variances 2 and 8: 9 + 2 + 8 - 2 * sqrt(16) = 11.
    a = torch.tensor([[0.0], [2.0]])
    b = torch.tensor([[2.0], [6.0]])
    assert frechet_distance(a, b) == pytest.approx(11.0, abs=1e-12)


def test_statistics_are_those_of_torch() -> None:
    x = correlated(50, 7, seed=1).double()
    stats = gaussian_statistics(x)
    assert stats.mean.dtype == stats.covariance.dtype == torch.float64
    torch.testing.assert_close(stats.mean, x.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.covariance, x.T.cov(), rtol=0, atol=1e-12)
    assert stats.count == 50


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(30, 80), st.integers(0, 99))
def test_agrees_with_torchmetrics_and_scipy(size: int, num: int, seed: int) -> None:
    a, b = correlated(num, size, seed).double(), correlated(num + 5, size, seed + 1).double()
    ours = frechet_distance(a, b)
    theirs = _compute_fid(
        a.mean(0), a.T.cov().view(size, size), b.mean(0), b.T.cov().view(size, size)
    )
    assert ours == pytest.approx(theirs.item(), rel=1e-7)
    covariances = a.T.cov().view(size, size).numpy() @ b.T.cov().view(size, size).numpy()
    root = scipy.linalg.sqrtm(covariances).real.trace()
    by_scipy = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * root
    assert ours == pytest.approx(by_scipy.item(), rel=1e-6)


def test_chunks_equal_the_whole() -> None:
    a, b = correlated(64, 6, seed=3), correlated(64, 6, seed=4)
    whole = frechet_distance(a, b)
    chunked = frechet_distance(gaussian_statistics(iter(a.split(5))), gaussian_statistics(b))
    assert chunked == pytest.approx(whole, rel=1e-10)


def test_far_away_means_lose_no_digits() -> None:
    a, b = correlated(64, 6, seed=3).double(), correlated(64, 6, seed=4).double()
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_symmetric_and_zero_for_equal_sets() -> None:
    a, b = correlated(40, 8, seed=5), correlated(40, 8, seed=6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert 0 <= frechet_distance(a, a) < 1e-10


def test_fewer_samples_than_features_stays_exact() -> None:
    # Singular covariances: the matrix square root of the product is where float FID goes wrong.
    a = correlated(5, 32, seed=7)
    shifted = a + 2.0
    assert frechet_distance(a, shifted) == pytest.approx(32 * 4.0, rel=1e-6)
    collapsed = torch.zeros(5, 32)
    expected = a.double().mean(0).square().sum() + a.double().var(0).sum()
    assert frechet_distance(a, collapsed) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("features", "word"),
    [
        (torch.zeros(1, 4), "at least 2"),
        (torch.zeros(3), r"\(N, D\)"),
        (torch.full((3, 4), math.nan), "NaN"),
    ],
)
def test_rejects_unusable_features(features: torch.Tensor, word: str) -> None:
    with pytest.raises(InputError, match=word):
        gaussian_statistics(features)


def test_rejects_different_feature_sizes() -> None:
    with pytest.raises(InputError, match="4 and 5"):
        frechet_distance(torch.zeros(3, 4), torch.zeros(3, 5))

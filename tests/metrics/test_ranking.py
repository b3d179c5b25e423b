"""Bradley-Terry strengths by hand and against logistic regression."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from apt.errors import InputError
from apt.metrics.ranking import bradley_terry


def test_by_hand() -> None:
    # One pair: the odds are those that were seen.
    a, b = bradley_terry(np.array([[0, 3], [1, 0]]))
    assert (a - b, a + b) == pytest.approx((np.log(3), 0))
    # Odds of 2, and of 4 against the third, which fit strengths of 4, 2 and 1 exactly.
    found = bradley_terry(np.array([[0, 8, 12], [4, 0, 8], [3, 4, 0]]))
    assert np.exp(found - found[2]) == pytest.approx([4, 2, 1])
    assert found.sum() == pytest.approx(0, abs=1e-12)


def test_logistic_regression_finds_the_same() -> None:
    random = np.random.default_rng(0)
    wins = random.integers(1, 30, (5, 5)) + random.integers(0, 2, (5, 5)) / 2
    rows, weights = [], []
    for i, j in itertools.permutations(range(5), 2):
        rows.append(np.eye(5)[i] - np.eye(5)[j])
        weights.append(wins[i, j])
    # A win is a row of class 1, the same row negated one of class 0.
    x = np.array(rows + [-row for row in rows])
    y = [1] * len(rows) + [0] * len(rows)
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(x, y, sample_weight=weights * 2)
    expected = model.coef_[0] - model.coef_[0].mean()
    assert bradley_terry(wins) == pytest.approx(expected, abs=1e-5)


def test_many_at_once_and_what_has_no_answer() -> None:
    fine = np.array([[0, 3.0, 1], [1, 0, 2], [2, 2, 0]])
    never_lost = np.array([[0, 3.0, 1], [0, 0, 2], [0, 2, 0]])
    apart = np.array([[0, 3.0, 0], [1, 0, 0], [0, 0, 0]])
    found = bradley_terry(np.stack([fine, never_lost, apart, fine]))
    assert np.isnan(found).all(axis=1).tolist() == [False, True, True, False]
    assert (found[0] == found[3]).all()
    assert found[0] == pytest.approx(bradley_terry(fine))
    # In a circle of wins every model was beaten, by way of others.
    circle = np.array([[0, 1.0, 0], [0, 0, 1], [1, 0, 0]])
    assert bradley_terry(circle) == pytest.approx([0, 0, 0])
    for wrong in (np.ones(3), np.ones((2, 3)), -np.ones((2, 2)), np.full((2, 2), np.nan)):
        with pytest.raises(InputError, match="counts of wins, models by models"):
            bradley_terry(wrong)

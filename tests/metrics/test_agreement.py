"""Fleiss' kappa against worked examples, and its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.errors import InputError
from apt.metrics.agreement import fleiss_kappa

# Fleiss' example as it is worked out in textbooks: 14 raters, 10 subjects, 5 categories.
WORKED = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_worked_examples() -> None:
    assert fleiss_kappa(WORKED) == pytest.approx(0.20993070442195522, abs=1e-12)
    # Two raters, two subjects, by hand: they agree on one of two; each category has half by
    # chance, so (1/2 - 1/2) / (1/2).
    assert fleiss_kappa([[2, 0], [1, 1], [0, 2], [1, 1]]) == pytest.approx(0)
    assert fleiss_kappa([[3, 0, 0], [0, 3, 0]]) == 1
    assert fleiss_kappa([[1, 1], [1, 1]]) == -1


def test_statsmodels_agrees() -> None:
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    random = np.random.default_rng(0)
    for _ in range(20):
        table = random.multinomial(3, random.dirichlet(np.ones(3)), size=50)
        assert fleiss_kappa(table) == pytest.approx(inter_rater.fleiss_kappa(table), abs=1e-12)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=20))
def test_subjects_of_one_rater_and_orders_change_nothing(rows: list[tuple[int, int, int]]) -> None:
    if not any(sum(row) >= 2 for row in rows):
        with pytest.raises(InputError, match="two raters"):
            fleiss_kappa(rows)
        return
    kappa = fleiss_kappa(rows)
    assert math.isnan(kappa) or -1 - 1e-9 <= kappa <= 1 + 1e-9
    for other in ([*rows, (0, 1, 0), (0, 0, 0)], rows[::-1], [row[::-1] for row in rows]):
        assert fleiss_kappa(other) == pytest.approx(kappa, nan_ok=True)


def test_one_category_and_bad_counts() -> None:
    assert math.isnan(fleiss_kappa([[3, 0], [3, 0]]))
    for counts in ([1, 2], [[1, -1], [2, 2]]):
        with pytest.raises(InputError, match="table of counts"):
            fleiss_kappa(counts)  # type: ignore[arg-type]

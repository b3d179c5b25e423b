from __future__ import annotations

import pytest

from apt.errors import InputError
from apt.metrics import preference_score, relative_preference_score


@pytest.mark.parametrize(
    ("good", "similar", "bad", "score"),
    [(10, 0, 0, 1.0), (0, 0, 10, -1.0), (4, 7, 4, 0.0), (3, 4, 1, 0.25), (0, 5, 0, 0.0)],
)
def test_preference_score(good: int, similar: int, bad: int, score: float) -> None:
    assert preference_score(good, similar, bad) == pytest.approx(score)


def test_rejects_nothing_and_negative_counts() -> None:
    with pytest.raises(InputError, match="at least one"):
        preference_score(0, 0, 0)
    with pytest.raises(InputError, match="negative"):
        preference_score(1, 0, -1)


@pytest.mark.parametrize(
    ("absolute", "base", "relative"),
    [(34.7, 12.1, 22.6), (35.7, -41.4, 77.1), (97.8, -36.2, 134.0)],  # Tables 2 and 3
)
def test_relative_score_gives_the_papers_table(
    absolute: float, base: float, relative: float
) -> None:
    assert relative_preference_score(absolute, base) == pytest.approx(relative, abs=0.05)

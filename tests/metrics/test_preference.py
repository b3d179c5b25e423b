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


# Percent, by visual fidelity, structural integrity, text alignment, as printed.
TABLE_3 = {
    "FLUX": (-41.4, -32.9, -18.9),
    "SD3.5-Large": (-36.2, -25.6, -14.2),
    "SDXL": (12.1, 1.2, 0.2),
}
# Base; absolute scores and their average; relative scores and theirs.
TABLE_2 = {
    "FLUX-Schnell": ("FLUX", (35.7, -21.5, -28.1), -4.6, (77.1, 11.4, -9.2), 26.4),
    "SDXL-DMD2": ("SDXL", (34.7, 10.3, -11.8), 11.1, (22.6, 9.1, -12.0), 6.6),
    "SDXL-Nitro-Realism": ("SDXL", (24.6, 16.7, -4.9), 12.1, (12.5, 15.5, -5.1), 7.6),
    "SDXL-Hyper": ("SDXL", (43.6, 4.1, -6.7), 13.7, (31.5, 2.9, -6.9), 9.2),
    "SDXL-Lightning": ("SDXL", (34.1, 14.1, 11.4), 19.9, (22.0, 12.9, 11.2), 15.4),
    "SDXL-Turbo": ("SDXL", (68.9, 14.9, -7.9), 25.3, (56.8, 13.7, -8.1), 20.8),
    "SD3.5-Large-Turbo": ("SD3.5-Large", (97.8, 7.7, -16.7), 29.6, (134.0, 33.3, -2.5), 54.9),
}


@pytest.mark.parametrize("model", TABLE_2)
def test_relative_scores_give_the_papers_table(model: str) -> None:
    base, absolute, average, relative, relative_average = TABLE_2[model]
    found = [
        relative_preference_score(score, base_score)
        for score, base_score in zip(absolute, TABLE_3[base], strict=True)
    ]
    assert found == pytest.approx(relative, abs=0.001)
    assert sum(absolute) / 3 == pytest.approx(average, abs=0.051)
    assert sum(found) / 3 == pytest.approx(relative_average, abs=0.051)


def test_the_papers_number_of_comparisons() -> None:
    """Tables 1 to 3 have 18 pairs of models on images; 6 on videos make the total, of which Table 4
    prints two."""
    images, videos, raters = 300 * 3, 96, 3
    assert (8 + 7 + 3) * images * raters + 6 * videos * raters == 50_328

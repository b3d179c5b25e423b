from __future__ import annotations

import pytest

from apt.errors import InputError
from apt.metrics.vbench import (
    QUALITY_DIMENSIONS,
    SEMANTIC_DIMENSIONS,
    total_score,
    vbench_scores,
)

ALL = {**QUALITY_DIMENSIONS, **SEMANTIC_DIMENSIONS}


@pytest.mark.parametrize(
    ("quality", "semantic", "total"),
    [  # APT Table 7
        (84.36, 73.31, 82.15),
        (81.93, 62.10, 77.97),
        (78.83, 55.69, 74.20),
        (73.78, 40.15, 67.05),
        (84.39, 71.70, 81.85),
        (84.21, 73.15, 82.00),
    ],
)
def test_total_gives_the_papers_table(quality: float, semantic: float, total: float) -> None:
    assert total_score(quality, semantic) == pytest.approx(total, abs=0.011)


def test_range_ends_are_0_and_100_percent() -> None:
    best = vbench_scores({name: d.high for name, d in ALL.items()})
    worst = vbench_scores({name.replace(" ", "_"): d.low for name, d in ALL.items()})
    assert (best.quality, best.semantic, best.total) == pytest.approx((100, 100, 100))
    assert (worst.quality, worst.semantic, worst.total) == pytest.approx((0, 0, 0))


def test_dynamic_degree_counts_half() -> None:
    values = {name: d.low for name, d in ALL.items()}
    dynamic = vbench_scores({**values, "dynamic degree": 1.0})
    imaging = vbench_scores({**values, "imaging quality": 1.0})
    assert dynamic.quality == pytest.approx(100 * 0.5 / 6.5)
    assert imaging.quality == pytest.approx(100 / 6.5)
    assert dynamic.total == pytest.approx(dynamic.quality * 4 / 5)


def test_rejects_missing_unknown_and_percent() -> None:
    values = {name: 0.5 for name in ALL}
    with pytest.raises(InputError, match="scene"):
        vbench_scores({name: v for name, v in values.items() if name != "scene"})
    with pytest.raises(InputError, match="colour"):
        vbench_scores({**values, "colour": 0.5})
    with pytest.raises(InputError, match="percent"):
        vbench_scores({**values, "scene": 52.0})

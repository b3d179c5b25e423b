from __future__ import annotations

import pytest

from apt.evaluate.digits.bars import check_bars
from apt.evaluate.digits.measure import FIGURES, Measurement
from apt.evaluate.digits.methods import APT, CONSISTENCY, LONG, NO_REGULARISER
from apt.evaluate.digits.results import Curve, MethodResult, Results
from apt.evaluate.digits.runs import DISCRIMINATOR_LOSS


def measurement(accuracy: float) -> Measurement:
    others = dict.fromkeys((name for name in FIGURES if name != "accuracy"), 1.0)
    return Measurement(**others, accuracy=accuracy, radial_power=[], opinions={})  # type: ignore[arg-type]


def results(curves: dict[str, list[float]], **accuracies: list[float]) -> Results:
    return Results(
        runs=1, seeds=(1,), num_samples=1, samples_per_caption=1, num_heldout=1, num_reference=1,
        snapshot_samples=1, setting="centred", machine="", precision="bf16", classifiers={},
        real=[], snapshots=[], costs=[], reference_power=[],
        curves={
            f"ablations/{run}": {
                DISCRIMINATOR_LOSS: Curve(updates=list(range(len(values))), values=values)
            }
            for run, values in curves.items()
        },
        methods=[
            MethodResult(
                name=name, label=name, group="main",
                measurements={str(i): measurement(accuracy=x) for i, x in enumerate(found)},
            )
            for name, found in accuracies.items()
        ],
    )  # fmt: skip


def verdict(found: Results, key: str) -> bool | None:
    (bar,) = (bar for bar in check_bars(found) if bar.key == key)
    assert bar.reached is not None
    return bar.passed


@pytest.mark.parametrize(
    ("values", "passed"),
    [([1.0] * 4, None), ([1.0] * 40, True), ([3.0] * 40, False), ([3.0, 0.0] * 4, False)],
)
def test_a_difference_of_single_values_is_not_beyond_any_spread(
    values: list[float], passed: bool | None
) -> None:
    with_it = [1.99 if number % 20 < 10 else 2.01 for number in range(len(values))]
    found = results({NO_REGULARISER: values, LONG: with_it})
    assert verdict(found, "no_r1_loss") is passed


@pytest.mark.parametrize(
    ("apt", "consistency", "passed"),
    [
        ([0.9], [0.8], True),  # no spread is needed
        ([0.8], [0.9], None),
        ([0.8, 0.9], [0.9, 0.88], True),  # less by 0.04, give or take 0.08
        ([0.7, 0.71], [0.9, 0.9], False),
    ],
)
def test_less_by_no_more_than_the_spread(
    apt: list[float], consistency: list[float], passed: bool | None
) -> None:
    found = results({}, **{APT.name: apt, CONSISTENCY.name: consistency})
    assert verdict(found, "accuracy_consistency") is passed

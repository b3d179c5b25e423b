"""What the evaluation must show, with the paper's figures beside ours."""

from __future__ import annotations

from dataclasses import dataclass

from apt.evaluate.measure import Spread
from apt.evaluate.methods import APT, CONSISTENCY, DIFFUSION_GUIDED, NO_REGULARISER
from apt.evaluate.results import Results

# APT Table 5, COCO-5K: diffusion with 25 steps, consistency with 1, APT with 1.
PAPER = {
    "frechet": {DIFFUSION_GUIDED.name: 26.9, CONSISTENCY.name: 119.6, APT.name: 27.9},
    "patch": {DIFFUSION_GUIDED.name: 30.6, CONSISTENCY.name: 164.6, APT.name: 34.6},
}
MAX_RATIO_TO_CONSISTENCY = 0.5
MAX_RATIO_TO_DIFFUSION = 1.5
MIN_ACCURACY = 0.90
# Below this the collapse monitor says that the discriminator has won; it starts at 2 log 2.
ZERO_LOSS = 0.05
# A model has collapsed when it keeps less than this share of APT's diversity or accuracy.
COLLAPSED = 0.5

_NAMES = {"frechet": "Fréchet distance", "patch": "patch distance"}


@dataclass(frozen=True)
class Bar:
    """One condition: what was reached (None: not run), the paper's figure if it has one."""

    claim: str
    bar: str
    reached: Spread | None
    paper: float | None
    passed: bool | None

    @property
    def verdict(self) -> str:
        """pass, miss, or not run."""
        return {True: "pass", False: "**miss**", None: "not run"}[self.passed]


def check_bars(results: Results) -> list[Bar]:
    """Every condition, judged on the mean over seeds."""
    bars = []
    for figure in ("frechet", "patch"):
        for other, limit, words in (
            (CONSISTENCY.name, MAX_RATIO_TO_CONSISTENCY, "one-step consistency"),
            (DIFFUSION_GUIDED.name, MAX_RATIO_TO_DIFFUSION, "25-step diffusion with CFG"),
        ):
            bars.append(
                _at_most(
                    f"{_NAMES[figure]}, one-step APT / {words}",
                    results.ratio(APT.name, other, figure),
                    limit,
                    PAPER[figure][APT.name] / PAPER[figure][other],
                )
            )
    apt, consistency = results.method(APT.name), results.method(CONSISTENCY.name)
    accuracy = apt.summary()["accuracy"] if apt else None
    bars.append(_at_least("caption accuracy, one-step APT", accuracy, MIN_ACCURACY))
    other_accuracy = consistency.summary()["accuracy"].mean if consistency else None
    bars.append(
        _at_least(
            "caption accuracy, not below one-step consistency",
            accuracy if other_accuracy is not None else None,
            other_accuracy if other_accuracy is not None else MIN_ACCURACY,
        )
    )
    return bars + _collapse_bars(results)


def _collapse_bars(results: Results) -> list[Bar]:
    bars = []
    for run, claim, wants_zero in (
        ("apt", "D's loss at the end, with the regulariser", False),
        (NO_REGULARISER, "D's loss at the end, without it", True),
    ):
        curve = results.curves.get(run)
        reached = Spread(curve.final(), float("nan")) if curve else None
        check = _at_most if wants_zero else _at_least
        bars.append(check(claim, reached, ZERO_LOSS))
    ratios = [
        ratio
        for figure in ("accuracy", "within")
        if (ratio := results.ratio(f"ablation_{NO_REGULARISER}", APT.name, figure)) is not None
    ]
    bars.append(
        _at_most(
            "samples collapse without it: accuracy or diversity within a caption, whichever is "
            "lower, relative to APT's",
            min(ratios, key=lambda ratio: ratio.mean, default=None),
            COLLAPSED,
        )
    )
    return bars


def _at_most(claim: str, reached: Spread | None, limit: float, paper: float | None = None) -> Bar:
    passed = None if reached is None else reached.mean <= limit
    return Bar(claim, f"≤ {limit:.3g}", reached, paper, passed)


def _at_least(claim: str, reached: Spread | None, limit: float, paper: float | None = None) -> Bar:
    passed = None if reached is None else reached.mean >= limit
    return Bar(claim, f"≥ {limit:.3g}", reached, paper, passed)

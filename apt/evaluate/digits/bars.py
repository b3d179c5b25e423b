"""The targets of the evaluation, with the paper's figures beside ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apt.errors import DataError
from apt.evaluate.digits.judges import DESCRIPTIONS
from apt.evaluate.digits.methods import (
    APT,
    APT_TWO,
    CONSISTENCY,
    DIFFUSION_GUIDED,
    LONG,
    NO_REGULARISER,
)
from apt.evaluate.digits.results import Results
from apt.evaluate.digits.runs import DISCRIMINATOR_LOSS, INPUT_GRADIENT
from apt.evaluate.spread import Spread

# APT Table 5, COCO-5K: diffusion with 25 steps, consistency with 1, APT with 1.
PAPER = {
    "frechet": {DIFFUSION_GUIDED.name: 26.9, CONSISTENCY.name: 119.6, APT.name: 27.9},
    "patch": {DIFFUSION_GUIDED.name: 30.6, CONSISTENCY.name: 164.6, APT.name: 34.6},
}
MIN_ACCURACY = 0.90
NAMES = {"frechet": "Fréchet distance", "patch": "patch distance"}
CONSISTENCY_WORDS, DIFFUSION_WORDS = "one-step consistency", "25-step diffusion with CFG"

# Targets for the ratio of one-step APT to another method: figure, method, bar, goal.
_RATIOS = (
    ("frechet", CONSISTENCY, CONSISTENCY_WORDS, 0.7, 0.25),
    ("patch", CONSISTENCY, CONSISTENCY_WORDS, 0.45, 0.25),
    ("frechet", DIFFUSION_GUIDED, DIFFUSION_WORDS, 1.2, 1.0),
    ("patch", DIFFUSION_GUIDED, DIFFUSION_WORDS, 1.5, 1.0),
)
_TWO_STEPS, _TWO_STEPS_GOAL = 1.05, 1.0


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One target.

    Attributes:
        key: under which the cause of a miss is stored.
        claim, bar, goal, paper: text for the page.
        reached: None if it was not run.
        passed: None if it was not run, or if a single trial leaves its spread unknown.
    """

    key: str
    claim: str
    bar: str
    reached: Spread | None
    passed: bool | None
    goal: str = ""
    paper: str = ""


def check_bars(results: Results) -> list[Bar]:
    """Return every target, judged on the mean over trials."""
    return [
        *_ratio_bars(results),
        *_accuracy_bars(results),
        *_regulariser_bars(results),
        *_judge_bars(results),
    ]


def read_causes(file: Path) -> dict[str, str]:
    """Read why targets were missed, by key, as people wrote it; empty if there is no file.

    Raises DataError unless the file is a JSON object whose values are strings.
    """
    if not file.is_file():
        return {}
    try:
        causes = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(causes, dict) or not all(isinstance(v, str) for v in causes.values()):
            raise ValueError("expected one object whose values are strings")
    except ValueError as error:
        raise DataError(
            f"{str(file)!r} does not hold causes of missed targets: {error}; fix or remove it"
        ) from error
    return causes


def _ratio_bars(results: Results) -> Iterator[Bar]:
    for figure, other, words, limit, goal in _RATIOS:
        paper = PAPER[figure][APT.name] / PAPER[figure][other.name]
        reached = results.ratio(APT.name, other.name, figure)
        yield Bar(
            key=f"{figure}_apt_{other.run}",
            claim=f"{NAMES[figure]}, one-step APT / {words}",
            bar=f"≤ {limit:g}",
            reached=reached,
            passed=None if reached is None else reached.mean <= limit,
            goal=f"≤ {goal:g}",
            paper=f"{paper:.2f}",
        )
    reached = results.ratio(APT_TWO.name, DIFFUSION_GUIDED.name, "patch")
    yield Bar(
        key="patch_two_steps",
        claim=f"patch distance, two steps of APT / {DIFFUSION_WORDS}",
        bar=f"≤ {_TWO_STEPS:g}",
        reached=reached,
        passed=None if reached is None else reached.mean <= _TWO_STEPS,
        goal=f"< {_TWO_STEPS_GOAL:g}",
        paper="better details",
    )


def _accuracy_bars(results: Results) -> Iterator[Bar]:
    apt = results.method(APT.name)
    accuracy = apt.summary()["accuracy"] if apt else None
    yield Bar(
        key="accuracy",
        claim="caption accuracy, one-step APT",
        bar=f"≥ {MIN_ACCURACY:g}",
        reached=accuracy,
        passed=None if accuracy is None else accuracy.mean >= MIN_ACCURACY,
    )
    change = results.difference(APT.name, CONSISTENCY.name, "accuracy")
    yield Bar(
        key="accuracy_consistency",
        claim="caption accuracy, one-step APT minus one-step consistency",
        bar="≥ 0 within the spread",
        reached=change,
        passed=_not_below(change),
        goal="> 0",
        paper="falls (Sec. 5.5)",
    )


def _not_below(change: Spread | None) -> bool | None:
    """Return whether a change is at least minus its spread; None if that spread is unknown."""
    if change is None:
        return None
    if change.mean >= 0:
        return True
    return change.mean >= -change.std if math.isfinite(change.std) else None


def _regulariser_bars(results: Results) -> Iterator[Bar]:
    """Compare without and with the regulariser, past the peak: worse by more than the spread."""
    for key, name, claim, sign in (
        ("loss", DISCRIMINATOR_LOSS, "D's loss", -1),
        ("input_gradient", INPUT_GRADIENT, "D's gradient at its input", 1),
    ):
        with_it, without = (
            results.curves.get(f"ablations/{run}", {}).get(name) for run in (LONG, NO_REGULARISER)
        )
        ends = None if with_it is None or without is None else (without.end(), with_it.end())
        yield _worse(key, claim, ends, sign)
    last = _last_shared(results)
    for key, claim, sign in (
        ("within", "diversity within a caption", -1),
        ("frechet", "Fréchet distance", 1),
        ("patch", "patch distance", 1),
    ):
        yield _worse(key, claim, None if last is None else (last[0][key], last[1][key]), sign)


def _last_shared(results: Results) -> tuple[dict[str, Spread], dict[str, Spread]] | None:
    """Summarise without and with the regulariser, after the most updates that both share."""
    without, with_it = (
        {s.update: s for s in results.of_run(f"ablations/{run}")} for run in (NO_REGULARISER, LONG)
    )
    shared = without.keys() & with_it.keys()
    if not shared:
        return None
    return without[max(shared)].summary(), with_it[max(shared)].summary()


def _worse(key: str, claim: str, ends: tuple[Spread, Spread] | None, sign: int) -> Bar:
    change = None
    if ends is not None:
        without, with_it = ends
        # If a single value leaves a spread unknown (nan), that of the difference is unknown too.
        change = Spread(without.mean - with_it.mean, math.hypot(without.std, with_it.std))
    return Bar(
        key=f"no_r1_{key}",
        claim=f"without minus with the regulariser, past the peak: {claim}",
        bar=f"{'<' if sign < 0 else '>'} 0 by more than the spread",
        reached=change,
        passed=_beyond(change, sign),
        paper="collapse (Fig. 5)",
    )


def _beyond(change: Spread | None, sign: int) -> bool | None:
    """Return whether a change in direction `sign` exceeds its spread; None if that is unknown."""
    if change is None or not math.isfinite(change.std):
        return None
    return sign * change.mean > change.std


def _judge_bars(results: Results) -> Iterator[Bar]:
    for name in DESCRIPTIONS:
        if name not in results.classifiers:
            continue
        main = results.ratio(APT.name, CONSISTENCY.name, "frechet")
        reached = results.ratio(APT.name, CONSISTENCY.name, "frechet", name)
        passed = None
        if main is not None and reached is not None:
            passed = agrees(main.mean - 1, reached.mean - 1)
        yield Bar(
            key=f"judge_{name.replace(' ', '_')}",
            claim=f"Fréchet distance, one-step APT / {CONSISTENCY_WORDS}, judge {name!r}",
            bar="same side of 1 as the main judge",
            reached=reached,
            passed=passed,
        )


def agrees(one: float, other: float) -> bool:
    """Return whether two changes have the same sign."""
    return (one > 0) == (other > 0)

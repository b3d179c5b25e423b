"""Scores from votes, by hand and by resampling without the shortcuts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from apt.errors import InputError
from apt.metrics.agreement import fleiss_kappa
from apt.study.criteria import CRITERIA
from apt.study.document import Pair, Study
from apt.study.statistics import Analysis, Figure
from apt.study.votes import Vote, value_of

VISUAL = "visual_fidelity"


def study(comparisons: Sequence[tuple[str, str]], prompts: int) -> Study:
    models = dict.fromkeys(name for met in comparisons for name in met)
    return Study(
        title="",
        note="",
        seed=0,
        votes=3,
        check_every=0,
        repeat_every=0,
        models={name: {} for name in models},
        pairs=tuple(
            Pair(
                name=f"{first}-{second}-{n}",
                first=first,
                second=second,
                prompt=f"prompt {n}",
                seed=0,
                files=("a.png", "b.png"),
            )
            for first, second in comparisons
            for n in range(prompts)
        ),
        checks=(),
    )


def votes(first: str, second: str, values: Sequence[Sequence[int]]) -> list[Vote]:
    """`values[prompt][rater]`, the same for every criterion."""
    return [
        Vote(
            rater=rater,
            pair=f"{first}-{second}-{prompt}",
            criterion=criterion.name,
            value=value,
        )
        for prompt, row in enumerate(values)
        for rater, value in enumerate(row, 1)
        for criterion in CRITERIA
    ]


def test_a_choice_is_a_vote_for_the_sample_that_was_on_that_side() -> None:
    assert [value_of(choice, False) for choice in ("left", "same", "right")] == [1, 0, -1]
    assert [value_of(choice, True) for choice in ("left", "same", "right")] == [-1, 0, 1]


def test_a_score_by_hand() -> None:
    analysis = Analysis(study([("a", "b")], 3), votes("a", "b", [[1, 1], [0, -1], [1, 1]]))
    score = analysis.score(("a", "b"), VISUAL)
    assert (score.good, score.similar, score.bad) == (4, 1, 1)
    assert score.score.value == pytest.approx(0.5)
    assert -1 <= score.score.low < 0.5 < score.score.high <= 1
    average = analysis.score(("a", "b"), "average")
    assert (average.good, average.score.value) == (12, pytest.approx(0.5))


def test_intervals_are_of_prompts_and_raters() -> None:
    """Compared with drawing prompts and raters one by one, also where only one of them matters."""
    random = np.random.default_rng(1)
    values = random.integers(-1, 2, (20, 4))
    analysis = Analysis(study([("a", "b")], 20), votes("a", "b", values.tolist()), resamples=4000)
    drawn = [
        values[random.integers(0, 20, 20)][:, random.integers(0, 4, 4)].mean() for _ in range(4000)
    ]
    figure = analysis.score(("a", "b"), VISUAL).score
    assert (figure.low, figure.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)

    def width(table: list[list[int]]) -> float:
        made = Analysis(study([("a", "b")], len(table)), votes("a", "b", table))
        found = made.score(("a", "b"), VISUAL).score
        return found.high - found.low

    # A rater who contradicts the others on all prompts: more prompts do not help.
    assert width([[1, 1, -1]] * 50) > 1
    assert width([[1], [-1]] * 50) < 0.5
    assert width([[1, 1, 1]] * 5) == 0


def test_relative_scores_take_the_bases_from_the_same_resamples() -> None:
    made = study([("ours", "theirs"), ("base of theirs", "base of ours")], 10)
    random = np.random.default_rng(2)
    values = random.integers(-1, 2, (10, 3))
    both = votes("ours", "theirs", values.tolist())
    # The bases went exactly as the models did; the comparison is the other way round.
    both += votes("base of theirs", "base of ours", (-values).tolist())
    analysis = Analysis(made, both)
    bases = {"ours": "base of ours", "theirs": "base of theirs"}
    figure = analysis.relative(("ours", "theirs"), VISUAL, bases)
    assert figure == Figure(value=0, low=0, high=0)
    assert analysis.relative(("ours", "theirs"), VISUAL, {"ours": "base of ours"}) is None
    same = analysis.relative(("ours", "theirs"), VISUAL, {"ours": "x", "theirs": "x"})
    assert same == analysis.score(("ours", "theirs"), VISUAL).score
    with pytest.raises(InputError, match="no votes against each other"):
        analysis.relative(("ours", "theirs"), VISUAL, {"ours": "ours", "theirs": "base of ours"})


def test_kappa_is_of_pairs() -> None:
    values = [[1, 1, 0], [-1, -1, -1], [0, 1, -1], [0, 0, 0]]
    analysis = Analysis(study([("a", "b")], 4), votes("a", "b", values))
    table = [[row.count(v) for v in (1, 0, -1)] for row in values]
    assert analysis.kappa(VISUAL) == pytest.approx(fleiss_kappa(table))
    alone = Analysis(study([("a", "b")], 2), votes("a", "b", [[1], [0]]))
    assert math.isnan(alone.kappa(VISUAL))


def test_ranking_of_three() -> None:
    made = study([("a", "b"), ("a", "c"), ("b", "c")], 30)
    cast = votes("a", "b", [[1]] * 20 + [[-1]] * 10)
    cast += votes("a", "c", [[1]] * 24 + [[-1]] * 6)
    cast += votes("b", "c", [[1]] * 15 + [[0]] * 10 + [[-1]] * 5)
    found = Analysis(made, cast).ranking(VISUAL)
    # Odds of 2, 4 and (15 + 5):(5 + 5) = 2 fit exactly.
    assert found["a"].value - found["b"].value == pytest.approx(math.log(2))
    assert found["b"].value - found["c"].value == pytest.approx(math.log(2))
    assert found["a"].low < found["a"].value < found["a"].high
    # Whoever never loses has no finite strength.
    cast = votes("a", "b", [[1]] * 30) + votes("a", "c", [[1]] * 30)
    assert all(math.isnan(f.value) for f in Analysis(made, cast).ranking(VISUAL).values())

"""Turn raters' answers into votes for models, and into statistics about the raters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from apt.study.criteria import CRITERIA, Choice
from apt.study.document import Study
from apt.study.store import Shown


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A rater's vote on a pair, by one criterion.

    Attributes:
        rater: number from 1.
        pair: name of the pair.
        criterion: name of the criterion.
        value: 1 for the pair's first model, -1 for its second, 0 for no preference.
    """

    rater: int
    pair: str
    criterion: str
    value: int


@dataclass(frozen=True, kw_only=True)
class RaterSummary:
    """Statistics about a rater. Checks and repetitions do not count as pairs.

    Attributes:
        rater: number from 1.
        rated: pairs with an answer.
        asked: pairs assigned to the rater.
        skipped: pairs that the rater skipped because they could not be shown.
        checks, checks_passed: answers to attention checks, and the correct ones among them.
        repeats, repeats_same: answers to repeated pairs, and those equal to the first answer.
        left, same, right: how often each was chosen for pairs.
    """

    rater: int
    rated: int
    asked: int
    skipped: int
    checks: int
    checks_passed: int
    repeats: int
    repeats_same: int
    left: int
    same: int
    right: int

    def attention(self) -> float:
        """Return the share of checks that were passed; 1 if the rater has seen none."""
        return self.checks_passed / self.checks if self.checks else 1.0


def value_of(choice: Choice, flipped: bool) -> int:
    """Return 1 for the first sample (on the left unless flipped), -1 for the second, 0 for same."""
    side = {"left": 1, "same": 0, "right": -1}[choice]
    return -side if flipped else side


def find_votes(study: Study, shown: Iterable[Shown]) -> list[Vote]:
    """Return the votes for models, without checks, repetitions and skipped pairs."""
    names = {pair.name for pair in study.pairs}
    return [
        vote
        for one in shown
        if one.task.kind == "pair" and one.task.pair in names
        for vote in _votes(one)
    ]


def summarise_raters(shown: Iterable[Shown]) -> list[RaterSummary]:
    """Return statistics about every rater who was given tasks, in order."""
    by_rater: dict[int, list[Shown]] = {}
    for one in shown:
        by_rater.setdefault(one.rater, []).append(one)
    return [_summary(rater, tasks) for rater, tasks in sorted(by_rater.items())]


def _summary(rater: int, tasks: list[Shown]) -> RaterSummary:
    pairs = [one for one in tasks if one.task.kind == "pair"]
    answered = [one for one in pairs if one.choices is not None]
    first = {(v.pair, v.criterion): v.value for one in answered for v in _votes(one)}
    again = [v for one in tasks if one.task.kind == "repeat" for v in _votes(one)]
    met = [(v, first[v.pair, v.criterion]) for v in again if (v.pair, v.criterion) in first]
    checks = [v.value for one in tasks if one.task.kind == "check" for v in _votes(one)]
    clicks = [choice for one in answered for choice in (one.choices or {}).values()]
    return RaterSummary(
        rater=rater,
        rated=len(answered),
        asked=len(pairs),
        skipped=sum(one.version > 0 and one.choices is None for one in pairs),
        checks=len(checks),
        checks_passed=sum(value == 1 for value in checks),
        repeats=len(met),
        repeats_same=sum(vote.value == before for vote, before in met),
        left=clicks.count("left"),
        same=clicks.count("same"),
        right=clicks.count("right"),
    )


def _votes(one: Shown) -> list[Vote]:
    choices: Mapping[str, Choice] = one.choices or {}
    return [
        Vote(
            rater=one.rater,
            pair=one.task.pair,
            criterion=criterion.name,
            value=value_of(choices[criterion.name], one.task.flipped),
        )
        for criterion in CRITERIA
        if criterion.name in choices
    ]

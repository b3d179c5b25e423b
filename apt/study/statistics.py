"""Scores of APT Tables 1 to 4 from votes, with intervals over prompts and raters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apt.errors import InputError
from apt.metrics.agreement import fleiss_kappa
from apt.metrics.preference import preference_score, relative_preference_score
from apt.metrics.ranking import bradley_terry
from apt.rng import hash_key
from apt.study.criteria import CRITERIA
from apt.study.document import Study
from apt.study.votes import Vote

AVERAGE = "average"
"""The mean over the criteria, as in the last column of Table 2."""
MEASURES = (*(criterion.name for criterion in CRITERIA), AVERAGE)

_LEVEL = 0.95
_MOST_UNKNOWN = 0.05
"""The largest share of resamples in which a figure may be undefined before it has no interval."""

Comparison = tuple[str, str]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure and its 95 % interval.

    Attributes:
        value: the figure; nan if undefined.
        low, high: ends of the interval; nan if resampling does not give one.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """One cell of a table.

    Attributes:
        good, similar, bad: votes for the first model, for neither, and for the second.
        score: (G - B) / (G + S + B).
    """

    good: int
    similar: int
    bad: int
    score: Figure


class Analysis:
    """The statistics of a study's votes.

    Intervals are percentiles of resamples in which prompts and raters are both drawn with
    replacement; a vote is weighted by the count of its prompt times the count of its rater (the
    pigeonhole bootstrap of Owen, 2007). The intervals thus cover other prompts and other raters, as
    far as those in the study represent them. With a single rater they cover other prompts only.

    Args:
        study: the study that was rated.
        votes: votes on its pairs.
        resamples: number of resamples.
    """

    def __init__(self, study: Study, votes: Sequence[Vote], *, resamples: int = 2000) -> None:
        self._pairs = {pair.name: pair for pair in study.pairs}
        self._votes = votes
        self.comparisons = [
            met for met in study.comparisons if any(self._met(vote) == met for vote in votes)
        ]
        prompts = sorted({self._pairs[vote.pair].prompt for vote in votes})
        raters = sorted({vote.rater for vote in votes})
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._columns = {rater: column for column, rater in enumerate(raters)}
        random = np.random.default_rng(hash_key(study.seed, "bootstrap"))
        self._weights = [
            random.multinomial(size, np.full(size, 1 / size), resamples).astype(np.float64)
            for size in (len(prompts), len(raters))
            if size
        ]

    def score(self, comparison: Comparison, measure: str) -> Score:
        """Return the score of the first model against the second; an average counts all votes."""
        good, similar, bad = self._counts(comparison, measure)
        figure = _figure(self._value(comparison, measure), self._resampled(comparison, measure))
        return Score(good=good, similar=similar, bad=bad, score=figure)

    def relative(
        self, comparison: Comparison, measure: str, bases: Mapping[str, str]
    ) -> Figure | None:
        """Return the score minus that of the two base models (Table 2); None without both bases.

        Nothing is subtracted if both models have the same base. Raises InputError if the bases were
        not compared.
        """
        first, second = (bases.get(name) for name in comparison)
        if first is None or second is None:
            return None
        score = self._value(comparison, measure)
        resampled = self._resampled(comparison, measure)
        if first == second:
            return _figure(score, resampled)
        if (first, second) in self.comparisons:
            sign, met = 1, (first, second)
        elif (second, first) in self.comparisons:
            sign, met = -1, (second, first)
        else:
            raise InputError(
                f"the base models {first!r} and {second!r} have no votes against each other; "
                "compare them in the same study, or leave out --base"
            )
        base = sign * self._value(met, measure)
        return _figure(
            relative_preference_score(score, base),
            resampled - sign * self._resampled(met, measure),
        )

    def kappa(self, criterion: str) -> float:
        """Return Fleiss' kappa over all pairs that at least two raters rated; nan if none."""
        counts: dict[str, Counter[int]] = {}
        for vote in self._votes:
            if vote.criterion == criterion:
                counts.setdefault(vote.pair, Counter())[vote.value] += 1
        table = [[count[value] for value in (1, 0, -1)] for count in counts.values()]
        if not any(sum(row) >= 2 for row in table):
            return float("nan")
        return fleiss_kappa(table)

    def ranking(self, criterion: str) -> dict[str, Figure]:
        """Return Bradley-Terry log-strengths of all models, of mean 0; a draw is half a win."""
        models = list(dict.fromkeys(name for met in self.comparisons for name in met))
        wins = np.zeros((len(models), len(models)))
        resampled = np.zeros((len(self._weights[0]), *wins.shape))
        for met in self.comparisons:
            i, j = (models.index(name) for name in met)
            sums, counts = self._table(met, criterion)
            for own, other, sign in ((i, j, 1), (j, i, -1)):
                # G + S/2 of the total G + S + B, from G - B and the total.
                half = (counts + sign * sums) / 2
                wins[own, other] = half.sum()
                resampled[:, own, other] = self._weigh(half)
        strengths, spread = bradley_terry(wins), bradley_terry(resampled)
        return {name: _figure(float(strengths[i]), spread[:, i]) for i, name in enumerate(models)}

    def _met(self, vote: Vote) -> Comparison:
        pair = self._pairs[vote.pair]
        return pair.first, pair.second

    def _counts(self, comparison: Comparison, measure: str) -> tuple[int, int, int]:
        """Return the votes for the first model, for neither, and for the second."""
        values = Counter(
            vote.value
            for vote in self._votes
            if self._met(vote) == comparison and measure in (AVERAGE, vote.criterion)
        )
        return values[1], values[0], values[-1]

    def _value(self, comparison: Comparison, measure: str) -> float:
        if measure == AVERAGE:
            return float(np.mean([self._value(comparison, name) for name in MEASURES[:-1]]))
        return preference_score(*self._counts(comparison, measure))

    def _table(self, comparison: Comparison, criterion: str) -> tuple[Floats, Floats]:
        """Return sums of votes and their numbers, both (prompts, raters)."""
        sums = np.zeros((len(self._rows), len(self._columns)))
        counts = np.zeros_like(sums)
        for vote in self._votes:
            if vote.criterion == criterion and self._met(vote) == comparison:
                cell = self._rows[self._pairs[vote.pair].prompt], self._columns[vote.rater]
                sums[cell] += vote.value
                counts[cell] += 1
        return sums, counts

    def _weigh(self, table: Floats) -> Floats:
        """Return the sum of a table in every resample."""
        prompts, raters = self._weights
        found: Floats = ((prompts @ table) * raters).sum(axis=1)
        return found

    def _resampled(self, comparison: Comparison, measure: str) -> Floats:
        """Return the score in every resample; nan where no vote was drawn."""
        if measure == AVERAGE:
            every = [self._resampled(comparison, name) for name in MEASURES[:-1]]
            mean: Floats = np.mean(every, axis=0)
            return mean
        sums, counts = (self._weigh(table) for table in self._table(comparison, measure))
        with np.errstate(invalid="ignore"):
            score: Floats = sums / counts
        return score


def _figure(value: float, resampled: Floats) -> Figure:
    known = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or len(known) < (1 - _MOST_UNKNOWN) * len(resampled):
        return Figure(value=value, low=float("nan"), high=float("nan"))
    low, high = np.quantile(known, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Figure(value=value, low=float(low), high=float(high))

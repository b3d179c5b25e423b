"""Ranking from pairwise comparisons: the model of Bradley and Terry (1952)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from apt.errors import InputError

_MOST_ROUNDS = 10_000
_CLOSE = 1e-10


def bradley_terry(wins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log-strengths of models, of mean 0: their difference is the log-odds of a win.

    The maximum-likelihood estimate, by Hunter's MM algorithm (2004).

    Args:
        wins: (..., N, N), how often the row's model beat the column's; a draw is half a win for
            each. The diagonal is ignored.

    Returns (..., N); nan for tables without a finite maximum, because some group of models was
    never beaten by a model outside it, or never met one.

    Raises InputError if wins is not such a table, or negative.
    """
    table = np.asarray(wins, dtype=np.float64)
    if table.ndim < 2 or table.shape[-1] != table.shape[-2] or not (table >= 0).all():
        raise InputError(
            "a ranking needs non-negative counts of wins, models by models; got shape "
            f"{table.shape}"
        )
    number = table.shape[-1]
    table = np.where(np.eye(number, dtype=bool), 0, table)
    known = _connected(table)
    # Tables without a finite maximum are replaced by one that converges at once.
    table = np.where(known[..., None, None], table, 1 - np.eye(number))
    total, met = table.sum(axis=-1), table + np.swapaxes(table, -1, -2)
    strength = np.ones(table.shape[:-1])
    for _ in range(_MOST_ROUNDS):
        expected = met / (strength[..., :, None] + strength[..., None, :])
        better = total / expected.sum(axis=-1)
        better /= np.exp(np.log(better).mean(axis=-1, keepdims=True))
        change = np.abs(np.log(better / strength)).max(initial=0)
        strength = better
        if change < _CLOSE:
            break
    return np.where(known[..., None], np.log(strength), np.nan)


def _connected(wins: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether every model beat every other one, directly or through others (Ford, 1957)."""
    number = wins.shape[-1]
    reach = ((wins > 0) | np.eye(number, dtype=bool)).astype(np.int64)
    for _ in range(max(1, number.bit_length())):
        reach = np.minimum(reach @ reach, 1)
    return np.asarray((reach > 0).all(axis=(-1, -2)), dtype=np.bool_)

"""Agreement among raters (Fleiss, 1971)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apt.errors import InputError


def fleiss_kappa(
    counts: Sequence[Sequence[int]] | NDArray[np.int64] | NDArray[np.float64],
) -> float:
    """1 for perfect agreement, 0 for what chance gives, below 0 for less.

    Args:
        counts: (subjects, categories), how many raters put a subject into a category. Subjects may
            have different numbers of raters; those with fewer than two say nothing of agreement,
            and are left out. With equal numbers this is Fleiss' formula.

    Returns nan if all raters used one category alone: agreement by chance is then perfect as well.

    Raises InputError for counts that are no table, negative, or without a subject of two raters.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or (table < 0).any():
        raise InputError(
            f"kappa needs a table of counts, subjects by categories; got shape {table.shape}"
        )
    table = table[table.sum(axis=1) >= 2]
    if not len(table):
        raise InputError("kappa needs a subject that two raters saw")
    raters = table.sum(axis=1)
    agreeing = (table * (table - 1)).sum(axis=1) / (raters * (raters - 1))
    by_chance = float(((table.sum(axis=0) / table.sum()) ** 2).sum())
    if by_chance == 1:
        return float("nan")
    return (float(agreeing.mean()) - by_chance) / (1 - by_chance)

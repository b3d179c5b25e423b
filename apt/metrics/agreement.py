"""Agreement among raters (Fleiss, 1971)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from apt.errors import InputError


def fleiss_kappa(
    counts: Sequence[Sequence[int]] | NDArray[np.int64] | NDArray[np.float64],
) -> float:
    """Return Fleiss' kappa: 1 for perfect agreement, 0 for chance, negative for less than chance.

    Args:
        counts: (subjects, categories), how many raters put a subject into a category. Subjects may
            have different numbers of raters; those with fewer than two say nothing about agreement
            and are left out. With equal numbers this is Fleiss' formula.

    Returns nan if all raters used a single category: chance agreement is then perfect, too.

    Raises InputError if counts are not a table, are negative, or no subject has two raters.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or (table < 0).any():
        raise InputError(
            f"kappa needs a table of counts, subjects by categories; got shape {table.shape}"
        )
    table = table[table.sum(axis=1) >= 2]
    if not len(table):
        raise InputError("kappa needs at least one subject that two raters rated")
    raters = table.sum(axis=1)
    agreeing = (table * (table - 1)).sum(axis=1) / (raters * (raters - 1))
    by_chance = float(((table.sum(axis=0) / table.sum()) ** 2).sum())
    if by_chance == 1:
        return float("nan")
    return (float(agreeing.mean()) - by_chance) / (1 - by_chance)

"""Mean and spread of a figure over trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (nan for a single value) over trials."""

    mean: float
    std: float

    @property
    def known(self) -> float:
        """The deviation, or 0 if it is unknown, as for a single value."""
        return self.std if math.isfinite(self.std) else 0.0


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the sample standard deviation (n - 1)."""
    array = np.asarray(values, dtype=np.float64)
    # An infinite ratio has no spread either.
    known = len(array) > 1 and bool(np.isfinite(array).all())
    return Spread(float(array.mean()), float(array.std(ddof=1)) if known else math.nan)

"""Preference scores of the paper's user studies (APT Section 4.2)."""

from __future__ import annotations

from apt.errors import InputError


def preference_score(good: int, similar: int, bad: int) -> float:
    """Return (G - B) / (G + S + B): +1 if always preferred, 0 for a draw, -1 if never preferred.

    ``good``, ``similar`` and ``bad`` count comparisons won, undecided and lost. The paper prints
    the score in percent. Raises ``InputError`` for negative counts, and if all are zero.
    """
    if min(good, similar, bad) < 0:
        raise InputError(
            f"comparison counts must not be negative; got {good=}, {similar=}, {bad=}."
        )
    total = good + similar + bad
    if total == 0:
        raise InputError("there are no comparisons; a preference score needs at least one.")
    return (good - bad) / total


def relative_preference_score(score: float, base_score: float) -> float:
    """Return the score of two one-step models minus that of their base models (Table 2).

    ``base_score`` compares the diffusion models that the one-step models came from (Table 3).
    Subtracting it keeps a strong base model from counting as a good one-step method.
    """
    return score - base_score

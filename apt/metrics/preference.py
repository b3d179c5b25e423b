"""Preference scores of the paper's user studies (APT Section 4.2)."""

from __future__ import annotations

from apt.errors import InputError


def preference_score(good: int, similar: int, bad: int) -> float:
    """(G - B) / (G + S + B): +1 when always preferred, 0 for a draw, -1 when never preferred.

    ``good``, ``similar`` and ``bad`` count comparisons won, undecided and lost. The paper prints
    the score in percent. Raises ``InputError`` for negative counts or no comparison at all.
    """
    if min(good, similar, bad) < 0:
        raise InputError(
            f"comparison counts must not be negative; got {good=}, {similar=}, {bad=}."
        )
    total = good + similar + bad
    if total == 0:
        raise InputError("no comparison was counted; a preference score needs at least one.")
    return (good - bad) / total


def relative_preference_score(score: float, base_score: float) -> float:
    """Score against another one-step model, less the score of the two base models (Table 2).

    ``base_score`` compares the two diffusion models the one-step models came from (Table 3), so a
    strong base model does not count as a good one-step method.
    """
    return score - base_score

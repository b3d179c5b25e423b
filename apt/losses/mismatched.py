"""Matching-aware discrimination: real samples under a wrong caption."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from apt.errors import ConfigError
from apt.losses.adversarial import UnpairedObjective
from apt.losses.checks import check_number
from apt.losses.names import LOSSES


@LOSSES.register("mismatched_condition")
@dataclass(frozen=True)
class MismatchedCondition:
    """weight * D's fake term on real samples with another sample's condition.

    APT Appendix J (1), after GigaGAN (Kang et al. 2023); the paper saw little gain and left it
    out. The pairing is the caller's: a shuffled condition that equals the true one must not be
    counted.

    Attributes:
        weight: factor of the term.
        objective: the adversarial objective whose fake term is taken; one with separate terms.
    """

    weight: float = 1.0
    objective: str = "non_saturating"

    def __post_init__(self) -> None:
        check_number("MismatchedCondition", "weight", self.weight)
        self._terms()

    def __call__(self, logits_mismatched: Tensor) -> Tensor:
        """The weighted term, a scalar, for D(x, c') (B,). Raises InputError otherwise."""
        return self.weight * self._terms().fake_term(logits_mismatched)

    def _terms(self) -> UnpairedObjective:
        objective = LOSSES.create(self.objective)
        if not isinstance(objective, UnpairedObjective):
            raise ConfigError(
                f"MismatchedCondition: {self.objective!r} has no fake term of its own; choose "
                "'non_saturating', 'hinge' or 'least_squares'"
            )
        return objective

"""Matching-aware discrimination: real samples with wrong captions."""

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
    out. The caller pairs samples with conditions, and must leave out pairs whose shuffled condition
    equals the true one.

    Attributes:
        weight: weight of the term.
        objective: the adversarial objective whose fake term is used; it must have separate terms.
    """

    weight: float = 1.0
    objective: str = "non_saturating"

    def __post_init__(self) -> None:
        check_number("MismatchedCondition", "weight", self.weight)
        self._terms()

    def __call__(self, logits_mismatched: Tensor) -> Tensor:
        """Return the weighted term, a scalar, for logits D(x, c') (B,).

        Raises InputError for other shapes or dtypes.
        """
        return self.weight * self._terms().fake_term(logits_mismatched)

    def _terms(self) -> UnpairedObjective:
        objective = LOSSES.create(self.objective)
        if not isinstance(objective, UnpairedObjective):
            raise ConfigError(
                f"MismatchedCondition: objective {self.objective!r} has no separate fake term; "
                "choose 'non_saturating', 'hinge' or 'least_squares'"
            )
        return objective

"""Losses: adversarial objectives, regularisers, distillation, flow matching."""

from __future__ import annotations

from apt.losses.adversarial import (
    AdversarialObjective,
    Hinge,
    LeastSquares,
    NonSaturating,
    Relativistic,
    UnpairedObjective,
)
from apt.losses.consistency import Consistency
from apt.losses.create import create_loss
from apt.losses.feature_matching import FeatureMatching
from apt.losses.flow_matching import FlowMatching
from apt.losses.mismatched import MismatchedCondition
from apt.losses.names import LOSSES, list_losses
from apt.losses.regularizers import R1, ApproximateR1, ApproximateR2, LogitCentring

__all__ = [
    "LOSSES",
    "R1",
    "AdversarialObjective",
    "ApproximateR1",
    "ApproximateR2",
    "Consistency",
    "FeatureMatching",
    "FlowMatching",
    "Hinge",
    "LeastSquares",
    "LogitCentring",
    "MismatchedCondition",
    "NonSaturating",
    "Relativistic",
    "UnpairedObjective",
    "create_loss",
    "list_losses",
]

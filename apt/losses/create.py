"""Build a loss by name, with its exact type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from apt.losses.names import LOSSES

if TYPE_CHECKING:
    from apt.losses.adversarial import Hinge, LeastSquares, NonSaturating, Relativistic
    from apt.losses.consistency import Consistency
    from apt.losses.feature_matching import FeatureMatching
    from apt.losses.flow_matching import FlowMatching
    from apt.losses.mismatched import MismatchedCondition
    from apt.losses.regularizers import R1, ApproximateR1, ApproximateR2, LogitCentring


@overload
def create_loss(name: Literal["approximate_r1"], /, **options: Any) -> ApproximateR1: ...
@overload
def create_loss(name: Literal["approximate_r2"], /, **options: Any) -> ApproximateR2: ...
@overload
def create_loss(name: Literal["consistency"], /, **options: Any) -> Consistency: ...
@overload
def create_loss(name: Literal["feature_matching"], /, **options: Any) -> FeatureMatching: ...
@overload
def create_loss(name: Literal["flow_matching"], /, **options: Any) -> FlowMatching: ...
@overload
def create_loss(name: Literal["hinge"], /, **options: Any) -> Hinge: ...
@overload
def create_loss(name: Literal["least_squares"], /, **options: Any) -> LeastSquares: ...
@overload
def create_loss(name: Literal["logit_centring"], /, **options: Any) -> LogitCentring: ...
@overload
def create_loss(
    name: Literal["mismatched_condition"], /, **options: Any
) -> MismatchedCondition: ...
@overload
def create_loss(name: Literal["non_saturating"], /, **options: Any) -> NonSaturating: ...
@overload
def create_loss(name: Literal["r1"], /, **options: Any) -> R1: ...
@overload
def create_loss(name: Literal["relativistic"], /, **options: Any) -> Relativistic: ...
@overload
def create_loss(name: str, /, **options: Any) -> Any: ...
def create_loss(name: str, /, **options: Any) -> Any:
    """Build a registered loss: a small frozen object that is called with tensors.

    Args:
        name: see `list_losses`.
        **options: fields of the loss, checked by name, type and range.

    Raises:
        InputError: for an unknown name or option (with close matches), or a value out of range.
    """
    return LOSSES.create(name, **options)

"""How far a result is off: as a whole, and in the worst of its rows.

The norm of the whole hides a row: of 4,096 rows one that is wholly wrong adds an error of 0.016,
which is what bf16 may have. The worst row alone would let a small error pass that all rows have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROW = 128  # values: a head's channels, or a piece of a wider row
# A row far smaller than the others is held to theirs: it is what is left of sums that cancel
_SMALL = 0.1


class Deviation(NamedTuple):
    """Relative errors in the Euclidean norm.

    Attributes:
        whole: of the tensor.
        row: the largest of a row of up to `ROW` neighbours in the last dimension.
    """

    whole: float
    row: float

    def exceeds(self, allowed: Deviation) -> str:
        """Which of the two is too large, with the figures; empty if neither. NaN is."""
        for name, error, limit in zip(("", " in a row"), self, allowed, strict=True):
            if not error <= limit:
                return f"{error:.2g}{name}, allowed {limit:.2g}"
        return ""


def deviation(found: Tensor, exact: Tensor) -> Deviation:
    """Of a result from what it should be; infinite for another shape.

    Args:
        found: any shape and dtype; not compared in less than the type of `exact`.
        exact: fp32 or fp64.
    """
    if found.shape != exact.shape:
        return Deviation(float("inf"), float("inf"))
    if not exact.numel():
        return Deviation(0.0, 0.0)
    errors, sizes = (_row_norms(values) for values in (found.to(exact.dtype) - exact, exact))
    tiny = torch.finfo(torch.float32).tiny
    typical = sizes.square().mean().sqrt()
    rows = errors / torch.maximum(sizes, _SMALL * typical).clamp(min=tiny)
    whole = errors.norm() / sizes.norm().clamp(min=tiny)
    return Deviation(float(whole), float(rows.max()))


def _row_norms(values: Tensor) -> Tensor:
    """(rows, pieces): norms of pieces of up to `ROW` values along the last dimension."""
    values = values.reshape(-1, values.shape[-1] if values.ndim else 1)
    whole = values.shape[1] // ROW * ROW
    norms = [torch.linalg.vector_norm(values[:, :whole].unflatten(1, (-1, ROW)), dim=2)]
    if whole < values.shape[1]:
        norms.append(torch.linalg.vector_norm(values[:, whole:], dim=1, keepdim=True))
    return torch.cat(norms, dim=1)

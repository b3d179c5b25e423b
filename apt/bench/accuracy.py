"""The error of a result: of the whole tensor, and of its worst row.

The norm of the whole tensor hides single rows: if one of 4,096 rows is completely wrong, the error
is 0.016, which bf16 may have. The worst row alone would hide a small error in all rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROW = 128  # values: the channels of a head, or a piece of a wider row
# Errors of rows much smaller than the typical row, which sums that cancel leave, are divided by
# this share of the typical size instead of their own
_SMALL = 0.1


class Deviation(NamedTuple):
    """Relative errors in the Euclidean norm.

    Attributes:
        whole: error of the tensor.
        row: largest error of a row, up to `ROW` neighbours in the last dimension.
    """

    whole: float
    row: float

    def exceeds(self, allowed: Deviation) -> str:
        """Return which error is too large, with figures; empty if neither. NaN is too large."""
        for name, error, limit in zip(("", " in a row"), self, allowed, strict=True):
            if not error <= limit:
                return f"{error:.2g}{name}, allowed {limit:.2g}"
        return ""


def deviation(found: Tensor, exact: Tensor) -> Deviation:
    """Return the error of a result; infinite if the shapes differ.

    Args:
        found: the result, of any shape and dtype; compared in the dtype of `exact`.
        exact: the correct values, fp32 or fp64.
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
    """Return the norms (rows, pieces) of pieces of up to `ROW` values of the last dimension."""
    values = values.reshape(-1, values.shape[-1] if values.ndim else 1)
    whole = values.shape[1] // ROW * ROW
    norms = [torch.linalg.vector_norm(values[:, :whole].unflatten(1, (-1, ROW)), dim=2)]
    if whole < values.shape[1]:
        norms.append(torch.linalg.vector_norm(values[:, whole:], dim=1, keepdim=True))
    return torch.cat(norms, dim=1)

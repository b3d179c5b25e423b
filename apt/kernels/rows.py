"""Condition rows shared by several samples."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def take_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """The row of `values` (R, ...) for each sample: (B, ...).

    `rows` (B,) int64 may repeat a row; None: R = B, and `values` come back as they are.
    """
    if rows is None:
        return values
    # The backward of embedding adds repeated rows in a fixed order on every device; those of
    # indexing and index_select use atomics on one device or the other, also on the CPU, and then a
    # resumed run would not equal an uninterrupted one.
    return F.embedding(rows, values.flatten(1)).unflatten(1, values.shape[1:])

"""MMDiT: the paper's transformer, in our own sizes."""

from __future__ import annotations

from apt.models.mmdit import cost
from apt.models.mmdit.model import MMDiT, MMDiTConfig

__all__ = ["MMDiT", "MMDiTConfig", "cost"]

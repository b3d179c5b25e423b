"""How checkpoints of public families become ours: one file per family, registered in `FAMILIES`."""

from __future__ import annotations

from apt.models.conversions import sd3

__all__ = ["sd3"]

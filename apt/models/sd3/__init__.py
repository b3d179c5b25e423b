"""Stable Diffusion 3 and 3.5, text to image."""

from __future__ import annotations

from apt.models.sd3 import checkpoint, cost
from apt.models.sd3.model import SD3, SD3Config

__all__ = ["SD3", "SD3Config", "checkpoint", "cost"]

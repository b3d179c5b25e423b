"""Wan 2.1 and 2.2, text to video."""

from __future__ import annotations

from apt.models.wan import checkpoint, cost
from apt.models.wan.checkpoint import NEGATIVE_PROMPT
from apt.models.wan.model import Wan, WanConfig

__all__ = ["NEGATIVE_PROMPT", "Wan", "WanConfig", "checkpoint", "cost"]

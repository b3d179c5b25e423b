"""Wan 2.1 and 2.2, text to video."""

from __future__ import annotations

from apt.models.wan import checkpoint, cost, sizes
from apt.models.wan.model import Wan, WanConfig
from apt.models.wan.sizes import NEGATIVE_PROMPT

__all__ = ["NEGATIVE_PROMPT", "Wan", "WanConfig", "checkpoint", "cost", "sizes"]

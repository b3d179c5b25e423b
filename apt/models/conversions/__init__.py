"""Families of public checkpoints, one file each: their configs and keys, and ours."""

from __future__ import annotations

from apt.models.conversions import sd3, wan

__all__ = ["sd3", "wan"]

"""Families of public checkpoints, one file each: their configs and keys, and ours."""

from __future__ import annotations

from apt.models.conversions import wan

__all__ = ["wan"]

"""Old name of `apt.checkpoints.lora`, for scripts written for earlier versions."""

from __future__ import annotations

from apt.checkpoints.lora import load_lora as read_lora
from apt.checkpoints.lora import merge_lora

__all__ = ["merge_lora", "read_lora"]

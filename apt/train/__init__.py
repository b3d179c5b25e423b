"""Training: recipes, the trainer, and what keeps a run safe."""

from __future__ import annotations

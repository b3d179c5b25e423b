"""Recipes by name."""

from __future__ import annotations

from collections.abc import Sequence

from apt.registry import Registry
from apt.train.config import TrainConfig

RECIPES: Registry[TrainConfig | Sequence[TrainConfig]] = Registry("recipe")
"""Functions that return the configuration of a run, or of several in a row."""


def list_recipes(pattern: str = "*") -> list[str]:
    """Return the names of registered recipes that match a shell-style pattern, sorted."""
    return RECIPES.names(pattern)


def stages_of(made: TrainConfig | Sequence[TrainConfig]) -> list[TrainConfig]:
    """Return the result of a recipe as a list of runs."""
    return [made] if isinstance(made, TrainConfig) else list(made)

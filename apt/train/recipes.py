"""Recipes: functions that return the configuration of a run, or of several in a row.

Importing this module registers all of them.
"""

from __future__ import annotations

from apt.train import (
    recipes_ablations,
    recipes_digits,
    recipes_gpu,
    recipes_own,
    recipes_paper,
    recipes_pixels,
    recipes_public,
    recipes_walks,
)
from apt.train.recipe_names import RECIPES, list_recipes

__all__ = [
    "RECIPES",
    "list_recipes",
    "recipes_ablations",
    "recipes_digits",
    "recipes_gpu",
    "recipes_own",
    "recipes_paper",
    "recipes_pixels",
    "recipes_public",
    "recipes_walks",
]

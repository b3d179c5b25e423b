"""All stages on rendered first-person walks, the clips that `data vizdoom` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from apt.train import recipes_digits
from apt.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from apt.train.recipe_names import RECIPES
from apt.train.sequence import move_runs

_WALKS = DataConfig(
    source="folder",
    path="data/walks",
    frames=9,
    height=64,
    width=64,
    fps=8.75,
    native_ratio=False,
    images="none",
)
_WALKS_PROMPTS = (
    "first-person view of a stone maze: the camera moves forward",
    "first-person view of a maze of rooms: the camera turns left",
    "first-person view of a small hall: the camera slides right, a cacodemon in sight",
    "first-person view of a brick corridor: the camera turns right, a soldier in sight",
)
# Batches are halved and training is shortened, so that everything takes about an hour on one core.
# This is a first look; such a model can learn more.
_WALKS_STAGES: tuple[dict[str, Any], ...] = (
    {
        "name": "walks_codec",
        "model": ModelConfig(codec="video_ae"),
        "num_updates": 4000,
        "batch_size": 4,
        "optimizer": OptimizerConfig(
            name="adamw",
            learning_rate=7e-4,
            warmup_updates=50,
            decay_updates=2500,
            max_grad_norm=1.0,
        ),
    },
    {"name": "walks_pretrain", "num_updates": 4000, "batch_size": 16},
    {"name": "walks_distill", "batch_size": 16},
    {"name": "walks_apt", "batch_size": 16},
)


@RECIPES.register("walks")
def walks() -> Sequence[TrainConfig]:
    """A codec and all three stages on the clips of `data vizdoom`."""
    digits = recipes_digits.digits()
    moved = [
        dataclasses.replace(
            config, run_dir="runs/walks", data=_WALKS, sample_prompts=_WALKS_PROMPTS, **changes
        )
        for config, changes in zip(digits, _WALKS_STAGES, strict=True)
    ]
    return tuple(move_runs(moved, before=digits))

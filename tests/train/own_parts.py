"""A user's own module for `--import`, which registers parts and recipes."""

from __future__ import annotations

from typing import Any

from apt.data.source import DATASETS
from apt.losses import LOSSES
from apt.methods import AdversarialConfig, DistillConfig, PretrainConfig
from apt.models import CODECS, HEADS, MODELS, TEXT_ENCODERS
from apt.train.config import DataConfig, ModelConfig, TrainConfig
from apt.train.recipe_names import RECIPES
from tests.train import own_classes as own

MODELS.register("own_mixer")(own.MixerConfig)
TEXT_ENCODERS.register("own_words")(own.WordsConfig)
CODECS.register("own_fold")(own.FoldConfig)
HEADS.register("own_mean")(own.MeanHead)
LOSSES.register("own_margin")(own.Margin)
DATASETS.register("own_bars")(own.BarsSource)

FRAMES, HEIGHT, WIDTH = own.CLIP
SHARED: dict[str, Any] = {
    "data": DataConfig(
        source="own_bars", options={"count": 6}, frames=FRAMES, height=HEIGHT, width=WIDTH
    ),
    "num_updates": 2,
    "batch_size": 2,
    "checkpoint_every": 1,
    "sample_every": 2,
    "sample_prompts": own.CAPTIONS,
}


@RECIPES.register("mine")
def recipes() -> list[TrainConfig]:
    """All three stages on the user's own parts."""
    return [
        TrainConfig(
            name="own_pretrain",
            run_dir="runs/own/pretrain",
            stage=PretrainConfig(),
            model=ModelConfig(
                name="own_mixer",
                options={"depth": 3},
                text_encoder="own_words",
                codec="own_fold",
                codec_options={"scale": 0.5},
            ),
            **SHARED,
        ),
        TrainConfig(
            name="own_distill",
            run_dir="runs/own/distill",
            stage=DistillConfig(teacher="runs/own/pretrain/export"),
            **SHARED,
        ),
        TrainConfig(
            name="own_apt",
            run_dir="runs/own/apt",
            stage=AdversarialConfig(
                generator="runs/own/distill/export",
                discriminator="runs/own/pretrain/export",
                head="own_mean",
                objective="own_margin",
            ),
            **SHARED,
        ),
    ]

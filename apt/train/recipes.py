"""Recipes: functions that return the configuration of a run, or of several in a row.

Those of the digits are here; importing this module registers the others too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from apt.train import recipes_paper, recipes_public
from apt.train.config import (
    AdversarialConfig,
    DistillConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)
from apt.train.registry import RECIPES, list_recipes

__all__ = ["RECIPES", "list_recipes", "recipes_paper", "recipes_public"]

_DIGITS_PROMPTS = (
    "a red seven moving left",
    "a green three moving up",
    "a white zero moving right",
    "a blue five moving down",
    "a yellow eight moving left",
    "a magenta two moving up",
)
_DIGITS_CFG = 1.5
_DIGITS_SHIFT = 12.0


@RECIPES.register("digits_pretrain")
def digits_pretrain() -> TrainConfig:
    """Flow matching on the moving digits, from scratch."""
    return TrainConfig(
        name="digits_pretrain",
        run_dir="runs/digits/pretrain",
        # A clip of 27,648 values that one of 240 captions explains: the noise drowns the caption's
        # part only where t > 0.95, which shift 3 draws in 14 % of the samples and 12, the paper's
        # value for videos, in 39 %.
        stage=PretrainConfig(
            timestep_shift=_DIGITS_SHIFT,
            cfg_scale=_DIGITS_CFG,
            sampling_shift=_DIGITS_SHIFT,
        ),
        model=ModelConfig(
            text_encoder_options={"alphabet": "ascii", "num_buckets": 1024, "depth": 1},
            # Mean and standard deviation of the training clips.
            codec_options={"lapped": True, "mean": -0.49, "std": 0.42},
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1.5e-3,
            warmup_updates=100,
            decay_updates=6000,
            max_grad_norm=1.0,
        ),
        num_updates=22_000,
        batch_size=16,
        ema_decay=0.999,
        precision="bf16",
        checkpoint_every=500,
        sample_every=1000,
        sample_prompts=_DIGITS_PROMPTS,
    )


@RECIPES.register("digits_distill")
def digits_distill() -> TrainConfig:
    """Consistency distillation of the digits model."""
    return TrainConfig(
        name="digits_distill",
        run_dir="runs/digits/distill",
        stage=DistillConfig(
            teacher="runs/digits/pretrain/export",
            cfg_scale=_DIGITS_CFG,
            num_timesteps=25,
            timestep_shift=_DIGITS_SHIFT,
        ),
        optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_updates=50),
        # Short: it gives G a start. After 800 updates the samples are sharper, but adversarial
        # training then moves less (docs/results/digits_search.md).
        num_updates=400,
        batch_size=16,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=200,
        sample_every=200,
        sample_prompts=_DIGITS_PROMPTS,
    )


@RECIPES.register("digits_apt")
def digits_apt() -> TrainConfig:
    """Adversarial post-training of the digits model, against real clips."""
    return TrainConfig(
        name="digits_apt",
        run_dir="runs/digits/apt",
        stage=AdversarialConfig(
            generator="runs/digits/distill/export",
            discriminator="runs/digits/pretrain/export",
            # To G's output layers D's gradients are mostly noise, which an optimiser that divides
            # by their size turns into grain (docs/results/digits_search.md).
            generator_trains="blocks",
            # With 100 and 0.05, D's gradients grew fiftyfold in 300 updates and led G to grain. G
            # asks D about samples, so these are penalised too.
            r1_weight=1000.0,
            r2_weight=1000.0,
            r1_sigma=0.1,
            # At one rate for both, small batches leave D's loss at 2 log 2: G moves as fast as D.
            discriminator_learning_rate=3e-4,
        ),
        # Momentum stands in for the paper's batch of thousands, and so does the decay at the end.
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-4,
            betas=(0.5, 0.95),
            warmup_updates=30,
            decay_updates=80,
        ),
        # Detail gains for longer, but digits are then read less often.
        num_updates=200,
        batch_size=32,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=50,
        snapshot_at=(50, 100, 150, 200),
        sample_every=50,
        sample_prompts=_DIGITS_PROMPTS,
    )


@RECIPES.register("digits")
def digits() -> Sequence[TrainConfig]:
    """All three stages on the moving digits, in a row."""
    return (digits_pretrain(), digits_distill(), digits_apt())


def _ablation(name: str, *, num_updates: int = 100, **changes: Any) -> TrainConfig:
    """The first updates of `digits_apt` with some fields changed, in a folder of its own.

    `changes` are fields of the stage, but for `batch_size`. Rates stay: they have not yet begun to
    fall in `digits_apt` after as many updates. Longer ones go on at constant rates.
    """
    base = digits_apt()
    batch_size = changes.pop("batch_size", base.batch_size)
    return dataclasses.replace(
        base,
        name=f"digits_apt_{name}",
        run_dir=f"runs/digits/ablations/{name}",
        stage=dataclasses.replace(base.stage, **changes),
        optimizer=dataclasses.replace(base.optimizer, decay_updates=0),
        batch_size=batch_size,
        num_updates=num_updates,
        snapshot_at=(),
    )


@RECIPES.register("digits_apt_no_r1")
def digits_apt_no_r1() -> TrainConfig:
    """Ablation: no regulariser (APT Fig. 5)."""
    return _ablation("no_r1", r1_weight=0.0, r2_weight=0.0, num_updates=500)


@RECIPES.register("digits_apt_no_r2")
def digits_apt_no_r2() -> TrainConfig:
    """Ablation: the regulariser on real samples alone, as in the paper."""
    return _ablation("no_r2", r2_weight=0.0)


@RECIPES.register("digits_apt_all_layers")
def digits_apt_all_layers() -> TrainConfig:
    """Ablation: all of the generator trains, as in the paper."""
    return _ablation("all_layers", generator_trains="all")


@RECIPES.register("digits_apt_shallow")
def digits_apt_shallow() -> TrainConfig:
    """Ablation: a discriminator of half the depth (APT Fig. 6)."""
    return _ablation("shallow", layers=(1, 2, 3))


@RECIPES.register("digits_apt_one_head")
def digits_apt_one_head() -> TrainConfig:
    """Ablation: one head, on the last block (APT Fig. 7)."""
    return _ablation("one_head", layers=(6,))


@RECIPES.register("digits_apt_frozen")
def digits_apt_frozen() -> TrainConfig:
    """Ablation: D's backbone frozen, only its heads train (APT App. F)."""
    return _ablation("frozen", freeze_discriminator_backbone=True)


@RECIPES.register("digits_apt_distilled_d")
def digits_apt_distilled_d() -> TrainConfig:
    """Ablation: D initialised from the distilled instead of the diffusion weights (Sec. 3.3)."""
    return _ablation("distilled_d", discriminator="runs/digits/distill/export")


@RECIPES.register("digits_apt_small_batch")
def digits_apt_small_batch() -> TrainConfig:
    """Ablation: a quarter of the batch (APT App. E)."""
    return _ablation("small_batch", batch_size=8)

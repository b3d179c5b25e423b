"""Recipes: functions that return the configuration of a run, or of several in a row.

Those of the digits and of the walks are here; importing this module registers the others too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from apt.losses import ApproximateR1, ApproximateR2, Consistency
from apt.methods.apt import AdversarialConfig
from apt.methods.autoencoder import AutoencoderConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.methods.terms import Terms
from apt.train import recipes_paper, recipes_public
from apt.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from apt.train.recipe_names import RECIPES, list_recipes
from apt.train.sequence import move_runs

__all__ = ["RECIPES", "list_recipes", "recipes_paper", "recipes_public"]

_DIGITS_PROMPTS = (
    "a red seven moving left",
    "a green three moving up",
    "a white zero moving right",
    "a blue five moving down",
    "a yellow eight moving left",
    "a magenta two moving up",
)
_FREE_DIGITS = DataConfig(setting="free")
_DIGITS_CFG = 1.5
_DIGITS_SHIFT = 12.0
_LATENT_CFG = 2.0
_LATENT_SHIFT = 3.0


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
            loss=Consistency(num_timesteps=25, cfg_scale=_DIGITS_CFG, timestep_shift=_DIGITS_SHIFT),
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
            r1=ApproximateR1(weight=1000.0, sigma=0.1),
            terms=Terms(r2=ApproximateR2(weight=1000.0, sigma=0.1)),
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


@RECIPES.register("digits_codec")
def digits_codec() -> TrainConfig:
    """A small video autoencoder on the free moving digits: the latents of `digits_latent`."""
    return TrainConfig(
        name="digits_codec",
        run_dir="runs/digits_latent/codec",
        stage=AutoencoderConfig(),
        model=ModelConfig(codec="digits_ae"),
        data=_FREE_DIGITS,
        optimizer=OptimizerConfig(
            name="adamw",
            # 2e-3 is slower from the start: weights of 0.07 move by a thirtieth in each update.
            learning_rate=7e-4,
            warmup_updates=50,
            decay_updates=5000,
            max_grad_norm=1.0,
        ),
        # Small batches: every pixel of every clip is an example.
        num_updates=8000,
        batch_size=8,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=200,
        sample_every=1000,
    )


@RECIPES.register("digits_latent_pretrain")
def digits_latent_pretrain() -> TrainConfig:
    """Flow matching on the free moving digits, in the latents of `digits_codec`."""
    base = digits_pretrain()
    assert isinstance(base.stage, PretrainConfig)
    return dataclasses.replace(
        base,
        name="digits_latent_pretrain",
        run_dir="runs/digits_latent/pretrain",
        stage=dataclasses.replace(
            base.stage,
            codec="runs/digits_latent/codec/export",
            # Tokens are narrower than the network, and latents have little that is redundant.
            timestep_shift=_LATENT_SHIFT,
            sampling_shift=_LATENT_SHIFT,
            cfg_scale=_LATENT_CFG,
        ),
        model=dataclasses.replace(base.model, name="mmdit_digits_latent", codec_options={}),
        data=_FREE_DIGITS,
        optimizer=dataclasses.replace(base.optimizer, decay_updates=2000),
        num_updates=6000,
        batch_size=32,
        ema_decay=0.998,
        checkpoint_every=200,
    )


@RECIPES.register("digits_latent_distill")
def digits_latent_distill() -> TrainConfig:
    """Consistency distillation of the latent digits model."""
    base = digits_distill()
    assert isinstance(base.stage, DistillConfig)
    return dataclasses.replace(
        base,
        name="digits_latent_distill",
        run_dir="runs/digits_latent/distill",
        stage=dataclasses.replace(
            base.stage,
            teacher="runs/digits_latent/pretrain/export",
            loss=dataclasses.replace(
                base.stage.loss, cfg_scale=_LATENT_CFG, timestep_shift=_LATENT_SHIFT
            ),
        ),
        data=_FREE_DIGITS,
        num_updates=250,
        batch_size=32,
        ema_decay=0.98,
        checkpoint_every=50,
        sample_every=50,
    )


@RECIPES.register("digits_latent_apt")
def digits_latent_apt() -> TrainConfig:
    """Adversarial post-training of the latent digits model: all of the generator, against clips."""
    base = digits_apt()
    assert isinstance(base.stage, AdversarialConfig)
    return dataclasses.replace(
        base,
        name="digits_latent_apt",
        run_dir="runs/digits_latent/apt",
        stage=dataclasses.replace(
            base.stage,
            generator="runs/digits_latent/distill/export",
            discriminator="runs/digits_latent/pretrain/export",
            generator_trains="all",
        ),
        data=_FREE_DIGITS,
        num_updates=150,
        ema_decay=0.98,
        checkpoint_every=25,
        snapshot_at=(50, 100, 150),
    )


@RECIPES.register("digits_latent")
def digits_latent() -> Sequence[TrainConfig]:
    """The codec and all three stages in its latents on the free moving digits, in a row."""
    return (
        digits_codec(),
        digits_latent_pretrain(),
        digits_latent_distill(),
        digits_latent_apt(),
    )


_WALKS = DataConfig(
    source="folder",
    path="data/walks",
    frames=17,
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
# Clips have seven times the positions of the digits'.
_WALKS_STAGES: tuple[dict[str, Any], ...] = (
    {"name": "walks_codec", "model": ModelConfig(codec="video_ae"), "batch_size": 4},
    {"name": "walks_pretrain", "batch_size": 16},
    {"name": "walks_distill", "batch_size": 16},
    {"name": "walks_apt", "batch_size": 16},
)


@RECIPES.register("walks")
def walks() -> Sequence[TrainConfig]:
    """A codec and all three stages on the clips of `data vizdoom`, in a row."""
    digits = digits_latent()
    moved = [
        dataclasses.replace(
            config, run_dir="runs/walks", data=_WALKS, sample_prompts=_WALKS_PROMPTS, **changes
        )
        for config, changes in zip(digits, _WALKS_STAGES, strict=True)
    ]
    return tuple(move_runs(moved, before=digits))


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
    return _ablation("no_r1", r1=ApproximateR1(weight=0.0), terms=Terms(), num_updates=500)


@RECIPES.register("digits_apt_no_r2")
def digits_apt_no_r2() -> TrainConfig:
    """Ablation: the regulariser on real samples alone, as in the paper."""
    return _ablation("no_r2", terms=Terms())


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

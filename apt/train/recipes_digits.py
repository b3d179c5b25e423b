"""Moving digits in the latents of a video autoencoder, which is trained first, as in the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from apt.losses import ApproximateR1, ApproximateR2, Consistency, MismatchedCondition
from apt.methods.apt import AdversarialConfig
from apt.methods.autoencoder import AutoencoderConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.methods.terms import Terms
from apt.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from apt.train.recipe_names import RECIPES
from apt.train.recipes_paper import apt_video_720p

DIGITS_PROMPTS = (
    "a red seven moving left",
    "a green three moving up",
    "a white zero moving right",
    "a blue five moving down",
    "a yellow eight moving left",
    "a magenta two moving up",
)
# The codec learns digits in all places as easily, so it also serves models of other settings.
_FREE = DataConfig(setting="free")
_NEAR = DataConfig(setting="near")
_CFG = 3.0
_SHIFT = 3.0


@RECIPES.register("digits_codec")
def digits_codec() -> TrainConfig:
    """A small video autoencoder on the moving digits, for the latents of the later stages."""
    return TrainConfig(
        name="digits_codec",
        run_dir="runs/digits/codec",
        stage=AutoencoderConfig(),
        model=ModelConfig(codec="digits_ae"),
        data=_FREE,
        optimizer=OptimizerConfig(
            name="adamw",
            # 2e-3 is slower from the start: it changes weights of 0.07 by a thirtieth per update.
            learning_rate=7e-4,
            warmup_updates=50,
            decay_updates=7000,
            max_grad_norm=1.0,
        ),
        # Small batches suffice, because every pixel of every clip is an example.
        num_updates=12_000,
        batch_size=8,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=200,
        sample_every=1000,
    )


@RECIPES.register("digits_pretrain")
def digits_pretrain() -> TrainConfig:
    """Flow matching on the moving digits, in the latents of `digits_codec`."""
    return TrainConfig(
        name="digits_pretrain",
        run_dir="runs/digits/pretrain",
        stage=PretrainConfig(
            codec="runs/digits/codec/export",
            timestep_shift=_SHIFT,
            cfg_scale=_CFG,
            sampling_shift=_SHIFT,
        ),
        model=ModelConfig(
            name="mmdit_digits_latent",
            text_encoder_options={"alphabet": "ascii", "num_buckets": 1024, "depth": 1},
        ),
        data=_NEAR,
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1.5e-3,
            warmup_updates=100,
            decay_updates=2000,
            max_grad_norm=1.0,
        ),
        num_updates=6000,
        batch_size=32,
        ema_decay=0.998,
        precision="bf16",
        checkpoint_every=200,
        sample_every=1000,
        sample_prompts=DIGITS_PROMPTS,
    )


@RECIPES.register("digits_distill")
def digits_distill() -> TrainConfig:
    """Consistency distillation of the digits model."""
    return TrainConfig(
        name="digits_distill",
        run_dir="runs/digits/distill",
        stage=DistillConfig(
            teacher="runs/digits/pretrain/export",
            loss=Consistency(num_timesteps=25, cfg_scale=_CFG, timestep_shift=_SHIFT),
        ),
        data=_NEAR,
        optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_updates=50),
        # Fixed before anything was measured, because the gain of APT over this stage depends on it.
        num_updates=250,
        batch_size=32,
        ema_decay=0.98,
        precision="bf16",
        checkpoint_every=50,
        snapshot_at=(50, 100, 150, 200, 250),
        sample_every=50,
        sample_prompts=DIGITS_PROMPTS,
    )


@RECIPES.register("digits_apt")
def digits_apt() -> TrainConfig:
    """Adversarial post-training of the digits model on real clips; the whole generator trains."""
    return TrainConfig(
        name="digits_apt",
        run_dir="runs/digits/apt",
        stage=AdversarialConfig(
            generator="runs/digits/distill/export",
            discriminator="runs/digits/pretrain/export",
            # With ten times this weight, D hardly tells samples from clips, and G follows noise.
            r1=ApproximateR1(weight=100.0, sigma=0.1),
            terms=Terms(
                # G follows D's gradients at samples, so they are penalised too.
                r2=ApproximateR2(weight=100.0, sigma=0.1),
                # Otherwise D learns in so few updates what clips look like, but ignores captions.
                mismatched=MismatchedCondition(weight=1.0),
            ),
            # With one rate for both and small batches, D never gets ahead of G: its loss stays at
            # 2 log 2.
            discriminator_learning_rate=6e-4,
        ),
        data=_NEAR,
        # Momentum, and the decay at the end, replace the paper's batch of thousands.
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-4,
            betas=(0.5, 0.95),
            warmup_updates=30,
            decay_updates=40,
        ),
        num_updates=80,
        batch_size=32,
        ema_decay=0.97,
        precision="bf16",
        checkpoint_every=25,
        snapshot_at=(40, 80),
        sample_every=40,
        sample_prompts=DIGITS_PROMPTS,
    )


@RECIPES.register("digits_apt_paper")
def digits_apt_paper() -> TrainConfig:
    """`digits_apt` with the paper's choices: RMSProp, only the approximated R1, constant rates."""
    base, paper = digits_apt(), apt_video_720p()
    assert isinstance(base.stage, AdversarialConfig)
    assert isinstance(paper.stage, AdversarialConfig)
    return dataclasses.replace(
        base,
        name="digits_apt_paper",
        run_dir="runs/digits/apt_paper",
        stage=dataclasses.replace(
            base.stage,
            r1=paper.stage.r1,
            terms=paper.stage.terms,
            discriminator_learning_rate=2e-4,
        ),
        # The paper's rate is for a batch of thousands and 8 billion weights.
        optimizer=dataclasses.replace(paper.optimizer, learning_rate=1e-4),
        num_updates=100,
        snapshot_at=(50, 100),
    )


@RECIPES.register("digits")
def digits() -> Sequence[TrainConfig]:
    """A codec and all three stages on the moving digits; the built-in models come from it."""
    return (digits_codec(), digits_pretrain(), digits_distill(), digits_apt())

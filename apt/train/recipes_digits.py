"""The moving digits as the paper works: in the latents of a video autoencoder, trained first."""

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
# The codec, to which places are no harder to learn, serves models of any.
_FREE = DataConfig(setting="free")
_NEAR = DataConfig(setting="near")
_CFG = 3.0
_SHIFT = 3.0


@RECIPES.register("digits_codec")
def digits_codec() -> TrainConfig:
    """A small video autoencoder on the moving digits, in whose latents the others work."""
    return TrainConfig(
        name="digits_codec",
        run_dir="runs/digits/codec",
        stage=AutoencoderConfig(),
        model=ModelConfig(codec="digits_ae"),
        data=_FREE,
        optimizer=OptimizerConfig(
            name="adamw",
            # 2e-3 is slower from the start: weights of 0.07 move by a thirtieth in each update.
            learning_rate=7e-4,
            warmup_updates=50,
            decay_updates=7000,
            max_grad_norm=1.0,
        ),
        # Small batches: every pixel of every clip is an example.
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
        # Fixed before anything was measured: what APT gains over it depends on it.
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
    """Adversarial post-training of the digits model: all of the generator, against real clips."""
    return TrainConfig(
        name="digits_apt",
        run_dir="runs/digits/apt",
        stage=AdversarialConfig(
            generator="runs/digits/distill/export",
            discriminator="runs/digits/pretrain/export",
            # At ten times this weight D hardly tells samples from clips, and G follows its noise.
            r1=ApproximateR1(weight=100.0, sigma=0.1),
            terms=Terms(
                # G asks D about samples, so D's gradients there are penalised too.
                r2=ApproximateR2(weight=100.0, sigma=0.1),
                # So few updates teach D what a clip looks like before what its caption says.
                mismatched=MismatchedCondition(weight=1.0),
            ),
            # At one rate for both, small batches leave D's loss at 2 log 2: G moves as fast as D.
            discriminator_learning_rate=6e-4,
        ),
        data=_NEAR,
        # Momentum stands in for the paper's batch of thousands, and so does the decay at the end.
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
    """The same as the paper writes it: RMSProp, the approximated R1 alone, constant rates."""
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
        # The paper's rate is that of a batch of thousands and of 8 billion weights.
        optimizer=dataclasses.replace(paper.optimizer, learning_rate=1e-4),
        num_updates=100,
        snapshot_at=(50, 100),
    )


@RECIPES.register("digits")
def digits() -> Sequence[TrainConfig]:
    """A codec and all three stages in its latents on the moving digits, in a row: what ships."""
    return (digits_codec(), digits_pretrain(), digits_distill(), digits_apt())

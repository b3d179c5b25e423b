"""Moving digits without a learned codec: pixels are folded into channels."""

from __future__ import annotations

from collections.abc import Sequence

from apt.losses import ApproximateR1, ApproximateR2, Consistency
from apt.methods.apt import AdversarialConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.methods.terms import Terms
from apt.train.config import ModelConfig, OptimizerConfig, TrainConfig
from apt.train.recipe_names import RECIPES
from apt.train.recipes_digits import DIGITS_PROMPTS

_CFG = 1.5
_SHIFT = 12.0


@RECIPES.register("digits_pixels_pretrain")
def digits_pixels_pretrain() -> TrainConfig:
    """Flow matching on centred digits, in pixels folded into channels."""
    return TrainConfig(
        name="digits_pixels_pretrain",
        run_dir="runs/digits_pixels/pretrain",
        # A clip has 27,648 values, and one of 240 captions. Noise hides what the caption determines
        # only where t > 0.95. Shift 3 draws this range in 14 % of the samples; shift 12, the
        # paper's value for videos, in 39 %.
        stage=PretrainConfig(
            timestep_shift=_SHIFT,
            cfg_scale=_CFG,
            sampling_shift=_SHIFT,
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
        sample_prompts=DIGITS_PROMPTS,
    )


@RECIPES.register("digits_pixels_distill")
def digits_pixels_distill() -> TrainConfig:
    """Consistency distillation of the pixel model."""
    return TrainConfig(
        name="digits_pixels_distill",
        run_dir="runs/digits_pixels/distill",
        stage=DistillConfig(
            teacher="runs/digits_pixels/pretrain/export",
            loss=Consistency(num_timesteps=25, cfg_scale=_CFG, timestep_shift=_SHIFT),
        ),
        optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_updates=50),
        # Short, because it only has to give G a start. After 800 updates, samples are sharper, but
        # adversarial training then changes less (docs/results/digits_search.md).
        num_updates=400,
        batch_size=16,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=200,
        sample_every=200,
        sample_prompts=DIGITS_PROMPTS,
    )


@RECIPES.register("digits_pixels_apt")
def digits_pixels_apt() -> TrainConfig:
    """Adversarial post-training of the pixel model."""
    return TrainConfig(
        name="digits_pixels_apt",
        run_dir="runs/digits_pixels/apt",
        stage=AdversarialConfig(
            generator="runs/digits_pixels/distill/export",
            discriminator="runs/digits_pixels/pretrain/export",
            # For G's output layers, D's gradients are mostly noise. An optimiser that divides by
            # their size turns it into grain (docs/results/digits_search.md).
            generator_trains="blocks",
            # With 100 and 0.05, D's gradients grew fiftyfold in 300 updates and caused grain. G
            # follows D's gradients at samples, so they are penalised too.
            r1=ApproximateR1(weight=1000.0, sigma=0.1),
            terms=Terms(r2=ApproximateR2(weight=1000.0, sigma=0.1)),
            # With one rate for both and small batches, D never gets ahead of G: its loss stays at
            # 2 log 2.
            discriminator_learning_rate=3e-4,
        ),
        # Momentum, and the decay at the end, replace the paper's batch of thousands.
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-4,
            betas=(0.5, 0.95),
            warmup_updates=30,
            decay_updates=80,
        ),
        # More updates improve detail, but make digits less legible.
        num_updates=200,
        batch_size=32,
        ema_decay=0.99,
        precision="bf16",
        checkpoint_every=50,
        snapshot_at=(50, 100, 150, 200),
        sample_every=50,
        sample_prompts=DIGITS_PROMPTS,
    )


@RECIPES.register("digits_pixels")
def digits_pixels() -> Sequence[TrainConfig]:
    """All three stages on the moving digits, in pixels without a learned codec."""
    return (digits_pixels_pretrain(), digits_pixels_distill(), digits_pixels_apt())

"""Recipes for public checkpoints: Wan 2.1 and Stable Diffusion 3.5.

They follow the paper's recipes (`apt.train.recipes_paper`); comments say why values differ. None of
them has been run at full size: they are starting points, not results. They read latent caches
(`diffusion-apt data encode`), so neither VAE nor text encoder takes memory.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from apt.losses import ApproximateR1, Consistency
from apt.methods.apt import AdversarialConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.models.wan import NEGATIVE_PROMPT
from apt.train.config import DataConfig, OptimizerConfig, TrainConfig
from apt.train.recipe_names import RECIPES
from apt.train.recipes_paper import apt_image_1024, apt_video_720p

_WAN = "wan2.1_t2v_1.3b"
_SD35 = "sd3.5_medium"


@RECIPES.register("wan_finetune")
def wan_finetune() -> TrainConfig:
    """Fine-tuning of Wan 2.1 1.3B on your own clips by flow matching, before distillation."""
    return dataclasses.replace(
        wan_distill(),
        name="wan_finetune",
        run_dir="runs/wan/finetune",
        # The shift of the scheduler in its repository.
        stage=PretrainConfig(start=_WAN, timestep_shift=3.0),
        # The paper has no such stage; AdamW and a low rate are usual.
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e-5, warmup_updates=100, max_grad_norm=1.0
        ),
        batch_size=32,
    )


@RECIPES.register("wan_distill")
def wan_distill() -> TrainConfig:
    """Consistency distillation of Wan 2.1 1.3B on images and videos (APT Sec. 3.2)."""
    return TrainConfig(
        name="wan_distill",
        run_dir="runs/wan/distill",
        stage=DistillConfig(
            teacher=_WAN,
            loss=Consistency(
                # The paper's 7.5 is for its own model; Wan's authors sample theirs with 5.
                cfg_scale=5.0,
                num_timesteps=50,
                # The shift of the scheduler in its repository; the paper does not give its grid.
                timestep_shift=3.0,
            ),
        ),
        data=_cache("data/wan", "mix"),
        # The paper does not give the rate of this stage; this is the rate of its image stage.
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_updates=100),
        num_updates=2000,
        batch_size=128,  # enough for a regression, unlike for the adversarial stage
        micro_batch_size=1,
        ema_decay=0.995,
        negative_prompt=NEGATIVE_PROMPT,  # Wan's own; `data encode` embeds it with the captions
        precision="bf16",
        activation_checkpointing=True,
        checkpoint_every=100,
        sample_every=0,
    )


@RECIPES.register("apt_image_wan")
def apt_image_wan() -> TrainConfig:
    """The paper's image stage on Wan 2.1 1.3B: images as videos of one frame."""
    paper = apt_image_1024()
    assert isinstance(paper.stage, AdversarialConfig)
    return dataclasses.replace(
        paper,
        name="apt_image_wan",
        run_dir="runs/wan/image",
        stage=dataclasses.replace(
            paper.stage,
            generator="runs/wan/distill/export",
            discriminator=_WAN,
            # To first order this equals the paper's 100 at 0.01, which in bf16 is mostly rounding
            # error: its gradient has a cosine of 0.22 with its fp32 value, this one's has 0.97.
            r1=ApproximateR1(weight=1.0, sigma=0.1),
        ),
        data=_cache("data/wan", "only"),
        # The paper has 9062 on 128 to 256 GPUs. 1024 is the smallest batch with which its video
        # stage was stable (App. E: 256 collapsed); few GPUs accumulate it over micro-batches.
        batch_size=1024,
        negative_prompt=NEGATIVE_PROMPT,
        sample_every=0,
        sample_prompts=(),
    )


@RECIPES.register("apt_video_wan")
def apt_video_wan() -> TrainConfig:
    """The paper's video stage on Wan 2.1 1.3B, at Wan's own 81 frames of 480p and 16 fps."""
    image, paper = apt_image_wan(), apt_video_720p()
    assert isinstance(paper.stage, AdversarialConfig)
    return dataclasses.replace(
        image,
        name="apt_video_wan",
        run_dir="runs/wan/video",
        stage=dataclasses.replace(
            paper.stage, generator="runs/wan/image/export", discriminator=_WAN
        ),
        # The cache has Wan's size and rate, 81 frames of 480x832 at 16 fps; the paper has 49 frames
        # of 720p at 24 fps, but the 1.3B model was not trained on larger sizes than these.
        data=_cache("data/wan", "none"),
        optimizer=paper.optimizer,
        num_updates=paper.num_updates,
        # The batch size is that of `apt_image_wan`; the paper has 2048.
        snapshot_at=paper.snapshot_at,
    )


@RECIPES.register("sd35_distill")
def sd35_distill() -> TrainConfig:
    """Consistency distillation of Stable Diffusion 3.5 medium on images."""
    wan = wan_distill()
    assert isinstance(wan.stage, DistillConfig)
    return dataclasses.replace(
        wan,
        name="sd35_distill",
        run_dir="runs/sd35/distill",
        # Stability AI samples with 4.5 and 3.
        stage=dataclasses.replace(
            wan.stage,
            teacher=_SD35,
            loss=dataclasses.replace(wan.stage.loss, cfg_scale=4.5, timestep_shift=3.0),
        ),
        data=_cache("data/sd35", "only"),
        negative_prompt="",  # its pipeline's default
    )


@RECIPES.register("apt_image_sd35")
def apt_image_sd35() -> TrainConfig:
    """The paper's image stage on Stable Diffusion 3.5 medium, at 1024 px."""
    image = apt_image_wan()
    assert isinstance(image.stage, AdversarialConfig)
    return dataclasses.replace(
        image,
        name="apt_image_sd35",
        run_dir="runs/sd35/image",
        stage=dataclasses.replace(
            image.stage, generator="runs/sd35/distill/export", discriminator=_SD35
        ),
        data=_cache("data/sd35", "only"),
        negative_prompt="",
    )


def _cache(path: str, images: Literal["mix", "only", "none"]) -> DataConfig:
    return DataConfig(source="latents", path=path, images=images, num_workers=4)

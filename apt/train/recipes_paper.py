"""The paper's two adversarial stages; each value is here once, with its section."""

from __future__ import annotations

import dataclasses

from apt.losses import ApproximateR1
from apt.methods.apt import AdversarialConfig
from apt.train.config import DataConfig, OptimizerConfig, TrainConfig
from apt.train.recipe_names import RECIPES


@RECIPES.register("apt_image_1024")
def apt_image_1024() -> TrainConfig:
    """The paper's image stage: 1024 px, G from a distilled model, D from the diffusion model."""
    return TrainConfig(
        name="apt_image_1024",
        run_dir="runs/apt_image_1024",
        stage=AdversarialConfig(
            r1=ApproximateR1(
                weight=100.0,  # Sec. 3.4: lambda
                sigma=0.01,  # Sec. 3.4: sigma for images; mostly rounding in bf16: the run warns
            ),
            rounding_every=10,
            timestep_shift=1.0,  # Sec. 3.3: s for images
        ),
        data=DataConfig(
            source="folder",
            frames=1,
            height=1024,
            width=1024,
            fps=0.0,
            size_multiple=16,
            images="only",
            num_workers=8,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-6),  # Sec. 3.5
        num_updates=350,  # Sec. 3.5: before quality starts to degrade
        batch_size=9062,  # Sec. 3.5
        micro_batch_size=1,
        ema_decay=0.995,  # Sec. 3.5
        precision="bf16",  # Sec. 3.5
        activation_checkpointing=True,
        checkpoint_every=25,
        snapshot_at=(50, 100, 150, 200, 250, 300, 350),
        sample_every=10,
        sample_prompts=("a close-up of the eyes of an owl",),
    )


@RECIPES.register("apt_video_720p")
def apt_video_720p() -> TrainConfig:
    """The paper's video stage: 1280x720, 24 fps, 49 frames; G from the image stage's EMA."""
    image = apt_image_1024()
    assert isinstance(image.stage, AdversarialConfig)
    return dataclasses.replace(
        image,
        name="apt_video_720p",
        run_dir="runs/apt_video_720p",
        stage=dataclasses.replace(
            image.stage,
            generator="runs/apt_image_1024/export",  # Sec. 3.5: the image EMA checkpoint
            r1=dataclasses.replace(image.stage.r1, sigma=0.1),  # Sec. 3.4: sigma for videos
            timestep_shift=12.0,  # Sec. 3.3: s for videos
        ),
        # Sec. 3.5: "only 1280x720 24fps videos", clipped to 2 seconds.
        data=dataclasses.replace(
            image.data,
            frames=49,
            height=720,
            width=1280,
            fps=24.0,
            native_ratio=False,
            images="none",
        ),
        optimizer=OptimizerConfig(learning_rate=3e-6),  # Sec. 3.5: lowered for stability
        num_updates=300,  # Sec. 3.5
        batch_size=2048,  # Sec. 3.5; 256 collapsed (App. E)
        snapshot_at=(50, 100, 150, 200, 250, 300),
        sample_prompts=(
            "A Western princess, with sunlight shining through the leaves on her face, facial "
            "close-up.",
        ),
    )

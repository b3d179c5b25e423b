"""A codec and all three stages on a folder of your own videos and images.

Settings that depend on the folder are left open: size, length and frame rate of clips, prompts of
sample sheets, channels. They are resolved when a stage begins (`apt.train.resolve`), from the model
that the stage starts from, or else from the folder. Numbers of updates and learning rates were
tuned on the digits; nothing larger has been trained with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from apt.errors import InputError
from apt.losses import Consistency
from apt.methods.apt import AdversarialConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.models.architectures import CODECS
from apt.models.codec_causal import CausalCodecConfig
from apt.train import recipes_digits
from apt.train.config import DataConfig, ModelConfig, TrainConfig
from apt.train.recipe_names import RECIPES

Size = Literal["tiny", "mini", "small"]
"""Size of the model, which also limits the size of clips."""

LEARNED_CODEC = "video_ae"

# Limits of frames, and of height times width, of clips from a folder: 80, 576 and 3328 tokens.
_LIMITS: dict[str, tuple[int, int]] = {
    "tiny": (17, 64 * 64),
    "mini": (33, 128 * 128),
    "small": (49, 256 * 256),
}
_TEXT = 128


@RECIPES.register("own_codec")
def own_codec(
    size: Size = "tiny", codec: str = LEARNED_CODEC, updates_factor: float = 1.0
) -> TrainConfig:
    """A video autoencoder on your own videos and images, for the latents of the later stages.

    Args:
        size: size of the model that will use it: tiny, mini or small. It limits the size of clips.
        codec: video_ae, or another codec that can be trained (digits_ae).
        updates_factor: multiplies the usual number of updates.
    """
    base = recipes_digits.digits_codec()
    return _own(
        base,
        size,
        "codec",
        updates_factor,
        # Clips have seven times as many positions as the digits.
        batch_size=4,
        model=dataclasses.replace(_model(size), codec=codec),
    )


@RECIPES.register("own_pretrain")
def own_pretrain(
    size: Size = "tiny", codec: str = "runs/own/codec/export", updates_factor: float = 1.0
) -> TrainConfig:
    """Flow matching on your own videos and images, in the latents of `own_codec`.

    Args:
        size: size of the model: tiny (4 M parameters), mini (18 M) or small (0.3 B).
        codec: the folder that own_codec exported, the name of a public codec (wan_vae, sd3_vae,
            ...), or a folder or Hub id of one.
        updates_factor: multiplies the usual number of updates.
    """
    base = recipes_digits.digits_pretrain()
    assert isinstance(base.stage, PretrainConfig)
    registered = codec in CODECS.names()
    model = _model(size)
    if registered:
        model = dataclasses.replace(model, codec=codec)
    return _own(
        base,
        size,
        "pretrain",
        updates_factor,
        stage=dataclasses.replace(base.stage, codec="" if registered else codec),
        batch_size=16,
        model=model,
    )


@RECIPES.register("own_distill")
def own_distill(updates_factor: float = 1.0) -> TrainConfig:
    """Consistency distillation of the model of `own_pretrain`, with the teacher's settings.

    Args:
        updates_factor: multiplies the usual number of updates.
    """
    base = recipes_digits.digits_distill()
    assert isinstance(base.stage, DistillConfig)
    as_the_teacher = Consistency(num_timesteps=None, cfg_scale=None, timestep_shift=None)
    stage = dataclasses.replace(base.stage, teacher="runs/own/pretrain/export", loss=as_the_teacher)
    return _own(base, "tiny", "distill", updates_factor, stage=stage, batch_size=16)


@RECIPES.register("own_apt")
def own_apt(updates_factor: float = 1.0) -> TrainConfig:
    """Adversarial post-training of the model of `own_distill` on your own clips.

    Args:
        updates_factor: multiplies the usual number of updates.
    """
    base = recipes_digits.digits_apt()
    assert isinstance(base.stage, AdversarialConfig)
    stage = dataclasses.replace(
        base.stage,
        generator="runs/own/distill/export",
        discriminator="runs/own/pretrain/export",
    )
    return _own(base, "tiny", "apt", updates_factor, stage=stage, batch_size=16)


@RECIPES.register("own")
def own(
    size: Size = "tiny", codec: str = LEARNED_CODEC, updates_factor: float = 1.0
) -> Sequence[TrainConfig]:
    """A codec and all three stages on a folder of your own (--data.path).

    Args:
        size: size of the model: tiny (4 M parameters; clips of up to 17 frames of 64x64), mini
            (18 M; 33 of 128x128) or small (0.3 B; 49 of 256x256). --data.frames, --data.height,
            --data.width and --data.fps can set other sizes.
        codec: video_ae, which is trained first; or an existing codec, without that stage: the name
            of a public one (wan_vae, sd3_vae, ...), or a folder or Hub id of one.
        updates_factor: multiplies the usual number of updates of every stage.
    """
    rest = (own_distill(updates_factor), own_apt(updates_factor))
    if _is_trained_here(codec):
        pretrain = own_pretrain(size, updates_factor=updates_factor)
        return (own_codec(size, codec, updates_factor), pretrain, *rest)
    return (own_pretrain(size, codec, updates_factor), *rest)


def _is_trained_here(codec: str) -> bool:
    return codec in CODECS.names() and isinstance(CODECS.get(codec)(), CausalCodecConfig)


def _own(
    base: TrainConfig, size: str, name: str, updates_factor: float, **changes: Any
) -> TrainConfig:
    """Return a stage of the digits for a folder, without settings that only suit the digits."""
    frames, pixels = _LIMITS[size]
    return dataclasses.replace(
        _lengthened(base, updates_factor),
        **{
            "name": f"own_{name}",
            "run_dir": f"runs/own/{name}",
            "data": DataConfig(source="folder", max_frames=frames, max_pixels=pixels),
            "precision": "auto",
            "sample_prompts": None,
            **changes,
        },
    )


def _lengthened(config: TrainConfig, factor: float) -> TrainConfig:
    """Multiply a stage's number of updates, and the rest of its schedule with it."""
    if not 0 < factor < float("inf"):
        raise InputError(f"updates_factor must be a positive number, got {factor}")

    def times(updates: int) -> int:
        return max(min(updates, 1), round(updates * factor))

    optimizer = dataclasses.replace(
        config.optimizer,
        warmup_updates=times(config.optimizer.warmup_updates),
        decay_updates=times(config.optimizer.decay_updates),
    )
    return dataclasses.replace(
        config,
        optimizer=optimizer,
        num_updates=times(config.num_updates),
        ema_decay=config.ema_decay ** (1 / factor),
        sample_every=times(config.sample_every),
        snapshot_at=tuple(dict.fromkeys(map(times, config.snapshot_at))),
    )


def _model(size: str) -> ModelConfig:
    """Return the backbone, and a text encoder for captions in any language."""
    options: dict[str, int | float | str] = (
        {"text_dim": _TEXT, "pooled_dim": _TEXT} if size == "small" else {}
    )
    return ModelConfig(
        name=f"mmdit_{size}",
        options=options,
        text_encoder_options={"max_length": 256, "max_word_bytes": 128},
    )

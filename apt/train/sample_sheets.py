"""Sample sheets during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from apt.media import write_contact_sheet
from apt.methods.base import MicroBatch, Preview, Stage
from apt.models.cached import CachedCodec
from apt.pixels import to_uint8
from apt.train.config import TrainConfig


@torch.no_grad()
def draw_samples(
    stage: Stage, config: TrainConfig, batches: Sequence[MicroBatch]
) -> Preview | None:
    """Draw the stage's preview with the EMA weights; return None if it has nothing to show.

    Collective; `batches` are the micro-batches of the update.
    """
    trained = stage.generator
    assert trained.ema is not None
    with trained.ema.applied(trained.module), stage.host.autocast():
        return stage.samples(config.sample_prompts or (), config.data.clip, batches)


@torch.no_grad()
def decode_samples(stage: Stage, latents: Tensor) -> Tensor | None:
    """Return pixels (B, 3, T, H, W) in [-1, 1]; None if the run has no codec that decodes."""
    if isinstance(stage.codec, CachedCodec):
        return None
    if stage.codec is None:
        return latents.clamp(-1, 1)
    with stage.host.autocast():
        return stage.codec.decode(latents).clamp(-1, 1)


def write_sheet(path: Path, pixels: Tensor, preview: Preview, title: str) -> None:
    """Write a PNG with one row of frames per sample."""
    frames = to_uint8(pixels).permute(0, 2, 3, 4, 1).cpu()
    cells = [[video.numpy()] for video in frames]
    write_contact_sheet(path, cells, rows=list(preview.names), columns=[preview.shows], title=title)

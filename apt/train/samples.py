"""Sample sheets during training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from apt.flow import sampling_timesteps
from apt.media import write_contact_sheet
from apt.models.cached import CachedCodec
from apt.models.generator import generate
from apt.pixels import to_uint8
from apt.rng import sample_noise
from apt.sampling import bind_guided, sample
from apt.train.config import PretrainConfig
from apt.train.stage import Stage


@torch.no_grad()
def draw_samples(stage: Stage, prompts: tuple[str, ...]) -> Tensor:
    """Latents (B, C, T, H, W) from the EMA weights, always from the same noise.

    Diffusion models take their many steps with guidance, later stages one step. Every rank must
    call it.
    """
    trained = stage.generator
    assert trained.ema is not None
    data, codec = stage.config.data, stage.start.codec
    shape = (codec.channels, *codec.latent_shape(data.frames, data.height, data.width))
    z = sample_noise(
        len(prompts), shape, seed=stage.config.seed, step=0, offset=0, stream="samples"
    ).to(stage.parallel.device)
    with trained.ema.applied(trained.module), stage.autocast():
        c = stage.encode(prompts)
        if isinstance(stage.config.stage, PretrainConfig):
            negative = stage.encode([stage.config.negative_prompt])
            predict = bind_guided(trained.module, c, negative, stage.config.stage.cfg_scale)
            grid = sampling_timesteps(stage.config.stage.num_steps)
            x = sample(predict, z, grid, sampler="euler", noise=lambda step: z)
        else:
            x = generate(trained.module, z, c)
        return x.float()


@torch.no_grad()
def decode_samples(stage: Stage, latents: Tensor) -> Tensor | None:
    """Pixels (B, 3, T, H, W) in [-1, 1]; None if the run has no codec that decodes."""
    if isinstance(stage.start.codec, CachedCodec):
        return None
    with stage.autocast():
        return stage.start.codec.decode(latents).clamp(-1, 1)


def write_sheet(path: Path, pixels: Tensor, prompts: tuple[str, ...], title: str) -> None:
    """A PNG with one row of frames per prompt."""
    frames = to_uint8(pixels).permute(0, 2, 3, 4, 1).cpu()
    cells = [[video.numpy()] for video in frames]
    write_contact_sheet(path, cells, rows=list(prompts), columns=["frames"], title=title)

"""Run a pipeline's network on given noise, and convert between tokens and latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.errors import InputError
from apt.flow import bind_guided, sample
from apt.pipeline import OneStepPipeline, SamplingPlan


def encode(pipeline: OneStepPipeline, prompts: Sequence[str]) -> Condition:
    """Encode prompts as a condition, a row each. Raises InputError for a prompt that is no text."""
    return Condition(EncodedText.concatenate(encode_each(pipeline, prompts)))


def encode_each(pipeline: OneStepPipeline, prompts: Sequence[str]) -> list[EncodedText]:
    """Encode each prompt as one row, on the pipeline's device. Raises what `encode` raises."""
    encoder = pipeline.bundle.text_encoder
    encoder.check(prompts)
    with pipeline.at_work(encoder):
        encoded = {
            text: encoder([text]).to(pipeline.device, pipeline.dtype)
            for text in dict.fromkeys(prompts)
        }
    return [encoded[prompt] for prompt in prompts]


def sample_from(pipeline: OneStepPipeline, c: Condition, z: Tensor, plan: SamplingPlan) -> Tensor:
    """Sample latents (B, C, T, H, W) from noise z of that shape, with a condition c of B rows.

    Samplers that add noise between steps add the same noise to every sample, so that two samples
    differ in z alone.
    """

    def fresh(step: int) -> Tensor:
        channels, frames, height, width = z.shape[1:]
        return pipeline.noise([0], (channels, frames, height, width), step).expand_as(z)

    backbone = pipeline.bundle.backbone
    negative = encode(pipeline, [plan.negative_prompt]) if plan.cfg_scale != 1 else c
    predict = bind_guided(backbone, c, negative, plan.cfg_scale)
    with pipeline.at_work(backbone):
        return sample(predict, z, plan.timesteps, sampler=plan.sampler, noise=fresh)


def decode(pipeline: OneStepPipeline, x: Tensor) -> Tensor:
    """Decode latents to pixels (B, 3, T, H, W) fp32 in [-1, 1], one sample at a time."""
    codec = pipeline.bundle.codec
    with pipeline.at_work(codec):
        return torch.cat([codec.decode(latent[None]).float().clamp(-1, 1) for latent in x])


def to_tokens(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Cut latents (B, C, T, H, W) into the patches of a token grid (t, h, w): (B, L, values).

    Raises InputError if the grid does not divide the latents.
    """
    batch, channels, *size = x.shape
    if any(length % tokens for length, tokens in zip(size, grid, strict=True)):
        raise InputError(f"latents of {tuple(size)} do not divide into {tuple(grid)} tokens")
    t, h, w = grid
    pt, ph, pw = (length // tokens for length, tokens in zip(size, grid, strict=True))
    parts = x.reshape(batch, channels, t, pt, h, ph, w, pw)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, t * h * w, -1)


def to_latents(tokens: Tensor, grid: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Undo `to_tokens`: turn tokens (B, L, values) into latents (B, *shape), shape (C, T, H, W)."""
    t, h, w = grid
    channels, *size = shape
    pt, ph, pw = (length // tokens for length, tokens in zip(size, grid, strict=True))
    parts = tokens.reshape(len(tokens), t, h, w, channels, pt, ph, pw)
    return parts.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(tokens), *shape)

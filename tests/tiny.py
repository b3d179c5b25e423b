"""A model small enough for tests, random in every layer, so that every input reaches the output."""

from __future__ import annotations

import torch

from apt.checkpoints.info import ModelInfo, SampleInfo, SamplingInfo
from apt.checkpoints.load import ModelBundle, component_info
from apt.models import create_codec, create_model, create_text_encoder


def tiny_bundle(stage: str = "apt", sampling: SamplingInfo | None = None) -> ModelBundle:
    """The digits model with 2 narrow blocks: 9 frames of 32x32. The same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = create_model(
            "mmdit_digits", hidden_size=24, depth=2, num_heads=2, text_dim=16, pooled_dim=16
        )
        text_encoder = create_text_encoder("bytes", width=16, depth=1, num_heads=2)
        codec = create_codec("patchify")
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return ModelBundle(
        backbone,
        text_encoder,
        codec,
        ModelInfo(
            stage=stage,
            model=component_info("mmdit_digits", backbone),
            text_encoder=component_info("bytes", text_encoder),
            codec=component_info("patchify", codec),
            sample=SampleInfo(frames=9, height=32, width=32, fps=8),
            sampling=SamplingInfo() if sampling is None else sampling,
            training={"recipe": "none"},
        ),
    )

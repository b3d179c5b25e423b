"""The published sizes of `Wan`, where their weights are, and how they are sampled."""

from __future__ import annotations

import dataclasses
from typing import Any

from apt.checkpoints.info import SampleInfo, SamplingInfo
from apt.models.architectures import MODELS, PretrainedEntry
from apt.models.wan.model import WanConfig

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The fixed negative prompt that Wan's authors sample with, and its users distil with."""


def _published(
    repo: str, sample: SampleInfo, sampling: SamplingInfo, **options: Any
) -> PretrainedEntry:
    parts = {"codec": "wan_vae", "compression": (4, 8, 8)}
    return PretrainedEntry(
        repo=repo,
        license="Apache-2.0",
        source="Wan team, arXiv 2503.20314",
        text_encoder="umt5",
        text_tokens=512,
        sample=sample,
        sampling=sampling,
        **{**parts, **options},
    )


# What the authors sample with: their configs, and diffusers' page on Wan for the shift at 480p.
_480P = SampleInfo(frames=81, height=480, width=832, fps=16)
_720P = SampleInfo(frames=81, height=720, width=1280, fps=16)
_SAMPLING = SamplingInfo(
    num_steps=50, cfg_scale=5.0, timestep_shift=3.0, negative_prompt=NEGATIVE_PROMPT
)
_SAMPLING_720P = dataclasses.replace(_SAMPLING, timestep_shift=5.0)
_SAMPLING_A14B = dataclasses.replace(_SAMPLING, num_steps=40, cfg_scale=4.0, timestep_shift=12.0)
_BOUNDARY_A14B = 0.875


@MODELS.register(
    "wan2.1_t2v_1.3b",
    pretrained={"official": _published("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _480P, _SAMPLING)},
)
def wan21_t2v_1_3b() -> WanConfig:
    """Wan 2.1 text to video, 1.42 B parameters: 480p, 16 fps."""
    return WanConfig()


@MODELS.register(
    "wan2.1_t2v_14b",
    pretrained={"official": _published("Wan-AI/Wan2.1-T2V-14B-Diffusers", _720P, _SAMPLING_720P)},
)
def wan21_t2v_14b() -> WanConfig:
    """Wan 2.1 text to video, 14.3 B parameters: 480p and 720p, 16 fps."""
    return WanConfig(hidden_size=5120, depth=40, num_heads=40, mlp_size=13824)


@MODELS.register(
    "wan2.2_ti2v_5b",
    pretrained={
        "official": _published(
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            SampleInfo(frames=121, height=704, width=1280, fps=24),
            _SAMPLING_720P,
            codec="wan2.2_vae",
            compression=(4, 16, 16),
            note="text to video; a given first frame needs timesteps per token",
        )
    },
)
def wan22_ti2v_5b() -> WanConfig:
    """Wan 2.2 text (and image) to video, 5.00 B parameters: 720p, 24 fps, 16x16x4 VAE.

    One timestep for each sample is text to video; a timestep for each token, 0 at the tokens of
    a given first frame, is image to video.
    """
    return WanConfig(in_channels=48, hidden_size=3072, depth=30, num_heads=24, mlp_size=14336)


@MODELS.register(
    "wan2.2_t2v_a14b",
    pretrained={
        "high_noise": _published(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            _720P,
            _SAMPLING_A14B,
            lowest_t=_BOUNDARY_A14B,
            note="the expert for t from 0.875 to 1: the one that generates in one step",
        ),
        "low_noise": _published(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            _720P,
            dataclasses.replace(_SAMPLING_A14B, cfg_scale=3.0),
            subfolder="transformer_2",
            note="the expert for t below 0.875: it has never seen the pure noise of one step",
        ),
    },
)
def wan22_t2v_a14b() -> WanConfig:
    """Wan 2.2 text to video, 14.3 B parameters: the high-noise expert of two.

    Wan 2.2 A14B has an expert for t >= 0.875 and another below. One step starts at t = 1, so the
    generator is made from the high-noise expert alone, and an export holds no second transformer.
    As a teacher it is to be trusted for t >= 0.875 only.
    """
    return WanConfig(hidden_size=5120, depth=40, num_heads=40, mlp_size=13824)

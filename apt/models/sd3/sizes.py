"""The published sizes of `SD3`, and where their weights are."""

from __future__ import annotations

from apt.checkpoints.info import SampleInfo, SamplingInfo
from apt.models.architectures import MODELS, PretrainedEntry
from apt.models.sd3.model import SD3Config


def _stability(repo: str, num_steps: int, cfg_scale: float) -> PretrainedEntry:
    """Steps and guidance are those of the repository's page."""
    return PretrainedEntry(
        repo=repo,
        license="stabilityai-ai-community",
        source="Stability AI; arXiv 2403.03206",
        codec="sd3_vae",
        compression=(1, 8, 8),
        text_encoder="sd3",
        text_tokens=77 + 256,  # CLIP's and T5's
        gated=True,
        sample=SampleInfo(frames=1, height=1024, width=1024, fps=1),
        sampling=SamplingInfo(num_steps=num_steps, cfg_scale=cfg_scale, timestep_shift=3.0),
    )


@MODELS.register(
    "sd3.5_medium",
    pretrained={"stabilityai": _stability("stabilityai/stable-diffusion-3.5-medium", 40, 4.5)},
)
def sd3_5_medium() -> SD3Config:
    """Stable Diffusion 3.5 medium: 2.2 B parameters, images of up to 2 megapixels."""
    return SD3Config(
        depth=24, num_heads=24, dual_attention_layers=tuple(range(13)), max_positions=384
    )


@MODELS.register(
    "sd3.5_large",
    pretrained={"stabilityai": _stability("stabilityai/stable-diffusion-3.5-large", 28, 3.5)},
)
def sd3_5_large() -> SD3Config:
    """Stable Diffusion 3.5 large: 8.1 B parameters, images of 1 megapixel (APT Table 3)."""
    return SD3Config(depth=38, num_heads=38)

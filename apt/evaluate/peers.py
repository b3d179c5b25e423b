"""The one-step models that the paper compares with (Section 4, Tables 1 to 6), and their bases.

Values are the model card's where it gives them; `Peer.source` says what was read where. The paper
runs the bases with 25 steps and with diffusers' default guidance; some cards recommend more steps.
Licences are as named in the cards: read them before use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class WeightsFile:
    """Weights that replace those of the pipeline's UNet: a file in a Hub repository or a folder.

    A pickle (.bin) is never loaded; for such a peer the user names a converted file.
    """

    repo: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a published model is sampled.

    Attributes:
        about: description for lists.
        repo: Hub id of the pipeline.
        licence: as the card names it.
        source: where each of these values was read.
        dtype: of the weights.
        num_steps: sampling steps.
        guidance_scale: diffusers' option; 0 is off.
        side: height and width in pixels.
        call: further options of the pipeline's call.
        unet: weights that replace the pipeline's UNet.
        scheduler: diffusers class that replaces the pipeline's, built from its configuration.
        scheduler_options: changes to that configuration.
    """

    about: str
    repo: str
    licence: str
    source: str
    dtype: Literal["float32", "bfloat16", "float16"]
    num_steps: int
    guidance_scale: float
    side: int = 1024
    call: Mapping[str, Any] = field(default_factory=dict)
    unet: WeightsFile | None = None
    scheduler: str | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)


_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_OPENRAIL = "CreativeML Open RAIL++-M"
_STABILITY = "Stability AI Community License (gated)"

PEERS: Mapping[str, Peer] = {
    "flux-schnell": Peer(
        about="FLUX.1 [schnell], latent adversarial diffusion distillation, one step",
        repo="black-forest-labs/FLUX.1-schnell",
        licence="Apache-2.0",
        source="card: 1 to 4 steps, guidance 0, 256 tokens, bfloat16, licence",
        dtype="bfloat16",
        num_steps=1,
        guidance_scale=0.0,
        call={"max_sequence_length": 256},
    ),
    "flux-dev": Peer(
        about="FLUX.1 [dev], the base of schnell in the paper's tables, 25 steps",
        repo="black-forest-labs/FLUX.1-dev",
        licence="FLUX.1 [dev] Non-Commercial License (gated)",
        source=(
            "guidance 3.5, 512 tokens, bfloat16 and the licence as quoted elsewhere from the card, "
            "which is gated and was not read; the paper: 25 steps"
        ),
        dtype="bfloat16",
        num_steps=25,
        guidance_scale=3.5,
        call={"max_sequence_length": 512},
    ),
    "sd3.5-large-turbo": Peer(
        about="Stable Diffusion 3.5 Large Turbo, adversarial diffusion distillation, one step",
        repo="stabilityai/stable-diffusion-3.5-large-turbo",
        licence=_STABILITY,
        source="card: guidance 0, bfloat16, licence (4 steps there); the paper: one step",
        dtype="bfloat16",
        num_steps=1,
        guidance_scale=0.0,
    ),
    "sd3.5-large": Peer(
        about="Stable Diffusion 3.5 Large, the base of Turbo, 25 steps",
        repo="stabilityai/stable-diffusion-3.5-large",
        licence=_STABILITY,
        source=(
            "card, in a public copy of it: guidance 3.5, bfloat16, licence (28 steps there); the "
            "paper: 25 steps, at diffusers' default guidance, which is 7"
        ),
        dtype="bfloat16",
        num_steps=25,
        guidance_scale=3.5,
    ),
    "sdxl": Peer(
        about="Stable Diffusion XL base 1.0, the base of all SDXL peers, 25 Euler steps",
        repo=_SDXL,
        licence=_OPENRAIL,
        source=(
            "the card names no guidance: 5 is diffusers' default, as in the paper; the scheduler "
            "is the pipeline's own, Euler; the paper: 25 steps"
        ),
        dtype="float16",
        num_steps=25,
        guidance_scale=5.0,
    ),
    "sdxl-dmd2": Peer(
        about="SDXL-DMD2, distribution matching distillation, one step",
        repo=_SDXL,
        licence="CC BY-NC 4.0",
        source="card: UNet file, LCM scheduler, timestep 399, guidance 0, float16, licence",
        dtype="float16",
        num_steps=1,
        guidance_scale=0.0,
        call={"timesteps": [399]},
        unet=WeightsFile("tianweiy/DMD2", "dmd2_sdxl_1step_unet_fp16.bin"),
        scheduler="LCMScheduler",
    ),
    "sdxl-hyper": Peer(
        about="SDXL-Hyper, trajectory segmented consistency, one step (the UNet)",
        repo=_SDXL,
        licence=_OPENRAIL,
        source="card: UNet file, LCM scheduler, timestep 800, guidance 0, float16, licence",
        dtype="float16",
        num_steps=1,
        guidance_scale=0.0,
        call={"timesteps": [800]},
        unet=WeightsFile("ByteDance/Hyper-SD", "Hyper-SDXL-1step-Unet.safetensors"),
        scheduler="LCMScheduler",
    ),
    "sdxl-lightning": Peer(
        about="SDXL-Lightning, progressive adversarial distillation, one step (the UNet)",
        repo=_SDXL,
        licence=_OPENRAIL,
        source=(
            "card: UNet file, which predicts the sample, Euler scheduler with trailing timesteps, "
            "guidance 0, float16, licence"
        ),
        dtype="float16",
        num_steps=1,
        guidance_scale=0.0,
        unet=WeightsFile("ByteDance/SDXL-Lightning", "sdxl_lightning_1step_unet_x0.safetensors"),
        scheduler="EulerDiscreteScheduler",
        scheduler_options={"timestep_spacing": "trailing", "prediction_type": "sample"},
    ),
    "sdxl-nitro": Peer(
        about="SDXL-Nitro-Realism (NitroFusion), dynamic adversarial training, one step",
        repo=_SDXL,
        licence="CC BY-NC 4.0",
        source=(
            "card: UNet file, guidance 0, float16, licence, and a scheduler whose timesteps are a "
            "quarter of LCM's: with one step, LCM's own at timestep 249, a quarter of 999"
        ),
        dtype="float16",
        num_steps=1,
        guidance_scale=0.0,
        call={"timesteps": [249]},
        unet=WeightsFile("ChenDY/NitroFusion", "nitrosd-realism_unet.safetensors"),
        scheduler="LCMScheduler",
    ),
    "sdxl-turbo": Peer(
        about="SDXL-Turbo, adversarial diffusion distillation, one step at 512 px",
        repo="stabilityai/sdxl-turbo",
        licence="Stability AI Non-Commercial Research Community License",
        source=(
            "card: one step, guidance 0, 512 px, float16, licence; the scheduler is the pipeline's "
            "own, with trailing timesteps as diffusers' page asks"
        ),
        dtype="float16",
        num_steps=1,
        guidance_scale=0.0,
        side=512,
    ),
}
"""Peers by the names that `--model` takes."""

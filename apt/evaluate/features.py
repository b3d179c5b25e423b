"""Networks that turn pictures into features for Fréchet distances.

You can use your own: `Features("mine", my_function, size=64)`, or, to select it by name, a function
that is registered in `FEATURES` and imported with `--import`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.checkpoints.external import import_hub_extra, load_complete, local_folder, read_config
from apt.errors import InputError
from apt.evaluate.inception import load_inception
from apt.registry import Registry


@dataclass(frozen=True)
class Features:
    """A frozen network, and the size of the pictures that it takes.

    Attributes:
        name: used in tables and records.
        network: maps pictures (B, size, size, 3) in [0, 255] on the CPU, uint8 or (resized without
            rounding) float32, to features (B, D) of any float dtype.
        size: side in pixels; pictures are cropped and resized to it as in clean-fid.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    size: int

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Return features (B, D) on the CPU in float32 or wider.

        Raises InputError unless the network returns one row per picture.
        """
        features = check_rows(self.name, self.network(pictures), len(pictures), "pictures")
        wide = features if features.dtype == torch.float64 else features.float()
        return wide.cpu()


def check_rows(name: str, features: Tensor, number: int, what: str) -> Tensor:
    """Return `features`; raise InputError unless they have one row per input."""
    if features.ndim != 2 or len(features) != number or not features.is_floating_point():
        raise InputError(
            f"the features {name!r} returned {features.dtype} {tuple(features.shape)} for "
            f"{number} {what}; expected floats of shape ({number}, D)"
        )
    return features


FEATURES: Registry[Features] = Registry("features")
"""Functions that build features, by name. Each takes `device` and the location of its weights."""

FDR_FEATURES = ("inception", "convnextv2", "dinov2", "mae", "siglip2", "clip")
"""The six networks of FDr^6; see `apt.evaluate.image_measures.FrechetRatio`."""


@FEATURES.register("inception")
def inception(weights: str | None = None, device: str = "cpu") -> Features:
    """FID's Inception-v3 of 2015, 2048 features (95.6 MB, Apache-2.0)."""
    network = load_inception(None if weights is None else Path(weights)).to(device)

    def extract(pictures: Tensor) -> Tensor:
        features: Tensor = network(pictures.to(device).float().permute(0, 3, 1, 2))
        return features

    return Features("inception", extract, 299)


@FEATURES.register("dinov2")
def dinov2(
    weights: str = "facebook/dinov2-large", size: int = 224, device: str = "cpu"
) -> Features:
    """DINOv2-L's class token, 1024 features (1.2 GB, Apache-2.0)."""
    return _of_transformers(
        "dinov2",
        weights,
        size,
        device,
        "Dinov2Model",
        lambda output: output.last_hidden_state[:, 0],
    )


@FEATURES.register("convnextv2")
def convnextv2(
    weights: str = "facebook/convnextv2-base-22k-224", size: int = 224, device: str = "cpu"
) -> Features:
    """ConvNeXt-V2-B's last feature map, averaged, 1024 features (0.35 GB, Apache-2.0)."""
    return _of_transformers(
        "convnextv2",
        weights,
        size,
        device,
        "ConvNextV2Model",
        lambda output: output.last_hidden_state.mean(dim=(2, 3)),
        foreign=("classifier.",),
    )


@FEATURES.register("mae")
def mae(weights: str = "facebook/vit-mae-large", device: str = "cpu") -> Features:
    """MAE-L's class token, without masking, 1024 features (1.3 GB, CC-BY-NC-4.0)."""
    return _of_transformers(
        "mae",
        weights,
        None,
        device,
        "ViTMAEModel",
        lambda output: output.last_hidden_state[:, 0],
        foreign=("decoder.",),
        # The share of patches that its embeddings drop.
        settings={"mask_ratio": 0.0},
    )


@FEATURES.register("siglip2")
def siglip2(weights: str = "google/siglip2-so400m-patch16-256", device: str = "cpu") -> Features:
    """SigLIP 2 So400m's pooled token, 1152 features (4.5 GB with its text tower, Apache-2.0)."""
    return _of_transformers(
        "siglip2",
        weights,
        None,
        device,
        "SiglipVisionModel",
        lambda output: output.pooler_output,
        foreign=("text_model.", "logit_scale", "logit_bias"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


@FEATURES.register("clip")
def clip(weights: str = "openai/clip-vit-large-patch14", device: str = "cpu") -> Features:
    """CLIP-L/14's class token, 1024 features (1.7 GB with its text tower, MIT)."""
    return _of_transformers(
        "clip",
        weights,
        None,
        device,
        "CLIPVisionModel",
        lambda output: output.pooler_output,
        foreign=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of CLIP's training images in [0, 1]; later CLIP models use them too."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale (B, H, W, 3) to [0, 1] and return (x - mean) / std as float32 (B, 3, H, W)."""
    scaled = pictures.float() / 255
    return ((scaled - scaled.new_tensor(mean)) / scaled.new_tensor(std)).permute(0, 3, 1, 2)


def _of_transformers(
    name: str,
    weights: str,
    size: int | None,
    device: str,
    model_class: str,
    pick: Callable[[Any], Tensor],
    *,
    foreign: Sequence[str] = (),
    settings: Mapping[str, float] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Features:
    transformers = import_hub_extra("transformers")
    folder = local_folder(weights, None, [""])
    read_config(folder)
    model = load_complete(
        getattr(transformers, model_class), folder, dtype=torch.float32, foreign=foreign
    ).to(device)
    model.requires_grad_(False).eval()
    model.config.update(dict(settings or {}))

    def extract(pictures: Tensor) -> Tensor:
        return pick(model(normalise(pictures.to(device), mean, std)))

    return Features(name, extract, model.config.image_size if size is None else size)

"""CLIP score: how well pictures match their prompts (Hessel et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.checkpoints.external import import_hub_extra, load_complete, local_folder, read_config
from apt.errors import InputError
from apt.evaluate.features import CLIP_MEAN, CLIP_STD, normalise
from apt.models.text_transformers import load_tokenizer

PAPER_MODEL = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
"""The model of APT's Appendix A, which follows ADD (Sauer et al., 2025). 5.5 GB, MIT."""

_MAX_TOKENS = 77


@dataclass(frozen=True)
class Similarity:
    """A network that compares pictures with prompts.

    Attributes:
        name: used in tables and records.
        network: maps pictures (B, size, size, 3) in [0, 255], uint8 or float32, on the CPU, and
            their B prompts to (B,), the cosine of each pair in [-1, 1].
        size: side in pixels; pictures are cropped and resized to it as in clean-fid.
    """

    name: str
    network: Callable[[Tensor, Sequence[str]], Tensor]
    size: int

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return (B,) float64 on the CPU. Raises InputError unless there is one figure per pair."""
        if len(pictures) != len(prompts):
            raise InputError(f"{len(pictures)} pictures need as many prompts, got {len(prompts)}")
        cosines = self.network(pictures, prompts)
        if cosines.shape != (len(pictures),):
            raise InputError(
                f"the similarity {self.name!r} returned the shape {tuple(cosines.shape)} for "
                f"{len(pictures)} pictures; expected ({len(pictures)},)"
            )
        return cosines.double().cpu()


def clip_similarity(weights: str = PAPER_MODEL, device: str = "cpu") -> Similarity:
    """Load CLIP through transformers, in fp32.

    Prompts are truncated to 77 tokens, as in CLIP's own code. Unlike there, resized pictures are
    not rounded to integers.

    Args:
        weights: a folder or a Hub id.
        device: where the network runs.

    Raises:
        MissingPackageError: transformers is not installed.
        CheckpointError: the weights cannot be loaded or do not fit.
    """
    transformers = import_hub_extra("transformers")
    folder = local_folder(weights, None, [""])
    read_config(folder)
    tokenizer = load_tokenizer(transformers, folder)
    model = load_complete(transformers.CLIPModel, folder, dtype=torch.float32).to(device)
    model.requires_grad_(False).eval()

    def cosines(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=_MAX_TOKENS,
            return_tensors="pt",
        ).to(device)
        output = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=normalise(pictures.to(device), CLIP_MEAN, CLIP_STD),
        )
        products: Tensor = (output.image_embeds * output.text_embeds).sum(dim=1)
        return products

    return Similarity("clip", cosines, model.config.vision_config.image_size)

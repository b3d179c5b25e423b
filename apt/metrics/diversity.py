"""Diversity of samples relative to real clips, which falls when a model collapses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.errors import InputError

_CHUNK = 256


@dataclass(frozen=True)
class Diversity:
    """Mean distance between two samples of the same prompt, and of different prompts."""

    within: float
    across: float

    def relative_to(self, real: Diversity) -> Diversity:
        """Divide both by those of real clips: 1 is as diverse as the data, 0 is collapsed."""
        if real.within <= 0 or real.across <= 0:
            raise InputError(
                "the real clips have no diversity, so nothing can be compared with them. Use more "
                "real clips, several for each prompt."
            )
        return Diversity(self.within / real.within, self.across / real.across)


def pairwise_diversity(features: Tensor, prompts: Sequence[Hashable]) -> Diversity:
    """Return the mean Euclidean distance of all pairs, split by whether they share a prompt.

    ``features`` (N, D), any float dtype, are flattened pixels or a classifier's features;
    ``prompts`` has one entry per row. Raises ``InputError`` if the lengths differ, if no pair
    shares its prompt, or if all pairs do.
    """
    if features.ndim != 2 or features.shape[0] != len(prompts):
        raise InputError(
            f"features of shape {tuple(features.shape)} do not fit {len(prompts)} prompts; "
            "expected one row (N, D) for each prompt."
        )
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([index[prompt] for prompt in prompts])
    rows, columns = torch.triu_indices(len(prompts), len(prompts), offset=1)
    same = groups[rows] == groups[columns]
    if not same.any() or same.all():
        raise InputError(
            "diversity needs at least one prompt with two samples and at least two prompts; got "
            f"{len(prompts)} samples of {len(index)} prompts."
        )
    x = features.detach().to(device="cpu", dtype=torch.float64)
    pairs = zip(rows[same].split(_CHUNK), columns[same].split(_CHUNK), strict=True)
    within = torch.cat([(x[i] - x[j]).norm(dim=1) for i, j in pairs])
    # A matrix product is many times faster, but gives about 1e-6 between equal rows. A collapse
    # makes samples of one prompt equal, so those are subtracted directly, above.
    distances = torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist")[rows, columns]
    return Diversity(within.mean().item(), distances[~same].mean().item())

"""The catalogue of registered models: size, weights, licence and formats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt.checkpoints.layouts import family_of
from apt.models.architectures import MODELS, PretrainedEntry


@dataclass(frozen=True)
class CatalogueEntry:
    """A registered model.

    Attributes:
        name: registered name.
        summary: a description in one line.
        parameters: number of parameters.
        family: family of public checkpoints; None for models of our own.
        formats: formats that it can be loaded from and exported to.
        pretrained: published weights by tag.
    """

    name: str
    summary: str
    parameters: int
    family: str | None
    formats: tuple[str, ...]
    pretrained: dict[str, PretrainedEntry]


def catalogue(pattern: str = "*") -> list[CatalogueEntry]:
    """Return the registered models whose names match a shell-style pattern."""
    entries = []
    for name in MODELS.names(pattern):
        config = MODELS.get(name)()
        with torch.device("meta"):
            module = config.build()
        family = family_of(config)
        entries.append(
            CatalogueEntry(
                name=name,
                summary=MODELS.summary(name),
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                family=None if family is None else family.name,
                formats=("apt",) if family is None else ("apt", "diffusers", "comfyui"),
                pretrained=dict(MODELS.pretrained(name)),
            )
        )
    return entries

"""What the three stages share: their inputs, their random draws, and the frame of an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.models.bundle import ModelBundle
from apt.models.conditions import TextCondition
from apt.rng import sample_noise, sample_uniform
from apt.train.adapters import add_adapters
from apt.train.config import TrainConfig
from apt.train.networks import Denoiser, Trained
from apt.train.parallel import Parallel


@dataclass(frozen=True)
class MicroBatch:
    """A part of a rank's batch that goes through the networks at once.

    Attributes:
        x: clean latents (b, C, T, H, W).
        captions: b texts.
        offset: index of the first sample in the global batch; random draws are keyed by it.
    """

    x: Tensor
    captions: list[str]
    offset: int


class Stage(ABC):
    """One stage of the recipe: the networks that it trains, and one update of them.

    Attributes:
        trained: by name; "generator" is always there, and is what gets exported.
        start: the bundle that the run began with: text encoder, codec and description.
    """

    trained: dict[str, Trained]

    def __init__(self, config: TrainConfig, start: ModelBundle, parallel: Parallel) -> None:
        self.config = config
        self.start = start
        self.parallel = parallel

    @abstractmethod
    def update(self, batches: Sequence[MicroBatch], update: int) -> dict[str, float | Tensor]:
        """One update from micro-batches of equal size. `update` counts from 0.

        Returns metrics, each a mean over this rank's samples.
        """

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the trained networks."""
        return {}

    def warnings(self) -> list[str]:
        """What the user should know before the run costs time."""
        return []

    @property
    def generator(self) -> Trained:
        return self.trained["generator"]

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Conditions from the frozen text encoder."""
        assert isinstance(self.start.text_encoder, nn.Module)
        with torch.no_grad():
            return self.start.text_encoder(prompts)

    def autocast(self) -> AbstractContextManager[object]:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=enabled)

    def noise(self, batch: MicroBatch, update: int, stream: str) -> Tensor:
        """Standard normal noise in the shape of the batch's latents."""
        return sample_noise(
            len(batch.captions),
            batch.x.shape[1:],
            seed=self.config.seed,
            step=update,
            offset=batch.offset,
            stream=stream,
            device=batch.x.device,
        )

    def uniform(self, batch: MicroBatch, update: int, stream: str) -> Tensor:
        """(b,) uniform in [0, 1)."""
        return sample_uniform(
            len(batch.captions),
            seed=self.config.seed,
            step=update,
            offset=batch.offset,
            stream=stream,
            device=batch.x.device,
        )


def denoiser(start: ModelBundle, config: TrainConfig, *, with_text: bool) -> Denoiser:
    """The generator's networks, with activation checkpointing and adapters as configured."""
    start.backbone.set_checkpointing(config.activation_checkpointing)
    add_adapters(start.backbone, config.lora, seed=config.seed)
    text = start.text_encoder if with_text else None
    assert text is None or isinstance(text, nn.Module)
    return Denoiser(start.backbone, text)


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of detached scalars."""
    return torch.stack([value.detach().float() for value in values]).mean()

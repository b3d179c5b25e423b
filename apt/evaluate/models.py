"""Load a chosen model as an object that generates samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from apt.errors import InputError
from apt.evaluate.choice import PIPELINE_PREFIX, ModelChoice, check_model
from apt.evaluate.peers import PEERS
from apt.pipeline import OneStepPipeline
from apt.samples import SampleKey

DtypeName = Literal["float32", "bfloat16", "float16"]


class SampleModel(Protocol):
    """A model that generates samples.

    Attributes:
        settings: everything besides prompt and seed that determines its samples, as JSON.
        frames: per sample; 1 is an image.
        fps: frames per second of its videos.
        batch_size: number of samples computed together; another number may change rounding.
    """

    settings: Mapping[str, Any]
    frames: int
    fps: float
    batch_size: int

    def stream(self, keys: Sequence[SampleKey]) -> Iterator[Tensor]:
        """Yield the samples in order, uint8 (T, H, W, 3).

        Raises InputError for a prompt, size or option that does not fit.
        """
        ...


def load_model(
    choice: ModelChoice,
    *,
    device: torch.device | str | None = None,
    dtype: DtypeName | None = None,
) -> SampleModel:
    """Load a model.

    Args:
        choice: which model, and how to sample it.
        device: None uses a GPU if there is one.
        dtype: of the weights; None is float32, or what a peer's card says.

    Raises:
        CheckpointError: a model that does not exist or cannot be loaded.
        InputError: an option that does not fit.
    """
    check_model(choice)
    if choice.place.startswith(PIPELINE_PREFIX) or choice.place in PEERS:
        # Imports diffusers, which our own models do not need.
        from apt.evaluate.pipelines import load_peer, load_pipeline

        if choice.place in PEERS:
            return load_peer(
                PEERS[choice.place], choice.options, unet=choice.unet, device=device, dtype=dtype
            )
        place = choice.place.removeprefix(PIPELINE_PREFIX)
        return load_pipeline(
            place, choice.options, fps=choice.fps, device=device, dtype=dtype or "float32"
        )
    return OwnModel(choice, device=device, dtype=dtype or "float32")


class OwnModel:
    """One of our models; see `SampleModel`. Arguments and errors are those of `load_model`."""

    def __init__(
        self,
        choice: ModelChoice,
        *,
        device: torch.device | str | None = None,
        dtype: DtypeName = "float32",
    ) -> None:
        self._pipeline = OneStepPipeline.from_pretrained(
            choice.place, device=device, dtype=getattr(torch, dtype)
        )
        self._options = choice.options
        self.batch_size = choice.options.batch_size
        sample = self._pipeline.info.sample
        self.frames, *_ = sample.sized(
            self._options.frames, self._options.height, self._options.width
        )
        self.fps = sample.fps if choice.fps is None else choice.fps
        if self.frames > 1 and not self.fps:
            raise InputError(
                f"{choice.place} was trained on clips at each video's own rate; set a frame rate "
                f"for its samples, as in {choice.place},fps=24"
            )
        plan = self._pipeline.plan(self._options)
        origin = self._pipeline.bundle.origin
        self.settings: Mapping[str, Any] = {
            **dataclasses.asdict(self._options),
            "model": choice.place,
            "model_content": origin and (origin.revision or origin.weights),
            "dtype": dtype,
            "fps": self.fps,
            "num_steps": len(plan.timesteps) - 1,
            "sampler": plan.sampler,
            "cfg_scale": plan.cfg_scale,
        }

    def stream(self, keys: Sequence[SampleKey]) -> Iterator[Tensor]:
        """See `SampleModel`."""
        prompts, seeds = [prompt for prompt, _ in keys], [seed for _, seed in keys]
        return self._pipeline.stream(prompts, seed=seeds, options=self._options)

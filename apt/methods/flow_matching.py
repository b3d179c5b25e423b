"""Flow-matching pre-training, which provides the teacher and D's backbone (APT Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from apt.checkpoints.info import SamplingInfo
from apt.checkpoints.load import ModelBundle
from apt.checks import check_positive
from apt.condition import Condition, EncodedText
from apt.errors import ConfigError
from apt.flow import bind_guided, sample, sampling_timesteps, shift_timesteps
from apt.losses import FlowMatching
from apt.methods.base import (
    Denoiser,
    Host,
    Method,
    MethodConfig,
    Metrics,
    MicroBatch,
    Part,
    Pass,
    even_timesteps,
    mean,
)
from apt.models.architectures import untrained_timesteps
from apt.rng import sample_noise


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(MethodConfig):
    """Flow-matching pre-training (APT Sec. 3.1).

    Attributes:
        start: a diffusion model to fine-tune: a built-in name, a folder, or a Hub id. Its text
            encoder, codec, size and sampling settings are kept. Empty starts from random weights.
        codec: a trained codec: a folder that a codec run exported, a model that has one, or a Hub
            id; empty uses `model.codec`.
        timestep_sampling: distribution of t before the shift.
        timestep_shift: s of Eq. 7, applied to the training timesteps.
        caption_dropout: share of captions replaced by the negative prompt, for guidance.
        cfg_scale, num_steps, sampling_shift: recorded as the sampling defaults of a new model;
            sampling_shift is s of Eq. 7 for the sampling timesteps.
    """

    exports_as: ClassVar[str] = "diffusion"
    summary: ClassVar[str] = "a flow-matching diffusion model, sampled in many steps"
    starts_from: ClassVar[str | None] = "start"
    may_begin_anew: ClassVar[bool] = True
    names_models: ClassVar[tuple[str, ...]] = ("codec", "start")

    start: str = ""
    codec: str = ""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    timestep_shift: float = 1.0
    caption_dropout: float = 0.1
    cfg_scale: float = 7.5
    num_steps: int = 25
    sampling_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {self.num_steps}")
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"caption_dropout must be in [0, 1], got {self.caption_dropout}")

    def check(self) -> None:
        check_positive(self, "stage.", "timestep_shift", "sampling_shift")
        if self.start and self.codec:
            raise ConfigError(
                f"--stage.start {self.start} has its own codec, but --stage.codec names "
                f"{self.codec}; leave out one of them (--stage.codec '')"
            )

    def trained_codec(self) -> str:
        return self.codec

    def check_adapters(self) -> None:
        if not self.start:
            raise ConfigError(
                "lora.rank needs a model to start from: adapters leave the weights unchanged, and "
                "pre-training starts from random ones; name a model with --stage.start"
            )

    def build(self, start: ModelBundle, host: Host) -> FlowMatchingPretraining:
        return FlowMatchingPretraining(self, start, host)

    def sampling(self, before: SamplingInfo) -> SamplingInfo:
        if self.start:
            return before
        return replace(
            before,
            num_steps=self.num_steps,
            cfg_scale=self.cfg_scale,
            timestep_shift=self.sampling_shift,
            sampler="euler",
        )


class FlowMatchingPretraining(Method):
    """Trains the backbone, and the text encoder if its weights are trainable."""

    def __init__(self, config: PretrainConfig, start: ModelBundle, host: Host) -> None:
        super().__init__(start, host)
        if config.start and start.info.stage in ("consistency", "apt"):
            raise ConfigError(
                f"--stage.start names a model of the stage {start.info.stage!r}, which is already "
                "distilled; start from the diffusion model that it was distilled from"
            )
        self.config = config
        self.sampling = config.sampling(start.info.sampling)
        self.loss = FlowMatching()
        text = start.text_encoder
        host.adapt(start.backbone)
        # With adapters, nothing else trains.
        whole = all(p.requires_grad for p in start.backbone.parameters())
        self.trains_text = whole and any(p.requires_grad for p in text.parameters())
        self.trained = {"generator": self.train_generator(text if self.trains_text else None)}

    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts, with gradients if the text encoder trains."""
        if not self.trains_text:
            return super().encode_text(prompts)
        return cast("Denoiser", self.generator.module).encode(prompts)

    def warnings(self) -> list[str]:
        if not self.config.start:
            return []
        told = untrained_timesteps(self.start.info.model.architecture, [0.0, 0.25, 0.5, 0.75, 1.0])
        return [] if told is None else [f"the model to start from {told}"]

    def prompts(self) -> list[str]:
        return [self.host.negative_prompt]

    def passes(self) -> list[Pass]:
        return [Pass(self.start.backbone, 1.0, 2)]

    def parts(self) -> dict[str, Part]:
        return {"generator": self.generator_step}

    def generator_step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Minimise the MSE of the velocity z - x at x_t = (1 - t) x + t z."""
        self.generator.zero_grad()
        losses = []
        for batch in self.generator.accumulated(batches):
            t = self.timesteps(batch, update)
            z = sample_noise(len(batch), batch.x.shape[1:], self.draw(batch, update, "noise"))
            with self.host.autocast():
                c = self.encode(self.captions(batch, update), batch.extra)
                loss = self.loss(partial(self.generator.module, c=c), batch.x, z, t)
            (loss / len(batches)).backward()
            losses.append(loss)
        norm = self.generator.step(update)
        return {"generator/loss": mean(losses), "generator/grad_norm": norm}

    def heldout(self, batch: MicroBatch) -> Metrics:
        """Return the loss without caption dropout."""
        t = self.spread(even_timesteps(batch)).to(batch.x.device)
        z = sample_noise(len(batch), batch.x.shape[1:], self.draw(batch, 0, "heldout noise"))
        with self.host.autocast():
            c = self.condition(batch)
            return {"generator/loss": self.loss(partial(self.generator.module, c=c), batch.x, z, t)}

    def preview(self, z: Tensor, c: Condition) -> Tensor:
        """Sample with many steps and guidance, on the timestep grid of the model's own shift."""
        how = self.sampling
        predict = bind_guided(self.generator.module, c, self.negative(c), how.cfg_scale)
        grid = sampling_timesteps(how.num_steps, how.timestep_shift)
        return sample(predict, z, grid, sampler="euler", noise=lambda step: z)

    def timesteps(self, batch: MicroBatch, update: int) -> Tensor:
        """Draw training timesteps (b,), shifted by s (Eq. 7)."""
        return self.spread(self.uniform(batch, update, "timestep")).to(batch.x.device)

    def spread(self, u: Tensor) -> Tensor:
        """Map uniform numbers (b,) to the distribution of training timesteps (Eq. 7)."""
        if self.config.timestep_sampling == "logit_normal":
            # ndtri maps uniform to normal; fp64 keeps its tails finite.
            u = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).sigmoid().float()
        return shift_timesteps(u, self.config.timestep_shift)

    def captions(self, batch: MicroBatch, update: int) -> list[str]:
        """Return captions, some replaced by the negative prompt for classifier-free guidance."""
        draws = self.uniform(batch, update, "caption_dropout").tolist()
        return [
            self.host.negative_prompt if draw < self.config.caption_dropout else caption
            for caption, draw in zip(batch.captions, draws, strict=True)
        ]

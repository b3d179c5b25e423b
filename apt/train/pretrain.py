"""Stage one: flow-matching pre-training (APT Sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.flow import shift_timesteps
from apt.losses import create_loss
from apt.models.bundle import ModelBundle
from apt.models.conditions import TextCondition
from apt.train.config import PretrainConfig, TrainConfig
from apt.train.networks import Denoiser, make_trained
from apt.train.parallel import Parallel
from apt.train.stage import MicroBatch, Stage, denoiser, mean


class Pretrain(Stage):
    """Trains the backbone, and the text encoder if it has weights that train."""

    def __init__(self, config: TrainConfig, start: ModelBundle, parallel: Parallel) -> None:
        super().__init__(config, start, parallel)
        assert isinstance(config.stage, PretrainConfig)
        self.stage = config.stage
        self.loss = create_loss("flow_matching")
        text = start.text_encoder
        assert isinstance(text, nn.Module)
        self.trains_text = any(p.requires_grad for p in text.parameters())
        network = denoiser(start, config, with_text=self.trains_text)
        blocks = start.backbone.block_list()
        self.trained = {
            "generator": make_trained(
                network,
                blocks,
                config,
                parallel,
                ema_decay=config.ema_decay,
                forward_methods=("encode",) if self.trains_text else (),
            )
        }

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Conditions, with gradients if the text encoder trains."""
        if not self.trains_text:
            return super().encode(prompts)
        network = self.generator.module
        assert isinstance(network, Denoiser)
        return network.encode(prompts)

    def update(self, batches: Sequence[MicroBatch], update: int) -> dict[str, float | Tensor]:
        self.generator.zero_grad()
        losses = []
        for batch in batches:
            t = self.timesteps(batch, update)
            with self.autocast():
                c = self.encode(self.captions(batch, update))
                loss = self.loss(
                    lambda x_t, t, c=c: self.generator.module(x_t, t, c),
                    batch.x,
                    self.noise(batch, update, "noise"),
                    t,
                )
            (loss / len(batches)).backward()
            losses.append(loss)
        norm = self.generator.step(update)
        return {"generator/loss": mean(losses), "generator/grad_norm": norm}

    def timesteps(self, batch: MicroBatch, update: int) -> Tensor:
        """(b,) training timesteps: drawn, then shifted (Eq. 7)."""
        u = self.uniform(batch, update, "timestep")
        if self.stage.timestep_sampling == "logit_normal":
            # ndtri maps uniform to normal; fp64 keeps its tails finite.
            u = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).sigmoid().float()
        return shift_timesteps(u, self.stage.timestep_shift)

    def captions(self, batch: MicroBatch, update: int) -> list[str]:
        """Captions with some replaced by the negative prompt, for classifier-free guidance."""
        draws = self.uniform(batch, update, "caption_dropout").tolist()
        return [
            self.config.negative_prompt if draw < self.stage.caption_dropout else caption
            for caption, draw in zip(batch.captions, draws, strict=True)
        ]

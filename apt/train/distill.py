"""Stage two: consistency distillation with guidance (APT Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apt.losses import create_loss
from apt.models.bundle import ModelBundle
from apt.models.registry import untrained_timesteps
from apt.sampling import bind
from apt.train.config import DistillConfig, TrainConfig
from apt.train.ema import EMA
from apt.train.networks import frozen_copy, make_trained, place
from apt.train.parallel import Parallel
from apt.train.stage import MicroBatch, Stage, denoiser, mean


class Distill(Stage):
    """Trains the generator to jump along the teacher's guided trajectory."""

    def __init__(self, config: TrainConfig, start: ModelBundle, parallel: Parallel) -> None:
        super().__init__(config, start, parallel)
        assert isinstance(config.stage, DistillConfig)
        stage = config.stage
        self.loss = create_loss(
            "consistency",
            num_timesteps=stage.num_timesteps,
            cfg_scale=stage.cfg_scale,
            shift=stage.timestep_shift,
        )
        teacher = frozen_copy(start.backbone)
        network = denoiser(start, config, with_text=False)
        target = frozen_copy(start.backbone)  # after the network got its adapters, if any
        target.backbone.set_checkpointing(False)
        self.teacher = place(teacher, teacher.backbone.block_list(), parallel)
        self.target = place(target, target.backbone.block_list(), parallel)
        self.trained = {
            "generator": make_trained(
                network,
                start.backbone.block_list(),
                config,
                parallel,
                ema_decay=config.ema_decay,
            )
        }
        self.target_ema = EMA(network, stage.target_decay)

    def extra_state(self) -> dict[str, Any]:
        return {"target": self.target_ema.state_dict()}

    def warnings(self) -> list[str]:
        grid, _ = self.loss.timesteps(torch.arange(self.loss.num_timesteps))
        problem = untrained_timesteps(self.start.info.model.architecture, grid.tolist())
        return [] if problem is None else [f"the teacher {problem}"]

    def update(self, batches: Sequence[MicroBatch], update: int) -> dict[str, float | Tensor]:
        student = self.generator.module
        self.generator.zero_grad()
        self.target_ema.copy_to(self.target)
        losses = []
        for batch in batches:
            c = self.encode(batch.captions)
            negative = self.encode([self.config.negative_prompt] * len(batch.captions))
            index = (self.uniform(batch, update, "timestep") * self.loss.num_timesteps).long()
            with self.autocast():
                loss = self.loss(
                    bind(student, c),
                    lambda x_t, t, c=c, n=negative: (
                        self.teacher(x_t, t, c),
                        self.teacher(x_t, t, n),
                    ),
                    bind(self.target, c),
                    batch.x,
                    self.noise(batch, update, "noise"),
                    index,
                )
            (loss / len(batches)).backward()
            losses.append(loss)
        norm = self.generator.step(update)
        self.target_ema.update(student)
        return {"generator/loss": mean(losses), "generator/grad_norm": norm}

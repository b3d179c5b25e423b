"""Consistency distillation with guidance, which initialises G (APT Sec. 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.info import ModelInfo, SamplingInfo
from apt.checkpoints.load import ModelBundle
from apt.checks import check_range
from apt.condition import Condition
from apt.flow import bind
from apt.losses import Consistency
from apt.methods.apt import generate, one_step_sampling
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
from apt.models.transformer import DiffusionTransformer
from apt.rng import Draw, sample_noise


@dataclass(frozen=True, kw_only=True)
class DistillConfig(MethodConfig):
    """Consistency distillation (APT Sec. 3.2).

    Attributes:
        teacher: the diffusion model: a built-in name, a folder or a Hub id.
        loss: the discretised trajectory, and the teacher's constant guidance scale, 7.5 in the
            paper. Values of None are taken from the teacher's sampling settings: its steps,
            guidance and shift.
        target_decay: EMA decay of the target network.
    """

    exports_as: ClassVar[str] = "consistency"
    summary: ClassVar[str] = "a consistency-distilled model, the start of Adversarial Post-Training"
    starts_from: ClassVar[str | None] = "teacher"
    names_models: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str = ""
    loss: Consistency = Consistency()
    target_decay: float = 0.95

    def build(self, start: ModelBundle, host: Host) -> ConsistencyDistillation:
        return ConsistencyDistillation(self, start, host)

    def check(self) -> None:
        check_range(self, "stage.", {"target_decay": (0, 1)})

    def filled(self, start: ModelInfo) -> DistillConfig:
        sampled = start.sampling
        teachers: dict[str, Any] = {
            "num_timesteps": sampled.num_steps,
            "cfg_scale": sampled.cfg_scale,
            "timestep_shift": sampled.timestep_shift,
        }
        loss = self.loss
        still_open = {name: x for name, x in teachers.items() if getattr(loss, name) is None}
        return replace(self, loss=replace(loss, **still_open))

    def sampling(self, before: SamplingInfo) -> SamplingInfo:
        shift = self.loss.timestep_shift
        return one_step_sampling(before if shift is None else replace(before, timestep_shift=shift))


class ConsistencyDistillation(Method):
    """Trains the generator to jump along the teacher's guided trajectory."""

    def __init__(self, config: DistillConfig, start: ModelBundle, host: Host) -> None:
        super().__init__(start, host)
        self.loss = config.loss
        self.teacher = _copy(start.backbone).requires_grad_(False)
        host.adapt(start.backbone)
        self.target = _copy(start.backbone)  # after `adapt`: the average includes the adapters
        self.target.backbone.set_checkpointing(False)
        for network in (self.teacher, self.target):
            host.place(network, network.backbone.block_list())
        self.target.requires_grad_(False)
        self.trained = {"generator": self.train_generator()}
        # The target network holds the average; there is no other copy.
        self.target_ema = host.average(
            self.generator.module, config.target_decay, inside=self.target
        )

    def extra_state(self) -> dict[str, Any]:
        return {"target": self.target_ema.state_dict()}

    def warnings(self) -> list[str]:
        grid, _ = self.loss.timesteps(torch.arange(self.loss.num_intervals))
        problem = untrained_timesteps(self.start.info.model.architecture, grid.tolist())
        return [] if problem is None else [f"the teacher {problem}"]

    def prompts(self) -> list[str]:
        return [self.host.negative_prompt]

    def passes(self) -> list[Pass]:
        backbone = self.start.backbone
        # The teacher with both prompts, the target, and the student.
        return [Pass(backbone, 2.0, 0), Pass(backbone, 1.0, 0), Pass(backbone, 1.0, 2)]

    def parts(self) -> dict[str, Part]:
        return {"generator": self.generator_step}

    def generator_step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        """Minimise the MSE to the target after one guided teacher step (Sec. 3.2)."""
        self.generator.zero_grad()
        losses = []
        for batch in self.generator.accumulated(batches):
            u = self.uniform(batch, update, "timestep")
            loss = self.distance(batch, u, self.draw(batch, update, "noise"))
            (loss / len(batches)).backward()
            losses.append(loss)
        norm = self.generator.step(update)
        self.target_ema.update(self.generator.module)
        return {"generator/loss": mean(losses), "generator/grad_norm": norm}

    def heldout(self, batch: MicroBatch) -> Metrics:
        """Return the MSE to the target that the next update would use."""
        u = even_timesteps(batch).to(batch.x.device)
        return {"generator/loss": self.distance(batch, u, self.draw(batch, 0, "heldout noise"))}

    def distance(self, batch: MicroBatch, u: Tensor, draw: Draw) -> Tensor:
        """Return the MSE to the target at the fraction u (b,) in [0, 1) of the trajectory."""
        c = self.condition(batch)
        negative = self.negative(c)
        with self.host.autocast():
            return self.loss(
                bind(self.generator.module, c),
                partial(self.both_velocities, c=c, negative=negative),
                bind(self.target, c),
                batch.x,
                sample_noise(len(batch), batch.x.shape[1:], draw),
                (u * self.loss.num_intervals).long(),
            )

    def both_velocities(
        self, x_t: Tensor, t: Tensor, c: Condition, negative: Condition
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's velocities under the caption and under the negative prompt."""
        return self.teacher(x_t, t, c), self.teacher(x_t, t, negative)

    def preview(self, z: Tensor, c: Condition) -> Tensor:
        return generate(self.generator.module, z, c)


def _copy(backbone: DiffusionTransformer) -> Denoiser:
    """Return an independent copy."""
    return Denoiser(copy.deepcopy(backbone))

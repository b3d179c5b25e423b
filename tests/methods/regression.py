"""A user's own method and recipe, which change nothing in the package.

Luhman & Luhman 2021: the one-step sample is regressed on what the teacher makes from the same noise
in many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.checkpoints.info import SamplingInfo
from apt.checkpoints.load import ModelBundle
from apt.condition import Condition
from apt.flow import bind, euler_sample, sampling_timesteps
from apt.methods import Host, Method, MethodConfig, MicroBatch
from apt.methods.apt import generate, one_step_sampling
from apt.methods.base import Metrics, Part, mean
from apt.rng import sample_noise
from apt.train.config import TrainConfig
from apt.train.recipe_names import RECIPES


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(MethodConfig):
    """Its options."""

    exports_as: ClassVar[str] = "regression"
    summary: ClassVar[str] = "a one-step model regressed on its teacher"
    starts_from: ClassVar[str | None] = "pupil"
    names_models: ClassVar[tuple[str, ...]] = ("pupil",)

    pupil: str = ""
    steps: int = 2

    def build(self, start: ModelBundle, host: Host) -> Method:
        return Regression(self, start, host)

    def sampling(self, before: SamplingInfo) -> SamplingInfo:
        return one_step_sampling(before)


class Regression(Method):
    def __init__(self, config: RegressionConfig, start: ModelBundle, host: Host) -> None:
        super().__init__(start, host)
        self.teacher, _ = host.backbone("pupil")
        host.place(self.teacher.requires_grad_(False), self.teacher.block_list())
        self.grid = sampling_timesteps(config.steps)
        host.adapt(start.backbone)
        self.trained = {"generator": self.train_generator()}

    def parts(self) -> dict[str, Part]:
        return {"generator": self.step}

    def step(self, batches: Sequence[MicroBatch], update: int) -> Metrics:
        self.generator.zero_grad()
        losses = []
        for batch in batches:
            c = self.condition(batch)
            z = sample_noise(len(batch), batch.x.shape[1:], self.draw(batch, update, "noise"))
            with torch.no_grad():
                target = euler_sample(bind(self.teacher, c), z, self.grid)
            loss = F.mse_loss(generate(self.generator.module, z, c), target)
            (loss / len(batches)).backward()
            losses.append(loss)
        self.generator.step(update)
        return {"generator/loss": mean(losses)}

    def preview(self, z: Tensor, c: Condition) -> Tensor:
        return generate(self.generator.module, z, c)


@RECIPES.register("digits_regression")
def digits_regression() -> TrainConfig:
    """Regression of the digits model on itself in two steps."""
    return TrainConfig(
        name="digits_regression",
        run_dir="runs/regression",
        stage=RegressionConfig(pupil="digits-diffusion"),
        num_updates=2,
        batch_size=2,
        checkpoint_every=1,
        sample_every=0,
    )

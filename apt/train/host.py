"""What a run gives its method: networks put to work on this rank, as the configuration says."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from apt.checkpoints.bundle import ModelBundle
from apt.checkpoints.info import ModelInfo
from apt.checkpoints.load import describe_model, load_model
from apt.distributed.parallel import Parallel
from apt.models.protocols import LatentCodec
from apt.models.transformer import DiffusionTransformer
from apt.train.adapters import add_adapters
from apt.train.config import TrainConfig
from apt.train.ema import EMA
from apt.train.networks import Trained, initial_bundle, initial_codec, make_optimizer
from apt.train.objects import NO_OBJECTS, Objects


@dataclasses.dataclass(frozen=True)
class RunHost:
    """A `Host` for one run on one rank."""

    config: TrainConfig
    parallel: Parallel
    objects: Objects = NO_OBJECTS

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def device(self) -> torch.device:
        return self.parallel.device

    @property
    def negative_prompt(self) -> str:
        return self.config.negative_prompt or ""

    def model(self) -> ModelBundle:
        return initial_bundle(self.config, self.objects)

    def backbone(self, field: str) -> tuple[DiffusionTransformer, ModelInfo]:
        bundle = self.objects.bundles.get(field)
        if bundle is None:
            source = self.config.stage.source(field)
            return load_model(source), describe_model(source)
        # Of its own: one bundle may stand for two models.
        return copy.deepcopy(bundle.backbone), bundle.info

    def codec(self) -> tuple[str, LatentCodec]:
        return initial_codec(self.config, self.objects)

    def over_ranks(self, values: Tensor) -> Tensor:
        flat = {str(i): value for i, value in enumerate(values.flatten().tolist())}
        means = self.parallel.mean(flat)
        return values.new_tensor([means[key] for key in flat]).view_as(values)

    def autocast(self) -> AbstractContextManager[object]:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def adapt(self, backbone: DiffusionTransformer, *, discriminator: bool = False) -> None:
        backbone.set_checkpointing(self.config.activation_checkpointing)
        if self.config.lora.discriminator or not discriminator:
            add_adapters(backbone, self.config.lora, seed=self.seed)

    def train(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        averaged: bool,
        learning_rate: float | None = None,
        slowed: tuple[nn.Module, float] | None = None,
        forward_methods: Sequence[str] = (),
    ) -> Trained:
        # The average and the optimiser follow the parameters that sharding leaves.
        self.place(network, blocks, forward_methods=forward_methods)
        optimizer = self.config.optimizer
        if learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=learning_rate)
        warmup = self.config.ema_warmup is True
        ema = EMA(network, self.config.ema_decay, warmup=warmup) if averaged else None
        moved_by = make_optimizer(network, optimizer, ema, slowed)
        return Trained(network, moved_by, optimizer, self.config.num_updates, ema)

    def place(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        forward_methods: Sequence[str] = (),
    ) -> None:
        network.to(self.device)
        self.parallel.shard(network, blocks, forward_methods=forward_methods)

    def average(self, network: nn.Module, decay: float) -> EMA:
        return EMA(network, decay)

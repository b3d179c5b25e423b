"""What a run gives its method: networks put to work on this rank, as the configuration says."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from apt.checkpoints.bundle import ModelBundle
from apt.checkpoints.info import ModelInfo
from apt.checkpoints.load import describe_model, load_model
from apt.checkpoints.lora import find_lora, load_lora
from apt.checkpoints.lora.layers import Layer
from apt.checkpoints.origin import Frozen, fill_from_origins
from apt.distributed.collectives import everywhere
from apt.distributed.parallel import Parallel
from apt.distributed.sharding import linear_layers
from apt.methods.base import Stage
from apt.models.protocols import LatentCodec
from apt.models.transformer import DiffusionTransformer
from apt.train.adapters import add_adapters
from apt.train.config import TrainConfig
from apt.train.ema import EMA
from apt.train.networks import Trained, initial_bundle, initial_codec, make_optimizer
from apt.train.objects import NO_OBJECTS, Objects


@dataclasses.dataclass(frozen=True)
class RunHost:
    """A `Host` for one run on one rank.

    Attributes:
        frozen: weights that several networks have and none trains, on one device once.
    """

    config: TrainConfig
    parallel: Parallel
    objects: Objects = NO_OBJECTS
    frozen: Frozen = dataclasses.field(default_factory=dict)

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
        return initial_bundle(self.config, self.objects, self.parallel.from_main)

    def backbone(self, field: str) -> tuple[DiffusionTransformer, ModelInfo]:
        bundle = self.objects.bundles.get(field)
        if bundle is None:
            source = self.config.stage.source(field)
            return load_model(source, device="meta"), describe_model(source)
        # Of its own: one bundle may stand for two models.
        return copy.deepcopy(bundle.backbone), bundle.info

    def codec(self) -> tuple[str, LatentCodec]:
        return initial_codec(self.config, self.objects)

    def over_ranks(self, values: Tensor) -> Tensor:
        flat = {str(i): value for i, value in enumerate(values.flatten().tolist())}
        means = self.parallel.mean(flat)
        return values.new_tensor([means[key] for key in flat]).view_as(values)

    def autocast(self) -> AbstractContextManager[object]:
        # Without the cache, in which a pass would leave a whole model's weights in bf16.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._half, cache_enabled=False
        )

    def begin(self) -> Stage:
        """The stage at work, its frozen parts on this rank's device."""
        stage = self.config.stage.begin(self)
        for part in stage.frozen:
            part.to(self.device)
        return stage

    def adapt(self, backbone: DiffusionTransformer, *, discriminator: bool = False) -> None:
        config = self.config
        backbone.set_checkpointing(config.activation_checkpointing and config.checkpointing)
        backbone.narrow_residual = config.bf16_residual
        if config.compile_blocks:
            backbone.compile_blocks(trains=True)
        if discriminator and not config.lora.discriminator:
            return
        begun: Mapping[str, Layer] = {}
        if config.lora.base and not discriminator:
            field = config.stage.start_field
            assert field is not None, "adapters are of stages that start from a model"
            begun = load_lora(find_lora(config.stage.source(field)), backbone).layers
        add_adapters(backbone, config.lora, seed=self.seed, begun=begun)

    def train(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        averaged: bool,
        learning_rate: float | None = None,
        slowed: tuple[nn.Module, float] | None = None,
        forward_methods: Sequence[str] = (),
        exact: bool = False,
    ) -> Trained:
        # The average and the optimiser follow the parameters that sharding leaves.
        self.place(network, blocks, forward_methods=forward_methods, exact=exact)
        optimizer = self.config.optimizer
        if learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=learning_rate)
        warmup = self.config.ema_warmup is True
        ema = EMA(network, self.config.ema_decay, warmup=warmup) if averaged else None
        moved_by = make_optimizer(network, optimizer, ema, slowed)
        return Trained(
            network,
            moved_by,
            optimizer,
            self.config.num_updates,
            ema,
            reduces_once=self.config.parallel.reduce_once,
        )

    def place(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        forward_methods: Sequence[str] = (),
        exact: bool = False,
    ) -> None:
        half = self._half and not exact
        network._apply(lambda t: t if t.is_meta else t.to(self.device))
        for module in network.modules():
            if isinstance(module, DiffusionTransformer):
                module.split_tokens(self.parallel.sequence)
        if half:
            _halve_frozen(blocks)
        self.parallel.shard(network, blocks, half=half, forward_methods=forward_methods)
        self.fill(network)

    def fill(self, network: nn.Module) -> None:
        """Read the weights of a network that has been sharded without any; nothing for others."""
        everywhere(partial(fill_from_origins, network, self.device, self.frozen))

    def average(self, network: nn.Module, decay: float, *, inside: nn.Module | None = None) -> EMA:
        return EMA(network, decay, inside=inside)

    @property
    def _half(self) -> bool:
        return self.config.precision == "bf16"


def _halve_frozen(blocks: Sequence[nn.Module]) -> None:
    """Let linear layers that do not train be read as bf16, which is what autocast makes of them."""
    for layer in (layer for block in blocks for layer in linear_layers(block)):
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.is_meta and not parameter.requires_grad:
                half = nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
                setattr(layer, name, half)

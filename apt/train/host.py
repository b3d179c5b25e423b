"""What a run provides to its method: networks on this rank, and micro-batches one at a time."""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import overload

import torch
from torch import Tensor, nn

from apt.checkpoints.info import ModelInfo
from apt.checkpoints.load import ModelBundle, describe_model, load_model
from apt.checkpoints.lora import find_lora, load_lora
from apt.checkpoints.lora.layers import Layer
from apt.checkpoints.origin import Frozen, fill_from_origins
from apt.condition import EncodedText
from apt.data.dataset import Batch
from apt.distributed.collectives import everywhere
from apt.distributed.parallel import Parallel
from apt.distributed.sharding import linear_layers
from apt.methods.base import MicroBatch, Stage
from apt.models.transformer import DiffusionTransformer
from apt.pixels import LatentCodec
from apt.train.adapters import add_adapters
from apt.train.config import TrainConfig
from apt.train.initial import initial_bundle, initial_codec
from apt.train.networks import EMA, Trained, make_optimizer
from apt.train.objects import NO_OBJECTS, Objects


@dataclasses.dataclass(frozen=True)
class RunHost:
    """A `Host` for one run on one rank.

    Attributes:
        config: the configuration of the run.
        parallel: the ranks.
        objects: objects that the run was given in Python.
        frozen: weights that several networks share and none trains; the device holds them once.
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
        # Copy it, because one bundle may be used for two models.
        return copy.deepcopy(bundle.backbone), bundle.info

    def codec(self) -> tuple[str, LatentCodec]:
        return initial_codec(self.config, self.objects)

    def over_ranks(self, values: Tensor) -> Tensor:
        flat = {str(i): value for i, value in enumerate(values.flatten().tolist())}
        means = self.parallel.mean(flat)
        return values.new_tensor([means[key] for key in flat]).view_as(values)

    def autocast(self) -> AbstractContextManager[object]:
        # Autocast's cache would hold a whole model's weights in bf16.
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._half, cache_enabled=False
        )

    def begin(self) -> Stage:
        """Return the stage, ready to train, with its frozen parts on this rank's device."""
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
            assert field is not None, "adapters need a stage that starts from a model"
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
        # Sharding replaces parameters, so the average and the optimiser are made after it.
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
            sharded=self.parallel.mesh is not None,
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
        """Read the weights of a network that was sharded without them; else do nothing."""
        everywhere(partial(fill_from_origins, network, self.device, self.frozen))

    def average(self, network: nn.Module, decay: float, *, inside: nn.Module | None = None) -> EMA:
        return EMA(network, decay, inside=inside)

    @property
    def _half(self) -> bool:
        return self.config.precision == "bf16"


def _halve_frozen(blocks: Sequence[nn.Module]) -> None:
    """Make frozen linear layers bf16 before they are read; autocast would cast them anyway."""
    for layer in (layer for block in blocks for layer in linear_layers(block)):
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.is_meta and not parameter.requires_grad:
                half = nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
                setattr(layer, name, half)


class MadeOneByOne(Sequence[MicroBatch]):
    """A sequence of micro-batches, each made when it is requested."""

    def __init__(self, number: int) -> None:
        self._number = number

    @abstractmethod
    def make(self, number: int) -> MicroBatch:
        """Return the micro-batch with this number, from 0."""

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        numbers = range(self._number)[index]
        if isinstance(numbers, range):
            return [self.make(number) for number in numbers]
        return self.make(numbers)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (self.make(number) for number in range(self._number))


class MicroBatches(MadeOneByOne):
    """The micro-batches of one update, each read and encoded when it is first requested.

    The parts of an update iterate over them in turn. Latents, or pixels in their original dtype,
    wait in host memory for the next part.

    Args:
        stage: provides the codec for latents, if it has one, and the device.
        read: returns the next micro-batch of the loader.
        number: number of micro-batches.
        watch: called with pixels and latents; pixels are None if latents came from a cache.
        between: called with the number of each micro-batch before it is returned.
    """

    def __init__(
        self,
        stage: Stage,
        read: Callable[[], Batch],
        number: int,
        *,
        watch: Callable[[Tensor | None, Tensor], None] | None = None,
        between: Callable[[int], None] = lambda number: None,
    ) -> None:
        super().__init__(number)
        self._stage = stage
        self._read = read
        self._watch = watch
        self._between = between
        self._kept: list[_Kept] = []

    def make(self, number: int) -> MicroBatch:
        self._between(number)
        while len(self._kept) <= number:
            self._kept.append(self._take(self._read()))
        return self._kept[number].on(self._stage.host.device)

    def skip(self) -> None:
        """Read the micro-batches not requested yet, so that the loader is at the next update."""
        for _ in range(self._number - len(self._kept)):
            self._read()

    def _take(self, batch: Batch) -> _Kept:
        codec, device = self._stage.codec, self._stage.host.device
        x = batch.latents if batch.pixels is None else batch.pixels
        assert x is not None
        pixels = None
        if batch.pixels is not None and codec is not None:
            pixels = _values(batch.pixels, device)
            x = encoded(self._stage, codec, pixels)
        if self._watch is not None and codec is not None:
            self._watch(pixels, _values(x, device))
        # A single micro-batch stays on the device, where the next part needs it.
        kept = x if self._number == 1 else _to_host(x)
        return _Kept(kept, batch.captions, batch.extra, batch.offset)


def encoded(stage: Stage, codec: LatentCodec, pixels: Tensor) -> Tensor:
    """Encode pixels to fp32 latents in the codec's own precision, also under autocast."""
    host = stage.host
    half = codec.encodes_in_autocast
    precision = host.autocast() if half else torch.autocast(host.device.type, enabled=False)
    with torch.no_grad(), precision:
        return codec.encode(pixels).float()


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A micro-batch that waits between two parts: pixels or latents, in their original dtype."""

    x: Tensor
    captions: list[str]
    extra: Mapping[str, Tensor]
    offset: int
    texts: dict[str, EncodedText] = dataclasses.field(default_factory=dict)

    def on(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            x=_values(self.x, device),
            captions=self.captions,
            extra={name: value.to(device, non_blocking=True) for name, value in self.extra.items()},
            offset=self.offset,
            texts=self.texts,
        )


def _to_host(x: Tensor) -> Tensor:
    """Copy to host memory: from a GPU to page-locked memory, for an asynchronous way back."""
    return x.cpu().pin_memory() if x.is_cuda else x


def _values(x: Tensor, device: torch.device) -> Tensor:
    """Return fp32 values on the device; bytes are pixels, and are converted there."""
    there = x.to(device, non_blocking=True)
    return there.float() / 127.5 - 1 if x.dtype == torch.uint8 else there.float()

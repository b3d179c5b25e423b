"""The networks of a run: built or loaded, put in place, sharded, and given an optimiser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.checkpoints.bundle import ModelBundle, component_info
from apt.checkpoints.info import ComponentInfo, ModelInfo, SamplingInfo
from apt.checkpoints.load import (
    describe,
    describe_model,
    load_bundle,
    load_codec,
    load_model,
    load_text_encoder,
)
from apt.distributed.parallel import FromMain, made_here
from apt.distributed.sharding import reduce_gradients
from apt.distributed.tensors import local, whole
from apt.errors import ConfigError
from apt.kernels import FusedRMSprop
from apt.methods.base import MethodConfig, MicroBatch
from apt.models.create import create_codec, create_model, create_text_encoder
from apt.models.protocols import LatentCodec, TextEncoder
from apt.train.cache_parts import cached_codec, cached_text_encoder
from apt.train.config import OptimizerConfig, TrainConfig
from apt.train.ema import EMA
from apt.train.objects import NO_OBJECTS, Objects
from apt.train.state import model_state, optimizer_state
from apt.train.witness import Rehearsed


class NonFiniteGradient(ArithmeticError):
    """Gradients are NaN or infinite, or their norm is; no weight has moved.

    Attributes:
        names: of the parameters whose gradients are, in this rank's shard.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = [
            name
            for name, p in module.named_parameters()
            if p.grad is not None and not bool(local(p.grad).isfinite().all())
        ]
        super().__init__("a gradient is NaN or infinite")


@dataclass
class Trained:
    """A network that is trained, with its optimiser and, for generators, its EMA."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    num_updates: int
    ema: EMA | None = None
    reduces_once: bool = False
    moves: int = 0
    """How often its weights began to move, in this process."""
    rehearses: bool = False
    """Whether `step` raises Rehearsed in place of moving anything."""

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def accumulated(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Micro-batches whose gradients add up, in a loop around forward and backward pass."""
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            reduce_gradients(self.module, last=last, once=self.reduces_once)
            yield batch

    def step(self, update: int) -> float:
        """Clip, move the weights and the EMA. `update` counts from 0. Returns the gradient norm.

        Raises NonFiniteGradient before anything has moved.
        """
        if self.rehearses:
            raise Rehearsed
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = gradient_norm(parameters)
        if not math.isfinite(norm):
            raise NonFiniteGradient(self.module)
        limit = self.config.max_grad_norm
        if limit:
            scale = min(1.0, limit / (norm + 1e-6))
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(update) * group["share"]
        self.moves += 1
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.module, update)
        return norm

    def rate(self, update: int) -> float:
        """The learning rate of update number `update`, from 0."""
        return learning_rate(self.config, update, self.num_updates)

    def state(self) -> dict[str, Any]:
        """Everything that training changes, as live tensors by name."""
        state: dict[str, Any] = {
            "weights": model_state(self.module),
            "optimizer": optimizer_state(self.module, self.optimizer),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state


def learning_rate(config: OptimizerConfig, update: int, num_updates: int) -> float:
    """The rate of update number `update`, from 0, of a run of `num_updates`."""
    rise = (update + 1) / max(config.warmup_updates, 1)
    fall = (num_updates - update) / max(config.decay_updates, 1)
    return config.learning_rate * min(1.0, rise, fall if config.decay_updates else 1.0)


def gradient_norm(parameters: Sequence[Tensor]) -> float:
    """The 2-norm of all gradients over all ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients)
    return whole(norm).item()


def make_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    ema: EMA | None = None,
    slowed: tuple[nn.Module, float] | None = None,
) -> torch.optim.Optimizer:
    """RMSprop (APT Sec. 3.5) or AdamW over the parameters that train.

    RMSprop also averages them, in the same pass over memory, if there is an EMA of the module of
    constant decay. `slowed` is a part of the module and the share of the rate that it trains at,
    which is `share` in its group.
    """
    part, share = slowed or (module, 1.0)
    apart = {id(p) for p in part.parameters()}
    groups: list[dict[str, Any]] = [{"params": [], "share": share}, {"params": [], "share": 1.0}]
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups[share == 1.0 or id(parameter) not in apart]["params"].append(parameter)
    chosen = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(
            chosen,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    lent = None if ema is None or ema.warmup else ema
    return FusedRMSprop(
        chosen,
        lr=config.learning_rate,
        alpha=config.alpha,
        eps=config.eps,
        ema=None if lent is None else lent.lend(module),
        ema_decay=None if lent is None else lent.decay,
    )


def initial_bundle(
    config: TrainConfig, objects: Objects = NO_OBJECTS, from_main: FromMain = made_here
) -> ModelBundle:
    """The generator that a run starts from.

    Pre-training: random weights from `config.seed`. Later stages: the model that they start from,
    whose text encoder and codec they keep, its backbone on the meta device with the `origin` of its
    weights. `objects` are in place of what they name, and `from_main` is that of several ranks.

    Raises:
        ConfigError: parts that do not fit each other, or no model to start from.
    """
    field = config.stage.start_field
    if field is None:
        return _new_bundle(config, objects)
    bundle = _started_bundle(config, objects, field, from_main)
    if config.lora.base:
        base = load_model(config.lora.base, device="meta")
        if base.config != bundle.backbone.config:
            raise ConfigError(
                f"lora.base {config.lora.base!r} is another architecture than "
                f"{config.stage.source(field)!r}; name the model that its adapters were trained on"
            )
        bundle = dataclasses.replace(bundle, backbone=base)
    return bundle


def _started_bundle(
    config: TrainConfig, objects: Objects, field: str, from_main: FromMain
) -> ModelBundle:
    cache = config.data.make_source().latent_cache()
    if field in objects.bundles:
        bundle = objects.bundles[field]
        if cache is not None:
            cached_codec(cache, bundle.info.codec)  # raises if another one made it
        return bundle
    source = config.stage.source(field)
    if cache is not None:
        return _bundle_on_cache(source, cache, from_main)
    return load_bundle(source, device="meta")


def _bundle_on_cache(source: str, cache: Path, from_main: FromMain) -> ModelBundle:
    """The model without what its latents and embeddings were made by."""
    backbone, info = load_model(source, device="meta"), describe_model(source)
    codec: LatentCodec = cached_codec(cache, info.codec)
    if info.codec.weights is not None:
        codec = load_codec(source)  # it is small, and goes into the model that comes out
    if info.text_encoder.weights is None:
        texts = cached_text_encoder(cache, info.text_encoder, from_main)
        return ModelBundle(backbone, texts, codec, info)
    return ModelBundle(backbone, load_text_encoder(source), codec, info)


def _new_bundle(config: TrainConfig, objects: Objects) -> ModelBundle:
    model, stage = config.model, config.stage
    assert isinstance(stage, MethodConfig), "only a generator is built anew"
    torch.manual_seed(config.seed)
    text_encoder, text_info = _text_encoder(config, objects)
    codec, codec_info = _codec(config, objects)
    options: dict[str, Any] = model.options
    backbone = objects.model
    if backbone is None:
        backbone = create_model(model.name, **options)
    if backbone.in_channels != codec.channels:
        raise ConfigError(
            f"model {model.name!r} takes {backbone.in_channels} channels, but codec "
            f"{codec_info.architecture!r} gives {codec.channels}; set --model.options in_channels "
            f"{codec.channels}"
        )
    if backbone.config.text_dim != text_encoder.embedding_dim:
        raise ConfigError(
            f"model {model.name!r} takes text of {backbone.config.text_dim} dimensions, but "
            f"{model.text_encoder!r} gives {text_encoder.embedding_dim}; set --model.options "
            f"text_dim {text_encoder.embedding_dim}"
        )
    info = ModelInfo(
        stage=stage.exports_as,
        model=component_info(model.name, backbone),
        text_encoder=text_info,
        codec=codec_info,
        sample=config.data.clip,
        sampling=stage.sampling(SamplingInfo(negative_prompt=config.negative_prompt or "")),
    )
    return ModelBundle(backbone, text_encoder, codec, info)


def initial_codec(config: TrainConfig, objects: Objects) -> tuple[str, LatentCodec]:
    """A codec with random weights from `config.seed`, or the given one, and its name."""
    if objects.codec is not None:
        return config.model.codec, objects.codec
    torch.manual_seed(config.seed)
    model = config.model
    return model.codec, create_codec(model.codec, **model.codec_options)


def _text_encoder(config: TrainConfig, objects: Objects) -> tuple[TextEncoder, ComponentInfo]:
    given, model = objects.text_encoder, config.model
    if given is not None:
        return given, objects.info("text_encoder", given)
    text_encoder = create_text_encoder(model.text_encoder, **model.text_encoder_options)
    return text_encoder, component_info(model.text_encoder, text_encoder)


def _codec(config: TrainConfig, objects: Objects) -> tuple[LatentCodec, ComponentInfo]:
    """The codec of a new model: one that was trained, or one without weights of its own."""
    model, source = config.model, config.stage.trained_codec()
    if objects.codec is not None:
        codec = objects.codec.requires_grad_(False).eval()
        info = objects.info("codec", codec)
    elif source:
        codec, found = load_codec(source), describe(source).codec
        info = component_info(found.architecture, codec, found.weights)
    else:
        codec = create_codec(model.codec, **model.codec_options)
        info = component_info(model.codec, codec)
        if any(parameter.requires_grad for parameter in codec.parameters()):
            raise ConfigError(
                f"codec {model.codec!r} is not trained yet: train it (`diffusion-apt train "
                "digits_codec`), and name the folder that it exported with --stage.codec"
            )
    cache = config.data.make_source().latent_cache()
    if cache is None:
        return codec, info
    cached = cached_codec(cache, info)
    return (cached if info.weights is None else codec), info

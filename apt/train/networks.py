"""The networks of a run: built or loaded, put in place, sharded, and given an optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apt.data.latents import LatentFolder
from apt.errors import ConfigError
from apt.hub import ComponentInfo, ModelInfo, SamplingInfo
from apt.kernels import FusedRMSprop
from apt.methods.base import MethodConfig
from apt.models.bundle import (
    ModelBundle,
    component_info,
    find_codec,
    load_backbone,
    load_codec,
    load_pretrained,
    load_text_encoder,
)
from apt.models.create import create_codec, create_model, create_text_encoder
from apt.models.protocols import LatentCodec
from apt.train.cached import cached_codec, cached_text_encoder
from apt.train.config import OptimizerConfig, TrainConfig
from apt.train.ema import EMA
from apt.train.state import model_state, optimizer_state


@dataclass
class Trained:
    """A network that is trained, with its optimiser and, for generators, its EMA."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    num_updates: int
    ema: EMA | None = None
    moves: int = 0
    """How often its weights began to move, in this process."""

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, update: int) -> float:
        """Clip, move the weights and the EMA. `update` counts from 0. Returns the gradient norm."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = gradient_norm(parameters)
        limit = self.config.max_grad_norm
        if limit:
            scale = min(1.0, limit / (norm + 1e-6))
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(update)
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
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def make_optimizer(
    module: nn.Module, config: OptimizerConfig, ema: EMA | None = None
) -> torch.optim.Optimizer:
    """RMSprop (APT Sec. 3.5) or AdamW over the parameters that train.

    RMSprop also averages them, in the same pass over memory, if there is an EMA of the module of
    constant decay.
    """
    chosen = [p for p in module.parameters() if p.requires_grad]
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


def initial_bundle(config: TrainConfig) -> ModelBundle:
    """The generator that a run starts from.

    Pre-training: random weights from `config.seed`. Later stages: the model that they start from,
    in fp32, whose text encoder and codec they keep.

    Raises:
        ConfigError: parts that do not fit each other, or no model to start from.
    """
    source = starts_from(config)
    if source is None:
        return _new_bundle(config)
    if config.data.source == "latents":
        return _bundle_on_cache(source, LatentFolder(config.data.path))
    return load_pretrained(source)


def _bundle_on_cache(source: str, cache: LatentFolder) -> ModelBundle:
    """The model without what its latents and embeddings were made by."""
    backbone, info = load_backbone(source)
    codec: LatentCodec = cached_codec(cache, info.codec)
    if info.codec.weights is not None:
        codec = load_codec(source)  # it is small, and goes into the model that comes out
    if info.text_encoder.weights is None:
        return ModelBundle(backbone, cached_text_encoder(cache, info.text_encoder), codec, info)
    return ModelBundle(backbone, load_text_encoder(source), codec, info)


def starts_from(config: TrainConfig) -> str | None:
    """The model whose weights the generator has at first; None for random ones.

    Raises ConfigError if the stage needs one and names none.
    """
    field = config.stage.starts_from
    return None if field is None else config.stage.source(field)


def _new_bundle(config: TrainConfig) -> ModelBundle:
    model, stage = config.model, config.stage
    assert isinstance(stage, MethodConfig), "only a generator is built anew"
    torch.manual_seed(config.seed)
    text_encoder = create_text_encoder(model.text_encoder, **model.text_encoder_options)
    codec, codec_info = _codec(config)
    options: dict[str, Any] = model.options
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
        text_encoder=component_info(model.text_encoder, text_encoder),
        codec=codec_info,
        sample=config.data.clip,
        sampling=stage.sampling(SamplingInfo(negative_prompt=config.negative_prompt)),
    )
    return ModelBundle(backbone, text_encoder, codec, info)


def initial_codec(config: TrainConfig) -> tuple[str, LatentCodec]:
    """A codec with random weights from `config.seed`, and its registered name."""
    torch.manual_seed(config.seed)
    model = config.model
    return model.codec, create_codec(model.codec, **model.codec_options)


def _codec(config: TrainConfig) -> tuple[LatentCodec, ComponentInfo]:
    """The codec of a new model: one that was trained, or one without weights of its own."""
    model, source = config.model, config.stage.trained_codec()
    if source:
        codec, info = find_codec(source)
    else:
        codec = create_codec(model.codec, **model.codec_options)
        info = component_info(model.codec, codec)
        if any(parameter.requires_grad for parameter in codec.parameters()):
            raise ConfigError(
                f"codec {model.codec!r} is not trained yet: train it (`diffusion-apt train "
                "digits_codec`), and name the folder that it exported with --stage.codec"
            )
    if config.data.source != "latents":
        return codec, info
    cached = cached_codec(LatentFolder(config.data.path), info)
    return (cached if info.weights is None else codec), info


def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole CPU tensors from a possibly sharded state; every rank must call it."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in state.items()
    }

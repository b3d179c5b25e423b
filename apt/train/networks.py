"""The networks of a run: built or loaded, put in place, sharded, and given an optimiser."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apt.data.latents import LatentFolder
from apt.errors import ConfigError
from apt.hub import ModelInfo, SampleInfo, SamplingInfo
from apt.kernels import FusedRMSprop
from apt.models.bundle import (
    ModelBundle,
    component_info,
    load_backbone,
    load_pretrained,
    load_text_encoder,
)
from apt.models.conditions import TextCondition
from apt.models.protocols import Backbone, LatentCodec
from apt.models.registry import create_codec, create_model, create_text_encoder
from apt.train.cached import cached_codec, cached_text_encoder
from apt.train.config import DistillConfig, OptimizerConfig, PretrainConfig, TrainConfig
from apt.train.ema import EMA
from apt.train.parallel import Parallel
from apt.train.state import model_state, optimizer_state


class Denoiser(nn.Module):
    """A backbone, and the text encoder if that is trained with it: one unit for FSDP and EMA."""

    def __init__(self, backbone: Backbone, text_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_encoder = text_encoder

    def forward(
        self, x: Tensor, t: Tensor, c: TextCondition, *, rows: Tensor | None = None
    ) -> Tensor:
        """The backbone's velocity."""
        return self.backbone(x, t, c, rows=rows)

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Conditions, with gradients to the trained text encoder."""
        assert self.text_encoder is not None
        return self.text_encoder(prompts)


@dataclass
class Trained:
    """A network that is trained, with its optimiser and, for generators, its EMA."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    num_updates: int
    ema: EMA | None = None

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
            group["lr"] = learning_rate(self.config, update, self.num_updates)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.module)
        return norm

    def state(self) -> dict[str, object]:
        """Everything that training changes, as live tensors by name."""
        state: dict[str, object] = {
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

    RMSprop also averages them, in the same pass over memory, if there is an EMA of the module.
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
    return FusedRMSprop(
        chosen,
        lr=config.learning_rate,
        alpha=config.alpha,
        eps=config.eps,
        ema=None if ema is None else ema.lend(module),
        ema_decay=None if ema is None else ema.decay,
    )


def initial_bundle(config: TrainConfig) -> ModelBundle:
    """The generator that a run starts from.

    Pre-training: random weights from `config.seed`. Later stages: the model that they start from,
    in fp32, whose text encoder and codec they keep.

    Raises:
        ConfigError: parts that do not fit each other, or no model to start from.
    """
    stage = config.stage
    if isinstance(stage, PretrainConfig):
        return _new_bundle(config)
    source = stage.teacher if isinstance(stage, DistillConfig) else stage.generator
    option = "stage.teacher" if isinstance(stage, DistillConfig) else "stage.generator"
    source = require_source(source, option)
    if config.data.source == "latents":
        return _bundle_on_cache(source, LatentFolder(config.data.path))
    return load_pretrained(source)


def _bundle_on_cache(source: str, cache: LatentFolder) -> ModelBundle:
    """The model without what its latents and embeddings were made by."""
    backbone, info = load_backbone(source)
    codec = cached_codec(cache, info.codec)
    if info.text_encoder.weights is None:
        return ModelBundle(backbone, cached_text_encoder(cache, info.text_encoder), codec, info)
    return ModelBundle(backbone, load_text_encoder(source), codec, info)


def require_source(source: str, option: str) -> str:
    """The model that a run starts from; ConfigError names the option if it is empty."""
    if not source:
        raise ConfigError(
            f"--{option} is empty: name the model to start from, a folder that a training run "
            "exported, a built-in name, or a Hub id"
        )
    return source


def _new_bundle(config: TrainConfig) -> ModelBundle:
    model, stage = config.model, config.stage
    assert isinstance(stage, PretrainConfig)
    torch.manual_seed(config.seed)
    text_encoder = create_text_encoder(model.text_encoder, **model.text_encoder_options)
    codec: LatentCodec = create_codec(model.codec, **model.codec_options)
    if config.data.source == "latents":
        codec = cached_codec(LatentFolder(config.data.path), component_info(model.codec, codec))
    options: dict[str, Any] = model.options
    backbone = create_model(model.name, **options)
    if backbone.in_channels != codec.channels:
        raise ConfigError(
            f"model {model.name!r} takes {backbone.in_channels} channels, but codec "
            f"{model.codec!r} gives {codec.channels}; set --model.options in_channels "
            f"{codec.channels}"
        )
    if backbone.config.text_dim != text_encoder.embedding_dim:
        raise ConfigError(
            f"model {model.name!r} takes text of {backbone.config.text_dim} dimensions, but "
            f"{model.text_encoder!r} gives {text_encoder.embedding_dim}; set --model.options "
            f"text_dim {text_encoder.embedding_dim}"
        )
    data = config.data
    info = ModelInfo(
        stage="diffusion",
        model=component_info(model.name, backbone),
        text_encoder=component_info(model.text_encoder, text_encoder),
        codec=component_info(model.codec, codec),
        sample=SampleInfo(frames=data.frames, height=data.height, width=data.width, fps=data.fps),
        sampling=SamplingInfo(
            num_steps=stage.num_steps,
            cfg_scale=stage.cfg_scale,
            negative_prompt=config.negative_prompt,
            timestep_shift=stage.sampling_shift,
        ),
    )
    return ModelBundle(backbone, text_encoder, codec, info)


def make_trained(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    config: TrainConfig,
    parallel: Parallel,
    *,
    ema_decay: float | None,
    forward_methods: Sequence[str] = (),
) -> Trained:
    """Move to the device, shard, and give an EMA and an optimiser: in this order."""
    place(module, blocks, parallel, forward_methods=forward_methods)
    ema = None if ema_decay is None else EMA(module, ema_decay)
    optimizer = make_optimizer(module, config.optimizer, ema)
    return Trained(module, optimizer, config.optimizer, config.num_updates, ema)


def place(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    parallel: Parallel,
    *,
    forward_methods: Sequence[str] = (),
) -> nn.Module:
    """Move a network to the device and shard it."""
    module.to(parallel.device)
    parallel.shard(module, blocks, forward_methods=forward_methods)
    return module


def frozen_copy(backbone: Backbone) -> Denoiser:
    """An independent copy that no gradient reaches."""
    return Denoiser(copy.deepcopy(backbone)).requires_grad_(False)


def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole CPU tensors from a possibly sharded state; every rank must call it."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in state.items()
    }

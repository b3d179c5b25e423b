"""From weights in training to a model folder that the pipeline loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.hub import SampleInfo, SamplingInfo
from apt.hub import Stage as StageName
from apt.models.bundle import ModelBundle, save_pretrained
from apt.models.lora import LoRA, merge_lora, save_lora
from apt.models.protocols import TextEncoder
from apt.models.registry import create_model, create_text_encoder
from apt.train.adapters import split_adapters
from apt.train.config import AdversarialConfig, DistillConfig, StageConfig, TrainConfig
from apt.train.networks import gather
from apt.train.parallel import Parallel
from apt.train.stage import Stage
from apt.train.state import model_state

_STAGE_NAMES: dict[type[StageConfig], StageName] = {
    DistillConfig: "consistency",
    AdversarialConfig: "apt",
}


def export(
    stage: Stage,
    parallel: Parallel,
    folder: Path,
    *,
    updates: int,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the generator as a model folder. Every rank must call it; rank 0 writes.

    Args:
        stage: whose generator it is.
        folder: where to. Adapters are merged into the weights, and written by themselves too.
        updates: done so far, for the record.
        weights: "ema" or "raw".
        dtype: of the weights in the file; None keeps fp32.
    """
    trained = stage.generator
    assert trained.ema is not None
    state = model_state(trained.module)
    if weights == "ema":
        state |= trained.ema.state_dict()
    whole = gather(state)
    if not parallel.is_main:
        return
    start = stage.start
    backbone = create_model(start.info.model.architecture, **start.info.model.config)
    assert isinstance(backbone, nn.Module)
    weights_of, adapters = split_adapters(_part(whole, "backbone."), stage.config.lora)
    backbone.load_state_dict(weights_of)
    merge_lora(backbone, LoRA(adapters, {}))
    text_encoder: TextEncoder = start.text_encoder
    text_state = _part(whole, "text_encoder.")
    if text_state:
        # A new one, because the one in training may be sharded.
        fresh = create_text_encoder(
            start.info.text_encoder.architecture, **start.info.text_encoder.config
        )
        assert isinstance(fresh, nn.Module)
        fresh.load_state_dict(text_state)
        text_encoder = fresh
    info = dataclasses.replace(
        start.info,
        stage=_STAGE_NAMES.get(type(stage.config.stage), "diffusion"),
        sample=_sample_info(stage.config),
        sampling=_sampling(stage.config, start.info.sampling),
        training=provenance(stage.config, updates, weights, start.info.training),
    )
    bundle = ModelBundle(backbone, text_encoder, start.codec, info)
    external = start.info.text_encoder.weights is None and not text_state
    save_pretrained(folder, bundle, dtype=dtype, external_text_encoder=external)
    if adapters:
        save_lora(folder, adapters)


def provenance(
    config: TrainConfig, updates: int, weights: str, before: Mapping[str, Any]
) -> dict[str, Any]:
    """What `apt.json` says of how the weights came to be, with the stages before."""
    return {
        "recipe": config.name,
        "seed": config.seed,
        "updates": updates,
        "batch_size": config.batch_size,
        "weights": weights,
        "config": dataclasses.asdict(config),
        **({"started_from": dict(before)} if before else {}),
    }


def _sample_info(config: TrainConfig) -> SampleInfo:
    data = config.data
    return SampleInfo(frames=data.frames, height=data.height, width=data.width, fps=data.fps)


def _sampling(config: TrainConfig, before: SamplingInfo) -> SamplingInfo:
    if isinstance(config.stage, (DistillConfig, AdversarialConfig)):
        # Guidance is built in, and a second step is best halfway: measured in
        # docs/results/digits_search.md.
        return dataclasses.replace(before, num_steps=1, cfg_scale=1.0, timestep_shift=1.0)
    return before


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

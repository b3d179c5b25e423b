"""Export weights in training to a folder that the pipeline or the next stage can load."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.distributed.parallel import Parallel
from apt.distributed.tensors import WholeTensors
from apt.methods.base import Outcome, Stage
from apt.train.adapters import BaseWeights, find_adapters
from apt.train.config import TrainConfig
from apt.train.networks import model_state


def save_outcome(
    stage: Stage,
    config: TrainConfig,
    parallel: Parallel,
    folder: Path,
    *,
    updates: int,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
) -> None:
    """Export what a stage trains to a folder. Collective; rank 0 writes.

    Tensors are gathered and written one at a time.

    Args:
        stage: the stage, whose generator or codec is exported.
        config: the configuration of the run.
        parallel: the ranks.
        folder: the folder to write. Adapters are merged into the weights, and also saved
            separately.
        updates: updates so far, for the record.
        weights: "ema" or "raw".
        dtype: dtype of the weights in the file; None keeps fp32.
    """
    trained = stage.generator
    assert trained.ema is not None
    state = model_state(trained.module)
    if weights == "ema":
        state |= trained.ema.state_dict()
    tensors = WholeTensors(state)
    problem: Exception | None = None
    with tensors.shown() as here:
        if here:
            try:
                stage.save(
                    folder, _outcome(trained.module, tensors, config, updates, weights, dtype)
                )
            except Exception as error:
                problem = error
    parallel.agree(problem)


def _outcome(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    config: TrainConfig,
    updates: int,
    weights: str,
    dtype: torch.dtype | None,
) -> Outcome:
    adapters = find_adapters(tensors, config.lora)
    return Outcome(
        weights=BaseWeights(network, tensors),
        adapters={name.removeprefix("backbone."): layer for name, layer in adapters.items()},
        config=config.stage,
        sample=config.data.clip,
        training=provenance(config, updates, weights),
        dtype=dtype,
    )


def provenance(config: TrainConfig, updates: int, weights: str) -> dict[str, Any]:
    """Return the record for `apt.json` of how this stage trained the weights."""
    return {
        "recipe": config.name,
        "seed": config.seed,
        "updates": updates,
        "batch_size": config.batch_size,
        "weights": weights,
        "config": dataclasses.asdict(config),
        "folders": [
            "run_dir",
            "data.path",
            "heldout.path",
            *(f"data.options.{name}" for name in config.data.make_source().names_folders),
            *(f"stage.{name}" for name in config.stage.names_folders),
        ],
        "models": [
            *(f"stage.{field}" for field in config.stage.names_models),
            *(["lora.base"] if config.lora.base else []),
        ],
    }

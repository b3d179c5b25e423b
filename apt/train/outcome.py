"""From weights in training to a folder that the pipeline, or the next stage, loads."""

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
    """Write what a stage trains as a folder. Every rank must call it; rank 0 writes.

    Weights go from the ranks to the file one at a time.

    Args:
        stage: whose generator, or codec, it is.
        config: of the run.
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
    """What `apt.json` says of how the weights came to be; not of the stages before."""
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

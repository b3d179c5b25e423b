"""Moving digits with four times the pixels and twice the frames, in minutes on one GPU.

No GPU has run it. Its lengths assume that an H100 computes at a quarter of its bf16 peak: about 60
seconds for the codec, 100 for pre-training, 40 for distillation and 60 for adversarial training,
with 15 processes that draw clips. A rehearsal on a CPU, with a hundredth of the work:

    diffusion-apt train digits_gpu --device cpu --run-dir runs/rehearsal --batch-size 4 \\
        --num-updates 4 --optimizer.warmup-updates 0 --optimizer.decay-updates 0 \\
        --data.num-workers 0 --sample-every 4 --snapshot-at
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from apt.train import recipes_digits
from apt.train.config import DataConfig, OptimizerConfig, TrainConfig
from apt.train.recipe_names import RECIPES
from apt.train.sequence import move_runs

_DATA = DataConfig(setting="large", num_workers=15)
_MODEL: dict[str, int | float | str] = {"hidden_size": 384, "depth": 8, "num_heads": 6}


@RECIPES.register("digits_gpu")
def digits_gpu() -> Sequence[TrainConfig]:
    """All four stages on 17 frames of 64x64, wider models, batch 512: minutes on one H100."""
    stages = recipes_digits.digits()
    codec, pretrain, _, apt = stages
    changes: tuple[dict[str, Any], ...] = (
        {
            "optimizer": _schedule(codec, 1e-3, decay=1000),
            "num_updates": 1800,
            "batch_size": 64,
            "sample_every": 600,
        },
        {
            "model": dataclasses.replace(pretrain.model, options=_MODEL),
            "optimizer": _schedule(pretrain, 1e-3, decay=300),
            "num_updates": 700,
            "ema_decay": 0.99,
            "sample_every": 350,
        },
        {"num_updates": 150, "sample_every": 75, "snapshot_at": (75, 150)},
        {
            "optimizer": dataclasses.replace(apt.optimizer, warmup_updates=20, decay_updates=40),
            "num_updates": 100,
            "snapshot_at": (50, 100),
        },
    )
    moved = [
        dataclasses.replace(
            stage,
            **{
                "name": stage.name.replace("digits", "digits_gpu"),
                "run_dir": "runs/digits_gpu",
                "data": _DATA,
                "batch_size": 512,
                "checkpoint_every": 1000,
                **change,
            },
        )
        for stage, change in zip(stages, changes, strict=True)
    ]
    return tuple(move_runs(moved, before=stages))


def _schedule(stage: TrainConfig, rate: float, *, decay: int) -> OptimizerConfig:
    return dataclasses.replace(stage.optimizer, learning_rate=rate, decay_updates=decay)

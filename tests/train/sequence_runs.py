"""Small runs of the three stages whose samples several ranks share; test_sequence.py starts this.

As in `small_runs.py`, every rank is forked from this process, which never computes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from apt.data.digits import MovingDigits
from apt.distributed.mesh import ParallelConfig
from apt.losses import ApproximateR2
from apt.methods.apt import AdversarialConfig
from apt.methods.terms import Terms
from apt.train.config import TrainConfig
from tests.train import small_runs
from tests.train.small_runs import STAGES, Child

UPDATES = 3
# The 2 heads do not divide four ranks.
LAYOUTS = {
    "two": ParallelConfig(sequence=2),
    "four": ParallelConfig(sequence=4),
    "two of two": ParallelConfig(sequence=2, shard=2),
    "copies": ParallelConfig(sequence=2, replicate=2),
}
QUICK = ("two",)


def config(root: Path, stage: str, name: str, **changes: Any) -> TrainConfig:
    """A small run of a stage, without rates that rounding errors grow under."""
    made = small_runs.config(root, stage, name, num_updates=UPDATES, sample_every=0, **changes)
    optimizer = dataclasses.replace(
        made.optimizer, learning_rate=1e-3, eps=1e-2, warmup_updates=0, decay_updates=0
    )
    stage_config = made.stage
    if isinstance(stage_config, AdversarialConfig):
        terms = Terms(r2=ApproximateR2(weight=50.0, sigma=0.1))
        stage_config = dataclasses.replace(stage_config, terms=terms)
    return dataclasses.replace(made, optimizer=optimizer, stage=stage_config)


def run_ranks(config: TrainConfig, layout: ParallelConfig, *, resume: bool = False) -> list[Any]:
    """Ranks in a layout, with the environment that torchrun gives them."""
    world = layout.replicate * max(layout.shard, 1) * layout.sequence
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = dataclasses.replace(config, parallel=layout)
    children = [
        Child(
            config,
            resume=resume,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    return [child.wait() for child in children]


def main(root: Path, kind: str) -> None:
    import matplotlib.figure
    import torch.utils.tensorboard  # noqa: F401

    MovingDigits(0)[0]
    matplotlib.figure.Figure().savefig(os.devnull, format="png")
    report: dict[str, list[Any]] = {}
    layouts = QUICK if kind == "quick" else tuple(LAYOUTS)
    for stage in STAGES:
        report[f"whole/{stage}"] = [Child(config(root, stage, "whole")).wait()]
        for name in layouts:
            made = config(root, stage, name)
            report[f"{name}/{stage}"] = run_ranks(made, LAYOUTS[name])
    report |= other_layouts(root, kind)
    (root / "report.json").write_text(json.dumps(report))


def other_layouts(root: Path, kind: str) -> dict[str, list[Any]]:
    """The checkpoint that two ranks wrote goes on with one, and its next with four."""
    begun, moved = (config(root, "apt", name) for name in ("two", "moved"))
    folder = Path(moved.run_dir)
    folder.parent.mkdir(parents=True)
    shutil.copytree(begun.run_dir, folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{UPDATES:08d}")
    alone = Child(moved, resume=True).wait()
    if kind == "quick":
        return {"moved/apt": [alone]}
    longer = dataclasses.replace(moved, num_updates=UPDATES + 2)
    four = run_ranks(longer, LAYOUTS["four"], resume=True)
    whole = dataclasses.replace(config(root, "apt", "longer"), num_updates=UPDATES + 2)
    return {"moved/apt": [alone, *four], "longer/apt": [Child(whole).wait()]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

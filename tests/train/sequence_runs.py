"""Small runs of the three stages whose samples several ranks share; test_sequence.py starts this.

As in `small_runs.py`, every rank is forked from this process, which never computes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch

from apt.checkpoints.save import save_bundle
from apt.data.digits import MovingDigits
from apt.distributed.mesh import ParallelConfig
from apt.losses import ApproximateR1, ApproximateR2
from apt.methods.apt import AdversarialConfig
from apt.methods.base import StageConfig
from apt.methods.consistency import DistillConfig
from apt.methods.terms import Terms
from apt.train.config import TrainConfig
from apt.train.initial import initial_bundle
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
PENALTIES = {"discriminator/approximate_r1": 100.0, "discriminator/approximate_r2": 50.0}
"""The weight of each term, by its name in the log."""


def config(root: Path, stage: str, name: str, **changes: Any) -> TrainConfig:
    """A small run of a stage, at rates at which rounding errors do not grow."""
    made = small_runs.config(root, stage, name, num_updates=UPDATES, sample_every=0, **changes)
    optimizer = dataclasses.replace(
        made.optimizer, learning_rate=1e-3, eps=1e-2, warmup_updates=0, decay_updates=0
    )
    teacher, student = str(root / "teacher"), str(root / "student")
    options: StageConfig = made.stage
    if isinstance(options, DistillConfig):
        options = dataclasses.replace(options, teacher=teacher)
    if isinstance(options, AdversarialConfig):
        r1, r2 = PENALTIES.values()
        options = dataclasses.replace(
            options,
            generator=student,
            discriminator=teacher,
            r1=ApproximateR1(weight=r1, sigma=0.1),
            terms=Terms(r2=ApproximateR2(weight=r2, sigma=0.1)),
        )
    return dataclasses.replace(made, optimizer=optimizer, stage=options)


def draw_models(root: Path) -> None:
    """Models whose velocities are of the size of real ones: new ones give zeros."""
    child = os.fork()
    if child == 0:
        bundle = initial_bundle(config(root, "pretrain", "unused"))
        for seed, name in enumerate(("teacher", "student")):
            generator = torch.Generator().manual_seed(seed)
            for parameter in bundle.backbone.parameters():
                torch.nn.init.normal_(parameter, std=0.2, generator=generator)
            save_bundle(root / name, bundle)
        os._exit(0)
    os.waitpid(child, 0)


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
    draw_models(root)
    report: dict[str, list[Any]] = {}
    for stage in STAGES if kind == "all" else ("apt",):
        report[f"whole/{stage}"] = [Child(config(root, stage, "whole")).wait()]
        for name in LAYOUTS if kind == "all" else ("two",):
            report[f"{name}/{stage}"] = run_ranks(config(root, stage, name), LAYOUTS[name])
    if kind == "all":
        report |= other_layouts(root)
    (root / "report.json").write_text(json.dumps(report))


def other_layouts(root: Path) -> dict[str, list[Any]]:
    """Continue the checkpoint of two ranks with one process, and then with four ranks."""
    begun, moved = (config(root, "apt", name) for name in ("two", "moved"))
    folder = Path(moved.run_dir)
    folder.parent.mkdir(parents=True)
    shutil.copytree(begun.run_dir, folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{UPDATES:08d}")
    alone = Child(moved, resume=True).wait()
    longer = dataclasses.replace(moved, num_updates=UPDATES + 2)
    four = run_ranks(longer, LAYOUTS["four"], resume=True)
    whole = dataclasses.replace(config(root, "apt", "longer"), num_updates=UPDATES + 2)
    return {"moved/apt": [alone, *four], "longer/apt": [Child(whole).wait()]}

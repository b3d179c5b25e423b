"""`diffusion-apt plan`: what a recipe takes on GPUs that need not be here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from apt.cli.train import parse_recipe
from apt.errors import InputError
from apt.train.config import TrainConfig

if TYPE_CHECKING:
    from apt.plan.estimate import Job


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is no field of the configuration."""

    gpus: int = 1
    """How many GPUs."""
    gpu: str = "h100"
    """Of which kind: a100, h100, h100-pcie, h200, b200, rtx4090."""
    model: str = ""
    """A registered model in place of those that the recipe starts from."""
    utilization: float = 0.4
    """The share of the GPU's peak that matrix products and attention reach; time depends on it."""
    whole: bool = False
    """Run every block of deep networks, instead of a few whose figures are multiplied."""
    compare: bool = False
    """Run an update here too, with weights of zeros, and hold the plan's memory against it: on a
    GPU torch.cuda.max_memory_allocated, on the CPU live tensors, and the collectives of several
    ranks. One GPU, or under torchrun so many as --gpus says."""


@dataclass(frozen=True, kw_only=True)
class Overview(Options):
    """Plan a recipe: diffusion-apt plan RECIPE --gpus N [--gpu h100] [--any.field value].

    `diffusion-apt list recipes` shows the recipes; `--config FILE` takes what
    `train --print-config` printed."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Its name comes first."""


@dataclass(frozen=True, kw_only=True)
class Plan(Options):
    """Plan this recipe: memory of a GPU by part, time and traffic of an update, and the layout of
    those tried that fits with the largest throughput, or what to change where none fits. Every
    field of the recipe is an option; --parallel.* fixes the layout.

    No GPU, weights or data are needed: the trainer's own networks and steps are run on tensors
    that have sizes only. It takes a minute or some."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(args: Sequence[str], *, prog: str) -> int:
    """Plan the recipe's stages, one after the other."""
    options, configs = parse_recipe(lambda config, _: Plan(config=config), Overview, args, prog)
    if options.gpus < 1:
        raise InputError(f"--gpus must be at least 1, got {options.gpus}")
    if not 0 < options.utilization <= 1:
        raise InputError(f"--utilization must be above 0 and at most 1, got {options.utilization}")

    from apt.methods.base import MethodConfig
    from apt.plan.gpus import find_gpu
    from apt.plan.plan import job_of, plan
    from apt.plan.report import report

    gpu = find_gpu(options.gpu)
    # Of stages in a row, those that train a generator; one alone is told that it cannot be planned.
    row = configs
    configs = [c for c in configs if isinstance(c.stage, MethodConfig)] or configs
    apart = ""
    for config in configs:
        job = job_of(config, options.model, row)
        if options.compare:
            text = compare(job, options.gpus)
        else:
            share = options.utilization
            choice = plan(job, options.gpus, gpu, utilization=share, whole=options.whole)
            text = report(job, choice, options.gpus)
        if text:
            print(apart + text, flush=True)
            apart = "\n\n"
    return 0


def compare(job: Job, gpus: int) -> str:
    """A table of planned and real peaks; empty on ranks other than 0."""
    from apt.distributed.parallel import Parallel
    from apt.plan.compare import compared, planned_usage
    from apt.train.resolve import rounded

    layout = job.config.parallel.layout(gpus)
    config, _ = rounded(job.config, layout.data)
    job = dataclasses.replace(job, config=config)
    # Before the ranks find each other: they are imagined in a process that is alone.
    planned = planned_usage(job, layout)
    with Parallel.from_environment(config.device, config=config.parallel) as parallel:
        if parallel.world_size != gpus:
            raise InputError(
                f"--compare runs an update on {gpus} ranks, and there are {parallel.world_size}: "
                f"torchrun --nproc-per-node {gpus} -m apt plan ..."
            )
        text = compared(planned, job, parallel)
        return text if parallel.is_main else ""

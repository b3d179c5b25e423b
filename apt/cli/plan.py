"""`diffusion-apt plan`: estimate the memory and time of a recipe on GPUs that need not be here."""

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
    """Options that are not fields of the configuration."""

    gpus: int = 1
    """Number of GPUs."""
    gpu: str = "h100"
    """Kind of GPU: a100, h100, h100-pcie, h200, b200 or rtx4090."""
    model: str = ""
    """A registered model that replaces those that the recipe starts from."""
    utilization: float = 0.4
    """Fraction of the GPU's peak that matrix products and attention reach; affects the time."""
    whole: bool = False
    """Run every block of deep networks, instead of running a few and multiplying."""
    compare: bool = False
    """Also run an update on this machine, with weights of zero, and compare its memory with the
    plan: torch.cuda.max_memory_allocated on a GPU, live tensors on the CPU, where several ranks
    also compare their collectives. With --gpus above 1, run it under torchrun with that many
    processes."""


@dataclass(frozen=True, kw_only=True)
class Overview(Options):
    """Plan a recipe: diffusion-apt plan RECIPE --gpus N [--gpu h100] [--any.field value].

    `diffusion-apt list recipes` lists the recipes. `--config FILE` reads the output of
    `train --print-config` instead."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Name of the recipe, which comes first."""


@dataclass(frozen=True, kw_only=True)
class Plan(Options):
    """Plan this recipe: the memory of each GPU by part, the time and traffic of an update, and the
    layout with the largest throughput among those that fit, or what to change if none fits. Every
    field of the recipe is an option; --parallel.* fixes the layout.

    This needs no GPU, weights or data: it runs the trainer's own networks and steps on tensors
    that have sizes only. It takes a few minutes at most."""

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
    # Among several stages, plan those with a method. A single other stage gets an error below.
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
    """Return a table of planned and measured peaks; empty on ranks other than 0."""
    from apt.distributed.parallel import Parallel
    from apt.plan.compare import compared, planned_usage
    from apt.train.resolve import rounded

    layout = job.config.parallel.layout(gpus)
    config, _ = rounded(job.config, layout.data)
    job = dataclasses.replace(job, config=config)
    # Before the ranks connect, because planning simulates all of them in a single process.
    planned = planned_usage(job, layout)
    with Parallel.from_environment(config.device, config=config.parallel) as parallel:
        if parallel.world_size != gpus:
            raise InputError(
                f"--compare runs an update on {gpus} ranks, but there are {parallel.world_size}; "
                f"use torchrun --nproc-per-node {gpus} -m apt plan ..."
            )
        text = compared(planned, job, parallel)
        return text if parallel.is_main else ""

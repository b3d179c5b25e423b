"""A run planned from its configuration: what it starts from, layouts, and the choice."""

from __future__ import annotations

import dataclasses

from apt.errors import ConfigError
from apt.methods.base import MethodConfig
from apt.plan.estimate import Estimate, Job, estimate
from apt.plan.gpus import PlannedGpu
from apt.plan.layouts import Choice, choose
from apt.plan.models import Row, find_model, is_public, new_model, registered_model, sample_size
from apt.train.config import TrainConfig
from apt.train.resolve import rounded

__all__ = ["job_of", "plan"]


def job_of(config: TrainConfig, model: str = "", row: Row = ()) -> Job:
    """What is to be trained.

    Args:
        config: of the run.
        model: registered name that stands for every model which the stage names, and for
            `lora.base`; empty takes those. What earlier stages make stays a file of its own.
        row: stages that come with it, by which what it starts from is made.

    Raises:
        ConfigError: a stage that trains a codec, or a model that is not there yet and that nobody
            makes; a size of clips that nothing tells.
        InputError: an unknown model, with close matches.
    """
    stage = config.stage
    if not isinstance(stage, MethodConfig):
        raise ConfigError(
            "plan knows the stages that train a generator, and this one trains a codec"
        )
    first = stage.start_field
    unused = {"codec", stage.starts_from if first is None else "codec"}
    fields = [name for name in stage.names_models if name not in unused]
    if model:
        named = registered_model(model)
        models = {
            name: dataclasses.replace(named, file=model if is_public(stage, name) else name)
            for name in fields
        }
    else:
        models = {name: find_model(config, name, row) for name in fields}
    if first is None:
        start = new_model(config, row)
    else:
        start = models.pop(first)
        if config.lora.base:  # whose weights the adapters lie beside, and whoever starts from it
            start = dataclasses.replace(start, file=model or config.lora.base)
            config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, base=""))
        config = dataclasses.replace(config, stage=stage.filled(start.info))
    config = dataclasses.replace(config, compile_blocks=False)  # counted op by op
    if config.precision == "auto":
        config = dataclasses.replace(config, precision="bf16")  # which all these GPUs compute in
    return Job(config, start, models, sample_size(config, start))


def plan(job: Job, ranks: int, gpu: PlannedGpu, *, utilization: float, whole: bool) -> Choice:
    """The layout for so many GPUs, measured.

    Args:
        job: what is to be trained.
        ranks: number of GPUs.
        gpu: of that kind.
        utilization: the share of the peak that matrix products and attention are assumed to reach.
        whole: run every block instead of a few.

    Raises:
        ConfigError: what the trainer would refuse.
    """
    tflops = utilization * gpu.peak_tflops

    def assess(config: TrainConfig) -> Estimate:
        layout = config.parallel.layout(ranks)
        config, _ = rounded(config, layout.data)
        usage = estimate(dataclasses.replace(job, config=config), layout, whole=whole)
        return Estimate(config, layout, usage, gpu, tflops)

    return choose(job, ranks, gpu, assess)

"""Plan a run from its configuration: find its models, try layouts, and choose one."""

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
    """Return the job to plan.

    Args:
        config: the configuration of the run.
        model: a registered name that replaces every model that the stage names, and `lora.base`;
            empty keeps them. The exports of earlier stages still count as separate files.
        row: stages planned together with this one, which may export what it starts from.

    Raises:
        ConfigError: the stage trains a codec, a model does not exist and no recipe exports it, or
            the size of clips is not set.
        InputError: the model is unknown; the message lists close matches.
    """
    stage = config.stage
    if not isinstance(stage, MethodConfig):
        raise ConfigError(
            "plan supports only stages that train a generator, and this one trains a codec; plan "
            "another stage"
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
        if config.lora.base:  # its weights are shared with other networks that start from it
            start = dataclasses.replace(start, file=model or config.lora.base)
            config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, base=""))
        config = dataclasses.replace(config, stage=stage.filled(start.info))
    config = dataclasses.replace(config, compile_blocks=False)  # ops are counted one by one
    if config.precision == "auto":
        config = dataclasses.replace(config, precision="bf16")  # supported by all these GPUs
    return Job(config, start, models, sample_size(config, start))


def plan(job: Job, ranks: int, gpu: PlannedGpu, *, utilization: float, whole: bool) -> Choice:
    """Measure layouts for a number of GPUs, and choose one.

    Args:
        job: the run.
        ranks: number of GPUs.
        gpu: the kind of GPU.
        utilization: the share of the peak that matrix products and attention are assumed to reach.
        whole: run all blocks instead of a few.

    Raises:
        ConfigError: the trainer would refuse the run.
    """
    tflops = utilization * gpu.peak_tflops

    def assess(config: TrainConfig) -> Estimate:
        layout = config.parallel.layout(ranks)
        config, _ = rounded(config, layout.data)
        usage = estimate(dataclasses.replace(job, config=config), layout, whole=whole)
        return Estimate(config, layout, usage, gpu, tflops)

    return choose(job, ranks, gpu, assess)

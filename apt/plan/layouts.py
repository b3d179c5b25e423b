"""Choose a layout for a number of GPUs: which are tried, and which is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from apt.distributed.mesh import ParallelConfig
from apt.errors import ConfigError
from apt.models.checkpointing import Checkpointing
from apt.plan.estimate import Estimate, Job
from apt.plan.gpus import PlannedGpu
from apt.plan.measure import STATES
from apt.train.config import TrainConfig

__all__ = ["Choice", "choose", "ways"]


@dataclass(frozen=True)
class Choice:
    """The layout that was chosen, and the alternatives.

    Attributes:
        taken: the fastest of the tried layouts that fit; if none fits, the one that needs least
            memory.
        tried: all layouts that were measured, in order.
        skipped: configurations that cannot fit according to other measurements, and a lower bound
            of the bytes of GPU memory that each takes.
        refused: layouts that the trainer refuses, and why.
    """

    taken: Estimate
    tried: tuple[Estimate, ...]
    refused: tuple[tuple[ParallelConfig, str], ...]
    skipped: tuple[tuple[TrainConfig, float], ...] = ()


def choose(
    job: Job, ranks: int, gpu: PlannedGpu, assess: Callable[[TrainConfig], Estimate]
) -> Choice:
    """Try layouts, from the least communication to the least memory, until one fits.

    If the configuration sets a layout (`parallel`), only that one is tried. Within each layout,
    options that save memory and leave results unchanged are tried next: D's groups in two forward
    passes, if activations are checkpointed, and, where no more ranks can share a sample, inputs of
    blocks in host memory. That one is last because nothing hides its copies. If a layout leaves
    room, attention's outputs are kept, which saves computation. A configuration that cannot fit
    according to other measurements is not measured, unless it is the last resort.

    Args:
        job: the run.
        ranks: number of GPUs.
        gpu: the kind of GPU.
        assess: measures a configuration.

    Raises:
        ConfigError: the trainer refuses all layouts; the message is the reason for the first.
    """
    tried: list[Estimate] = []
    refused: list[tuple[ParallelConfig, str]] = []
    skipped: list[tuple[TrainConfig, float]] = []
    layouts = list(_layouts(job.config, ranks, gpu))
    for number, (parallel, last) in enumerate(layouts, start=1):
        config = dataclasses.replace(job.config, parallel=parallel)
        try:
            if ranks > 1:
                config.stage.check_sharded()
            possible = list(ways(config, last=last))
            for way in possible:
                least = max((_least(found, way, ranks) for found in tried), default=0.0)
                last_resort = number == len(layouts) and way is possible[-1]
                if least > gpu.memory and not last_resort:
                    skipped.append((way, least))
                    continue
                tried.append(assess(way))
                if tried[-1].fits:
                    break
        except ConfigError as error:
            refused.append((parallel, str(error)))
            continue
        if tried and tried[-1].fits:
            faster = _with_attention_kept(tried[-1].config)
            if faster is not None and tried[-1].room_with_attention > 0:
                tried.append(assess(faster))
            break
    if not tried:
        raise ConfigError(refused[0][1])
    fitting = [found for found in tried if found.fits]
    if fitting:
        taken = max(fitting, key=lambda found: found.samples_per_second)
    else:
        taken = min(tried, key=lambda found: found.needed)
    return Choice(taken, tuple(tried), tuple(refused), tuple(skipped))


def _layouts(
    config: TrainConfig, ranks: int, gpu: PlannedGpu
) -> Iterator[tuple[ParallelConfig, bool]]:
    """Yield the layouts to try, in order, and whether no more ranks can share a sample."""
    given = config.parallel
    if given != dataclasses.replace(ParallelConfig(), reduce_once=given.reduce_once):
        given.layout(ranks)
        yield given, True
        return
    for copy in range(min(ranks, gpu.node), ranks + 1):
        if ranks % copy:
            continue
        fit = [n for n in (1, 2, 4, 8) if copy % n == 0]
        for sequence in fit:
            one = dataclasses.replace(given, replicate=ranks // copy, sequence=sequence)
            yield one, sequence == fit[-1]


def ways(config: TrainConfig, *, last: bool) -> Iterator[TrainConfig]:
    """Yield the configuration, and then variants with the same results that take less memory.

    Variants that use host memory come only with `last`: no more ranks can share a sample.
    """
    yield config
    stage: Any = config.stage
    if getattr(stage, "discriminator_forwards", 2) == 1:
        stage = dataclasses.replace(stage, discriminator_forwards=2)
        if config.activation_checkpointing:  # else both passes keep all that they made
            yield dataclasses.replace(config, stage=stage)
    if last and not config.checkpointing.offloads:
        checkpointing = Checkpointing(offloads=True)
        yield dataclasses.replace(
            config, stage=stage, activation_checkpointing=True, checkpointing=checkpointing
        )


def _least(found: Estimate, config: TrainConfig, ranks: int) -> float:
    """Return a lower bound of the GPU memory of `config`, in bytes, from the estimate `found`.

    It is 0 if the estimate implies nothing. States are divided by the ranks that share a copy, and
    everything else by those that share a sample, as if no rank held any of it whole. With D's
    groups in two forward passes, a pass has at least half of them. Tensors in host memory count 0.
    """
    mine, layout = found.layout, config.parallel.layout(ranks)
    forwards = (_forwards(found.config), _forwards(config))
    offloads = (found.config.checkpointing.offloads, config.checkpointing.offloads)
    holds_more = mine.sequence > layout.sequence or mine.states > layout.states
    if holds_more or forwards[0] > forwards[1] or offloads[0] > offloads[1]:
        return 0.0
    least = 0.0
    for name, peak in found.usage.peaks.items():
        states = sum(peak.parts[part] for part in STATES)
        rest = (peak.total - states) * mine.sequence / layout.sequence
        if name == "discriminator":
            rest *= forwards[0] / forwards[1]
        if offloads[1] > offloads[0]:
            rest = 0.0
        least = max(least, states * mine.states / layout.states + rest)
    return least + found.gpu.reserved


def _forwards(config: TrainConfig) -> int:
    """Return the number of forward passes for D's groups."""
    return int(getattr(config.stage, "discriminator_forwards", 1))


def _with_attention_kept(config: TrainConfig) -> TrainConfig | None:
    """Return the configuration with attention's outputs kept, or None if that changes nothing."""
    if not config.activation_checkpointing or config.checkpointing.saves_attention:
        return None
    kept = dataclasses.replace(config.checkpointing, saves_attention=True)
    return dataclasses.replace(config, checkpointing=kept)

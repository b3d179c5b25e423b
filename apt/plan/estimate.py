"""Estimate memory, traffic and time of a run in one layout of GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apt.checkpoints.info import SampleInfo
from apt.distributed.mesh import Layout
from apt.models.discriminator import paper_layers
from apt.plan.gpus import PlannedGpu
from apt.plan.measure import Usage, measure
from apt.plan.models import PlannedModel
from apt.plan.tracking import Collective
from apt.train.config import TrainConfig

__all__ = ["Estimate", "Job", "estimate"]

# Depths of the networks from which a deep one is extrapolated. In each, D's heads are at three
# depths.
_DEPTHS = (6, 8)


@dataclass(frozen=True)
class Job:
    """A run to be planned.

    Attributes:
        config: the configuration of the run.
        start: the model that its stage starts from.
        others: the models that other fields of the stage name, by field.
        sample: the size of clips.
    """

    config: TrainConfig
    start: PlannedModel
    others: Mapping[str, PlannedModel]
    sample: SampleInfo

    def of_depth(self, depth: int) -> Job:
        """Return the job with backbones of another depth, and D's heads moved in proportion."""

        def cut(model: PlannedModel) -> PlannedModel:
            return dataclasses.replace(model, config=dataclasses.replace(model.config, depth=depth))

        stage: Any = self.config.stage
        layers = getattr(stage, "layers", ())
        if layers:
            whole = self.depth
            scaled = sorted({max(1, round(layer * depth / whole)) for layer in layers})
            stage = dataclasses.replace(stage, layers=tuple(scaled))
        return Job(
            dataclasses.replace(self.config, stage=stage),
            cut(self.start),
            {name: cut(model) for name, model in self.others.items()},
            self.sample,
        )

    @property
    def depth(self) -> int:
        """The depth of the backbones; 0 if they differ."""
        models = [self.start, *self.others.values()]
        depths = {int(model.config.depth) for model in models}
        return depths.pop() if len(depths) == 1 else 0

    @property
    def blocks_are_alike(self) -> bool:
        """Whether the network is deep and uniform enough to extrapolate from shallow ones."""
        models = [self.start, *self.others.values()]
        return self.depth > max(_DEPTHS) and all(
            not getattr(model.config, "dual_attention_layers", ())
            and getattr(model.config, "num_dual_blocks", None) is None
            for model in models
        )

    @property
    def as_many_heads(self) -> bool:
        """Whether D keeps its number of heads at the depths used for extrapolation."""
        layers = getattr(self.config.stage, "layers", ()) or paper_layers(max(self.depth, 1))
        found = {len(layers)}
        for depth in _DEPTHS:
            of = getattr(self.of_depth(depth).config.stage, "layers", ())
            found.add(len(of or paper_layers(depth)))
        return len(found) == 1


def estimate(job: Job, layout: Layout, *, gpu: bool = True, whole: bool = False) -> Usage:
    """Return what an update takes on one rank.

    Networks of many identical blocks are run with 6 and with 8 of them, and the difference is
    extrapolated.

    Args:
        job: the run.
        layout: the layout of the ranks.
        gpu: plan for a GPU and its kernels, else for the CPU.
        whole: run all blocks instead.
    """

    def run(job: Job) -> Usage:
        return measure(job.config, layout, job.start, job.others, job.sample, gpu=gpu)

    if not whole and job.blocks_are_alike and job.as_many_heads:
        few, more = (run(job.of_depth(depth)) for depth in _DEPTHS)
        found = few.between(more, (job.depth - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0]))
        if found is not None:
            return found
    return run(job)


@dataclass(frozen=True)
class Estimate:
    """The resources and time that a run takes in one layout.

    Attributes:
        config: the run's configuration in this layout.
        layout: the layout of the ranks.
        usage: what one rank uses in an update.
        gpu: the GPU that the plan is for.
        tflops: the rate at which matrix products and attention are assumed to run.
    """

    config: TrainConfig
    layout: Layout
    usage: Usage
    gpu: PlannedGpu
    tflops: float

    @property
    def needed(self) -> float:
        """Bytes of GPU memory: tensors at their peak, plus `PlannedGpu.reserved`."""
        return self.usage.peak.total + self.gpu.reserved

    @property
    def room(self) -> float:
        """The share of the GPU's memory that stays free; below 0 if the run does not fit."""
        return 1 - self.needed / self.gpu.memory

    @property
    def room_with_attention(self) -> float:
        """An upper bound of `room` for a run that keeps attention's outputs."""
        return 1 - (self.usage.with_attention + self.gpu.reserved) / self.gpu.memory

    @property
    def fits(self) -> bool:
        return self.room >= 0

    @property
    def compute_seconds(self) -> float:
        """Computing time of an update at the assumed rate."""
        return self.usage.work.flops / (self.tflops * 1e12)

    def sent(self) -> dict[Collective, float]:
        """Return the bytes that one rank sends in an update, by kind of collective.

        A ring sends (n - 1) / n of the whole tensor in an all-gather or reduce-scatter, and twice
        as much in an all-reduce. An all-to-all sends (n - 1) / n of the rank's tensor.
        """
        found = {}
        for collective, size in self.usage.work.sent.items():
            n = max(collective.ranks, 1)
            twice = 2 if collective.kind == "all-reduce" else 1
            found[collective] = twice * size * (n - 1) / n
        return found

    def seconds_of(self, collective: Collective, size: float) -> float:
        """Return how long it takes to send `size` bytes. Neighbouring ranks fill a machine."""
        near = collective.ranks * collective.stride <= self.gpu.node
        return size / ((self.gpu.node_gb_s if near else self.gpu.network_gb_s) * 1e9)

    @property
    def waiting_seconds(self) -> float:
        """Time of collectives that cannot overlap with computation: all-to-alls between layers."""
        return sum(
            self.seconds_of(c, size) for c, size in self.sent().items() if c.kind == "all-to-all"
        )

    @property
    def hidden_seconds(self) -> float:
        """Time of collectives that overlap with computation."""
        return sum(
            self.seconds_of(c, size) for c, size in self.sent().items() if c.kind != "all-to-all"
        )

    @property
    def seconds(self) -> float:
        """Time of an update: computing or overlapped sending (the longer), plus waiting."""
        return max(self.compute_seconds, self.hidden_seconds) + self.waiting_seconds

    @property
    def samples_per_second(self) -> float:
        return self.config.batch_size / self.seconds

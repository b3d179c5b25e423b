"""A recipe in one layout of GPUs: measured, on few blocks where they are alike, and timed."""

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

# Depths of the networks that stand for a deep one. D's heads are at three depths in each.
_DEPTHS = (6, 8)


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        config: of the run.
        start: the model that its stage starts from.
        others: those of the stage's other fields.
        sample: the size of clips.
    """

    config: TrainConfig
    start: PlannedModel
    others: Mapping[str, PlannedModel]
    sample: SampleInfo

    def of_depth(self, depth: int) -> Job:
        """The same with backbones of another depth, and D's heads at the same shares of it."""

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
        """Of the backbones; 0 if they differ, or there is none."""
        models = [self.start, *self.others.values()]
        depths = {int(model.config.depth) for model in models}
        return depths.pop() if len(depths) == 1 else 0

    @property
    def blocks_are_alike(self) -> bool:
        """Whether a shallow network tells of a deep one."""
        models = [self.start, *self.others.values()]
        return self.depth > max(_DEPTHS) and all(
            not getattr(model.config, "dual_attention_layers", ())
            and getattr(model.config, "num_dual_blocks", None) is None
            for model in models
        )

    @property
    def as_many_heads(self) -> bool:
        """Whether D has as many heads at the depths that stand for its own."""
        layers = getattr(self.config.stage, "layers", ()) or paper_layers(max(self.depth, 1))
        found = {len(layers)}
        for depth in _DEPTHS:
            of = getattr(self.of_depth(depth).config.stage, "layers", ())
            found.add(len(of or paper_layers(depth)))
        return len(found) == 1


def estimate(job: Job, layout: Layout, *, gpu: bool = True, whole: bool = False) -> Usage:
    """What an update takes on one rank.

    Networks of many blocks that are all alike are run with 6 and with 8 of them, and what a block
    adds is multiplied.

    Args:
        whole: run every block all the same.
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
    """A layout, what it takes, and how long.

    Attributes:
        config: of the run, in this layout.
        layout: of the ranks.
        usage: of an update on one rank.
        gpu: that it is planned for.
        tflops: the rate at which matrix products and attention are assumed to run.
    """

    config: TrainConfig
    layout: Layout
    usage: Usage
    gpu: PlannedGpu
    tflops: float

    @property
    def needed(self) -> float:
        """Bytes of a GPU: tensors at their peak, and what is never theirs."""
        return self.usage.peak.total + self.gpu.reserved

    @property
    def room(self) -> float:
        """The share of a GPU's memory that is left; below 0 if it does not fit."""
        return 1 - self.needed / self.gpu.memory

    @property
    def room_with_attention(self) -> float:
        """The most that can be left, as `room`, if what attention gives was kept."""
        return 1 - (self.usage.with_attention + self.gpu.reserved) / self.gpu.memory

    @property
    def fits(self) -> bool:
        return self.room >= 0

    @property
    def compute_seconds(self) -> float:
        """Of an update, at the assumed rate."""
        return self.usage.work.flops / (self.tflops * 1e12)

    def sent(self) -> dict[Collective, float]:
        """Bytes that one rank sends in an update, by kind of collective.

        A ring sends (n - 1) / n of a whole tensor to gather or to scatter it, and twice that to
        sum it; an all-to-all (n - 1) / n of what a rank has.
        """
        found = {}
        for collective, size in self.usage.work.sent.items():
            n = max(collective.ranks, 1)
            twice = 2 if collective.kind == "all-reduce" else 1
            found[collective] = twice * size * (n - 1) / n
        return found

    def seconds_of(self, collective: Collective, size: float) -> float:
        """How long bytes take.

        Ranks that share a copy are neighbours, so those of one machine; copies are in others.
        """
        layout, node = self.layout, self.gpu.node
        between = collective.kind == "all-reduce" and collective.ranks == layout.replicate
        near = layout.world_size <= node or (collective.ranks <= node and not between)
        return size / ((self.gpu.node_gb_s if near else self.gpu.network_gb_s) * 1e9)

    @property
    def waiting_seconds(self) -> float:
        """Of collectives that nothing can hide: all-to-alls stand between layers."""
        return sum(
            self.seconds_of(c, size) for c, size in self.sent().items() if c.kind == "all-to-all"
        )

    @property
    def hidden_seconds(self) -> float:
        """Of those that go on beside computing."""
        return sum(
            self.seconds_of(c, size) for c, size in self.sent().items() if c.kind != "all-to-all"
        )

    @property
    def seconds(self) -> float:
        """Of an update: the longer of computing and sending, and what nothing hides."""
        return max(self.compute_seconds, self.hidden_seconds) + self.waiting_seconds

    @property
    def samples_per_second(self) -> float:
        return self.config.batch_size / self.seconds

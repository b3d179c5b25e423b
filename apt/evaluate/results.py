"""What an evaluation found, before it is put in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from apt.checkpoints.info import ModelInfo
from apt.evaluate.digits_classifier import Accuracy
from apt.evaluate.measure import Measurement, Spread, spread, summarise
from apt.evaluate.methods import Group, Method, updates_of


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row of the tables: a sampler of a model, or real clips.

    ``measurements`` has one entry per seed, and is empty if the model has not been trained.
    ``evaluations`` is of the network per sample, ``updates`` the length of the model's last stage,
    ``cfg_scale`` that of methods with guidance.
    """

    name: str
    label: str
    group: Group | str
    num_steps: int | None
    evaluations: int | None
    updates: int | None
    cfg_scale: float | None
    measurements: list[Measurement] = field(default_factory=list)

    @classmethod
    def of(
        cls, method: Method, measurements: list[Measurement], info: ModelInfo | None
    ) -> MethodResult:
        """The row of a method."""
        return cls(
            name=method.name,
            label=method.label,
            group=method.group,
            num_steps=method.num_steps,
            evaluations=method.evaluations,
            updates=None if info is None else updates_of(info),
            cfg_scale=info.sampling.cfg_scale if info is not None and method.guided else None,
            measurements=measurements,
        )

    @property
    def was_run(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.measurements)

    def summary(self) -> dict[str, Spread]:
        """Mean and spread of every figure over seeds."""
        return summarise(self.measurements)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Quality after some updates, of EMA or raw weights (APT Figure 9)."""

    weights: str
    update: int
    measurements: list[Measurement]


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """Discriminator loss against updates (APT Figure 5); the penalty is not part of it."""

    label: str
    updates: list[int]
    losses: list[float]

    def final(self) -> float:
        """Mean over the last tenth of the run."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything the report is written from."""

    seeds: tuple[int, ...]
    num_samples: int
    samples_per_caption: int
    num_heldout: int
    num_reference: int
    snapshot_samples: int
    machine: str
    precision: str
    classifier: dict[str, Accuracy]
    real: list[MethodResult]
    methods: list[MethodResult]
    curves: dict[str, LossCurve]
    progress: list[Progress]
    reference_power: list[float]

    def method(self, name: str) -> MethodResult | None:
        """The result of a method that was measured."""
        return next((m for m in self.methods if m.name == name and m.was_run), None)

    def ratio(self, name: str, other: str, figure: str) -> Spread | None:
        """Ratio of a figure of two methods, seed by seed: the seeds share captions and noise.

        A figure of 0 below the line makes the ratio infinite.
        """
        a, b = self.method(name), self.method(other)
        if a is None or b is None:
            return None
        pairs = zip(a.measurements, b.measurements, strict=True)
        values = [(getattr(x, figure), getattr(y, figure)) for x, y in pairs]
        return spread([x / y if y else math.inf for x, y in values])

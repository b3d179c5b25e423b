"""The results of an evaluation, before they are formatted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from apt.checkpoints.info import ModelInfo
from apt.evaluate.digits.classifier import Accuracy
from apt.evaluate.digits.measure import Measurement, summarise
from apt.evaluate.digits.methods import Group, Method, updates_of
from apt.evaluate.spread import Spread, spread


def trial(run: int, seed: int) -> str:
    """Return the key of a measurement: training run, counted from 1, and evaluation seed."""
    return f"run {run}, seed {seed}"


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row of the tables: a sampler of a model, or real clips.

    Attributes:
        name, label, group: of the method.
        num_steps, evaluations: sampler steps and network evaluations per sample.
        updates: length of the model's last stage.
        cfg_scale: of methods with guidance.
        measurements: by `trial`; empty if the model was not trained.
    """

    name: str
    label: str
    group: Group | str
    num_steps: int | None = None
    evaluations: int | None = None
    updates: int | None = None
    cfg_scale: float | None = None
    measurements: dict[str, Measurement] = field(default_factory=dict)

    @classmethod
    def of(
        cls, method: Method, measurements: dict[str, Measurement], info: ModelInfo
    ) -> MethodResult:
        """Build the row of a method."""
        samples = method.num_steps > 0
        return cls(
            name=method.name,
            label=method.label,
            group=method.group,
            num_steps=method.num_steps if samples else None,
            evaluations=method.evaluations if samples else None,
            updates=updates_of(info) if samples else None,
            cfg_scale=info.sampling.cfg_scale if method.guided else None,
            measurements=measurements,
        )

    def summary(self) -> dict[str, Spread]:
        """Return the mean and spread of every figure over runs and seeds."""
        return summarise(list(self.measurements.values()))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Quality of weights after `update` updates of a stage; `run` is its folder under a root."""

    run: str
    weights: str
    update: int
    measurements: dict[str, Measurement]

    def summary(self) -> dict[str, Spread]:
        """Return the mean and spread of every figure over runs and seeds."""
        return summarise(list(self.measurements.values()))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A figure of a run's log against its updates."""

    updates: list[int]
    values: list[float]

    def end(self, block: int = 10) -> Spread:
        """Return mean and spread of means over `block` updates, in the last quarter of the run."""
        last = self.values[-max(1, len(self.values) // 4) :]
        size = max(1, min(block, len(last) // 2))
        means = [sum(last[i : i + size]) / size for i in range(0, len(last) - size + 1, size)]
        return spread(means)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The time that one stage of one training run took, by its log."""

    run: int
    stage: str
    updates: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything the report is written from.

    `curves` are by run folder, then by name in the log, from the first training run that has them.
    """

    runs: int
    seeds: tuple[int, ...]
    num_samples: int
    samples_per_caption: int
    num_heldout: int
    num_reference: int
    snapshot_samples: int
    setting: str
    machine: str
    precision: str
    classifiers: dict[str, dict[str, Accuracy]]
    real: list[MethodResult]
    methods: list[MethodResult]
    curves: dict[str, dict[str, Curve]]
    snapshots: list[Snapshot]
    costs: list[Cost]
    reference_power: list[float]

    def method(self, name: str) -> MethodResult | None:
        """Return the result of a method, or None if it was not measured."""
        return next((m for m in self.methods if m.name == name), None)

    def of_run(self, run: str, weights: str = "ema") -> list[Snapshot]:
        """Return the snapshots of a run, ordered by updates."""
        found = [s for s in self.snapshots if (s.run, s.weights) == (run, weights)]
        return sorted(found, key=lambda snapshot: snapshot.update)

    def ratio(self, name: str, other: str, figure: str, judge: str | None = None) -> Spread | None:
        """Return the ratio of a figure of two methods, per trial, which share captions and noise.

        A denominator of 0 makes the ratio infinite. `judge` names an independent judge.
        """
        pairs = self._pairs(name, other, figure, judge)
        return spread([x / y if y else math.inf for x, y in pairs]) if pairs else None

    def difference(
        self, name: str, other: str, figure: str, judge: str | None = None
    ) -> Spread | None:
        """Return the difference, first minus second; otherwise as `ratio`."""
        pairs = self._pairs(name, other, figure, judge)
        return spread([x - y for x, y in pairs]) if pairs else None

    def _pairs(
        self, name: str, other: str, figure: str, judge: str | None
    ) -> list[tuple[float, float]]:
        a, b = self.method(name), self.method(other)
        if a is None or b is None:
            return []
        shared = [key for key in a.measurements if key in b.measurements]
        return [
            (x.figure(figure, judge), y.figure(figure, judge))
            for x, y in ((a.measurements[key], b.measurements[key]) for key in shared)
        ]

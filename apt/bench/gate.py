"""Gates: does a measurement meet its budget, and is it no slower than before?

A regression is a median that exceeds the median of comparable recorded runs by more than a
percentage *and* by more than an absolute floor: the percentage alone would fail on the jitter of
short kernels, the floor alone on that of long ones. Only runs of the same machine, software and
case are comparable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Literal

from apt.bench.machine import Machine
from apt.bench.records import Measurement, Record
from apt.bench.timing import median
from apt.errors import ConfigError, InputError

Outcome = Literal["passed", "failed", "not judged"]


@dataclass(frozen=True, kw_only=True)
class RegressionPolicy:
    """How much slower counts as a regression. Both limits must be exceeded.

    Attributes:
        percent: limit in percent above the median of comparable runs.
        floor_ms: limit in milliseconds above that median.
        minimum_runs: comparable runs needed for a verdict.
    """

    percent: float
    floor_ms: float
    minimum_runs: int = 1

    def __post_init__(self) -> None:
        if self.percent <= 0 or self.floor_ms <= 0 or self.minimum_runs < 1:
            raise ConfigError(
                "a regression policy needs percent > 0, floor_ms > 0 and minimum_runs >= 1, got "
                f"{self}"
            )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A figure that must be reached on a class of devices.

    Attributes:
        name: what is promised, in words.
        devices: patterns of device names; other devices are not judged.
        where: patterns that the case must match; "topic" counts as part of the case.
        metric: "median_ms", or a key of `Measurement.metrics`.
        at_least, at_most: the bound; exactly one of them.
        relative_to: changes to the case that give another measurement of the same run, such as
            {"variant": "compile"}; the bound is then a multiple of its metric. None for an
            absolute bound.
        launch_bound_ms: measurements with a shorter roofline ("floor_ms") are not judged, because
            launches dominate their time. None judges all.
        enforced: False for a goal, which is reported but fails nothing.
    """

    name: str
    devices: tuple[str, ...]
    where: Mapping[str, str]
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    relative_to: Mapping[str, str] | None = None
    launch_bound_ms: float | None = None
    enforced: bool = True

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ConfigError(f"budget {self.name!r} needs either at_least or at_most")
        if not self.devices or not self.where:
            raise ConfigError(f"budget {self.name!r} needs devices and where")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict of a gate on a measurement.

    Attributes:
        gate: the budget's name, or "no regression".
        subject: the measurement's label.
        outcome: "not judged" if there is nothing to compare with.
        text: the figures, or why there is no verdict.
        enforced: whether a failure counts.
    """

    gate: str
    subject: str
    outcome: Outcome
    text: str
    enforced: bool = True

    @property
    def fails(self) -> bool:
        """Whether this verdict makes the run fail."""
        return self.outcome == "failed" and self.enforced


@dataclass(frozen=True, kw_only=True)
class Run:
    """A measurement with its machine and topic, which decide what it can be compared with."""

    machine: Machine
    topic: str
    measurement: Measurement
    date: str = field(default="", compare=False)

    def differences(self, other: Run) -> list[str]:
        """Return the names of all fields that differ; empty if the runs are comparable."""
        mine, theirs = (
            asdict(run.machine) | {"topic": run.topic} | dict(run.measurement.case)
            for run in (self, other)
        )
        return [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]


def runs_of(records: Iterable[Record]) -> list[Run]:
    """Return every measurement of the records that a later one may be compared with."""
    return [
        Run(machine=r.machine, topic=r.topic, measurement=m, date=r.provenance.date)
        for r in records
        for m in r.measurements
        if m.status == "measured" and m.label not in r.failed
    ]


def like_runs(run: Run, archive: Iterable[Run]) -> list[Run]:
    """Return the runs of the archive that are comparable with `run`."""
    return [other for other in archive if not run.differences(other)]


def check_regression(run: Run, baselines: Sequence[Run], policy: RegressionPolicy) -> Verdict:
    """Judge whether `run` is slower than the median of its baselines, beyond both limits.

    Raises:
        InputError: if a baseline is not comparable, with what differs, or `run` was not measured.
    """
    if run.measurement.status != "measured":
        raise InputError(f"{run.measurement.label} was not measured: {run.measurement.reason}")
    for baseline in baselines:
        different = run.differences(baseline)
        if different:
            raise InputError(
                f"{run.measurement.label} cannot be compared with the run of {baseline.date}: "
                f"{', '.join(different)} differ"
            )
    subject, gate = run.measurement.label, "no regression"
    if len(baselines) < policy.minimum_runs:
        text = f"{len(baselines)} comparable runs recorded, {policy.minimum_runs} needed"
        return Verdict(gate=gate, subject=subject, outcome="not judged", text=text)
    before = median([baseline.measurement.median_ms for baseline in baselines])
    now = run.measurement.median_ms
    slower, percent = now - before, 100 * (now / before - 1)
    failed = slower > policy.floor_ms and percent > policy.percent
    text = (
        f"{now:.4g} ms against {before:.4g} ms of {len(baselines)} comparable runs "
        f"({percent:+.1f} %; fails above both +{policy.percent:g} % and +{policy.floor_ms:g} ms)"
    )
    return Verdict(gate=gate, subject=subject, outcome="failed" if failed else "passed", text=text)


def check_budget(budget: Budget, run: Run, beside: Sequence[Run]) -> Verdict | None:
    """Judge whether `run` meets a budget; None if the budget does not apply to it.

    Args:
        budget: the budget.
        run: the measurement to judge.
        beside: all measurements of the same run, among them those that relative bounds refer to.

    Raises:
        ConfigError: if the measurement does not have the budget's metric.
    """
    case = {"topic": run.topic, **run.measurement.case}
    about = all(fnmatch(str(case.get(key, "")), pattern) for key, pattern in budget.where.items())
    if not about or run.measurement.status == "skipped":
        return None

    def verdict(outcome: Outcome, text: str) -> Verdict:
        return Verdict(
            gate=budget.name,
            subject=run.measurement.label,
            outcome=outcome,
            text=text,
            enforced=budget.enforced,
        )

    if not any(fnmatch(run.machine.device, pattern) for pattern in budget.devices):
        return verdict("not judged", f"for {', '.join(budget.devices)}; not {run.machine.device}")
    if run.measurement.status == "wrong":
        return verdict("failed", run.measurement.reason)
    if budget.launch_bound_ms is not None:
        floor = _metric(budget, run, "floor_ms")
        if floor < budget.launch_bound_ms:
            short = f"launch-bound: roofline below {budget.launch_bound_ms:g} ms"
            return verdict("not judged", short)
    value, unit = _metric(budget, run, budget.metric), ""
    if budget.relative_to is not None:
        wanted = {**run.measurement.case, **budget.relative_to}
        others = [o for o in beside if o.measurement.case == wanted]
        if not others or others[0].measurement.status != "measured":
            return verdict("not judged", f"{dict(budget.relative_to)} was not measured with it")
        value /= _metric(budget, others[0], budget.metric)
        unit = f" times that of {', '.join(budget.relative_to.values())}"
    if budget.at_least is not None:
        kept, bound = value >= budget.at_least, f"at least {budget.at_least:g}"
    else:
        assert budget.at_most is not None
        kept, bound = value <= budget.at_most, f"at most {budget.at_most:g}"
    return verdict("passed" if kept else "failed", f"{budget.metric} {value:.4g}, {bound}{unit}")


def check_record(
    record: Record,
    archive: Sequence[Record],
    budgets: Sequence[Budget],
    policies: Mapping[str, RegressionPolicy],
) -> list[Verdict]:
    """Return all verdicts on a record: budgets, and regressions against the archive.

    Args:
        record: the record to judge.
        archive: earlier records.
        budgets: all budgets; those that do not apply are ignored.
        policies: regression policies by kind of device.

    Raises:
        ConfigError: if there is no policy for the record's kind of device.
    """
    if record.machine.kind not in policies:
        raise ConfigError(
            f"no regression policy for {record.machine.kind!r}; there are: {', '.join(policies)}"
        )
    policy, known = policies[record.machine.kind], runs_of(archive)
    runs = [
        Run(machine=record.machine, topic=record.topic, measurement=m) for m in record.measurements
    ]
    verdicts = [check_budget(budget, run, runs) for budget in budgets for run in runs]
    return [v for v in verdicts if v is not None] + [
        check_regression(run, like_runs(run, known), policy)
        for run in runs
        if run.measurement.status == "measured"
    ]


def _metric(budget: Budget, run: Run, name: str) -> float:
    if name == "median_ms":
        return run.measurement.median_ms
    if name not in run.measurement.metrics:
        raise ConfigError(
            f"budget {budget.name!r}: no metric {name!r} in {run.measurement.label}; "
            f"there are: median_ms, {', '.join(run.measurement.metrics)}"
        )
    return run.measurement.metrics[name]

"""The summary of a GPU run: one short table, with the most important lines last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from apt.bench.records import Measurement
from apt.bench.tables import format_table, milliseconds, real_time

Row = tuple[str, str, str]


@dataclass
class TestCounts:
    """Outcomes of a run of tests."""

    __test__ = False  # pytest must not collect it

    collected: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def __str__(self) -> str:
        parts = [f"{number} {outcome}" for outcome, number in sorted(self.outcomes.items())]
        return f"{', '.join(parts) or 'none ran'}, of {self.collected}"


def summary_table(
    checks: Mapping[str, str], measurements: Mapping[str, Sequence[Measurement]]
) -> str:
    """Return the table, least important lines first: a terminal shows its end.

    Args:
        checks: results of the tests and the sanitizer.
        measurements: measurements by topic, in the order in which they were taken.
    """
    rows: list[Row] = [(name, said, "") for name, said in checks.items()]
    for topic in ("encoders", "training"):
        rows += [_plain_row(m) for m in measurements.get(topic, ())]
    rows += reversed(list(_op_rows(measurements.get("kernels", ()))))
    rows += reversed([_network_row(m) for m in measurements.get("dit", ())])
    return format_table(("what", "measured", "details"), rows, left=3)


def _plain_row(m: Measurement) -> Row:
    beside = ", ".join(
        f"{name} {m.metrics[name]:.4g}"
        for name in ("deviation", "samples_per_s", "frames_per_s", "peak_gb", "updates")
        if m.metrics.get(name)
    )
    return m.label, _time(m), beside


def _network_row(m: Measurement) -> Row:
    if m.status != "measured":
        return m.label, _time(m), ""
    beside = f"{m.metrics['share_of_floor']:.0%} of the floor"
    return m.label, _time(m), beside + (f", {real_time(m)} of real time" if real_time(m) else "")


def _op_rows(measurements: Iterable[Measurement]) -> Iterator[Row]:
    """Yield a row for each case: our kernel, and the fastest of the others."""
    cases: dict[str, list[Measurement]] = {}
    for m in measurements:
        name = " ".join(str(m.case[key]) for key in ("op", "shape", "direction"))
        cases.setdefault(name, []).append(m)
    for name, found in cases.items():
        ours = [m for m in found if m.case["variant"] == "triton"]
        others = [m for m in found if m.status == "measured" and m not in ours]
        best = min(others, key=lambda m: m.median_ms, default=None)
        beside = f"{best.case['variant']} {_time(best)}" if best else ""
        if ours and ours[0].status == "measured":
            share = f" ({ours[0].metrics['share_of_copy']:.0%} of copy)"
            yield name, _time(ours[0]) + share, beside
        else:
            yield name, _time(ours[0]) if ours else "no kernel of ours", beside


def _time(m: Measurement) -> str:
    if m.status == "measured":
        return f"{milliseconds(m.median_ms)} ms"
    return f"{m.status}: {m.reason[:70]}"

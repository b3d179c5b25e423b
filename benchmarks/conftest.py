"""What the benchmark suites share: the device, its ceilings, and what becomes of measurements.

Variants are timed in turns by `apt.bench`; pytest-benchmark gets those samples through a clock that
replays them, and does the statistics and the comparison it is known for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from apt.bench.records import Measurement
from benchmarks.archive import RESULTS, Judged, judge
from benchmarks.session import REPLAY_CLOCK, Bench, Replay

JUDGED = pytest.StashKey[list[Judged]]()
PAGES = pytest.StashKey[list[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("apt benchmarks")
    group.addoption(
        "--quick",
        action="store_true",
        help="few rounds, small shapes, nothing compiled: does the harness work?",
    )
    group.addoption(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder for records (default: benchmarks/results); --quick writes none without it",
    )


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Measured ceilings of the device; after the last test, records and gates."""
    config = request.config
    bench = Bench(quick=config.getoption("--quick"))
    yield bench
    folder: Path = config.getoption("--results")
    keep = not bench.quick or folder != RESULTS
    judged = [
        judge(topic, measurements, bench.ceilings, bench.device)
        for topic, measurements in bench.measurements.items()
    ]
    config.stash[JUDGED] = judged
    config.stash[PAGES] = [one.write(folder) for one in judged] if keep else []
    failed = [name for one in judged for name in one.record.failed]
    assert not failed, f"gates failed: {', '.join(failed)}"


@pytest.fixture
def replay(benchmark: BenchmarkFixture) -> Replay:
    """Hand a measurement's samples to pytest-benchmark, or skip or fail with its reason."""

    def show(measurement: Measurement) -> None:
        if measurement.status == "skipped":
            pytest.skip(measurement.reason)
        assert measurement.status == "measured", measurement.reason
        samples = iter(measurement.samples_ms)

        def advance() -> None:
            REPLAY_CLOCK.now += next(samples) / 1e3

        benchmark.extra_info |= dict(measurement.case) | dict(measurement.metrics)
        benchmark.pedantic(advance, rounds=len(measurement.samples_ms))

    return show


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for one in config.stash.get(JUDGED, []):
        terminalreporter.section(one.record.topic)
        terminalreporter.write_line(one.report())
    for page in config.stash.get(PAGES, []):
        terminalreporter.write_line(f"recorded: {page.name}")

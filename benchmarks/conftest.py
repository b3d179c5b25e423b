"""Shared by the benchmark suites: the device, its ceilings, and the records of measurements.

`apt.bench` times variants in turns. pytest-benchmark gets those samples through a clock that
replays them, and does its usual statistics and comparisons.
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
        help="test the harness: few rounds, small shapes, nothing compiled",
    )
    group.addoption(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder for records (default: benchmarks/results; with --quick, none are written)",
    )


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Measure the device's ceilings; after the last test, write records and check gates."""
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
    """Give a measurement's samples to pytest-benchmark, or skip or fail with its reason."""

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
